"""The only place that prints: data on stdout, talk on stderr, progress on terminals, names escaped."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from surgery.errors import OutputError, SurgeryError, printable

_LINE_BREAKS_KEPT = str.maketrans({c: f"\\x{c:02x}" for c in (*range(10), *range(11, 32), 127, *range(0x80, 0xA0))})
_FOLDED = 20  # texts that are longer may be folded


class Talk:
    """How much to say: set once by the global options, read by everything below."""

    quiet = False
    verbose = False


def data(text: str) -> None:
    """One line (or block) of the result, on stdout."""
    _write(sys.stdout, text.translate(_LINE_BREAKS_KEPT) + "\n")


def data_json(value: Any) -> None:
    """The result as one JSON object on stdout."""
    data(json.dumps(value, indent=2, default=_plain))  # ASCII: no name in it can reach a terminal as it is


def note(text: str) -> None:
    """Talk on stderr; silenced by -q."""
    if not Talk.quiet:
        _write(sys.stderr, text.translate(_LINE_BREAKS_KEPT) + "\n")


def warn(text: str) -> None:
    """A warning on stderr, never silenced."""
    _write(sys.stderr, f"{_paint('warning', '33;1')}: {text.translate(_LINE_BREAKS_KEPT)}\n")


def error(err: SurgeryError) -> None:
    """An error of ours: one line, and one for the hint."""
    message = " ".join(err.message.translate(_LINE_BREAKS_KEPT).split("\n"))
    _write(sys.stderr, f"{_paint(f'error[{err.code}]', '31;1')}: {message}\n")
    if err.hint:
        _write(sys.stderr, f"{_paint('hint', '36')}: {err.hint.translate(_LINE_BREAKS_KEPT)}\n")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, to_stderr: bool = False) -> None:
    """A table: drawn by rich on a terminal, aligned plain columns elsewhere. Numbers align right.

    On a narrow terminal long texts are folded; where that is not enough, columns are plain and the terminal breaks the
    lines, since a number that is cut short says something else.
    """
    cells = [[_cell(c) for c in row] for row in rows]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells if row[i]) for i in range(len(header))]
    stream = sys.stderr if to_stderr else sys.stdout
    if to_stderr and Talk.quiet:
        return
    widths = [max(len(r[i]) for r in [list(header), *cells]) for i in range(len(header))]
    if stream.isatty() and "NO_COLOR" not in os.environ and _least(widths, right) <= shutil.get_terminal_size().columns:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
        for title, is_right in zip(header, right, strict=True):
            long = not is_right and widths[len(drawn.columns)] > _FOLDED
            drawn.add_column(title, justify="right" if is_right else "left", no_wrap=not long, overflow="fold")
        for row in cells:
            drawn.add_row(*(Text(c) for c in row))
        Console(file=stream).print(drawn)
        return
    lines = []
    for row in [list(header), *cells]:
        padded = (c.rjust(w) if is_right else c.ljust(w) for c, w, is_right in zip(row, widths, right, strict=True))
        lines.append("  ".join(padded).rstrip() + "\n")
    _write(stream, "".join(lines))


def _least(widths: Sequence[int], right: Sequence[bool]) -> int:
    """How wide a table is at least, with its long texts folded."""
    return (
        sum(w if is_right else min(w, _FOLDED) for w, is_right in zip(widths, right, strict=True)) + 3 * len(widths) + 1
    )


def interval(pair: Sequence[float]) -> str:
    """The ends of an interval of shares or scores."""
    return f"[{pair[0]:.3f}, {pair[1]:.3f}]"


def change(pair: Sequence[float]) -> str:
    """The ends of an interval of differences, with their signs."""
    return f"[{pair[0]:+.3f}, {pair[1]:+.3f}]"


def share(value: float | None) -> str:
    """A share or a score of 0 to 1; n/a where there is none."""
    return "n/a" if value is None else f"{value:.3f}"


def count(n: float, unit: str = "") -> str:
    """1 234 567 as 1,234,567; bytes as KiB, MiB, GiB."""
    if unit != "B":
        return f"{n:,}{unit}"
    size = float(n)
    for name in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or name == "GiB":
            return f"{size:.0f} {name}" if name == "B" else f"{size:.1f} {name}"
        size /= 1024
    raise AssertionError


class Progress:
    """A `Report`: turns events (name, numbers) into bars on a terminal, and into rare lines elsewhere with -v.

    Understands {"step", "steps"}, {"done", "total"} and {"done", "n"}, each for one of {"operator", "operators"}; other
    numbers are shown beside the bar.
    """

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}
        self._live: Any = None
        self._last = 0.0
        self._on_terminal = sys.stderr.isatty() and not Talk.quiet

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: str, numbers: Mapping[str, float]) -> None:
        steps = "steps" in numbers
        done = numbers.get("step" if steps else "done", 0)
        total = numbers.get("steps" if steps else "total", numbers.get("n", 0))
        counters = ("done", "total", "n", "step", "steps", "operator", "operators")
        extra = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items() if k not in counters)
        if numbers.get("operators", 1) > 1:
            event = f"{event} {numbers['operator'] + 1:.0f}/{numbers['operators']:.0f}"
        now = time.monotonic()
        if self._on_terminal:
            if total and (now - self._last > 0.1 or done >= total or event not in self._bars):
                self._draw(event, done, total, extra)
                self._last = now
        elif Talk.verbose and total and (now - self._last > 5 or done >= total):
            note(f"{event}: {done:,.0f}/{total:,.0f}  {extra}".rstrip())
            self._last = now

    def _draw(self, event: str, done: float, total: float, extra: str) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._live = Progress(*columns, TextColumn("{task.fields[extra]}"), console=Console(stderr=True))
            self._live.start()
        if event not in self._bars:
            self._bars[event] = self._live.add_task(event, total=total, extra=extra)
        self._live.update(self._bars[event], completed=done, total=total, extra=extra)


def _write(stream: TextIO, text: str) -> None:
    """Write and flush; a reader that went away ends the process here, since the option parser would call it exit 1."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        leave(141)
    except OSError as err:
        if stream is sys.stdout:
            raise OutputError("not-writable", f"standard output: {err.strerror}", hint="free some space") from None


def leave(status: int) -> NoReturn:
    """End the process with both streams flushed; what cannot be said any more is not an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return printable(str(value), limit=10_000)


def _is_number(text: str) -> bool:
    return text.lstrip("+-").replace(",", "").replace(".", "", 1).rstrip("%").replace("e-", "").isdigit()


def _paint(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "items"):
        return dict(value)
    return str(value)
