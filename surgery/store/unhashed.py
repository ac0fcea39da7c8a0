"""What can be said of a checkpoint without reading its tensors, for runs with --hash header.

Which tensor digests are known: from the cache of digests, which knows a file by device, inode, size and time, or from
the checkpoint's own record, which is believed only while the files are those that it describes and none is newer. And
which files these are: two finetunes of one model have equal headers, so only the files themselves tell them apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.store import digests
from surgery.store.header import header_digest
from surgery.store.layout import LINEAGE_FILE
from surgery.store.tensors import Part, TensorRef, is_kept


@dataclass(frozen=True)
class Unhashed:
    """`known` are sha256 by full name from files that were hashed, `claimed` those that the record alone says. `files`
    are rows of path, size and header digest, and `where` is a digest of these and of the files' identities: another for
    every other file, also where headers and sizes are equal. `digest` is that of the content (hex), None where some
    tensor has none."""

    known: Mapping[str, str]
    claimed: Mapping[str, str]
    files: tuple[Mapping[str, Any], ...]
    where: str
    digest: str | None

    @property
    def identity(self) -> dict[str, str]:
        """What a node's key says of the checkpoint in place of its digest."""
        if self.digest is None:
            return {"unhashed": self.where}
        return {"digest": self.digest, "files": self.where} if self.claimed else {"digest": self.digest}

    @property
    def row(self) -> dict[str, Any]:
        """What a record says of it as a parent."""
        if self.digest is None:
            return {"digest": f"unhashed:{self.where}", "files": [dict(row) for row in self.files]}
        return {"digest": f"sha256:{self.digest}"} | ({"digested_by": "its own record"} if self.claimed else {})


def look_at(
    parts: Mapping[str, Part],
    root: Path,
    *,
    hashed: Mapping[str, str],
    record: Mapping[str, Any] | None,
    selected: str | None,
) -> Unhashed:
    """What is known of the checkpoint at `root` from headers, the cache of digests and its `record`.

    `hashed` are sha256 by full name that this process made already, whatever the cache kept; `selected` is the name of
    a pipeline's part that was opened alone. Raises OSError where a file went away.
    """
    known: dict[str, str] = {}
    claimed: dict[str, str] = {}
    files: list[dict[str, Any]] = []
    places: list[Any] = []
    tensors: dict[str, TensorRef] = {}
    for part in parts.values():
        prefix = f"{part.name}/" if part.name else ""
        tensors |= {prefix + name: ref for name, ref in part.tensors.items()}
        refs: dict[str, list[TensorRef]] = {file: [] for file in part.files}
        for ref in part.tensors.values():
            refs[ref.file].append(ref)
        for file, inside in refs.items():
            row = _file_row(root, file, inside)
            files.append(row)
            places.append([row, digests.identity(file)])
            cached = (digests.lookup(file) if is_kept(file, inside) else None) or {}
            told = _recorded(record, root, selected, prefix, row, inside) if record is not None else {}
            for ref in inside:
                name = prefix + ref.name
                if sha := hashed.get(name) or cached.get(ref.name):
                    known[name] = sha
                elif sha := told.get(name):
                    claimed[name] = sha
    everything = {**known, **claimed}
    digest = None
    if len(everything) == len(tensors):
        digest = digests.content_digest((n, r.dtype, r.shape, everything[n]) for n, r in tensors.items())
    return Unhashed(known, claimed, tuple(files), digests.canonical_digest(places), digest)


def _file_row(root: Path, file: str, refs: list[TensorRef]) -> dict[str, Any]:
    """A weight file as records spell it; of a file of another format, what stands for its header is names, dtypes and
    shapes."""
    path = Path(file)
    described = [[r.name, r.dtype, r.shape] for r in refs]
    header = header_digest(path) if file.endswith(".safetensors") else digests.canonical_digest(described)
    return {"path": path.relative_to(root).as_posix(), "size": path.stat().st_size, "header": header}


def _recorded(
    record: Mapping[str, Any],
    root: Path,
    selected: str | None,
    prefix: str,
    row: Mapping[str, Any],
    refs: list[TensorRef],
) -> dict[str, str]:
    """sha256 by full name that the record has of a file's tensors, if the file can be the one that it speaks of: the
    same size and header, and not written to since the record was."""
    inside = bool(selected) and (root.parent / LINEAGE_FILE).is_file()  # the pipeline's record
    folder, lead = (root.parent, f"{selected}/") if inside else (root, "")
    listed = {r["path"]: r for r in record["output"]["files"]}.get(lead + row["path"], {})
    same = (listed.get("size"), listed.get("header")) == (row["size"], row["header"])
    if not same or (root / row["path"]).stat().st_mtime_ns > (folder / LINEAGE_FILE).stat().st_mtime_ns:
        return {}
    found = {}
    for ref in refs:
        told = record["tensors"].get(lead + prefix + ref.name, {})
        if (told.get("dtype"), told.get("shape")) == (ref.dtype, list(ref.shape)) and "sha256" in told:
            found[prefix + ref.name] = told["sha256"]
    return found
