"""The executor: memory is a promise, order is that of the files, and nothing depends on the number of workers."""

import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import CheckpointError, SurgeryError
from surgery.graph.engine import budget, local, work
from surgery.graph.engine.work import Joined, Made, Resources, Unit, chunk_rows, join, peak_of
from surgery.graph.op import Compute
from surgery.graph.run import RunOptions, run_op
from surgery.ops.cast import Cast
from surgery.store.checkpoint import open_checkpoint
from surgery.store.ranges import copy_range
from surgery.store.tensors import TensorRef


def unit(name: str, peak: int) -> Unit:
    return Unit(name, TensorRef(name, "U8", (1,), "f", 0, 1), "U8", (1,), 1, (), peak)


def recorded(monkeypatch: pytest.MonkeyPatch, *, seconds: float = 0.002) -> dict[str, Any]:
    """Replace the work itself by a short sleep; what runs at once is written down."""
    seen: dict[str, Any] = {"now": {}, "most": 0, "order": [], "together": []}
    lock = threading.Lock()

    def carry_out(job: Unit, pickles: object) -> dict[str, str]:
        with lock:
            seen["now"][job.name] = job.peak
            seen["most"] = max(seen["most"], sum(seen["now"].values()))
            seen["order"].append(job.name)
            seen["together"].append(set(seen["now"]))
        time.sleep(seconds)
        with lock:
            del seen["now"][job.name]
        return {job.name: "sha"}

    monkeypatch.setattr(local, "carry_out", carry_out)
    return seen


def run(jobs: list[Unit], **resources: Any) -> list[str]:
    done: list[str] = []
    local.run_jobs(jobs, lambda job, result: done.append(job.name), resources=Resources(**resources))
    return done


MB = 1 << 20


def test_running_jobs_together_never_exceed_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    jobs = [unit(f"n{i}", (1 + i * 7 % 5) * MB) for i in range(40)]
    assert sorted(run(jobs, workers=4, budget=6 * MB)) == sorted(j.name for j in jobs)
    assert 2 * MB < seen["most"] <= 6 * MB


def test_a_job_larger_than_the_budget_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    jobs = [unit("a", MB), unit("b", MB), unit("large", 9 * MB), unit("c", MB), unit("d", MB)]
    assert len(run(jobs, workers=4, budget=3 * MB)) == 5
    assert [names for names in seen["together"] if "large" in names] == [{"large"}]


@pytest.mark.parametrize("allowed", [0, -5])
def test_without_any_room_jobs_run_one_by_one(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    seen = recorded(monkeypatch)
    assert len(run([unit(f"n{i}", MB) for i in range(6)], workers=3, budget=allowed)) == 6
    assert max(map(len, seen["together"])) == 1


def test_jobs_start_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, seconds=0)
    names = [f"n{i}" for i in range(100)]
    run([unit(n, MB) for n in names], workers=1)
    assert seen["order"] == names


def test_a_fault_stops_the_rest_and_what_ran_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def carry_out(job: Unit, pickles: object) -> dict[str, str]:
        started.append(job.name)
        if job.name == "n3":
            raise CheckpointError("bad-plan", "no")
        time.sleep(0.01)
        return {job.name: "sha"}

    monkeypatch.setattr(local, "carry_out", carry_out)
    told: list[str] = []
    with pytest.raises(CheckpointError):
        local.run_jobs(
            [unit(f"n{i}", MB) for i in range(50)],
            lambda job, result: told.append(job.name),
            resources=Resources(workers=2),
        )
    assert len(started) < 10 and sorted([*told, "n3"]) == sorted(started)


def test_an_interrupt_lets_running_jobs_end_and_tells_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, seconds=0.01)
    told: list[str] = []

    def finished(job: Any, result: object) -> None:
        told.append(job.name)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.run_jobs([unit(f"n{i}", MB) for i in range(60)], finished, resources=Resources(workers=2))
    assert sorted(told) == sorted(seen["order"]) and len(told) < 12 and not seen["now"]


def test_peaks_count_inputs_output_and_scratch_one_input_after_the_other() -> None:
    a, b = (TensorRef(n, "F32", (10,), "f", 0, 40) for n in "ab")
    task = Compute(name="c", dtype="F32", shape=(10,), how=None, refs=(a, b), scratch=7)
    made = Made(Cast("bf16"), task, (a, b), 0)
    assert peak_of(made) == 40 + 40 + 40 + 7
    outer = Made(Cast("bf16"), task, (a, made), 0)
    assert peak_of(outer) == 40 + (40 + 40 + 40 + 7)  # while the inner one is made, the first input is held


