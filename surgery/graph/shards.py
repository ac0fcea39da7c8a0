"""Which output file each tensor goes to, and in what order inside it. Planning only: no byte is read or moved."""

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import CheckpointError, UsageError
from surgery.graph.op import Entry, Keep, Plan
from surgery.store.checkpoint import Checkpoint
from surgery.store.header import DTYPE_BITS, read_header
from surgery.store.layout import natural
from surgery.store.tensors import TensorRef
from surgery.store.writer import PlannedFile

SHARD_SIZE = 5_000_000_000  # bytes of a new file where nothing else is asked for
SMALL_PART = 256 << 20  # bytes; a part up to this size is one file however its tensors came to be


@dataclass(frozen=True)
class Shard:
    """One planned weight file and its entries in file order."""

    file: PlannedFile
    entries: tuple[Entry, ...]


def plan_shards(
    plan: Plan, *, key: str | None, shard_size: int | None = None
) -> tuple[list[Shard], dict[str, dict[str, str]]]:
    """Group the plan's entries into files; returns them and, for each part with several, the weight map of its index.

    Kept tensors stay in the grouping of the parent's files, so that an untouched file moves as one range; new tensors
    get files of their own. Small parts become one file. A `shard_size` in bytes holds for every file (a tensor that is
    larger stands alone); without one it is `SHARD_SIZE` for new tensors, and kept files may be as large as they were.
    A plan that mirrors a parent has that one's files, with its index among the plan's own files. `key` goes into the
    headers; with None there are none, for files that will never be: offsets then tell the order alone.
    """
    if plan.mirror is not None and shard_size is None:
        return _mirrored(plan, plan.mirror, key)
    shards: list[Shard] = []
    indexes: dict[str, dict[str, str]] = {}
    weight_map: dict[str, str]
    by_part: dict[str, list[Entry]] = {p.part: [] for p in plan.parts}
    for entry in plan.entries:
        by_part[entry.part].append(entry)
    for part in plan.parts:
        entries = by_part[part.part]
        prefix = f"{part.part}/" if part.part else ""
        if plan.new_file is not None and shard_size is None:
            files, weight_map = _beside(entries, prefix, part.base, plan.new_file, key)
            shards += files
            if len(files) > 1:
                indexes[f"{prefix}{part.base}.safetensors.index.json"] = weight_map
            continue
        limit = plan.regroup or shard_size or SHARD_SIZE
        entries.sort(key=lambda e: natural(e.name))
        if sum(e.nbytes for e in entries) <= (limit if plan.regroup else min(SMALL_PART, limit)):
            groups = [sorted(entries, key=lambda e: -DTYPE_BITS[e.dtype])]
        elif plan.regroup:
            groups = list(_cut(entries, limit))
        else:
            groups = list(_groups(entries, shard_size))
        names = [f"{part.base}-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
        if len(groups) == 1:
            names = [f"{part.base}.safetensors"]
        for name, group in zip(names, groups, strict=True):
            shards.append(Shard(_whole_file(prefix + name, group) or _file(prefix + name, group, key), tuple(group)))
        if len(groups) > 1:
            weight_map = {e.name: name for name, group in zip(names, groups, strict=True) for e in group}
            indexes[f"{prefix}{part.base}.safetensors.index.json"] = weight_map
    return shards, indexes


def _mirrored(plan: Plan, parent: Checkpoint, key: str | None) -> tuple[list[Shard], dict[str, dict[str, str]]]:
    """The parent's files again: the same names and order, and its header bytes where every tensor is as it was but for
    its values. Only an index that says something else than the parent's is returned: the plan copies that one."""
    shards: list[Shard] = []
    indexes: dict[str, dict[str, str]] = {}
    by_name = {(e.part, e.name): e for e in plan.entries}
    bases = {p.part: p.base for p in plan.parts}
    for part in parent.parts.values():
        prefix = f"{part.name}/" if part.name else ""
        weight_map: dict[str, str] = {}
        changed = False
        by_file: dict[str, list[TensorRef]] = {file: [] for file in part.files}
        for ref in part.tensors.values():
            by_file[ref.file].append(ref)
        for file, inside in by_file.items():
            refs = sorted(inside, key=lambda r: (r.offset, r.name))
            group = [by_name[part.name, r.name] for r in refs]
            stem = Path(file).name if parent.layout != "file" else f"{bases[part.name]}.safetensors"
            same = all((e.dtype, e.shape) == (r.dtype, r.shape) for e, r in zip(group, refs, strict=True))
            whole = _like(prefix + stem, file, group, refs) if same and os.path.lexists(file) else None
            shards.append(Shard(whole or _file(prefix + stem, group, key), tuple(group)))
            weight_map |= dict.fromkeys((r.name for r in refs), stem)
            changed = changed or whole is None
        if part.index is not None and changed:  # its total size is another now
            indexes[part.index] = weight_map
    return shards, indexes


def _like(relative: str, file: str, group: list[Entry], refs: list[TensorRef]) -> PlannedFile:
    """A file with the header of another; taken from it whole where every tensor is kept."""
    header = read_header(file)
    with open(file, "rb") as handle:
        raw = handle.read(header.data_start)
    places = {n: (header.data_start + t.start, t.stop - t.start) for n, t in header.tensors.items()}
    kept = len(header.tensors) == len(refs) and all(
        isinstance(e, Keep) and (e.ref.file, e.ref.offset, e.ref.name) == (file, r.offset, e.name)
        for e, r in zip(group, refs, strict=True)
    )
    return PlannedFile(relative, raw, places, header.file_size, file if kept else None)


def index_json(name: str, weight_map: Mapping[str, str], sizes: Mapping[str, int]) -> bytes:
    """The index of a part's shards; `sizes` are bytes by full name."""
    prefix = f"{name.rsplit('/', 1)[0]}/" if "/" in name else ""
    total = sum(sizes[prefix + tensor] for tensor in weight_map)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": dict(weight_map)}, indent=2) + "\n").encode()


def parse_size(text: str) -> int:
    """Bytes in "500MB", "5GB", "2GiB" or a plain number. Raises `UsageError` for anything else."""
    import re

    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE | re.ASCII)
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise UsageError("size", f"'{text}' is not a size", hint="write 500MB, 5GB or 2GiB")
    return size


