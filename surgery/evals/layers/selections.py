"""Which layers a sweep merges at a time, planned from headers as `surgery merge` plans them; nothing is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.arch.merging.pair import Request, plan_pair
from surgery.errors import UsageError
from surgery.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class Selection:
    """What is merged at once: the words of `--layers`, the first layer of them, and the canonical names of all tensors.
    Without --layers (`all`) the final norm is among them, as in `surgery merge`."""

    label: str
    first: int
    tensors: tuple[str, ...]


def selections(
    host: Checkpoint,
    donor: Checkpoint,
    specs: Sequence[str] = (),
    window: int | None = None,
    stride: int | None = None,
    *,
    force: bool = False,
) -> tuple[list[Selection], tuple[str, ...]]:
    """The merge of each spec of `--layers`, then of every window of so many layers, or of everything; and warnings.

    Each is planned as `surgery merge` plans it, from headers, so that it is refused or warned of alike. Raises
    UsageError for a spec or window that does not fit, CheckpointError when the donor does not.
    """
    whole = plan_pair(Request(force=force), host, donor, None)
    count = whole.report["layers"]["of"]
    wanted = list(specs)
    if window is not None:
        if not 1 <= window <= count:
            raise UsageError("window", f"a window of {window} layers", hint=f"from 1 to the tower's {count}")
        stops = ((start, start + window - 1) for start in range(0, count - window + 1, stride or 1))
        wanted += [f"{first}-{last}" if last > first else str(first) for first, last in stops]
    out = []
    for spec in dict.fromkeys(wanted or ["all"]):
        plan = whole if spec == "all" else plan_pair(Request(layers=spec, force=force), host, donor, None)
        out.append(
            Selection(
                spec, min(plan.report["layers"]["selected"]), tuple(t["canonical"] for t in plan.report["tensors"])
            )
        )
    return out, whole.warnings
