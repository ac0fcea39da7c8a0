"""`surgery merge` as a user types it: layers, output, errors, safety."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_pairs
from safetensors.torch import load_file, save_file
from vlm_pairs import Pair

from surgery.arch.layers import parse_spans
from surgery.errors import UsageError

Command = Callable[..., Any]


@pytest.fixture
def copy(pair: Pair, tmp_path: Path) -> Pair:
    """The same models, to be damaged."""
    for name in ("host", "donor", "base"):
        shutil.copytree(getattr(pair, name), tmp_path / name)
    return Pair(tmp_path / "host", tmp_path / "donor", tmp_path / "base")


def edit(folder: Path, *path: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def changed(a: Path, b: Path) -> set[str]:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return {n for n in one if not torch.equal(one[n].view(torch.uint8), two[n].view(torch.uint8))}


def test_layers_include_both_ends_and_nothing_else_changes(pair: Pair, command: Command, tmp_path: Path) -> None:
    ended = command("merge", pair.host, pair.donor, "--layers", "1-2", "-o", "out")
    assert ended.code == 0 and ended.stdout == "out\n"
    assert "host 0.9 / donor 0.1" in ended.stderr and "layers   1-2  (2 of 4)" in ended.stderr
    names = changed(pair.host, tmp_path / "out")
    assert names and all(
        n.startswith(("language_model.model.layers.1.", "language_model.model.layers.2.")) for n in names
    )
    assert command("verify", "out").code == 0
    assert command("replay", "out", "--to", "again").code == 0


def test_fast_numbers_are_a_choice_that_the_record_names(pair: Pair, command: Command, tmp_path: Path) -> None:
    for number, name in ((1, "fast"), (2, "fast-again")):
        ended = command(
            "merge", pair.host, pair.donor, "--numerics", "fast", "--workers", number, "-q", "-o", name
        )  # fmt: skip
        assert ended.code == 0
    assert not changed(tmp_path / "fast", tmp_path / "fast-again")
    assert changed(pair.host, tmp_path / "fast")
    (step,) = json.loads((tmp_path / "fast" / "surgery.json").read_text())["steps"]
    assert step["params"]["numerics"] == "fast"
    ended = command("merge", pair.host, pair.donor, "--numerics", "fast", "--rounding", "stochastic", "-o", "no")
    assert ended.code == 2 and "--numerics fast" in ended.stderr and not (tmp_path / "no").exists()


def test_all_of_the_host_is_equal_to_it(pair: Pair, command: Command) -> None:
    assert command("merge", pair.host, pair.donor, "--alpha", "1", "-o", "out").code == 0
    ended = command("diff", pair.host, "out")
    assert ended.code == 0 and "every byte" in ended.stdout


def test_without_a_name_the_same_command_finds_its_result(pair: Pair, command: Command, tmp_path: Path) -> None:
    first = command("merge", pair.host, pair.donor, "-q")
    again = command("merge", pair.host, pair.donor)
    assert first.stdout == again.stdout and first.stdout.startswith("host-merge-") and "already done" in again.stderr


def test_groups_are_left_out_and_taken_in(pair: Pair, command: Command, tmp_path: Path) -> None:
    command(
        "merge", pair.host, pair.donor, "--layers", "2-", "--exclude", "mlp", "--include", "final-norm", "-o", "out"
    )
    names = changed(pair.host, tmp_path / "out")
    assert not any(".mlp." in n for n in names) and "language_model.model.norm.weight" in names
    assert {n.split(".")[3] for n in names if ".layers." in n} == {"2", "3"}
    ended = command("merge", pair.host, pair.donor, "--exclude", "mpl", "-o", "none")
    assert ended.code == 2 and "groups are attn, mlp" in ended.stderr


def test_a_gradient_runs_over_the_selected_layers(pair: Pair, command: Command) -> None:
    ended = command("merge", pair.host, pair.donor, "--layers", "1-3", "--alpha", "1.0,0.8,0.6", "--dry-run", "--json")
    weights = json.loads(ended.stdout)["weights"]
    assert [(w["layers"], w["host"]) for w in weights] == [([1], 1.0), ([2], 0.8), ([3], 0.6)]
    Path("shares.yml").write_text("layers: {2: 0.95}\ndefault: 0.5\n")
    ended = command("merge", pair.host, pair.donor, "--alpha", "@shares.yml", "-o", "out", "--json")
    found = json.loads(ended.stdout)
    assert [(w["layers"], w["host"]) for w in found["plan"]["weights"]] == [([0, 1], 0.5), ([2], 0.95), ([3], 0.5)]
    assert len(found["measured"]["layers"]) == 5
    assert "shares.yml" not in Path("out/surgery.json").read_text()


def test_a_small_change_is_warned_of_and_other_roundings_keep_it(pair: Pair, command: Command) -> None:
    ended = command("merge", pair.host, pair.donor, "--alpha", "0.999", "-o", "out")
    assert "less than 80 % of the intended change arrives" in ended.stderr
    ended = command("merge", pair.host, pair.donor, "--alpha", "0.999", "--rounding", "stochastic", "-o", "b", "--json")
    rows = json.loads(ended.stdout)["measured"]["layers"]
    assert 0.8 < sum(r["transfer"] for r in rows[:4]) / 4 < 1.2
    ended = command("merge", pair.host, pair.donor, "--alpha", "0.99", "--dtype", "fp32", "-o", "c", "--json")
    assert all(r["transfer"] > 0.999 for r in json.loads(ended.stdout)["measured"]["layers"])
    assert json.loads(Path("c/config.json").read_text())["dtype"] == "float32"
    assert {t.dtype for t in load_file("c/model.safetensors").values()} == {torch.float32}


def test_effective_transfer_is_the_definition(pair: Pair, command: Command) -> None:
    command("merge", pair.host, pair.donor, "-l", "1", "--include", "final-norm", "--alpha", "0.8", "-o", "out", "-q")
    host, donor = load_file(pair.host / "model.safetensors"), load_file(pair.donor / "model.safetensors")
    out = load_file("out/model.safetensors")
    over = under = count = moved = 0.0
    for name, tensor in out.items():
        if ".layers.1." not in name or not name.startswith("language_model"):
            continue
        wish = 0.2 * (donor[name.removeprefix("language_model.")].double() - host[name].double())
        change = tensor.double() - host[name].double()
        over, under = over + float((change * wish).sum()), under + float((wish * wish).sum())
        count, moved = count + tensor.numel(), moved + int((change != 0).sum())
    row = json.loads(Path("out/surgery.json").read_text())["measured"]["layers"][0]
    assert row["transfer"] == pytest.approx(over / under, abs=1e-4) and row["changed"] == pytest.approx(moved / count)


def test_vocabularies_are_merged_by_ids_or_by_tokens(copy: Pair, command: Command) -> None:
    words = [f"w{i}" for i in range(96)]
    moved = [*words[:90], *reversed(words[90:])]
    for folder, table in ((copy.host, words), (copy.donor, moved)):
        vocab = {"model": {"vocab": {w: i for i, w in enumerate(table)}}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(vocab))
    ended = command("merge", copy.host, copy.donor, "--vocab", "overlap", "-o", "out")
    assert ended.code == 3 and "first 90 ids" in ended.stderr
    ended = command("merge", copy.host, copy.donor, "--vocab", "by-token", "--alpha", "0.5", "-o", "out", "-q")
    assert ended.code == 0, ended.stderr
    name = "embed_tokens.weight"
    host = load_file(copy.host / "model.safetensors")[f"language_model.model.{name}"]
    donor = load_file(copy.donor / "model.safetensors")[f"model.{name}"]
    out = load_file("out/model.safetensors")[f"language_model.model.{name}"]
    order = [moved.index(w) for w in words]
    want = (host[:96].float() * 0.5 + donor[order].float() * 0.5).bfloat16()
    want[90] = host[90]  # the image token: the donor knows the word and never saw an image
    assert torch.equal(out[:96], want) and torch.equal(out[96:], host[96:])
    (copy.donor / "tokenizer.json").unlink()
    ended = command("merge", copy.host, copy.donor, "--vocab", "by-token", "-o", "none")
    assert ended.code == 3 and "tokenizer.json" in ended.stderr


@pytest.mark.parametrize("method", ["karcher", "nuslerp", "slerp", "nearswap", "arcee_fusion"])
def test_methods_of_mergekit_without_a_base(method: str, pair: Pair, command: Command, tmp_path: Path) -> None:
    ended = command("merge", pair.host, pair.donor, "--method", method, "--arithmetic", "kernels", "-o", "out", "-q")
    assert ended.code == 0, ended.stderr
    assert changed(pair.host, tmp_path / "out")


@pytest.mark.parametrize("method", ["della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "model_stock", "sce",
                                    "dare_ties", "ties"])  # fmt: skip
def test_methods_of_mergekit_with_a_base(method: str, pair: Pair, command: Command, tmp_path: Path) -> None:
    args = ["merge", pair.host, pair.donor, "--base", pair.base, "--method", method, "--arithmetic", "kernels", "-q"]
    args += ["--density", "0.5"] if method not in ("model_stock", "sce") else []
    ended = command(*args, "-o", "out", "--json")
    assert ended.code == 0, ended.stderr
    assert changed(pair.host, tmp_path / "out")
    assert [row["layer"] for row in json.loads(ended.stdout)["measured"]["layers"]] == [0, 1, 2, 3, "outside"]
    assert command(*args, "-o", "again", "--workers", "2").code == 0
    assert not changed(tmp_path / "out", tmp_path / "again")  # with the same seed, whatever the workers


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--layers", "1-4"], 2, "layer 4 is out of range, the tower has 4 layers (0-3); did you mean 1-3 or 1:4?"),
        (["--layers", "3-1"], 2, "runs backwards"),
        (["--layers", ""], 2, "not a layer or a span"),
        (["--alpha", "1.2"], 2, "outside [0, 1]"),
        (["--alpha", "high"], 2, "not a number"),
        (["--method", "ties"], 2, "needs --base"),
        (["--method", "tie"], 2, "did you mean"),
        (["--density", "0"], 2, "not in (0, 1]"),
        (["--alpha2", "0.5"], 2, "the base no longer cancels"),
        (["--vocab", "all"], 2, "--vocab all"),
        (["--dtype", "int8"], 2, "--dtype int8"),
        (["--method", "swap", "--alpha", "0.5"], 2, "swap takes"),
        (["--tower", "vision"], 2, "--tower vision"),
        (["--param", "x=1"], 2, "--param x=1"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_writes_nothing(
    args: list[str], code: int, says: str, pair: Pair, command: Command, tmp_path: Path
) -> None:
    ended = command("merge", pair.host, pair.donor, *args, "-o", "out")
    assert ended.code == code and says in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
    assert not (tmp_path / "out").exists() and ended.stdout == ""


def test_a_base_where_none_is_used_is_refused(pair: Pair, command: Command) -> None:
    ended = command("merge", pair.host, pair.donor, "--base", pair.base, "-o", "out")
    assert ended.code == 2 and "the base cancels" in ended.stderr
    assert command("merge", pair.host, "-o", "out").code == 2


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("num_attention_heads",), 8, "num_attention_heads: host 4, donor 8"),
        (("num_key_value_heads",), 4, "num_key_value_heads: host 2, donor 4"),
        (("hidden_act",), "gelu", "hidden_act: host silu, donor gelu"),
        (("quantization_config",), {"quant_method": "gptq"}, "is quantised"),
    ],
)
def test_equal_shapes_are_not_enough(path: tuple, value: Any, says: str, copy: Pair, command: Command) -> None:
    edit(copy.donor, *path, value=value)
    ended = command("merge", copy.host, copy.donor, "-o", "out")
    assert ended.code == 3 and says in ended.stderr
    assert command("merge", copy.host, copy.donor, "-o", "out", "--force").code == 0


def test_other_rotary_settings_are_warned_of(copy: Pair, command: Command) -> None:
    edit(copy.donor, "rope_parameters", value=None)
    edit(copy.donor, "rope_theta", value=500000.0)
    ended = command("merge", copy.host, copy.donor, "-o", "out")
    assert ended.code == 0 and "rope rope_theta: host 10000.0, donor 500000.0" in ended.stderr
    assert command("merge", copy.host, copy.donor, "-o", "strict", "--strict").code == 3


def test_a_donor_of_another_base_is_refused(copy: Pair, command: Command) -> None:
    torch.manual_seed(9)
    weights = load_file(copy.donor / "model.safetensors")
    other = {n: (torch.randn_like(t.float()) * t.float().std()).to(t.dtype) for n, t in weights.items()}
    save_file(other, copy.donor / "model.safetensors", metadata={"format": "pt"})
    ended = command("merge", copy.host, copy.donor, "-o", "out")
    assert ended.code == 3 and "do not look related" in ended.stderr and not Path("out").exists()


class Run:
    """Anything but tensors in a pickle."""


def test_quantised_weights_damaged_files_and_missing_shards(copy: Pair, command: Command) -> None:
    weights = load_file(copy.donor / "model.safetensors")
    whole = (copy.donor / "model.safetensors").read_bytes()
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, copy.donor / "model.safetensors")
    ended = command("merge", copy.host, copy.donor, "-o", "out")
    assert ended.code == 3 and "stored as I8" in ended.stderr
    (copy.donor / "model.safetensors").write_bytes(whole[:-10])
    ended = command("merge", copy.host, copy.donor, "-o", "out")
    assert ended.code == 3 and "truncated" in ended.stderr
    (copy.donor / "model.safetensors").write_bytes(b"\xff" * 8 + whole[8:])
    ended = command("merge", copy.host, copy.donor, "-o", "out")
    assert ended.code == 3 and "header" in ended.stderr
    (copy.donor / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {n: "model-00001-of-00001.safetensors" for n in weights}}
    (copy.donor / "model.safetensors.index.json").write_text(json.dumps(index))
    ended = command("merge", copy.host, copy.donor, "-o", "out")
    assert ended.code == 3 and "missing-shard" in ended.stderr
    (copy.donor / "model.safetensors.index.json").unlink()
    torch.save(Run(), copy.donor / "model.bin")
    ended = command("merge", copy.host, copy.donor, "-o", "out")
    assert ended.code == 3 and "unsafe-pickle" in ended.stderr and "convert it" in ended.stderr
    assert not Path("out").exists()


def test_another_depth_and_other_heads_name_the_field(copy: Pair, command: Command) -> None:
    weights = load_file(copy.donor / "model.safetensors")
    save_file({n: t for n, t in weights.items() if ".layers.3." not in n}, copy.donor / "model.safetensors")
    ended = command("merge", copy.host, copy.donor, "-o", "out")
    assert ended.code == 3 and "num_hidden_layers" in ended.stderr
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(weights | {name: weights[name].repeat(2, 1)}, copy.donor / "model.safetensors")
    ended = command("merge", copy.host, copy.donor, "-o", "out")
    assert ended.code == 3 and "num_key_value_heads" in ended.stderr and "[32, 32]" in ended.stderr


def test_an_interrupted_merge_leaves_nothing_and_goes_on(
    pair: Pair, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.arch.merging import tasks

    before = {p: p.read_bytes() for f in (pair.host, pair.donor) for p in f.iterdir()}
    command("merge", pair.host, pair.donor, "-o", "whole", "-q")
    real, made = tasks.stream, []

    def halfway(*args: Any) -> Any:
        made.append(args)
        if len(made) == 15:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "stream", halfway)
        ended = command("merge", pair.host, pair.donor, "-o", "out", "-q", "--workers", "1")
    assert ended.code == 5 and "no space left" in ended.stderr and not Path("out").exists()
    ended = command("merge", pair.host, pair.donor, "-o", "out", "--resume")
    assert ended.code == 0 and "were reused" in ended.stderr
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert {p: p.read_bytes() for p in before} == before


def test_embeddings_of_another_length_want_a_policy(command: Command, tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, "mllama")
    ended = command("merge", pair.host, pair.donor, "--include", "embed", "-o", "out")
    assert ended.code == 3 and "--vocab overlap" in ended.stderr


def test_results_are_the_same_for_any_number_of_workers(pair: Pair, command: Command, tmp_path: Path) -> None:
    for jobs in (1, 2, 4):
        args = ["--base", pair.base, "--method", "dare-ties", "--rounding", "stochastic", "--seed", "3"]
        assert command("merge", pair.host, pair.donor, *args, "--jobs", jobs, "-o", f"out{jobs}", "-q").code == 0
    first = (tmp_path / "out1/model.safetensors").read_bytes()
    assert all((tmp_path / f"out{n}/model.safetensors").read_bytes() == first for n in (2, 4))


def test_the_chat_template_can_be_the_donor_s(copy: Pair, command: Command) -> None:
    (copy.donor / "tokenizer_config.json").write_text('{"chat_template": "donor says"}')
    command("merge", copy.host, copy.donor, "--chat-template", "donor", "-o", "out", "-q")
    assert Path("out/chat_template.jinja").read_text() == "donor says"


def test_a_dry_run_needs_no_torch(pair: Pair, surgery: Command, tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['surgery', 'merge', sys.argv[1], sys.argv[2], '--dry-run']\n"
        "from surgery.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'mergekit', 'pydantic'} & set(sys.modules)"
    )
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code, pair.host, pair.donor], check=True, capture_output=True)
    # Nor does a linear merge: numpy alone makes it.
    code = code.replace("'--dry-run'", f"'-o', {str(tmp_path / 'out')!r}")
    subprocess.run([sys.executable, "-c", code, pair.host, pair.donor], check=True, capture_output=True)
    assert (tmp_path / "out/model.safetensors").is_file()


SPANS = {
    "12-28": list(range(12, 29)), "12:28": list(range(12, 28)), "0,2-3,-2:": [0, 2, 3, 28, 29], "28-": [28, 29],
    "-2": [0, 1, 2], ":3": [0, 1, 2], "0:10:3": [0, 3, 6, 9], "5": [5], "1-3,2-4": [1, 2, 3, 4],
    "all": list(range(30)),
}  # fmt: skip


@pytest.mark.parametrize("spec", SPANS)
def test_the_language_of_layers(spec: str) -> None:
    assert list(parse_spans(spec, 30)) == SPANS[spec]


@pytest.mark.parametrize(
    "spec", ["28-", "28", "12-28", "0-99", "29:", "-29:", "", ",", "4-2", "4:2", "a", "1--2", "-", "0:3:0", "-1-3"]
)  # fmt: skip
def test_what_is_no_span_of_28_layers_is_refused(spec: str) -> None:
    with pytest.raises(UsageError):
        parse_spans(spec, 28)


def test_the_message_of_the_layers_is_exact() -> None:
    with pytest.raises(UsageError) as raised:
        parse_spans("12-28", 28)
    assert raised.value.message == (
        "--layers 12-28: layer 28 is out of range, the tower has 28 layers (0-27); did you mean 12-27 or 12:28?"
    )
