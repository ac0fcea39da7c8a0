"""The same work on a real Ray cluster of two workers: the same bytes, whatever dies on the way."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Starting a cluster takes half a minute; `make test-slow` runs these.
slow = pytest.mark.slow
Command = Callable[..., "subprocess.CompletedProcess[str]"]

RECIPE = """
surgery: 1
inputs: {base: dit-digits}
steps:
  deep: {op: slice, from: base, with: {layers: "0-4,1-5"}}
  half: {op: cast, from: base, with: {dtype: bf16}}
  both: {op: cast, from: deep, with: {dtype: fp16}}
  graft: {op: graft, from: base, with: {replace: [attn=mha], layers: "1", init: distill, data: digits, samples: 16}}
outputs: {half: half, both: both, graft: graft}
"""


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "surgery.json"}


def record(folder: Path) -> str:
    return str(json.loads((folder / "surgery.json").read_text())["record"])


@slow
def test_one_step_on_a_cluster_gives_the_same_bytes(on_cluster: Command, tmp_path: Path) -> None:
    on_cluster("cast", "dit-digits", "--dtype", "bf16", "-o", "here", "-q")
    there = on_cluster("cast", "dit-digits", "--dtype", "bf16", "-o", "there", "-q", "--engine", "ray")
    assert there.stdout == "there\n"
    assert content(tmp_path / "there") == content(tmp_path / "here")
    assert record(tmp_path / "there") == record(tmp_path / "here")


@slow
def test_independent_steps_of_a_recipe_run_side_by_side_with_the_same_bytes(
    on_cluster: Command, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    there = on_cluster("run", "r.yaml", "-o", "there", "--engine", "ray", SURGERY_CACHE=str(tmp_path / "cache1"))
    on_cluster("run", "r.yaml", "-o", "here", SURGERY_CACHE=str(tmp_path / "cache2"))
    for name in ("half", "both", "graft"):
        assert content(tmp_path / "there" / name) == content(tmp_path / "here" / name)
        assert record(tmp_path / "there" / name) == record(tmp_path / "here" / name)
    assert sorted(there.stdout.split()) == ["there/both", "there/graft", "there/half"]
    again = on_cluster(
        "run", "r.yaml", "-o", "there", "--json", "--engine", "ray", SURGERY_CACHE=str(tmp_path / "cache1")
    )
    assert all(row["found"] for row in json.loads(again.stdout).values())


@slow
def test_evaluations_go_out_and_find_the_same(on_cluster: Command, tmp_path: Path) -> None:
    """Both measure at once, one of them what is made before; each is a task for a whole step."""
    few = "samples: 20, steps: 2"
    (tmp_path / "r.yaml").write_text(
        "surgery: 1\ninputs: {base: dit-digits}\nsteps:\n"
        "  half: {op: cast, from: base, with: {dtype: bf16}}\n"
        f"  before: {{op: eval-images, from: base, with: {{ref: digits, {few}}}}}\n"
        f"  after: {{op: eval-images, from: half, with: {{ref: digits, {few}}}}}\n"
        "outputs: {half: half, before: before, after: after}\n"
    )
    words = ("run", "r.yaml", "--json")
    there = on_cluster(*words, "-o", "there", "--engine", "ray", SURGERY_CACHE=str(tmp_path / "cache1"))
    here = on_cluster(*words, "-o", "here", SURGERY_CACHE=str(tmp_path / "cache2"))
    found, expected = json.loads(there.stdout), json.loads(here.stdout)
    assert found["after"]["report"] == expected["after"]["report"] != found["before"]["report"]
    assert {n: row["digest"] for n, row in found.items()} == {n: row["digest"] for n, row in expected.items()}
    for name in ("half", "before", "after"):
        assert content(tmp_path / "there" / name) == content(tmp_path / "here" / name)
        assert record(tmp_path / "there" / name) == record(tmp_path / "here" / name)


@slow
def test_without_digests_the_bytes_are_the_same_and_the_keys_hold(on_cluster: Command, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    words = ("run", "r.yaml", "-o", "there", "--hash", "header", "--json", "--engine", "ray")
    there = json.loads(on_cluster(*words, SURGERY_CACHE=str(tmp_path / "cache1")).stdout)
    on_cluster("run", "r.yaml", "-o", "here", SURGERY_CACHE=str(tmp_path / "cache2"))
    assert all(row["undigested"] for row in there.values())
    for name in ("half", "both", "graft"):
        assert on_cluster("diff", f"there/{name}", f"here/{name}").returncode == 0
    assert on_cluster("verify", "there/graft").stdout.startswith("ok")
    again = json.loads(on_cluster(*words, SURGERY_CACHE=str(tmp_path / "cache1")).stdout)
    assert all(row["found"] for row in again.values())
    one = on_cluster(
        "cast", "dit-digits", "--dtype", "bf16", "-o", "one", "--hash", "header", "--engine", "ray", "--json"
    )
    assert json.loads(one.stdout)["undigested"] and on_cluster("diff", "one", "there/half").returncode == 0


@slow
def test_the_work_of_a_worker_that_dies_is_done_by_another(on_cluster: Command, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    on_cluster("killed-once", "dit-digits", "--mark", str(mark), "-o", "out", "-q", "--engine", "ray")
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    weights = "diffusion_pytorch_model.safetensors"
    first = on_cluster("inspect", "dit-digits", "--json").stdout
    assert json.loads(first)["digest"] == json.loads(on_cluster("inspect", "out", "--json").stdout)["digest"]
    assert (tmp_path / "out" / weights).is_file()


@slow
def test_an_error_of_an_operation_comes_back_as_itself(on_cluster: Command, tmp_path: Path) -> None:
    # The folder of the mark is missing, so the operation fails before it can die.
    words = ("killed-once", "dit-digits", "--mark", str(tmp_path / "none" / "mark"), "-o", "out", "-q")
    there = on_cluster(*words, "--engine", "ray", ok=False)
    here = on_cluster(*words, ok=False)
    assert there.returncode == here.returncode != 0
    assert there.stderr == here.stderr and "Traceback" not in there.stderr
    assert not (tmp_path / "out").exists()


def test_no_cluster_is_one_clear_line(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "surgery", "cast", "dit-digits", "--dtype", "bf16", "-o", "out", "--engine", "ray"],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 5 and ended.stderr.startswith(
        "error[resource.no-cluster]: no Ray cluster at 127.0.0.1:1"
    )
    assert "Traceback" not in ended.stderr and not (tmp_path / "out").exists()
