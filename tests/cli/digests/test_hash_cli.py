"""--hash header as users meet it: commands that write checkpoints, recipes, and what later commands say of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from vlm_pairs import Pair

from surgery.cli.operation import command_function
from surgery.ops.table import OPS
from surgery.store import cache
from surgery.store.checkpoint import Checkpoint, open_checkpoint

Run = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("own_cache")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(tiny_dit: Path, tmp_path: Path) -> Path:
    """A model from elsewhere, called `base` in the current folder."""
    shutil.copytree(tiny_dit, tmp_path / "base")
    (tmp_path / "base" / "surgery.json").unlink()
    return tmp_path / "base"


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """To hash a tensor of a checkpoint is a failure."""
    monkeypatch.setattr(Checkpoint, "hash_tensor", lambda self, ref, **_: pytest.fail(f"{ref.name} was hashed"))


def record(folder: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "surgery.json").read_text())
    return found


def ok(ended: Any) -> Any:
    assert ended.code == 0, ended.stderr
    return ended


# One operation


def test_every_command_that_writes_a_checkpoint_has_the_option() -> None:
    import inspect

    for name in OPS:
        assert "hash" in inspect.signature(command_function(name, "")).parameters, name


@pytest.mark.usefixtures("unread")
def test_a_merge_without_digests_has_the_same_files(command: Run, pair: Pair, tmp_path: Path) -> None:
    ended = ok(command("merge", pair.host, pair.donor, "--layers", "1-3", "--hash", "header", "-o", "m"))
    count = len(record("m")["tensors"])
    assert f"{count} of {count} tensors have no digest (--hash header)" in ended.stderr
    told = record("m")["parents"]
    assert all(row["digest"].startswith("unhashed:") for row in told.values()) and len(told) == 2


def test_the_bytes_do_not_depend_on_the_option(command: Run, pair: Pair, tmp_path: Path) -> None:
    ok(command("merge", pair.host, pair.donor, "--layers", "1-3", "--hash", "header", "-o", "m"))
    ok(command("merge", pair.host, pair.donor, "--layers", "1-3", "-o", "full"))
    files = [f.name for f in (tmp_path / "full").iterdir() if f.name != "surgery.json"]
    assert all((tmp_path / "m" / f).read_bytes() == (tmp_path / "full" / f).read_bytes() for f in files)


def test_json_says_how_many_have_no_digest(command: Run, base: Path) -> None:
    shown = json.loads(command("cast", "base", "--dtype", "bf16", "--hash", "header", "--json").stdout)
    assert shown["undigested"] == len(record(shown["path"])["tensors"]) and shown["digest"].startswith("unhashed:")
    assert json.loads(command("cast", "base", "--dtype", "fp16", "--json").stdout)["undigested"] == 0


@pytest.mark.parametrize("words", [("cast", "base", "--dtype", "bf16"), ("run", "r.yaml"), ("plan", "r.yaml")])
def test_another_word_is_refused(command: Run, base: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    ended = command(*words, "--hash", "none")
    assert ended.code == 2 and ended.stderr == "error[usage.bad-option]: --hash none: unknown\nhint: full or header\n"


def test_an_emitted_recipe_is_the_same_and_says_where_the_option_goes(command: Run, base: Path) -> None:
    plain = command("cast", "base", "--dtype", "bf16", "--emit-recipe")
    ended = ok(command("cast", "base", "--dtype", "bf16", "--hash", "header", "--emit-recipe"))
    assert ended.stdout == plain.stdout and "--hash is said to surgery run" in ended.stderr and not plain.stderr


# What later commands say


@pytest.fixture
def bare(command: Run, base: Path, tmp_path: Path) -> Path:
    """`bare`: a result without digests, of a parent that nobody hashed."""
    ok(command("cast", "base", "--dtype", "bf16", "--hash", "header", "-o", "bare", "-q"))
    return tmp_path / "bare"


def test_verify_says_how_many_it_could_not_check(command: Run, bare: Path) -> None:
    count = len(record(bare)["tensors"])
    ended = ok(command("verify", "bare"))
    assert f"0 of {count} tensors and every file match the record; {count} tensors have no digest" in ended.stdout
    shown = json.loads(command("verify", "bare", "--json").stdout)
    assert (shown["ok"], shown["tensors"], shown["undigested"]) == (True, count, count)


def test_log_and_inspect_say_so(command: Run, bare: Path) -> None:
    count = len(record(bare)["tensors"])
    told = ok(command("log", "bare")).stdout
    assert "digest unhashed:" in told and f"{count} of {count} tensors were never digested" in told
    assert "unhashed:" in ok(command("log", "bare", "--dot")).stdout
    shown = ok(command("inspect", "bare"))
    assert f"its record has no digest of {count} tensors" in shown.stdout
    assert f"digest      sha256:{open_checkpoint(bare).digest}" in shown.stdout


def test_diff_reads_what_was_not_digested(command: Run, bare: Path) -> None:
    ok(command("cast", "base", "--dtype", "bf16", "-o", "full", "-q"))
    assert ok(command("diff", "bare", "full")).code == 0
    assert command("diff", "bare", "base").code == 1


def test_replay_compares_with_what_lies_there(command: Run, bare: Path) -> None:
    count = len(record(bare)["tensors"])
    ended = ok(command("replay", "bare", "--to", "again"))
    assert f"the same: {count} tensors" in ended.stderr
    assert f"({count} of them, never digested, as they lie there)" in ended.stderr
    assert record("again")["digest"] == f"sha256:{open_checkpoint(bare).digest}"


def test_replay_finds_a_bit_that_no_record_speaks_of(command: Run, bare: Path) -> None:
    raw = bytearray((bare / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (bare / WEIGHTS).write_bytes(raw)
    ended = command("replay", "bare", "--to", "again")
    assert ended.code == 1 and "tensors that were never digested may have been altered since" in ended.stderr
    assert "beside its parents" not in ended.stderr


def test_a_parent_that_was_never_digested_is_taken_by_itself_or_at_the_user_s_word(
    command: Run, bare: Path, base: Path, tmp_path: Path
) -> None:
    tensors = load_file(base / WEIGHTS)
    shutil.move(base, tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", base)  # equal, but who knows?
    ended = command("replay", "bare", "--to", "again")
    assert ended.code == 3 and "was never digested and may be another" in ended.stderr
    assert "hint: say where it is: --parent base=PATH" in ended.stderr
    said = ok(command("replay", "bare", "--to", "again", "--parent", "base=base"))
    assert "that it is the one of then is your word" in said.stderr
    save_file({n: t for n, t in tensors.items() if n != "proj_out_1.bias"}, base / WEIGHTS)
    other = command("replay", "bare", "--to", "more", "--parent", "base=base")
    assert other.code == 3 and "has other files than it had" in other.stderr
    # The very folder, where it was: nobody need say anything.
    shutil.rmtree(base)
    shutil.move(tmp_path / "moved", base)
    assert "your word" not in ok(command("replay", "bare", "--to", "third")).stderr


def test_a_lost_parent_without_digests_is_rebuilt_from_its_record(command: Run, bare: Path, tmp_path: Path) -> None:
    ok(command("slice", "bare", "--layers", "0-3", "--hash", "header", "-o", "child", "-q"))
    kept = record("child")["tensors"].keys()
    shutil.move(bare, tmp_path / "elsewhere")
    assert command("replay", "child", "--to", "again").code == 3
    ended = ok(command("replay", "child", "--to", "again", "--deep"))
    assert f"the same: {len(kept)} tensors" in ended.stderr


def test_a_patch_is_checked_as_far_as_it_can_be(command: Run, tiny_llava: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llava, tmp_path / "vlm")
    numbers = ("--alpha1", "0.5", "--alpha2", "1.5", "--beta", "0.3")
    attach = ("adaptvis", "attach", "vlm", *numbers, "--hash", "header", "-o", "av", "-q")
    ok(command(*attach))
    ended = ok(command("adaptvis", "verify", "av", "--files-only"))
    assert "code and patch are what was attached" in ended.stdout and "never digested" in ended.stderr


# Recipes

RECIPE = """
surgery: 1
inputs: {base: base}
steps:
  deep: {op: slice, from: base, with: {layers: "0-4,1-5"}}
  half: {op: cast, from: deep, with: {dtype: bf16}}