def _beside(
    entries: list[Entry], prefix: str, base: str, stem: str, key: str | None
) -> tuple[list[Shard], dict[str, str]]:
    """The parent's files as they are, and new ones called `stem`-00001 and so on for the rest; with the weight map."""
    old: dict[str, list[Entry]] = {}
    new: list[Entry] = []
    for entry in entries:
        # A block that is kept under another name, or twice, is new: the parent's file has no room for it.
        if isinstance(entry, Keep) and entry.name == entry.ref.name:
            old.setdefault(entry.ref.file, []).append(entry)
        else:
            new.append(entry)
    groups: dict[str, list[Entry]] = {}
    for number, file in enumerate(sorted(old, key=natural), start=1):
        # A lone model.safetensors beside an index would be read in place of the index.
        suffix = f"-{number:05d}-of-{len(old):05d}" if len(old) > 1 or new else ""
        order = sorted(old[file], key=lambda e: (-DTYPE_BITS[e.dtype], e.ref.offset if isinstance(e, Keep) else 0))
        groups[f"{base}{suffix}.safetensors"] = order
    for number, group in enumerate(_cut(new, SHARD_SIZE), start=1):
        groups[f"{stem}-{number:05d}.safetensors"] = group
    shards = [
        Shard(_whole_file(prefix + name, group) or _file(prefix + name, group, key), tuple(group))
        for name, group in groups.items()
    ]
    return shards, {e.name: name for name, group in groups.items() for e in group}


def _groups(entries: list[Entry], shard_size: int | None) -> Iterable[list[Entry]]:
    by_source: dict[str, list[Entry]] = {}
    for entry in entries:
        source = entry.ref.file if isinstance(entry, Keep) else ""
        by_source.setdefault(source, []).append(entry)
    for source in sorted(by_source, key=lambda s: (s == "", natural(s))):
        group = by_source[source]
        if not source:
            yield from _cut(group, shard_size or SHARD_SIZE)
            continue
        # A block that is kept twice must not make a file larger than the parent's.
        once = sum(ref.nbytes for ref in {e.ref for e in group if isinstance(e, Keep)})
        limit = shard_size or max(SHARD_SIZE, once)
        pieces = [group] if sum(e.nbytes for e in group) <= limit else _cut(group, limit)
        for piece in pieces:
            # The parent's order, so that neighbours stay neighbours and one range copy serves many tensors.
            yield sorted(piece, key=lambda e: (-DTYPE_BITS[e.dtype], e.ref.offset if isinstance(e, Keep) else 0))


def _cut(entries: list[Entry], size: int) -> Iterable[list[Entry]]:
    """Groups of at most `size` bytes in the order of `entries`; a larger tensor is a group of its own."""
    piece: list[Entry] = []
    filled = 0
    for entry in entries:
        if piece and filled + entry.nbytes > size:
            yield sorted(piece, key=lambda e: -DTYPE_BITS[e.dtype])
            piece, filled = [], 0
        piece.append(entry)
        filled += entry.nbytes
    if piece:
        yield sorted(piece, key=lambda e: -DTYPE_BITS[e.dtype])


def _file(relative: str, group: list[Entry], key: str | None) -> PlannedFile:
    if key is None:
        ends = [0, *itertools.accumulate(e.nbytes for e in group)]
        places = {e.name: (start, end - start) for e, (start, end) in zip(group, itertools.pairwise(ends), strict=True)}
        return PlannedFile(relative, b"", places, ends[-1])
    # Loaders look for `format`; the node's key says which run a lone file came from.
    metadata = {"format": "pt", "surgery": key}
    return PlannedFile.plan(relative, ((e.name, e.dtype, e.shape) for e in group), metadata=metadata)


def _whole_file(relative: str, group: list[Entry]) -> PlannedFile | None:
    """The parent's own header when the group is exactly one file of the parent, so that it can be taken whole."""
    first = group[0] if group else None
    if not isinstance(first, Keep) or not os.path.lexists(first.ref.file):
        return None  # made, or of a step that is never written
    refs = [e.ref for e in group if isinstance(e, Keep) and e.ref.name == e.name and e.ref.offset >= 0]
    if len(refs) != len(group) or len({r.file for r in refs}) != 1:
        return None
    start, size = min(r.offset for r in refs), sum(r.nbytes for r in refs)
    try:
        with open(refs[0].file, "rb") as handle:
            # Headers may be large: it is parsed only where the group's bytes are all that the file has.
            end = os.fstat(handle.fileno()).st_size
            if (start, start + size) != (8 + int.from_bytes(handle.read(8), "little"), end):
                return None
            handle.seek(0)
            raw = handle.read(start)
    except OSError as err:
        raise CheckpointError(
            "unreadable", f"{refs[0].file}: {err.strerror}", hint="it was there a moment ago"
        ) from None
    header = read_header(refs[0].file)
    if len(header.tensors) != len(refs):
        return None  # tensors without elements were left out
    return PlannedFile(relative, raw, {r.name: (r.offset, r.nbytes) for r in refs}, header.file_size, refs[0].file)
