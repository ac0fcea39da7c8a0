"""The machine that a run has: its devices, and what a record says of it.

torch is imported only to look for a device that is no CPU.
"""

import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

from surgery import __version__
from surgery.errors import ResourceError, UsageError, printable


def machine() -> dict[str, str]:
    """Versions and the kind of processor, as records have them."""
    return {
        "surgery": __version__,
        "python": platform.python_version(),
        "torch": installed("torch"),
        "processor": _processor(),
    }


@cache
def installed(package: str) -> str:
    """The version of a package, "not installed" without one."""
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"


def check_device(device: str) -> None:
    """Refuse a device that is not there; "cpu" costs no import."""
    if device == "cpu":
        return
    kind = device.split(":")[0]
    if kind not in ("cuda", "mps", "xpu"):
        raise UsageError("device", f"unknown device '{printable(device)}'", hint="cpu, cuda, cuda:0, mps")
    import torch

    backend = getattr(torch, kind, None) or getattr(torch.backends, kind)
    if not backend.is_available():
        raise ResourceError("no-device", f"no {kind} device is available here", hint="use --device cpu")


def _processor() -> str:
    """The kind of processor as its maker numbers it: libraries of matrix work choose their order of sums by it."""
    words = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return words[0]
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    keys = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    return printable(" ".join(words + [found[key] for key in keys if key in found]))