outputs: {half: half}
"""
SHARED = RECIPE.replace("outputs: {half: half}", "  full: {op: cast, from: deep, with: {dtype: fp16}}\n") + (
    "outputs: {half: half, full: full}\n"
)


@pytest.mark.usefixtures("unread")
def test_a_recipe_is_planned_and_run_without_hashing(command: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    ok(command("plan", "r.yaml", "--hash", "header"))
    shown = json.loads(ok(command("run", "r.yaml", "--hash", "header", "--json")).stdout)["half"]
    count = len(record("half")["tensors"])
    assert shown["undigested"] == count and shown["digest"].startswith("unhashed:")
    (own,) = record("half")["ancestors"].values()
    assert own["parents"]["base"]["digest"].startswith("unhashed:") and own["tensors"] == {}
    again = ok(command("run", "r.yaml", "--hash", "header"))
    assert "already the result of this recipe" in again.stderr


def test_a_result_without_digests_is_no_equal_result(command: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert open_checkpoint(base).digest  # known, so that keys are equal with and without
    ok(command("run", "r.yaml", "--hash", "header"))
    key = record("half")["steps"][-1]["key"].removeprefix("sha256:")
    assert cache.recall(key) is None
    assert "its result was not digested" in ok(command("plan", "r.yaml", "-o", "other")).stdout
    shown = json.loads(ok(command("run", "r.yaml", "-o", "other", "--json")).stdout)["half"]
    assert not shown["found"] and shown["undigested"] == 0 and cache.recall(key) is not None
    taken = json.loads(ok(command("run", "r.yaml", "-o", "third", "--hash", "header", "--json")).stdout)["half"]
    assert taken["source"] == str(tmp_path / "other") and taken["undigested"] == 0
    refused = command("run", "r.yaml")
    assert refused.code == 4 and refused.stderr.startswith("error[output.undigested]: half: is this result")
    assert "hint: --hash header takes it as it is, --overwrite makes it with digests" in refused.stderr
    # What lies where an equal result was remembered is looked at, not trusted.
    ok(command("run", "r.yaml", "-o", "other", "--hash", "header", "--overwrite"))
    shown = json.loads(ok(command("run", "r.yaml", "-o", "fourth", "--json")).stdout)["half"]
    assert shown["undigested"] == 0


def test_a_result_whose_digests_are_a_record_s_word_is_not_remembered(
    command: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(command("slice", "base", "--layers", "0-4", "-o", "short", "-q"))
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "elsewhere"))
    text = "surgery: 1\ninputs: {short: short}\nsteps:\n  out: {op: slice, from: short, with: {layers: 0-3}}\n"
    (tmp_path / "r.yaml").write_text(text)
    for out in ("a", "b"):
        ok(command("run", "r.yaml", "--hash", "header", "-o", out))
        assert record(out)["digest"].startswith("sha256:") and record(out)["undigested"]["claimed"]
        key = record(out)["steps"][-1]["key"].removeprefix("sha256:")
        assert cache.recall(key) is None
    assert "'short' is another, or was digested once and once not" in ok(command("plan", "r.yaml", "-o", "c")).stdout
    ok(command("run", "r.yaml", "-o", "c"))
    assert "undigested" not in record("c") and record("c")["digest"] == record("a")["digest"]


def test_steps_that_go_to_the_cache_are_digested(command: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(SHARED)
    shown = json.loads(ok(command("run", "r.yaml", "--hash", "header", "--json")).stdout)
    assert all(row["undigested"] for row in shown.values())
    (node,) = cache.entries()
    assert node.record is not None and node.record["digest"].startswith("sha256:")
    assert ok(command("cache", "verify")).stdout == "1 results checked, 0 dropped\n"
    (parent,) = record("half")["parents"].values()
    assert parent["digest"] == node.record["digest"]
    assert "cached" in ok(command("plan", "r.yaml", "-o", "x", "--hash", "header")).stdout


def test_an_output_that_another_step_reads(command: Run, base: Path, tmp_path: Path) -> None:
    both = RECIPE.replace("outputs: {half: half}", "outputs: {deep: deep, half: half}")
    (tmp_path / "r.yaml").write_text(both)
    ok(command("run", "r.yaml", "--hash", "header"))
    (parent,) = record("half")["parents"].values()
    assert parent["digest"].startswith("unhashed:") and parent["lineage"] == record("deep")["record"]
    again = json.loads(ok(command("run", "r.yaml", "--hash", "header", "--json")).stdout)
    assert all(row["found"] for row in again.values())
    assert ok(command("verify", "half")).code == 0


def test_a_mergekit_file_of_several_documents(command: Run, pair: Pair, tmp_path: Path) -> None:
    text = (
        f"name: one\nmerge_method: linear\nmodels:\n  - {{model: {pair.base}, parameters: {{weight: 0.5}}}}\n"
        f"  - {{model: {pair.donor}, parameters: {{weight: 0.5}}}}\n---\nname: two\nmerge_method: linear\nmodels:\n"
        f"  - {{model: one, parameters: {{weight: 0.5}}}}\n  - {{model: {pair.donor}, parameters: {{weight: 0.5}}}}\n"
    )
    (tmp_path / "m.yml").write_text(text)
    ok(command("merge", "--config", "m.yml", "--hash", "header", "-o", "out"))
    assert record("out")["digest"].startswith("unhashed:")
