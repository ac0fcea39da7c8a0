"""A graft that trains, stopped by a real signal in either stage: it says how to go on, and goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery.train.grafting.operator_store import OperatorStore
from surgery.train.state import TrainingState

# Runs the command line in argv[3:]; once `argv[1]` has kept its state argv[2] times it says so and waits.
WAITING = """
import sys, time

from surgery.cli.main import main
from surgery.train.grafting.operator_store import OperatorStore
from surgery.train.state import TrainingState

kind = {"operator": OperatorStore, "state": TrainingState}[sys.argv[1]]
left, save = int(sys.argv[2]), kind.save


def keep(self, *rest, **choice):
    global left
    save(self, *rest, **choice)
    left -= 1
    if left == 0:
        print("ready", flush=True)
        time.sleep(100)


kind.save = keep
sys.argv[1:] = sys.argv[3:]
main()
"""


@pytest.fixture(scope="module")
def words(tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A graft of two operators with both stages, cached stage 1, on a few images of noise."""
    data = tmp_path_factory.mktemp("few") / "few.npz"
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(data, arr_0=pixels, labels=np.arange(12) % 10)
    stages = "--samples 24 --steps 2 --batch 12 --capture cache --finetune-steps 10 --finetune-batch 4"
    return ["graft", "-r", "attn=hyena@1,3", str(tiny_dit), "--data", f"npz:{data}", *stages.split(), "-o", "out"]


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    code = "from surgery.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code, *words], cwd=folder, check=True, capture_output=True)
    return content(folder / "out")


def content(folder: Path) -> dict[str, Any]:
    """All that must be equal: bytes of the weights, and the record with the curves of both stages."""
    record = json.loads((folder / "surgery.json").read_text())
    files = {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
    return {"record": record["record"], "training": record["steps"][-1]["training"], **files}


@pytest.mark.parametrize(
    ("stage", "saves", "number", "status", "workers"),
    [
        ("operator", 1, signal.SIGINT, 130, "1"),
        ("operator", 1, signal.SIGTERM, 143, "2"),
        ("state", 4, signal.SIGINT, 130, "1"),
        ("state", 4, signal.SIGTERM, 143, "1"),
    ],
    ids=["ctrl-c in stage 1", "terminated in stage 1", "ctrl-c in stage 2", "terminated in stage 2"],
)
def test_a_graft_stopped_while_it_trains_goes_on_to_the_same_bits(
    words: list[str],
    undisturbed: dict[str, Any],
    command: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    saves: int,
    number: signal.Signals,
    status: int,
    workers: str,
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, stage, str(saves), *words, "--workers", workers],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    # A terminal sends Ctrl-C to the whole group, workers too; kill and service managers name the one process.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == status and "Traceback" not in err, err
    assert "interrupted" in err and "To go on: surgery graft" in err and "--resume" in err
    assert not (tmp_path / "out").exists() and all(p.name.startswith(".out.surgery-") for p in tmp_path.iterdir())

    kept: list[tuple[str, Any]] = []
    for kind in (OperatorStore, TrainingState):
        save = kind.save

        def counted(self: Any, first: Any, *rest: Any, _save: Any = save, _kind: Any = kind, **choice: Any) -> None:
            kept.append((_kind.__name__, first))
            _save(self, first, *rest, **choice)

        monkeypatch.setattr(kind, "save", counted)
    ended = command(*words, "--resume", "--workers", "1")
    assert ended.code == 0 and ended.stdout == "out\n", ended.stderr
    assert content(tmp_path / "out") == undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    operators = sum(name == "OperatorStore" for name, _ in kept)
    steps = [first for name, first in kept if name == "TrainingState"]
    if stage == "state":  # no operator is trained again, and no step before the state that was kept
        assert operators == 0 and min(steps) > saves
    else:  # with one worker exactly the operator that was finished is not trained again
        assert operators == 1 if workers == "1" else operators <= 1