def test_a_slice_of_something_joined_is_made_of_its_pieces() -> None:
    a, b = (TensorRef(n, "U8", (10,), n, 100, 10) for n in "ab")
    whole = Joined("U8", (20,), 20, ((a, 0, 10), (b, 0, 10)))
    cut = join("U8", (8,), 8, ((whole, 6, 14),))
    assert cut.pieces == ((a, 6, 10), (b, 0, 4))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {f"h.{i}.w": torch.randn(64, 33) for i in range(12)} | {"emb": torch.randn(5000, 40)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def cast(model: Path, out: Path, **options: Any) -> Any:
    return run_op(Cast("bfloat16"), [open_checkpoint(model)], out, options=RunOptions(**options))


def test_large_tensors_of_a_row_wise_operation_are_made_in_pieces_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cast(model, tmp_path / "whole")
    monkeypatch.setattr(work, "CHUNK", 10_000)
    ref = open_checkpoint(model).tensors["emb"]
    task = Compute(name="emb", dtype="BF16", shape=ref.shape, how="BF16", refs=(ref,), scratch=0)
    source = Made(Cast("bfloat16"), task, (ref,), 0)
    assert chunk_rows(source) == 125 and peak_of(source) < 40_000
    pieces = cast(model, tmp_path / "pieces")
    assert pieces.record["digest"] == whole.record["digest"]
    got = load_file(tmp_path / "pieces/model.safetensors")["emb"]
    assert torch.equal(got, load_file(model / "model.safetensors")["emb"].to(torch.bfloat16))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_does_not_show_in_the_bytes(model: Path, tmp_path: Path, workers: int) -> None:
    cast(model, tmp_path / "out", workers=workers)
    cast(model, tmp_path / "one", workers=1)
    one, out = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "out"))
    assert hashlib.sha256(one).digest() == hashlib.sha256(out).digest()


def test_a_parent_that_changes_while_it_is_read_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = local.carry_out

    def meddling(job: Any, pickles: Any) -> dict[str, str]:
        with open(model / "model.safetensors", "r+b") as handle:
            handle.seek(-1, 2)
            handle.write(b"\1")
        return real(job, pickles)

    monkeypatch.setattr(local, "carry_out", meddling)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        cast(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fault_inside_an_operation_names_tensor_operation_and_shapes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cast, "run", lambda self, task, tensors, generator: tensors[0] @ tensors[0])
    with pytest.raises(SurgeryError, match=r"cast could not make '[^']+' from float32\[\d+, \d+\]: "):
        cast(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_memory_budget_follows_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemAvailable:   1000000 kB\n",
        "/proc/self/cgroup": "0::/job/step\n",
        "/sys/fs/cgroup/job/memory.max": "100000000\n",
        "/sys/fs/cgroup/job/memory.current": "60000000\n",
        "/sys/fs/cgroup/job/memory.stat": "anon 5\ninactive_file 10000000\n",
        "/sys/fs/cgroup/job/step/memory.max": "max\n",
        "/proc/self/status": "RssAnon:\t   1000 kB\n",
    }
    monkeypatch.setattr(budget, "_read", lambda path: files.get(path, ""))
    assert budget.available_memory() == 50_000_000
    assert budget.memory_budget(None) == 30_000_000
    assert budget.memory_budget(2_000_000) == 2_000_000 - 1_024_000


def test_a_range_copy_goes_on_where_the_kernel_stops(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(200)))
    with open(tmp_path / "a", "rb") as source, open(tmp_path / "b", "w+b") as target:
        copy_range(source.fileno(), 10, target.fileno(), 0, 100)
    assert (tmp_path / "b").read_bytes() == bytes(range(10, 110))


def test_a_process_stays_within_the_memory_it_was_allowed(tmp_path: Path) -> None:
    """A cast of tensors that would take twice the limit with four workers at once."""
    import subprocess
    import sys

    save_file({f"w{i}": torch.ones(2048, 1024) for i in range(8)}, tmp_path / "m.safetensors")
    script = (
        "import sys\nfrom surgery.cli.main import main\ntry:\n    main()\nfinally:\n"
        "    print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )

    def peak(*words: str) -> int:
        command = [
            sys.executable,
            "-c",
            script,
            "cast",
            "--dtype",
            "bf16",
            "m.safetensors",
            "-q",
            "--workers",
            "4",
            *words,
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stderr.split()[-1]) * 1024

    alone = peak("-o", "alone", "--workers", "1")
    together = peak("-o", "together")
    limited = peak("-o", "limited", "--max-memory", "1MB")  # no room beside torch: one tensor at a time
    assert limited - alone < 12 * MB < together - alone
