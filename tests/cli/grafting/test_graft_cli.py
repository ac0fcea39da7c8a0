"""`surgery graft` as people run it: what it prints, leaves behind, refuses, and makes again."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_errors import said_one_error
from graft_runs import digest, listing, small_pictures

from surgery.arch.architectures import ARCHITECTURES
from surgery.arch.dit.config import tensor_shapes
from surgery.store.header import plan_header

Run = Callable[..., Any]


# --- dry run ---------------------------------------------------------------------------------------------------------

# Runs the command where nothing heavy can be imported and no tensor data can be read.
HEADERS_ONLY = """
import os, sys
for name in ("torch", "numpy", "safetensors", "diffusers", "transformers", "yaml", "rich"):
    sys.modules[name] = None
def refuse(*_, **__):
    os._exit(99)
pread = os.pread
os.pread = lambda fd, count, at: pread(fd, count, at) if at + count < 1 << 20 else refuse()
os.preadv = os.copy_file_range = refuse
import surgery.cli.main, surgery.store.checkpoint, surgery.store.digests
surgery.store.digests.file_digest = surgery.store.digests.lookup = refuse
surgery.store.checkpoint.Checkpoint.hash_tensor = surgery.store.checkpoint.Checkpoint.chunks = refuse
surgery.cli.main.main()
"""


@pytest.fixture(scope="module")
def hollow_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DiT-XL/2 at full size: config, header, and a hole where the data would be."""
    folder = tmp_path_factory.mktemp("hollow") / "xl"
    folder.mkdir()
    config = ARCHITECTURES["dit-xl-2"].transformer
    header, places = plan_header([(n, "F32", s) for n, s in tensor_shapes(config).items()], metadata={"format": "pt"})
    with open(folder / "diffusion_pytorch_model.safetensors", "wb") as handle:
        handle.write(header)
        handle.truncate(len(header) + sum(count for _, count in places.values()))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "scheduler_config.json").write_text(json.dumps(ARCHITECTURES["dit-xl-2"].scheduler))
    return folder


def test_a_dry_run_at_full_size_reads_headers_only_and_imports_nothing_heavy(hollow_xl: Path, tmp_path: Path) -> None:
    args = ["graft", "--replace", "attn=hyena", "-l", "75%", str(hollow_xl), "--dry-run", "--json"]
    before = listing(hollow_xl)
    ended = subprocess.run(
        [sys.executable, "-c", HEADERS_ONLY, *args], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, listing(tmp_path), listing(hollow_xl)) == (0, set(), before), ended.stderr
    report = json.loads(ended.stdout)
    assert list(report) == ["entries", "params", "flops", "bytes", "warnings"]
    assert len(report["entries"]) == 21
    assert report["params"] == {"before": 749_826_464, "after": 750_189_344}
    core, features = report["flops"]["core"], report["flops"]["features"]
    assert set(report["flops"]) == {"core", "features"}
    assert 100 * core["after"] / core["before"] - 100 == pytest.approx(-74.85, abs=0.01)
    assert 100 * features["after"] / features["before"] - 100 == pytest.approx(0.20, abs=0.01)
    assert set(report["bytes"]) == {"kept", "written"}
    assert report["bytes"]["kept"] + report["bytes"]["written"] == 4 * report["params"]["after"]


