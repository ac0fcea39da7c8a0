"""What every refused command says: one error line with its code, one hint, no traceback, nothing on stdout."""

from typing import Any


def said_one_error(ended: Any, code: str, *words: str) -> str:
    """Check that of a command that `ended`; notes may stand before, and each of `words` must stand somewhere. Returns
    the error line."""
    lines = ended.stderr.splitlines()
    assert [line for line in lines if line.startswith("error[")] == lines[-2:-1], ended.stderr
    assert lines[-2].startswith(f"error[{code}]: "), ended.stderr
    assert lines[-1].startswith("hint: ") and len(lines[-1]) > len("hint: "), ended.stderr
    assert "Traceback" not in ended.stderr and ended.stdout == ""
    assert all(word in ended.stderr for word in words), ended.stderr
    return str(lines[-2])
