"""Killed at any moment: the target is absent or whole, and what a later run makes is what an undisturbed one makes."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery.graph.run import RunOptions, run_op
from surgery.ops.init import Init
from surgery.store import writer
from surgery.store.journal import read_journal
from surgery.store.writer import PlannedFile, Workspace

KEY = "0123456789ab" + "c" * 52
WEIGHTS = "diffusion_pytorch_model.safetensors"
CALLS = ("open", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "posix_fallocate")
CALLS = (*CALLS, "rename", "mkdir", "unlink", "rmdir")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# At every system call


def write(target: Path, *, mark: bytes = b"new", resume: bool = False, overwrite: bool = False) -> None:
    """A run of two files and four tensors, each journalled as soon as it is written."""
    with Workspace(target, KEY, resume=resume, overwrite=overwrite) as space:
        files = [
            PlannedFile.plan(f"model-{n}.safetensors", [("a", "U8", (5,)), ("b", "U8", (3,))], metadata={})
            for n in "12"
        ]
        for file in files:
            space.begin_file(file)
        for file in files:
            for name, (_, count) in file.places.items():
                if f"{file.relative}\0{name}" in space.done:
                    continue
                data = (mark + name.encode() * count)[:count]
                space.write(file, name, data)
                space.note(file.relative, name, hashlib.sha256(data).hexdigest(), count)
                space.sync()
        space.put_file("config.json", mark)
        space.put_file("surgery.json", b"{}")
        space.publish()


def killed_before(call: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that is killed before its `call`-th call to the disk; False when it ended first."""
    child = os.fork()
    if child == 0:
        left = call

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def counting(*args: object, **choice: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **choice)

            return counting

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote, so these tests need not wait for the disk."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    write(folder)
    return tree(folder)


def every_call(folder: Path, work: Callable[[Path], None], check: Callable[[Path], None], *, step: int = 1) -> int:
    """Kill `work` before each of its calls, in a folder of its own, and `check` what is left; returns the count."""
    for call in range(1, 500, step):
        place = folder / str(call)
        place.mkdir()
        dead = killed_before(call, lambda place=place: work(place / "out"))  # type: ignore[misc]
        check(place)
        if not dead:
            return call
    raise AssertionError("the work never ended")


@pytest.mark.usefixtures("no_waiting")
def test_a_run_killed_at_any_call_leaves_no_half_target_and_is_resumed_to_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    finished = []

    def check(place: Path) -> None:
        target = place / "out"
        finished.append(target.exists())
        if target.exists():
            assert tree(target) == undisturbed
        else:
            assert not [n for n in names(place) if not n.startswith(".")]
            write(target, resume=True)
            assert tree(target) == undisturbed and names(place) == ["out"]

    assert every_call(tmp_path, write, check) > 30
    assert finished.count(False) > 25 and finished == sorted(finished)


