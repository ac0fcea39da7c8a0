"""Every way a command can fail, as one small family of exceptions.

An error carries a dotted code, one sentence, one hint and the exit status of its class. The command line prints the
first two lines of it and nothing else; Python callers catch `SurgeryError` or a child. Nothing of ours is imported.
"""

from collections.abc import Sequence
from typing import ClassVar


class SurgeryError(Exception):
    """Base of all errors we raise on purpose.

    `code` is dotted ("checkpoint.duplicate-tensor"); its first part names the class. `message` names the file, tensor
    or option at fault; `hint` says what to do next.
    """

    status: ClassVar[int] = 1
    prefix: ClassVar[str] = "error"

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.code = f"{self.prefix}.{code}"
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"error[{self.code}]: {self.message}" + (f"\nhint: {self.hint}" if self.hint else "")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.code.removeprefix(self.prefix + "."), self.message, self.hint))


def _rebuild(kind: type[SurgeryError], code: str, message: str, hint: str) -> SurgeryError:
    return kind(code, message, hint=hint)


class Mismatch(SurgeryError):
    """Two things that should be equal are not (exit 1)."""

    status = 1
    prefix = "verify"


class Different(Mismatch):
    """Two checkpoints that were compared differ (exit 1)."""

    prefix = "diff"


class UsageError(SurgeryError):
    """The request itself is wrong: option, range, recipe key (exit 2)."""

    status = 2
    prefix = "usage"


class CheckpointError(SurgeryError):
    """An input is missing, malformed, unsafe or does not fit (exit 3)."""

    status = 3
    prefix = "checkpoint"


class OutputError(SurgeryError):
    """The output exists already or cannot be written (exit 4)."""

    status = 4
    prefix = "output"


class ResourceError(SurgeryError):
    """Not enough disk or memory, or a device or optional package is missing (exit 5)."""

    status = 5
    prefix = "resource"


class Busy(SurgeryError):
    """Another run holds the lock (exit 6)."""

    status = 6
    prefix = "busy"


class OfflineError(SurgeryError):
    """A hub id that is not cached while the network is off or out of reach (exit 7)."""

    status = 7
    prefix = "offline"


class Collapse(SurgeryError):
    """Training collapsed: the method's own criterion says that the run cannot recover (exit 8)."""

    status = 8
    prefix = "train"


class NonFiniteLoss(SurgeryError):
    """A loss became NaN or infinite (exit 9)."""

    status = 9
    prefix = "train"


def wrong_tensors(name: str, faults: Sequence[str]) -> CheckpointError:
    """Weights of `name` that do not belong to their config: what is wrong with the first three, and how many more."""
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    what = f"{name}: {'; '.join(faults[:3])}{more}"
    return CheckpointError("wrong-tensors", what, hint="weights and config.json do not belong together")


def closest(name: str, known: list[str], *, limit: int = 3) -> str:
    """The known names most like `name`, as the tail of a hint; all of them when there are few or none is near."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=limit, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "known: " + ", ".join(known[:24])


def printable(text: str, *, limit: int = 200) -> str:
    """`text` made safe to print: control, format and surrogate characters become escapes, long text is cut.

    Names of tensors and files come from strangers; an escape sequence in one must not reach a terminal.
    """
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text  # headers of a hundred thousand names come through here

    import unicodedata

    safe = "".join(
        c if c == " " or unicodedata.category(c)[0] not in "CZ" else c.encode("unicode_escape").decode()
        for c in text[:limit]
    )
    return safe if len(safe) <= limit and len(text) <= limit else safe[: limit - 1] + "…"
