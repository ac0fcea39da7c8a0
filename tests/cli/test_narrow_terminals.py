"""Tables on a narrow terminal: no number is cut short."""

import fcntl
import json
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest


def on_a_terminal(columns: int, *args: str | Path) -> str:
    """What a command writes to a terminal so wide."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.pop("COLUMNS", None)
        os.execv(sys.executable, [sys.executable, "-m", "surgery", *map(str, args)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    said = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:
            break
        if not piece:
            break
        said += piece
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, said
    return said.decode()


@pytest.mark.parametrize("columns", [60, 104, 160])
def test_numbers_are_whole_at_any_width(columns: int, tmp_path: Path) -> None:
    head = {"surgery_records": 1, "kind": "vqa", "settings": {"model": "m"}}
    words = " ".join(f"word{n}" for n in range(8))
    rows = [{"id": str(n), "correct": n % 3 > 0, "extracted": words, "answer": "1", "groups": {}} for n in range(9)]
    for name, wrong in (("a", 0), ("b", 1)):
        lines = [head, *({**r, "correct": r["correct"] != (wrong and r["id"] == "4")} for r in rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = on_a_terminal(columns, "eval", "compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for number in ("0.6667", "0.5556", "-0.1111", "[-0.333, +0.000]"):
        assert number in said.replace("\x1b", "\n"), said
    assert "…" not in said