@pytest.mark.usefixtures("no_waiting")
def test_a_run_killed_twice_is_resumed_to_the_same_bytes(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    def check(place: Path) -> None:
        if not (place / "out").exists():
            for call in (9, 4):
                killed_before(call, lambda: write(place / "out", resume=True))
        if not (place / "out").exists():
            write(place / "out", resume=True)
        assert tree(place / "out") == undisturbed

    every_call(tmp_path, write, check, step=4)


@pytest.mark.usefixtures("no_waiting")
def test_an_overwrite_killed_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    def work(target: Path) -> None:
        write(target, overwrite=True)

    write(tmp_path / "old" / "out", mark=b"old")
    old = tree(tmp_path / "old" / "out")
    for call in range(1, 500):
        place = shutil.copytree(tmp_path / "old", tmp_path / str(call))
        dead = killed_before(call, lambda place=place: work(place / "out"))  # type: ignore[misc]
        assert tree(place / "out") in (old, undisturbed)
        work(place / "out")
        assert tree(place / "out") == undisturbed and names(place) == ["out"]
        if not dead:
            return
    raise AssertionError("the work never ended")


@pytest.mark.usefixtures("no_waiting")
def test_an_overwrite_by_two_renames_killed_at_any_call_is_repaired(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoExchange:
        pass

    monkeypatch.setattr(writer.ctypes, "CDLL", lambda *_, **__: NoExchange())
    write(tmp_path / "old" / "out", mark=b"old")
    old = tree(tmp_path / "old" / "out")
    for call in range(1, 500):
        place = shutil.copytree(tmp_path / "old", tmp_path / str(call))
        dead = killed_before(call, lambda place=place: write(place / "out", overwrite=True))  # type: ignore[misc]
        with Workspace(place / "out", KEY, resume=True, overwrite=True):
            assert tree(place / "out") in (old, undisturbed)  # repaired as soon as the lock is held
        write(place / "out", overwrite=True)
        assert tree(place / "out") == undisturbed and names(place) == ["out"]
        if not dead:
            return
    raise AssertionError("the work never ended")


# The command itself


SLOW = """
import sys, time

from surgery.cli.main import main
from surgery.ops.init import Init
from surgery.store import writer

writer._SYNC_SECONDS = 0.0  # journal every tensor at once
draw, count = Init.run, 0


def slowly(self, *rest):
    global count
    count += 1
    if count == 40:
        print("ready", flush=True)
    if count >= 40:
        time.sleep(0.5)
    return draw(self, *rest)


Init.run = slowly
main()
"""


def stopped(folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Start `surgery init dit-digits -o out`, stop it by a signal in the middle; its exit status and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "init", "dit-digits", "-o", "out"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `kill -9` leaves. Read only."""
    folder = tmp_path_factory.mktemp("killed")
    assert stopped(folder, signal.SIGKILL)[0] == -signal.SIGKILL
    return folder


@pytest.fixture
def place(killed: Path, tmp_path: Path) -> Path:
    """A copy of what `kill -9` left, as the current folder."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return tmp_path


def run_folder(place: Path) -> Path:
    (found,) = (p for p in place.iterdir() if re.fullmatch(r"\.out\.surgery-[0-9a-f]{12}", p.name))
    return found


def reused(stderr: str) -> int:
    found = re.search(r"resumed: (\d+) tensors were reused", stderr)
    return int(found[1]) if found else 0


def test_a_killed_command_leaves_hidden_files_only(killed: Path) -> None:
    assert all(name.startswith(".out.surgery") for name in names(killed))
    assert (run_folder(killed) / "journal.jsonl").is_file()


def test_the_same_command_with_resume_finishes_to_the_same_bytes(
    place: Path, tiny_dit: Path, command: Callable
) -> None:
    ended = command("init", "dit-digits", "-o", "out", "--resume")
    assert ended.code == 0 and ended.stdout == "out\n" and 30 <= reused(ended.stderr) < 120
    made, expected = tree(place / "out"), tree(tiny_dit)
    assert made.keys() == expected.keys() and made[WEIGHTS] == expected[WEIGHTS]
    records = [json.loads(t["surgery.json"]) for t in (made, expected)]
    assert records[0]["record"] == records[1]["record"] and names(place) == ["out"]


def test_reused_tensors_are_not_computed_again(place: Path, command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = Init.run
    monkeypatch.setattr(Init, "run", lambda self, task, *rest: drawn.append(task.name) or real(self, task, *rest))
    ended = command("init", "dit-digits", "-o", "out", "--resume")
    assert len(drawn) == len(set(drawn)) == 120 - reused(ended.stderr)


def test_without_resume_the_command_starts_over(place: Path, tiny_dit: Path, command: Callable) -> None:
    ended = command("init", "dit-digits", "-o", "out")
    assert ended.code == 0 and reused(ended.stderr) == 0
    assert (place / "out" / WEIGHTS).read_bytes() == (tiny_dit / WEIGHTS).read_bytes() and names(place) == ["out"]


@pytest.mark.parametrize("change", [["--seed", "1"], ["--dtype", "bf16"]], ids=["seed", "dtype"])
def test_resume_of_another_plan_is_refused_and_keeps_the_run(place: Path, command: Callable, change: list[str]) -> None:
    before = tree(run_folder(place))
    ended = command("init", "dit-digits", "-o", "out", "--resume", *change)
    assert (
        ended.code == 4 and "error[output.changed-plan]" in ended.stderr and "hint: repeat the command" in ended.stderr
    )
    assert tree(run_folder(place)) == before and not (place / "out").exists()


def test_another_shard_size_is_resumed_without_leftovers(place: Path, command: Callable) -> None:
    ended = command("init", "dit-digits", "-o", "out", "--resume", "--shard-size", "500kB")
    assert ended.code == 0
    files = [n for n in names(place / "out") if n.endswith(".safetensors")]
    assert len(files) > 3 and WEIGHTS not in files
    assert command("verify", "out").code == 0


def tamper(place: Path) -> None:
    """Overwrite all tensor bytes of the unfinished file."""
    file = run_folder(place) / "out" / WEIGHTS
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with open(file, "r+b") as handle:
        handle.seek(start)
        handle.write(b"\xff" * (file.stat().st_size - start))


def test_half_written_data_that_was_tampered_with_is_not_trusted(
    place: Path, tiny_dit: Path, command: Callable
) -> None:
    tamper(place)
    ended = command("init", "dit-digits", "-o", "out", "--resume")
    assert ended.code == 0 and reused(ended.stderr) == 0
    assert (place / "out" / WEIGHTS).read_bytes() == (tiny_dit / WEIGHTS).read_bytes()


def test_what_was_found_tampered_is_struck_from_the_journal_before_it_is_overwritten(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(place)
    journal = run_folder(place) / "journal.jsonl"
    key = json.loads(journal.read_text().splitlines()[0])["key"]

    def struck(*_: object) -> None:
        assert read_journal(journal, key) == {}
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.graph.run._train", struck)
    with pytest.raises(KeyboardInterrupt):
        run_op(Init("dit-digits"), [], place / "out", options=RunOptions(resume=True))


@pytest.mark.parametrize("torn", [b'{"file": "diffusion_pyt', b"\0" * 4096, b"\xff\xfe\n{"])
def test_a_torn_line_of_the_journal_is_tolerated(place: Path, tiny_dit: Path, command: Callable, torn: bytes) -> None:
    with open(run_folder(place) / "journal.jsonl", "ab") as handle:
        handle.write(torn)
    ended = command("init", "dit-digits", "-o", "out", "--resume")
    assert ended.code == 0 and reused(ended.stderr) >= 30
    assert (place / "out" / WEIGHTS).read_bytes() == (tiny_dit / WEIGHTS).read_bytes()


def test_a_lost_journal_means_starting_over(place: Path, tiny_dit: Path, command: Callable) -> None:
    (run_folder(place) / "journal.jsonl").unlink()
    ended = command("init", "dit-digits", "-o", "out", "--resume")
    assert ended.code == 0 and reused(ended.stderr) == 0
    assert (place / "out" / WEIGHTS).read_bytes() == (tiny_dit / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_with_its_status_and_says_how_to_go_on(
    tmp_path: Path, tiny_dit: Path, command: Callable, number: signal.Signals, status: int
) -> None:
    code, err = stopped(tmp_path, number)
    assert code == status and "Traceback" not in err
    assert "interrupted" in err and "To go on: surgery init dit-digits -o out --resume" in err
    assert all(name.startswith(".out.surgery") for name in names(tmp_path)) and ".out.surgery.lock" not in names(
        tmp_path
    )
    ended = command("init", "dit-digits", "-o", "out", "--resume")
    assert reused(ended.stderr) >= 30
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tiny_dit / WEIGHTS).read_bytes() and names(tmp_path) == ["out"]


def test_an_interrupt_that_falls_into_a_destructor_is_not_lost() -> None:
    """Python prints and drops what a destructor raises; the run would go on as if nobody had pressed Ctrl-C."""
    code = (
        "import os, signal, time\n"
        "from surgery.cli.main import _heed_signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "_heed_signals()\n"
        "class Unlucky:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.001)\n"
        "try:\n"
        "    x = Unlucky()\n"
        "    del x\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('heard')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("heard\n", "", 0)
