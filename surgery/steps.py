"""What a step of a recipe may be: an operation, ours or a plug-in's, or an evaluation."""

from typing import Any

from surgery.errors import UsageError, closest
from surgery.evals.table import EVALS
from surgery.graph.op import load_attribute
from surgery.graph.plugins import plugin_ops
from surgery.ops.table import OPS, load_op


def load_step(name: str) -> Any:
    """The class of the operation or evaluation `name`; a `UsageError` with the nearest names otherwise."""
    if name in EVALS:
        return load_attribute(EVALS[name])
    try:
        return load_op(name)
    except UsageError as err:
        if err.code != "usage.unknown-op":
            raise
        hint = closest(name, [*OPS, *EVALS, *plugin_ops()])
        raise UsageError("unknown-op", err.message, hint=hint) from None
