"""What a planned recipe will cost: tensors, bytes, memory, disk. From plans alone; no tensor is read."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from surgery.graph.engine.budget import memory_budget
from surgery.graph.engine.work import Made, Source, is_range, leaves, peak_of
from surgery.graph.op import Entry, Keep, Trained
from surgery.graph.planned import sources_of
from surgery.graph.recipes.nodes import Node
from surgery.store import cache
from surgery.store.digests import cache_folder


def node_report(node: Node) -> dict[str, Any]:
    """One step as JSON values: where it stands and why, tensors by how they come to be, bytes and memory."""
    works = node.needed and node.state == "run"
    sources = sources_of(node.plan.entries, node.op, node.parents, node.options.seed)
    made = node.plan.bytes_report()
    size = made["kept"] + made["written"]
    return {
        "name": node.step.name,
        "op": node.step.op,
        "from": list(node.step.sources),
        "state": node.state if node.needed else "not needed",
        "why": node.why,
        "key": f"sha256:{node.key}" if node.key else None,
        "path": _shown_path(node),
        "tensors": {**_count(node.plan.entries, sources), "dropped": len(node.plan.dropped)},
        "bytes": {
            "size": size,
            "read": _read(sources) if works else size if node.needed and node.state == "copy" else 0,
            "written": size if works or (node.needed and node.state == "copy") else 0,
        },
        "peak_memory": _peak(sources, node) if works else 0,
        "plan": {**node.plan.report, "bytes": made, "warnings": list(node.plan.warnings)},
    }


def disk_report(nodes: Iterable[Node]) -> list[dict[str, Any]]:
    """For every disk that is written to: the folder, bytes needed, bytes free, and whether they suffice."""
    disks: dict[int, dict[str, Any]] = {}
    for node in nodes:
        if not node.needed or node.state not in ("run", "copy"):
            continue
        folder = _existing(node.target if node.target is not None else cache_folder())
        size = sum(e.nbytes for e in node.plan.entries)
        row = disks.setdefault(os.stat(folder).st_dev, {"folder": str(folder), "needed": 0})
        row["needed"] += size
    for row in disks.values():
        stat = os.statvfs(row["folder"])
        row["free"] = stat.f_bavail * stat.f_frsize
        row["enough"] = row["free"] >= row["needed"]
    return list(disks.values())


def _count(entries: Iterable[Entry], sources: Iterable[Source | None]) -> dict[str, int]:
    counts = dict.fromkeys(("kept", "renamed", "moved", "computed", "trained", "given"), 0)
    for entry, source in zip(entries, sources, strict=True):
        if source is None:
            counts["trained" if isinstance(entry, Trained) else "given"] += 1
        elif not is_range(source):
            counts["computed"] += 1  # by this step, or by one before it that is never written
        elif isinstance(entry, Keep):
            counts["kept" if entry.ref.name == entry.name else "renamed"] += 1
        else:
            counts["moved"] += 1
    return counts


def _read(sources: Iterable[Source | None]) -> int:
    """Bytes of all tensors on disk that are read; one that several outputs need is counted once for each."""
    return sum(ref.nbytes for source in sources if source is not None for ref in leaves(source))


def _peak(sources: Iterable[Source | None], node: Node) -> int:
    """The most that tensors in work can take at once: the largest ones, as many as there are workers, within the
    memory allowed."""
    peaks = sorted((peak_of(s) for s in sources if isinstance(s, Made)), reverse=True)
    most = sum(peaks[: max(1, node.options.workers)])
    return min(most, max(memory_budget(node.options.max_memory), peaks[0])) if peaks else 4 << 20


def _shown_path(node: Node) -> str | None:
    if node.state in ("done", "cached"):
        return str(node.source) if node.source else str(node.checkpoint.path)
    if node.state == "fused":
        return None
    if node.target is not None:
        return str(node.target)
    return str(cache.node_path(node.key)) if node.key else None


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
