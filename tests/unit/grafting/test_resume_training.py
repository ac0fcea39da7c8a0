"""Training that was stopped and goes on: the same bits, nothing done twice, nothing half-published."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery.errors import NonFiniteLoss, OutputError
from surgery.graph.op import Op
from surgery.graph.run import RunOptions, RunResult, run_op, silent
from surgery.ops.graft import Graft
from surgery.ops.train_diffusion import TrainDiffusion
from surgery.store.checkpoint import Checkpoint, open_checkpoint

STAGE_1: dict[str, Any] = {"samples": 48, "steps": 3, "batch": 48, "init": "distill"}
STAGE_2: dict[str, Any] = {"finetune_steps": 12, "finetune_batch": 4}


class Stop(BaseException):
    """What a signal does to a run, at a chosen moment."""


def stop_at(event: str, **numbers: float) -> Callable[[str, Mapping[str, float]], None]:
    """A report that ends the run when `event` comes with these numbers."""

    def report(name: str, given: Mapping[str, float]) -> None:
        if name == event and all(given.get(k) == v for k, v in numbers.items()):
            raise Stop

    return report


@pytest.fixture(scope="module")
def base(tiny_dit: Path) -> Checkpoint:
    return open_checkpoint(tiny_dit)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few images of noise: what is learned does not matter here."""
    path = tmp_path_factory.mktemp("data") / "few.npz"
    pixels = np.random.default_rng(0).integers(0, 255, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(path, arr_0=pixels, labels=np.arange(30) % 10)
    return f"npz:{path}"


def run(
    op: Op, base: Checkpoint, out: Path, *, resume: bool = False, report: Any = silent, workers: int = 1
) -> RunResult:
    return run_op(op, [base], out, options=RunOptions(resume=resume, workers=workers), report=report)


def content(result: RunResult) -> tuple[Any, ...]:
    """What must be equal: every digest and all that was recorded of the training."""
    step = result.record["steps"][-1]
    return result.record["digest"], result.record["record"], step["training"], step["key"]


@pytest.mark.parametrize(
    ("event", "numbers"),
    [
        ("capture", {}),
        ("stage1", {"operator": 1, "step": 0}),
        ("stage2", {"step": 7}),
    ],
    ids=["recording", "second-operator", "stage-2"],
)
def test_a_stopped_graft_resumes_to_the_same_bits(
    base: Checkpoint, data: str, tmp_path: Path, whole: RunResult, event: str, numbers: dict[str, float]
) -> None:
    op = graft(data)
    with pytest.raises(Stop):
        run(op, base, tmp_path / "g", report=stop_at(event, **numbers))
    assert not (tmp_path / "g").exists()
    resumed = run(op, base, tmp_path / "g", resume=True)
    assert content(resumed) == content(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["g"]


def graft(data: str) -> Graft:
    return Graft(replace=("attn=hyena@1,3",), data=data, **STAGE_1, **STAGE_2)


@pytest.fixture(scope="module")
def whole(base: Checkpoint, data: str, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The run that nothing disturbed."""
    return run(graft(data), base, tmp_path_factory.mktemp("whole") / "g")


def test_finished_operators_and_steps_are_not_done_again(base: Checkpoint, data: str, tmp_path: Path) -> None:
    op = graft(data)
    seen: list[tuple[str, float]] = []
    with pytest.raises(Stop):
        run(op, base, tmp_path / "g", report=stop_at("stage2", step=9))
    run(op, base, tmp_path / "g", resume=True, report=lambda e, n: seen.append((e, n.get("step", 0))))
    assert not [e for e, _ in seen if e in ("capture", "stage1")]
    steps = [s for e, s in seen if e == "stage2"]
    assert steps[0] > 1 and steps[-1] == 12


def test_another_command_does_not_resume_this_one(base: Checkpoint, data: str, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(graft(data), base, tmp_path / "g", report=stop_at("stage1", operator=1, step=0))
    other = Graft(replace=("attn=hyena@1,3",), data=data, **{**STAGE_1, "steps": 4})
    with pytest.raises(OutputError, match="unfinished run"):
        run(other, base, tmp_path / "g", resume=True)


def test_stopped_training_resumes_to_the_same_bits(base: Checkpoint, data: str, tmp_path: Path) -> None:
    op = TrainDiffusion(data=data, steps=20, batch=4, val_every=5)
    undisturbed = run(op, base, tmp_path / "a")
    with pytest.raises(Stop):
        run(op, base, tmp_path / "b", report=stop_at("stage2", step=13))
    assert content(run(op, base, tmp_path / "b", resume=True)) == content(undisturbed)


@pytest.mark.parametrize("steps", [1, 6])
def test_training_that_ends_in_nonsense_is_not_published(
    base: Checkpoint, data: str, tmp_path: Path, steps: int
) -> None:
    """Also when it is the last step that spoils the weights, after which no loss is taken."""
    op = TrainDiffusion(data=data, steps=steps, batch=4, lr=1e30, warmup=0, val_every=0)
    with pytest.raises(NonFiniteLoss):
        run(op, base, tmp_path / "t")
    assert not (tmp_path / "t").exists()


# --- real processes --------------------------------------------------------------------------------------------------


def _start(tiny_dit: Path, data: str, cwd: Path, *more: str) -> "subprocess.Popen[str]":
    args = ["graft", "-r", "attn=hyena", "-l", "1,3", str(tiny_dit), "--data", data, "--init", "distill", "-o", "g"]
    args += ["--samples", "256", "--steps", "40", "--batch", "32", "--finetune-steps", "20", "--finetune-batch", "16"]
    return subprocess.Popen(
        [sys.executable, "-m", "surgery", *args, *more],
        cwd=cwd,
        stdout=-1,
        stderr=-1,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )


def _wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    for _ in range(1200):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.1)


def _forked(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _lives(pid: int) -> bool:
    """Whether there is such a process that has not ended; one that waits for its parent to ask is dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_process_leaves_no_target_and_no_children_and_resumes_to_the_same_bits(
    tiny_dit: Path, data: str, tmp_path: Path, number: signal.Signals, workers: str
) -> None:
    (tmp_path / "whole").mkdir()
    whole = _start(tiny_dit, data, tmp_path / "whole")
    out, err = whole.communicate(timeout=600)
    assert (whole.returncode, out) == (0, "g\n"), err
    process = _start(tiny_dit, data, tmp_path, "--workers", workers)
    _wait_for(lambda: bool(list(tmp_path.glob(".g.surgery-*/scratch/stage1/operators/*"))), process)
    children = _forked(process.pid)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, err = process.communicate(timeout=60)
    codes = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
    assert process.returncode == codes[number], err
    assert "Traceback" not in err and not (tmp_path / "g").exists()
    if number != signal.SIGKILL:
        assert "--resume" in err
    for _ in range(100):  # a loaded machine takes its time to bury them
        if not any(map(_lives, children)):
            break
        time.sleep(0.1)
    assert not [c for c in children if _lives(c)]
    resumed = _start(tiny_dit, data, tmp_path, "--workers", workers, "--resume")
    out, err = resumed.communicate(timeout=600)
    assert (resumed.returncode, out) == (0, "g\n"), err
    assert open_checkpoint(tmp_path / "g").digest == open_checkpoint(tmp_path / "whole" / "g").digest
