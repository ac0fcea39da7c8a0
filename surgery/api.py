"""The public Python calls, behind the lazy names of the package."""

from pathlib import Path
from typing import Any

from surgery.graph.op import build_op, check_parents
from surgery.graph.run import RunOptions, RunResult, run_op
from surgery.ops.table import load_op
from surgery.store.checkpoint import Checkpoint
from surgery.store.names import open_named

__all__ = ["apply", "load", "open"]


def open(name: str | Path, *, offline: bool = False) -> Checkpoint:
    """Open a checkpoint by path, alias or hub id, reading headers and configs only."""
    return open_named(str(name), offline=offline)


def load(name: str | Path | Checkpoint) -> Any:
    """The diffusion transformer of a checkpoint as a torch module in evaluation mode, grafted operators in place.

    No code from the folder is run: operators are looked up in this package, an unknown one is refused.
    """
    from surgery.arch.dit.checkpoints import load_model

    return load_model(name if isinstance(name, Checkpoint) else open(name))


def apply(
    op: str,
    *parents: str | Path | Checkpoint,
    out: str | Path | None = None,
    options: RunOptions | None = None,
    **params: Any,
) -> RunResult:
    """Apply the operation called `op`, as the command of that name does.

        surgery.apply("graft", "dit-digits", replace=["attn=hyena"], data="digits", out="out/hyena")

    Raises the errors of the operation, and `UsageError` for a wrong number of parents or an unknown parameter.
    """
    kind = load_op(op)
    check_parents(kind, len(parents))
    opened = [p if isinstance(p, Checkpoint) else open(p) for p in parents]
    return run_op(build_op(kind, params), opened, Path(out) if out is not None else None, options=options)
