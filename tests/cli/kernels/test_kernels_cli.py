"""`surgery kernels check` and `surgery kernels bench` as they are called."""

import json
from collections.abc import Callable

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def test_check_lists_what_was_compiled_and_says_that_nothing_ran(command: Callable) -> None:
    ended = command("kernels", "check", "--arch", "90", "--kernels", "step_backward,decode_down", "--workers", "1")
    assert ended.code == 0
    rows = [line.split() for line in ended.stdout.splitlines()[1:]]
    assert {r[0] for r in rows} == {"step_backward", "decode_down"} and {r[-1] for r in rows} == {"ok"}
    assert "none run" in ended.stderr


def test_check_as_json(command: Callable) -> None:
    ended = command("kernels", "check", "--arch", "80,120", "--kernels", "scan_counts", "--json", "-q")
    found = json.loads(ended.stdout)
    assert ended.code == 0 and found["ok"] and found["run"] is False and ended.stderr == ""
    assert [row["arch"] for row in found["compiled"]] == [80, 120]
    assert all(row["registers"] > 0 and row["stack"] == 0 for row in found["compiled"])


def test_check_fails_when_a_configuration_does(command: Callable, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.kernels.moe import tiles

    table = json.loads(tiles.SHIPPED.read_text())
    table["archs"]["sm90"]["16"]["any"]["step_backward"]["BH"] = 100  # no power of two
    (tmp_path / "tiles.json").write_text(json.dumps(table))
    monkeypatch.setenv("SURGERY_KERNEL_TILES", str(tmp_path / "tiles.json"))
    ended = command("kernels", "check", "--arch", "90", "--kernels", "step_backward", "-q")
    assert ended.code == 1
    assert "error[verify.kernels]: 1 of 1 fail: step_backward on sm90" in ended.stderr and "tiles.json" in ended.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--arch", "70"), "--arch 70: no configurations are shipped for it"),
        (("--arch", "sm90"), "'sm90' is no whole number"),
        (("--arch", ","), "names no architecture"),
        (("--arch", "90", "--kernels", "combin"), "did you mean 'combine'"),
    ],
)
def test_check_refuses_what_it_does_not_know(command: Callable, args: tuple[str, ...], message: str) -> None:
    ended = command("kernels", "check", *args)
    assert ended.code == 2 and message in ended.stderr and ended.stdout == ""


BENCH = ("kernels", "bench", "--seconds", "0.01")


def test_bench_measures_and_says_what_it_did_not(command: Callable) -> None:
    ended = command(*BENCH, "--shape", "24,32,16,8,4,2", "--backward", "--json", "-q")
    found = json.loads(ended.stdout)
    assert ended.code == 0 and found["shape"]["words"] == "T=24 H=32 I=16 C=2 k=2,2 N=8 (=4 per layer)"
    seen = {(r["backend"], r["what"], r["assignment"], r["direction"]) for r in found["rows"]}
    for backend in ("loop", "grouped_mm"):
        for direction in ("forward", "backward"):
            assert {(backend, "experts", a, direction) for a in ("balanced", "zipf", "router")} <= seen
            assert {(backend, "layer", "router", direction), (backend, "layer C=1", "router", direction)} <= seen
    assert all(r["ms"] > 0 and r["tflops"] > 0 and r["of_bmm"] > 0 and r["of_roof"] > 0 for r in found["rows"])
    assert found["roof"]["bound"] in ("compute", "memory") and found["machine"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        reasons = {row["backend"]: row["why"] for row in found["not_run"]}
        assert reasons["triton"] == "there is no CUDA device" and {"liger", "sonicmoe"} <= set(reasons)
        assert "triton" not in {r["backend"] for r in found["rows"]}


def test_bench_prints_a_table(command: Callable) -> None:
    ended = command(
        *BENCH, "--shape", "8,32,16,4,2", "--backends", "loop,triton", "--assign", "zipf", "--device", "cpu"
    )
    lines = ended.stdout.splitlines()
    assert ended.code == 0 and lines[0].startswith("T=8 H=32 I=16 C=1 k=2 N=4 (=2 per layer)  float32 on CPU")
    assert lines[3].split()[:4] == ["what", "assignment", "pass", "backend"] and "loop" in lines[4]
    assert lines[-1].startswith("not run: triton:") and "floor" in lines[1]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--shape", "8,32,16,4"), 2, "need T,H,I,N,K"),
        (("--shape", "8,32,16,4,5"), 2, "K=5 experts a token of N=4"),
        (("--shape", "8,32,16,4,2,3"), 2, "K=2 cannot be split in C=3"),
        (("--shape", "8,x,16,4,2"), 2, "'x' is no whole number"),
        (("--shape", "8,32,16,4,2", "--backends", "grouped"), 2, "did you mean 'grouped_mm'"),
        (("--shape", "8,32,16,4,2", "--assign", "fair"), 2, "--assign fair: no such name"),
        (("--shape", "8,32,16,4,2", "--dtype", "int8"), 2, "not a precision"),
        (("--shape", "8,32,16,4,2", "--device", "tpu"), 2, "neither cpu nor cuda"),
    ],
)
def test_bench_refuses_what_it_cannot_do(command: Callable, args: tuple[str, ...], code: int, message: str) -> None:
    ended = command(*BENCH, *args)
    assert ended.code == code and message in ended.stderr and ended.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_without_the_device_that_was_asked_for(command: Callable) -> None:
    ended = command(*BENCH, "--shape", "8,32,16,4,2", "--device", "cuda:0")
    assert ended.code == 5 and "there is no CUDA device" in ended.stderr
