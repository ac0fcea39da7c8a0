"""The command line's own promises: streams, exit codes, errors in two lines, nothing heavy imported, names escaped."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from surgery.cli.operation import parse_size
from surgery.errors import UsageError
from surgery.store.header import plan_header
from surgery.store.names import ASSETS
from surgery.store.writer import Workspace

HEAVY = ("torch", "numpy", "pydantic", "rich", "yaml", "transformers", "diffusers", "safetensors")
WEIGHTS = "diffusion_pytorch_model.safetensors"
Command = Callable[..., Any]  # the fixtures `command` and `surgery`: words in, (stdout, stderr, code) out


def is_one_error(ended: Any, code: str) -> bool:
    """Nothing on stdout, and on stderr one error line of this code and at most one hint."""
    lines = ended.stderr.splitlines()
    hints = [line for line in lines if line.startswith("hint: ")]
    errors = [line for line in lines if line.startswith(f"error[{code}]: ")]
    return ended.stdout == "" and len(errors) == 1 and len(hints) <= 1 and len(lines) == len(errors) + len(hints)


# What is imported


LISTED = """
import sys
from surgery.cli.main import main

try:
    main()
finally:
    print("imported:", *(n for n in {heavy!r} if n in sys.modules), file=sys.stderr)
"""


def imported(*args: str | Path) -> list[str]:
    """The heavy packages that a command has imported when it ends."""
    code = LISTED.format(heavy=HEAVY)
    ended = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("args", [["--help"], ["graft", "--help"], ["train", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    assert imported(*args) == []


def test_looking_at_a_checkpoint_imports_nothing_heavy(tiny_dit: Path) -> None:
    assert imported("inspect", tiny_dit) == []
    assert imported("log", tiny_dit) == []


def test_a_dry_run_imports_nothing_heavy(tiny_dit: Path) -> None:
    assert imported("graft", "-r", "attn=hyena", tiny_dit, "--dry-run") == []


def test_planning_a_recipe_imports_yaml_alone(tiny_dit: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"surgery: 1\ninputs: {{m: {tiny_dit}}}\nsteps: {{a: {{op: cast, from: m, with: {{dtype: bf16}}}}}}\n"
    )
    assert imported("plan", recipe, "--json") == ["yaml"]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, surgery; dir(surgery); print(*(n for n in {HEAVY!r} if n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == []


# Streams


def test_a_producing_command_prints_the_path_alone(command: Command, tmp_path: Path) -> None:
    ended = command("init", "dit-digits", "-o", "out")
    assert ended.stdout == "out\n" and ended.code == 0 and (tmp_path / "out" / WEIGHTS).is_file()
    assert ended.stderr == "warning: dit-digits: random weights; the shape of the model and nothing it knows\n"


def test_without_a_name_the_same_command_twice_finds_its_own_result(command: Command, tiny_dit: Path) -> None:
    first = command("graft", "-r", "mlp=r3", tiny_dit)
    again = command("graft", "-r", "mlp=r3", tiny_dit)
    assert first.stdout == again.stdout and first.stdout.startswith("tiny-graft-")
    assert "already done" in again.stderr and "already done" not in first.stderr
    assert "already done" not in command("graft", "-q", "-r", "mlp=r3", tiny_dit).stderr


def test_json_of_a_producing_command_is_one_object(command: Command) -> None:
    found = json.loads(command("init", "dit-digits", "-o", "out", "--json").stdout)
    assert found.keys() >= {"path", "digest", "record", "key", "found", "reused"} and found["path"] == "out"


def test_a_dry_run_prints_the_plan_and_writes_nothing(command: Command, tiny_dit: Path, tmp_path: Path) -> None:
    ended = command("graft", "-r", "attn=hyena", tiny_dit, "-o", "out", "--dry-run")
    assert ended.code == 0 and "parameters" in ended.stdout and "kept" in ended.stdout
    found = json.loads(command("graft", "-r", "attn=hyena", tiny_dit, "--dry-run", "--json").stdout)
    assert found["bytes"].keys() == {"kept", "written"} and os.listdir(tmp_path) == []


def test_inspect_prints_the_facts_that_programs_ask_for(command: Command, tiny_dit: Path) -> None:
    found = json.loads(command("inspect", tiny_dit, "--json").stdout)
    assert found.keys() >= {"digest", "layout", "parameters", "tensors", "bytes"}
    assert (found["layout"], found["parameters"], found["tensors"], found["bytes"]) == ("hf", 584_900, 120, 2_339_600)
    assert found["digest"].startswith("sha256:") and found["made_by"] == "init"


def test_inspect_lists_every_tensor_on_request(command: Command, tiny_dit: Path) -> None:
    text = command("inspect", "--tensors", tiny_dit).stdout
    assert "proj_out_1.bias" in text and "pos_embed.proj.weight" in text
    rows = json.loads(command("inspect", "--tensors", "--json", tiny_dit).stdout)["rows"]
    assert len(rows) == 120 and {"name": "proj_out_1.bias", "dtype": "F32", "shape": [128]} in rows


def test_inspect_knows_the_parts_of_a_pipeline(command: Command, tiny_pipeline: Path) -> None:
    found = json.loads(command("inspect", tiny_pipeline, "--json").stdout)
    assert found["layout"] == "pipeline" and found["parts"] == {"transformer": 120, "vae": 3}
    assert json.loads(command("inspect", f"{tiny_pipeline}:vae", "--json").stdout)["tensors"] == 3


def test_log_shows_two_generations(command: Command, tiny_dit: Path) -> None:
    path = command("graft", "-r", "mlp=r3", tiny_dit).stdout.strip()
    second = command("graft", "-r", "attn=swa:w=4", path, "-o", "second").stdout.strip()
    text = command("log", second).stdout
    assert text.startswith("second\n") and "attn=swa:w=4" in text and "mlp=r3" in text and "init v1" in text
    assert text.index("attn=swa:w=4") < text.index("mlp=r3") < text.index("init v1")
    assert len(json.loads(command("log", second, "--json").stdout)["ancestors"]) == 2
    assert "compute" in command("log", second, "--tensors").stdout


def test_verify_says_ok_or_what_differs(command: Command, tmp_path: Path) -> None:
    command("init", "dit-digits", "-o", "out")
    ended = command("verify", "out")
    assert ended.code == 0 and ended.stdout.startswith("ok  out  120 tensors")
    with open(tmp_path / "out" / WEIGHTS, "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\xff")
    ended = command("verify", "out")
    assert ended.code == 1 and ended.stdout.endswith(": altered\n") and "error[verify.differs]" in ended.stderr
    found = json.loads(command("verify", "out", "--json").stdout)
    assert found["ok"] is False and len(found["faults"]) == 1


@pytest.mark.parametrize("text", ["{path}\n", '{{"path": "{path}", "digest": "x"}}\n'], ids=["path", "json"])
def test_a_dash_reads_the_path_from_standard_input(
    command: Command, tiny_dit: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = text.format(path=tiny_dit).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert json.loads(command("inspect", "-", "--json").stdout)["tensors"] == 120


@pytest.mark.parametrize("text", ["", "a\nb\n", "{}", '{"path"', "[]"])
def test_a_dash_wants_exactly_one_path(command: Command, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    ended = command("inspect", "-")
    assert ended.code in (2, 3) and ended.stderr.startswith("error[")


def test_commands_compose_in_a_pipe(command: Command, tiny_dit: Path, tmp_path: Path) -> None:
    command("graft", "-r", "mlp=r3", tiny_dit)  # so that the process below only has to find it
    script = f"surgery graft -q -r mlp=r3 {tiny_dit} | surgery inspect - --json"
    run = f'surgery() {{ "{sys.executable}" -m surgery "$@"; }}; {script}'
    ended = subprocess.run(["bash", "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(ended.stdout)["made_by"] == "graft" and ended.returncode == 0


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A file of three thousand empty tensors: its list is longer than any pipe."""
    rows = ((f"{'block' * 20}.{i}.weight", "F32", (0,)) for i in range(3000))
    path = tmp_path / "many.safetensors"
    path.write_bytes(plan_header(rows, metadata={})[0])
    return path