def test_a_dry_run_for_people_says_what_changes_and_costs(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    ended = command("graft", "-r", "attn=swa:w=2", "-r", "mlp=r3@all", tiny_dit, "--dry-run")
    assert ended.code == 0 and listing(tmp_path) == set()
    # 16 tokens, width 64: the window saves .69 of 3 softmax cores, the MLP a quarter of 6 MLPs.
    for words in ("swa:w=2", "mlp:r=3", "584,900 ->", "FLOPs core", "at most", "projections dominate", "kept,"):
        assert words in ended.stdout
    assert "not repaired yet" in ended.stderr


def test_a_model_that_is_not_cached_is_one_clear_line_offline(command: Run, tmp_path: Path) -> None:
    ended = command("graft", "--replace", "attn=hyena", "dit-xl-2", "--dry-run", "--offline")
    assert ended.code == 7 and listing(tmp_path) == set()
    said_one_error(ended, "offline.not-cached")
    assert "hf download facebook/DiT-XL-2-256" in ended.stderr


def test_an_architecture_is_planned_without_any_weights(command: Run, tmp_path: Path) -> None:
    """Parameters of section 11.2 and FLOPs of Tab. 4, as those of a folder that `surgery init` makes."""
    report = json.loads(command("graft", "-r", "attn=hyena", "arch:dit-xl-2", "--dry-run", "--json").stdout)
    assert report["params"] == {"before": 749_826_464, "after": 750_068_384}
    core = report["flops"]["core"]
    assert 100 * core["after"] / core["before"] - 100 == pytest.approx(-49.90, abs=0.01)
    ended = command("graft", "-r", "attn=hyena", "arch:dit-xl-2", "--init", "random")
    assert ended.code == 2 and listing(tmp_path) == set()
    said_one_error(ended, "usage.no-weights")
    said_one_error(command("graft", "-r", "attn=hyena", "arch:dit-xl", "--dry-run"), "usage.unknown-architecture")


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_stdout_is_the_path_alone_and_the_result_verifies(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    ended = command("graft", "-r", "attn=hyena", tiny_dit, "--init", "random", "-o", "out/g")
    assert (ended.code, ended.stdout) == (0, "out/g\n")
    assert "warning: the graft is not repaired yet (hyena-x: random start)" in ended.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"g"}
    assert command("verify", "out/g").code == 0
    facts = json.loads(command("inspect", "out/g", "--json").stdout)
    assert facts["parameters"] == 587_780 and facts["made_by"] == "graft"
    assert facts["digest"] == f"sha256:{digest(tmp_path / 'out/g')}"
    log = json.loads(command("log", "out/g", "--json").stdout)
    step = log["steps"][-1]
    assert (step["op"], step["seed"], step["params"]["replace"]) == ("graft", 0, ["attn=hyena"])
    assert len(log["dropped"]) == 24


def test_json_says_where_the_result_is_and_what_it_is(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    shown = json.loads(command("graft", "-r", "attn=mha", "--init", "copy", tiny_dit, "-o", "g", "--json").stdout)
    assert (shown["path"], shown["found"]) == ("g", False)
    assert shown["digest"] == f"sha256:{digest(tmp_path / 'g')}" == f"sha256:{digest(tiny_dit)}"


def test_without_a_name_the_same_command_finds_its_result_at_once(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    args = ("graft", "-r", "attn=hyena-y", "--init", "random", tiny_dit)
    first = command(*args)
    name = first.stdout.strip()
    assert name.startswith(f"{tiny_dit.name}-graft-") and len(name.rsplit("-", 1)[1]) == 8
    before = (tmp_path / name / "surgery.json").stat().st_mtime_ns
    again = command(*args)
    assert (again.code, again.stdout) == (0, first.stdout)
    assert "already done" in again.stderr and "warning" not in again.stderr
    assert (tmp_path / name / "surgery.json").stat().st_mtime_ns == before
    assert json.loads(command(*args, "--json").stdout)["found"] is True
    assert command(*args, "--seed", "1").stdout != first.stdout
    assert len(list(tmp_path.iterdir())) == 2


def test_an_output_that_is_there_is_replaced_only_when_asked(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    args = ("graft", "-r", "attn=hyena", "--init", "random", tiny_dit, "-o", "g")
    assert command(*args).code == 0
    first = digest(tmp_path / "g")
    ended = command(*args, "--seed", "1")
    assert ended.code == 4 and digest(tmp_path / "g") == first
    said_one_error(ended, "output.exists")
    assert command(*args, "--seed", "1", "--overwrite").code == 0
    assert digest(tmp_path / "g") != first
    assert {p.name for p in tmp_path.iterdir()} == {"g"}


def test_the_seed_decides_the_bits_and_workers_do_not(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    found = {}
    for name, more in {"a": (), "b": ("--workers", "1"), "c": ("--workers", "4"), "d": ("--seed", "5")}.items():
        assert command("graft", "-r", "attn=hyena", "-r", "mlp=mlp:r=5@0", tiny_dit, "-o", name, *more).code == 0
        found[name] = digest(tmp_path / name)
    assert found["a"] == found["b"] == found["c"] != found["d"]


def test_a_path_can_come_through_a_pipe(surgery: Run, tiny_dit: Path, tmp_path: Path) -> None:
    ended = surgery("graft", "-r", "attn=swa", "-", "-o", "g", stdin=f"{tiny_dit}\n")
    assert (ended.code, ended.stdout) == (0, "g\n")
    made = json.dumps({"path": "g", "digest": "…"})
    assert surgery("graft", "-r", "attn=hyena", "-l", "0", "-", "-o", "h", stdin=made).stdout == "h\n"


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "unknown slot": (("-r", "cross=hyena"), 2, "usage.bad-slot"),
    "unknown operator": (("-r", "attn=hyenna"), 2, "usage.bad-operator"),
    "operator of another slot": (("-r", "mlp=hyena"), 2, "usage.bad-operator"),
    "unknown argument": (("-r", "attn=hyena:taps=3"), 2, "usage.bad-operator"),
    "argument without value": (("-r", "attn=hyena:k"), 2, "usage.bad-operator"),
    "no operator": (("-r", "attn"), 2, "usage.bad-replace"),
    "no blocks after @": (("-r", "attn=hyena@"), 2, "usage.bad-replace"),
    "block out of range": (("-r", "attn=hyena", "-l", "6"), 2, "usage.bad-layers"),
    "empty selection": (("-r", "attn=hyena", "-l", ""), 2, "usage.bad-layers"),
    "backwards range": (("-r", "attn=hyena@4-2"), 2, "usage.bad-layers"),
    "share without a pattern": (("-r", "attn=hyena", "-l", "40%"), 2, "usage.bad-layers"),
    "locality without scores": (("-r", "attn=hyena", "-l", "top-local:2"), 2, "usage.bad-layers"),
    "slot twice": (("-r", "attn=hyena", "-r", "attn=swa@1"), 2, "usage.slot-twice"),
    "tied to other tokens": (("-r", "mlp=mlp-hyena-x:n=17"), 2, "usage.bad-operator"),
    "k below 1": (("-r", "attn=hyena:k=0"), 2, "usage.bad-operator"),
    "w below 1": (("-r", "attn=swa:w=0"), 2, "usage.bad-operator"),
    "no hidden unit": (("-r", "mlp=mlp:r=0.01"), 2, "usage.bad-operator"),
    "heads that do not fit": (("-r", "attn=mamba2:headdim=48"), 2, "usage.bad-operator"),
    "unknown init": (("-r", "attn=hyena", "--init", "warm"), 2, "usage.bad-option"),
    "unknown preset": (("-r", "attn=hyena", "--preset", "huge"), 2, "usage.bad-option"),
    "unknown loss": (("-r", "attn=hyena", "--loss", "l3"), 2, "usage.bad-option"),
    "unknown capture": (("-r", "attn=hyena", "--capture", "disk"), 2, "usage.bad-option"),
    "unknown finetune loss": (("-r", "attn=hyena", "--finetune-loss", "mse"), 2, "usage.bad-option"),
    "negative rate": (("-r", "attn=hyena", "--data", "digits", "--lr", "-1"), 2, "usage.bad-option"),
    "no batch": (("-r", "attn=hyena", "--data", "digits", "--batch", "0"), 2, "usage.bad-option"),
    "negative steps": (("-r", "attn=hyena", "--finetune-steps", "-3"), 2, "usage.bad-option"),
    "average of 1": (("-r", "attn=hyena", "--ema", "1"), 2, "usage.bad-option"),
    "negative seed": (("-r", "attn=hyena", "--seed", "-1"), 2, "usage.bad-option"),
    "not a number": (("-r", "attn=hyena", "--lr", "fast"), 2, "usage.option"),
    "distil without data": (("-r", "attn=hyena", "--init", "distill"), 2, "usage.no-data"),
    "finetune without data": (("-r", "attn=hyena", "--finetune-steps", "3"), 2, "usage.no-data"),
    "data without use": (("-r", "attn=hyena", "--init", "copy", "--data", "digits"), 2, "usage.data-unused"),
    "unknown data": (("-r", "attn=hyena", "--data", "digit"), 2, "usage.bad-data"),
    "data that is not there": (("-r", "attn=hyena", "--data", "npz:gone.npz"), 2, "usage.no-data"),
    "unknown device": (("-r", "attn=hyena", "--device", "gpu"), 2, "usage.device"),
    "device that is not there": (("-r", "attn=hyena", "--device", "xpu"), 5, "resource.no-device"),
    "bad size": (("-r", "attn=hyena", "--shard-size", "big"), 2, "usage.size"),
    "no workers": (("-r", "attn=hyena", "--workers", "-1"), 2, "usage.option"),
    "nothing to replace": ((), 2, "usage.option"),
    "unknown option": (("-r", "attn=hyena", "--layer", "1"), 2, "usage.option"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_a_hint(command: Run, tiny_dit: Path, tmp_path: Path, case: str) -> None:
    args, code, name = BAD_OPTIONS[case]
    ended = command("graft", *args, tiny_dit, "-o", "out/g")
    assert ended.code == code, ended.stderr
    said_one_error(ended, name)
    assert listing(tmp_path) == set()


def test_a_wrong_word_gets_the_nearest_known_ones(command: Run, tiny_dit: Path) -> None:
    assert "'hyena-x'" in command("graft", "-r", "attn=hyenax", tiny_dit).stderr
    assert "'random'" in command("graft", "-r", "attn=hyena", "--init", "randon", tiny_dit).stderr
    assert "0-5" in command("graft", "-r", "attn=hyena@99", tiny_dit).stderr


@pytest.mark.parametrize(
    ("arrays", "code", "name", "said"),
    [
        ({"labels": np.arange(20)}, 2, "usage.label-range", "labels 0 to 19"),
        ({"arr_0": np.zeros((20, 16, 16, 1), np.uint8)}, 2, "usage.data-misfit", "sample_size 8"),
        ({"arr_0": np.zeros((20, 8, 8, 3), np.uint8)}, 2, "usage.data-misfit", "in_channels 1"),
        ({"arr_0": np.zeros((20, 8, 8, 1))}, 3, "checkpoint.bad-images", "not bytes"),
        ({"labels": np.arange(7)}, 3, "checkpoint.bad-labels", "not 20 integers"),
    ],
    ids=["labels", "size", "channels", "floats", "count"],
)
def test_images_that_do_not_fit_leave_nothing_behind(
    command: Run,
    tiny_dit: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    arrays: dict[str, Any],
    code: int,
    name: str,
    said: str,
) -> None:
    spec = small_pictures(tmp_path_factory.mktemp("data"), **arrays)
    ended = command("graft", "-r", "attn=hyena", tiny_dit, "--data", spec, "-o", "g")
    assert ended.code == code, ended.stderr
    assert said in ended.stderr and listing(tmp_path) == set()
    said_one_error(ended, name)


def _edited(tiny_dit: Path, folder: Path, case: str) -> Path:
    """A damaged copy of the model."""
    shutil.copytree(tiny_dit, folder)
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "diffusion_pytorch_model.safetensors"
    if case == "no config":
        (folder / "config.json").unlink()
    elif case == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif case == "another architecture":
        config["_class_name"] = "UNet2DConditionModel"
    elif case == "missing tensors":
        config["num_layers"] = 7
    elif case == "unexpected tensors":
        config["num_layers"] = 5
    elif case == "truncated weights":
        os.truncate(weights, weights.stat().st_size - 1)
    elif case == "no weights":
        weights.unlink()
    if case in ("another architecture", "missing tensors", "unexpected tensors"):
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("no config", "checkpoint.no-config"),
        ("config is no JSON", "checkpoint.malformed"),
        ("another architecture", "checkpoint.unknown-architecture"),
        ("missing tensors", "checkpoint.wrong-tensors"),
        ("unexpected tensors", "checkpoint.wrong-tensors"),
        ("truncated weights", "checkpoint.truncated"),
        ("no weights", "checkpoint.no-weights"),
    ],
)
def test_a_source_that_is_no_such_model_is_refused(
    command: Run, tiny_dit: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, case: str, name: str
) -> None:
    source = _edited(tiny_dit, tmp_path_factory.mktemp("damaged") / "model", case)
    before = listing(source)
    for more in ((), ("--dry-run",)):
        ended = command("graft", "-r", "attn=hyena", source, "-o", "g", *more)
        assert ended.code == 3, ended.stderr
        said_one_error(ended, name)
    assert (listing(tmp_path), listing(source)) == (set(), before)


def test_a_source_that_is_not_there_and_an_output_inside_it_are_refused(command: Run, tiny_dit: Path) -> None:
    gone = command("graft", "-r", "attn=hyena", "nowhere/model", "-o", "g", "--offline")
    assert gone.code in (3, 7) and gone.stderr.count("error[") == 1
    inside = command("graft", "-r", "attn=hyena", tiny_dit, "-o", tiny_dit / "g")
    assert inside.code == 4
    said_one_error(inside, "output.inside-parent")
