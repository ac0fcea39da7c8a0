"""How much memory a run may take: what is free on this machine and in its control group, or what the user said."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

SHARE = 0.6  # of the memory that is available, where nothing else is asked for
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory() -> int:
    """Bytes that a new allocation can have: the kernel's estimate, bounded by the limits of the control groups that
    this process is in."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit_file, used_file in (*_own_groups(), *_CGROUPS):
        limit, used = _read(limit_file).strip(), _read(used_file).strip()
        if limit.isdecimal() and used.isdecimal():  # "max" is no limit
            free = min(free, max(0, int(limit) - int(used) + _inactive(Path(used_file).parent)))
    return free


def memory_budget(limit: int | None) -> int:
    """Bytes that running tasks may hold together. `limit` bounds the whole process: what it holds already (torch, the
    plan) counts. Zero or less: not even one task fits, so each runs alone."""
    if limit is None:
        return int(SHARE * available_memory())
    return limit - held_memory()


def held_memory() -> int:
    """Bytes of memory of this process that are its own: no file is behind them."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def return_freed_memory() -> None:
    """Let the allocator give large blocks back as soon as they are free: glibc raises by itself the size from which it
    does, and a process then holds more than what its tensors need."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, bytes


def _own_groups() -> list[tuple[str, str]]:
    """The limit and use of this process's own control group and those above it (version 2)."""
    path = next((line[3:] for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::/")), "")
    found = []
    while path.strip("/"):
        folder = f"/sys/fs/cgroup{path}"
        found.append((f"{folder}/memory.max", f"{folder}/memory.current"))
        path = path.rpartition("/")[0]
    return found


def _inactive(folder: Path) -> int:
    """Page cache that the group can drop at once."""
    for line in _read(str(folder / "memory.stat")).splitlines():
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
