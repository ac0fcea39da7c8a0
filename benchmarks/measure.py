"""Run a command as a whole process: CPU seconds from the kernel, peak anonymous memory by polling."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Compiled modules are kept, as on a user's machine; where they are not, every start compiles all sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
SURGERY = [sys.executable, "-m", "surgery"]


@dataclass(frozen=True)
class Cost:
    """CPU and wall seconds, peak anonymous resident memory in bytes, exit status."""

    cpu: float
    wall: float
    anonymous: int
    status: int


def run(command: Sequence[str], *, cwd: Path | None = None, watch: bool = True) -> Cost:
    """Run once; output goes nowhere. Without `watch` memory is not looked at, which takes time of a core that the
    command may have use for."""
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG if watch else 0)
        if pid:
            break
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - started, peak, process.returncode)


def median(command: Sequence[str], *, runs: int = 5) -> Cost:
    """The run with the median CPU time, after one that is not counted. Raises SystemExit when the command fails."""
    run(command)
    costs = [run(command) for _ in range(runs)]
    if any(c.status for c in costs):
        raise SystemExit(f"failed: {' '.join(command)}")
    middle = statistics.median_low(c.cpu for c in costs)
    return next(c for c in costs if c.cpu == middle)


def _anonymous(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def finish(name: str, rows: list[dict[str, object]]) -> None:
    """Print the rows (as JSON with --json); exit 1 when a limit is passed."""
    if "--json" in sys.argv:
        print(
            json.dumps(
                {"benchmark": name, "python": platform.python_version(), "machine": platform.machine(), "rows": rows},
                indent=2,
            )
        )
    else:
        for row in rows:
            mark = "ok  " if row["ok"] else "OVER"
            limit = "no limit" if row["limit"] is None else f"limit {row['limit']}"
            print(f"{mark} {row['what']}: {row['value']} {row['unit']} ({limit})   {row['note']}".rstrip())
    if not all(row["ok"] for row in rows):
        raise SystemExit(1)


def row(what: str, value: float, unit: str, limit: float | None, note: str = "") -> dict[str, object]:
    """One figure against its limit; None: it has none, and stands there to be known."""
    ok = limit is None or value <= limit
    return {"what": what, "value": round(value, 3), "unit": unit, "limit": limit, "ok": ok, "note": note}