@pytest.mark.parametrize("args", ["--tensors", "--tensors --json"])
def test_a_closed_pipe_is_no_error_to_speak_of(many: Path, args: str) -> None:
    script = f'"{sys.executable}" -m surgery inspect {args} {many} | head -1; echo ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] in ("141", "0") and ended.stderr == ""


@pytest.mark.parametrize(("redirect", "status"), [("> /dev/full", 4), ("2> /dev/full", 3), (">&- 2>&-", None)])
def test_a_stream_that_takes_nothing_ends_in_no_traceback(many: Path, redirect: str, status: int | None) -> None:
    path = many if status == 4 else "nowhere"
    script = f'"{sys.executable}" -m surgery inspect {path} {redirect}'
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert "Traceback" not in ended.stdout + ended.stderr and ended.returncode in (status, status or 1)


def test_a_path_that_is_not_utf8_goes_in_and_out_as_it_is(tiny_dit: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(os.fsencode(tiny_dit), name)
    ended = subprocess.run([sys.executable, "-m", "surgery", "inspect", name], capture_output=True)
    assert ended.returncode == 0 and b"caf\xe9" in ended.stdout and ended.stderr == b""


def test_a_terminal_without_unicode_gets_escapes(surgery: Command, tiny_dit: Path) -> None:
    ended = surgery("log", tiny_dit, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert ended.code == 0 and r"\u2514" in ended.stdout and "Traceback" not in ended.stderr


# Names from strangers


EVIL = "a\x1b[2Jb\nc\u202ed\x9be"


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A file whose tensor's name would clear the screen, break the line and turn the text round."""
    path = tmp_path / "evil.safetensors"
    path.write_bytes(plan_header([(EVIL, "F32", (0,)), (f"{EVIL}.2.weight", "F32", (0,))], metadata={})[0])
    return path


@pytest.mark.parametrize("args", [[], ["--tensors"], ["--json"], ["--tensors", "--json"]], ids=" ".join)
def test_names_are_escaped_on_every_way_out(command: Command, evil: Path, args: list[str]) -> None:
    ended = command("inspect", evil, *args)
    assert ended.code == 0
    for character in "\x1b\u202e\x9b":
        assert character not in ended.stdout + ended.stderr
    assert "\nc" not in ended.stdout


def test_json_gives_names_back_as_they_are(command: Command, evil: Path) -> None:
    rows = json.loads(command("inspect", evil, "--tensors", "--json").stdout)["rows"]
    assert rows[0]["name"] == EVIL


def test_names_are_escaped_in_errors(command: Command, evil: Path) -> None:
    evil.write_bytes(evil.read_bytes() + b"1234")
    (evil.parent / "model.safetensors").write_bytes(evil.read_bytes().replace(b'"F32"', b'"F31"'))
    for path in (evil, evil.parent / "model.safetensors"):
        ended = command("inspect", path)
        assert ended.code == 3 and "\x1b" not in ended.stderr and len(ended.stderr.splitlines()) == 2


def test_what_a_forged_record_says_is_escaped(command: Command, tiny_dit: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dit, tmp_path / "copy")
    record = json.loads((copy / "surgery.json").read_text())
    record["steps"][0] |= {"op": EVIL, "params": {EVIL: EVIL}, "training": {EVIL: EVIL}}
    record["parents"] = {EVIL: {"digest": EVIL, "lineage": None}}
    record["changes"] = [{"tensors": EVIL, "count": 1, "how": EVIL}]
    record["output"]["files"].append({"path": EVIL, "size": 1})
    record["tensors"][EVIL] = {"dtype": EVIL, "shape": [EVIL], "sha256": EVIL}
    (copy / "surgery.json").write_text(json.dumps(record))
    for args in (["inspect"], ["log"], ["log", "--tensors"], ["verify"]):
        ended = command(*args, "copy")
        assert ended.code in (0, 1) and "error.internal" not in ended.stderr
        assert not {"\x1b", "\u202e", "\x9b"} & set(ended.stdout + ended.stderr) and "\nc" not in ended.stdout


def test_a_record_that_descends_from_itself_is_told_once(command: Command, tiny_dit: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dit, tmp_path / "copy")
    record = json.loads((copy / "surgery.json").read_text())
    record["parents"] = {n: {"digest": "x", "lineage": record["record"]} for n in "ab"}
    record["ancestors"] = {record["record"]: {k: v for k, v in record.items() if k != "ancestors"}}
    (copy / "surgery.json").write_text(json.dumps(record))
    ended = command("log", "copy")
    assert ended.code == 0 and ended.stdout.count("init v1") == 2


# Errors


@pytest.mark.parametrize(
    ("args", "code", "status", "words"),
    [
        (["inspec", "x"], "usage.unknown-command", 2, "did you mean 'inspect'"),
        (["train", "difusion"], "usage.unknown-command", 2, "did you mean 'diffusion'"),
        (["inspect", "--tensor", "x"], "usage.option", 2, "--tensors"),
        (["--tensors"], "usage.option", 2, "--tensors"),
        (["init", "dit-digits", "--seed", "x"], "usage.option", 2, "--seed"),
        (["init", "dit-digits", "--workers", "-2"], "usage.option", 2, "--workers"),
        (["init", "dit-digits", "extra"], "usage.option", 2, "extra"),
        (["init", "dit-digit"], "usage.unknown-architecture", 2, "dit-digits"),
        (["init", "dit-digits", "--dtype", "int3"], "usage.dtype", 2, "bfloat16"),
        (["init", "dit-digits", "--shard-size", "5 bananas"], "usage.size", 2, "500MB"),
        (["init", "dit-digits", "--device", "abacus"], "usage.device", 2, "cpu"),
        (["inspect", ""], "usage.empty-name", 2, "name a folder"),
        (["inspect", "nowhere"], "checkpoint.missing", 3, "dit-digits"),
        (["inspect", "."], "checkpoint.no-weights", 3, "model.safetensors"),
        (["inspect", "/dev/null"], "checkpoint.unknown-layout", 3, "/dev/null"),
        (["inspect", "x" * 5000], "checkpoint.missing", 3, "no such file"),
        (["inspect", "org/name", "--offline"], "offline.not-cached", 7, "hf download org/name"),
        (["inspect", "hub:org/name@v1", "--offline"], "offline.not-cached", 7, "--revision v1"),
        (["graft", "-r", "attn=hyena", "dit-xl-2", "--dry-run", "--offline"], "offline.not-cached", 7, "hf download"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)  # fmt: skip
def test_an_error_is_one_line_a_hint_and_an_exit_code(
    command: Command, tmp_path: Path, args: list[str], code: str, status: int, words: str
) -> None:
    ended = command(*args)
    assert ended.code == status and is_one_error(ended, code) and words in ended.stderr
    assert os.listdir(tmp_path) == []


def test_an_output_that_is_there_is_exit_4(command: Command, tiny_dit: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    ended = command("graft", "-r", "mlp=r3", tiny_dit, "-o", "out")
    assert ended.code == 4 and is_one_error(ended, "output.exists")
    ended = command("graft", "-r", "mlp=r3", tiny_dit, "-o", "out", "--overwrite")
    assert ended.code == 4 and (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_overwrite_replaces_an_output_of_ours(command: Command, tmp_path: Path) -> None:
    command("init", "dit-digits", "-o", "out")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    ended = command("init", "dit-digits", "-o", "out", "--seed", "1", "--overwrite")
    assert ended.code == 0 and (tmp_path / "out" / WEIGHTS).read_bytes() != before and os.listdir(tmp_path) == ["out"]


def test_a_locked_output_is_exit_6(command: Command, tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", "0" * 64):
        ended = command("init", "dit-digits", "-o", "out")
    assert ended.code == 6 and "error[busy.output]" in ended.stderr and f"pid {os.getpid()}" in ended.stderr


def test_a_device_that_is_not_there_is_exit_5(command: Command) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    ended = command("init", "dit-digits", "--device", "cuda")
    assert ended.code == 5 and is_one_error(ended, "resource.no-device")


def test_no_arguments_print_the_help_and_are_wrong_use(command: Command) -> None:
    for args in ([], ["inspect"], ["train"]):
        ended = command(*args)
        assert ended.code == 2 and ended.stdout == "" and ended.stderr.startswith("Usage: surgery")


def test_help_and_version_go_to_standard_output(command: Command) -> None:
    ended = command("--help")
    assert ended.code == 0 and ended.stdout.startswith("Usage: surgery") and ended.stderr == ""
    assert command("--version").stdout.startswith("surgery ")


def test_every_command_explains_itself_with_an_example(command: Command) -> None:
    from surgery.cli.table import COMMANDS, GROUPS

    def leaves(table: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for name, (_, members) in table.items():
            yield from leaves(members, (*above, name)) if isinstance(members, Mapping) else [(*above, name)]

    for path in leaves({**COMMANDS, **GROUPS}):
        ended = command(*path, "--help")
        assert ended.code == 0 and f"surgery {' '.join(path)}" in ended.stdout.split("Options:")[0].split("\n", 1)[1], (
            path
        )


def test_a_fault_of_ours_has_no_traceback_unless_asked_for(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("nobody saw this coming")

    monkeypatch.setattr("surgery.cli.graph.checkpoint.open_source", fault)
    ended = command("inspect", "x")
    assert ended.code == 1 and is_one_error(ended, "error.internal") and "SURGERY_DEBUG=1" in ended.stderr
    monkeypatch.setenv("SURGERY_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        command("inspect", "x")


def test_no_memory_is_a_lack_of_resources(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("surgery.cli.graph.checkpoint.open_source", fault)
    ended = command("inspect", "x")
    assert ended.code == 5 and is_one_error(ended, "resource.memory")


def test_strict_refuses_what_no_writer_should_do(command: Command, evil: Path) -> None:
    import struct

    raw = b' {"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    evil.write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert command("inspect", evil).stderr.startswith("warning: ")
    ended = command("inspect", evil, "--strict")
    assert ended.code == 3 and is_one_error(ended, "checkpoint.odd")


def test_a_key_opens_a_nested_pickle(command: Command, tmp_path: Path) -> None:
    import torch

    torch.save({"model": {"a": torch.zeros(2)}, "ema": {"b": torch.zeros(3)}}, tmp_path / "x.pt")
    ended = command("inspect", "x.pt")
    assert ended.code == 2 and "--key: model, ema" in ended.stderr
    assert json.loads(command("inspect", "x.pt", "--key", "ema", "--json").stdout)["parameters"] == 3


# Names


def test_own_aliases_are_followed(
    command: Command, tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "surgery").mkdir()
    (tmp_path / "surgery" / "aliases.toml").write_text(f'[aliases]\nmine = "{tiny_dit}"\n')
    assert json.loads(command("inspect", "mine", "--json").stdout)["tensors"] == 120


def test_a_plan_says_what_a_short_name_stands_for(command: Command, tiny_dit: Path) -> None:
    words = ("graft", "-r", "attn=hyena", "--dry-run")
    short = command(*words, "dit-digits")
    assert short.code == 0 and short.stdout.splitlines()[0] == f"source   dit-digits = {ASSETS / 'dit-digits'}"
    assert "source" not in command(*words, tiny_dit).stdout
    assert "entries" in json.loads(command(*words, "dit-digits", "--json").stdout)


def test_a_shape_alone_cannot_be_trained_and_says_so(command: Command, tmp_path: Path) -> None:
    for more in ("--dry-run", "--finetune-steps=2"):
        ended = command("graft", "-r", "attn=hyena", "arch:dit-digits", "--data", "digits", more)
        assert ended.code == 2 and ended.stdout == "" and not list(tmp_path.iterdir())
        error, hint = ended.stderr.splitlines()
        assert error.startswith("error[usage.no-weights]: arch:dit-digits is a shape without weights")
        assert hint.endswith("surgery init dit-digits -o DIR")


def test_a_hub_id_in_the_cache_opens_offline(surgery: Command, tiny_dit: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "hf" / "hub" / "models--org--name"
    shutil.copytree(tiny_dit, root / "snapshots" / commit, ignore=shutil.ignore_patterns("surgery.json"))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    ended = surgery("inspect", "org/name", "--json", env=offline)
    assert ended.code == 0 and json.loads(ended.stdout)["tensors"] == 120 and ended.stderr == ""
    planned = surgery("cast", "org/name", "--dtype", "bf16", "--dry-run", env=offline)
    assert planned.stdout.splitlines()[0] == f"source   org/name = org/name@{commit}"


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 500_000_000), ("5GB", 5 * 10**9), ("2GiB", 2 << 30), ("1.5k", 1500), ("7", 7), ("8 B", 8)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5MB", "5XB", "GB", "1e9", "5MBs", "²MB", "9" * 400 + "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)
