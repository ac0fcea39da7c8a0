"""A checkpoint on disk: named tensors that are read on demand, side files, and two digests.

`open_checkpoint` reads headers and JSON only; torch is imported inside the methods that return tensors. Nothing here
writes, and nothing knows what a model does.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError, UsageError, closest, printable
from surgery.store import digests
from surgery.store.header import Header, nbytes_of, read_header
from surgery.store.layout import LINEAGE_FILE, Layout, PartLayout, find_layout, read_json
from surgery.store.record import read_record
from surgery.store.tensors import Part, TensorRef, fill, is_hole, is_kept, opened, read_chunks, read_tensor, row_range
from surgery.store.unhashed import Unhashed, look_at

if TYPE_CHECKING:
    import torch

_SMALL = 1 << 20  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """`name` is what the user typed, `path` opens it again. `layout` is "hf", "file", "gguf", "pipeline"
    or "pickle".

    `selected` is a part's name when one part of a pipeline was asked for, `origin` says which repository and commit a
    hub id led to. `side_files` and `ignored` are relative to `root`.
    """

    name: str
    path: Path
    root: Path
    layout: str
    parts: Mapping[str, Part]
    side_files: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    selected: str | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    _pickles: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def part(self, name: str | None = None) -> Part:
        """The part called `name`, or the only one; raises `UsageError` when that is not clear."""
        if name is None and len(self.parts) == 1:
            return next(iter(self.parts.values()))
        if name is None or name not in self.parts:
            asked = "a part must be named" if name is None else f"no part '{name}'"
            raise UsageError("part", f"{self.name}: {asked}", hint=f"parts: {', '.join(self.parts)}; write NAME:PART")
        return self.parts[name]

    @cached_property
    def tensors(self) -> dict[str, TensorRef]:
        """All tensors by full name: the plain name, or `part/name` in a pipeline."""
        if list(self.parts) == [""]:
            return self.parts[""].tensors
        return {
            f"{p.name}/{name}" if p.name else name: ref for p in self.parts.values() for name, ref in p.tensors.items()
        }

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the only part. Raises `CheckpointError` when there is none."""
        part = self.part()
        if part.config is None:
            raise CheckpointError(
                "no-config", f"{self.name}: no config.json beside the weights", hint="name the model's folder"
            )
        return part.config

    @cached_property
    def lineage(self) -> dict[str, Any] | None:
        """The parsed `surgery.json`, or None for a checkpoint that we did not make. One part of a pipeline has the
        pipeline's."""
        if self.path.is_file():
            return None  # the record describes a folder; which of its files this one is does not follow from it
        folders = (self.root.parent, self.root) if self.selected else (self.root,)
        return next((read_record(f / LINEAGE_FILE) for f in folders if (f / LINEAGE_FILE).is_file()), None)

    @cached_property
    def tensor_digests(self) -> dict[str, str]:
        """sha256 of the bytes of each tensor by full name: known ones from the digest cache, others by hashing."""
        found: dict[str, str] = {}
        for part in self.parts.values():
            prefix = f"{part.name}/" if part.name else ""
            by_file: dict[str, list[TensorRef]] = {}
            for ref in part.tensors.values():
                by_file.setdefault(ref.file, []).append(ref)
            for file in part.files:
                refs = by_file.get(file, [])
                keep = is_kept(file, refs)
                before = digests.identity(file)
                known = (digests.lookup(file) if keep else None) or {}
                if missing := [ref for ref in refs if ref.name not in known]:
                    known = known | self._hash_file(missing)
                    if keep and digests.identity(file) == before:  # else it was written to meanwhile
                        digests.remember(file, known)
                found.update({prefix + ref.name: known[ref.name] for ref in refs})
        return found

    def keep_digests(self, known: Mapping[str, str]) -> None:
        """Remember digests by full name that are known to be those of the files as they are now."""
        for part in self.parts.values():
            prefix = f"{part.name}/" if part.name else ""
            by_file: dict[str, dict[str, str]] = {}
            for ref in part.tensors.values():
                by_file.setdefault(ref.file, {})[ref.name] = known[prefix + ref.name]
            for file, rows in by_file.items():
                digests.remember(file, rows)

    @cached_property
    def digest(self) -> str:
        """Digest of the content: names, dtypes, shapes and bytes; the same for any sharding. A report's is recorded."""
        if self.layout == "report" and self.lineage is not None:
            return str(self.lineage["digest"]).removeprefix("sha256:")
        known = self.tensor_digests
        return digests.content_digest((n, r.dtype, r.shape, known[n]) for n, r in self.tensors.items())

    @property
    def digest_text(self) -> str:
        """The digest as records spell it."""
        return f"sha256:{self.digest}"

    @cached_property
    def unhashed(self) -> Unhashed:
        """What is known of it without reading a tensor. Asked once: the answer holds where the work goes on in another
        process, too. Raises `CheckpointError`."""
        hashed = self.__dict__.get("tensor_digests", {})
        try:
            return look_at(self.parts, self.root, hashed=hashed, record=self.lineage, selected=self.selected)
        except OSError as err:
            raise CheckpointError(
                "unreadable", f"{err.filename}: {err.strerror}", hint="it was there a moment ago"
            ) from None

    def identity(self, *, hashing: bool = True) -> dict[str, str]:
        """What the key of a node that is made from this checkpoint says of it. Without `hashing`, digests that are not
        known are not made: the files stand for them."""
        told = {"digest": self.digest} if hashing else self.unhashed.identity
        return told | {"config": self.config_digest()}

    def parent_row(self, *, hashing: bool = True) -> dict[str, Any]:
        """How a record says which content it had as a parent."""
        return {"digest": self.digest_text} if hashing else self.unhashed.row

    def file(self, name: str) -> Path | None:
        """Where a side file lies; None where there is none of that name."""
        path = self.root / name
        return path if self.path.is_dir() and path.is_file() else None

    def config_digest(self) -> str:
        """Digest of the parsed JSON side files that say how the tensors are used: a pipeline's list of parts, configs
        of parts and schedulers; of a GGUF file, of the config that it comes down to."""
        ends = ("config.json", "model_index.json")
        rows = {name: read_json(self.root / name) for name in self.side_files if name.endswith(ends)}
        if self.layout == "gguf":
            rows["config.json"] = self.part().config
        return digests.canonical_digest(rows)

    def _hash_file(self, refs: list[TensorRef]) -> dict[str, str]:
        """sha256 by name of all tensors of one file, which is opened once for the small ones: they may be many."""
        if all(ref.nbytes > _SMALL or ref.offset < 0 for ref in refs):
            return {ref.name: self.hash_tensor(ref) for ref in refs}
        with opened(refs[0]) as fd:
            return {ref.name: self.hash_tensor(ref, fd=fd) for ref in refs}

    def hash_tensor(self, ref: TensorRef, *, fd: int | None = None) -> str:
        """sha256 of one tensor's bytes as stored, read in bounded pieces; holes of a sparse file are not read. `fd` is
        the open file, if there is one."""
        if fd is not None and ref.nbytes <= _SMALL and ref.offset >= 0:
            buffer = memoryview(bytearray(ref.nbytes))
            fill(fd, buffer, ref.offset, ref)
            return hashlib.sha256(buffer).hexdigest()
        if ref.offset >= 0 and is_hole(ref):
            return digests.zeros_digest(ref.nbytes)
        state = hashlib.sha256()
        for piece in self.chunks(ref):
            state.update(piece)
        return state.hexdigest()

    def chunks(self, ref: TensorRef, *, size: int = 4 << 20) -> "Iterator[bytes | memoryview]":
        """The bytes of a tensor, in pieces of at most `size`."""
        if ref.offset < 0:
            whole = memoryview(_tensor_bytes(self._from_pickle(ref)))
            for position in range(0, len(whole), size):
                yield whole[position : position + size]
            return
        yield from read_chunks(ref, size=size)

    def read(self, name: str, *, rows: slice | None = None) -> "torch.Tensor":
        """The tensor called `name`, or only `rows` of its first axis. Sub-byte dtypes come as raw uint8 [nbytes]."""
        if name not in self.tensors:
            raise UsageError(
                "unknown-tensor", f"{self.name}: no tensor '{printable(name)}'", hint=closest(name, list(self.tensors))
            )
        return self.read_ref(self.tensors[name], rows=rows)

    def read_ref(self, ref: TensorRef, *, rows: slice | None = None) -> "torch.Tensor":
        """As `read`, for a ref of this checkpoint."""
        if ref.offset < 0:
            tensor = self._from_pickle(ref)
            return (tensor if rows is None else tensor[row_range(ref, rows)]).contiguous()
        return read_tensor(ref, rows=rows)

    @property
    def pickles(self) -> "Mapping[str, Mapping[str, torch.Tensor]]":
        """Tensors of pickles by file and name: they have no byte range."""
        return self._pickles

    def _from_pickle(self, ref: TensorRef) -> "torch.Tensor":
        tensor: torch.Tensor = self._pickles[ref.file][ref.name]
        return tensor

    def to_json(self) -> dict[str, Any]:
        """What `surgery inspect --json` prints first: digest, layout, counts."""
        from math import prod

        refs = self.tensors.values()
        return {
            "digest": f"sha256:{self.digest}",
            "layout": self.layout,
            "parameters": sum(prod(ref.shape) for ref in refs),
            "tensors": len(self.tensors),
            "bytes": sum(ref.nbytes for ref in refs),
        }


def open_checkpoint(
    path: Path, *, name: str | None = None, part: str | None = None, key: str | None = None
) -> Checkpoint:
    """Open what lies at `path` from headers and configs alone.

    `part` selects one part of a pipeline; `key` names the nested dictionary inside a pickle. Raises `CheckpointError`.
    """
    layout = find_layout(path)
    shown = name or str(path)
    chosen = layout.parts
    if part is not None:
        chosen = tuple(p for p in layout.parts if p.name == part)
        if not chosen:
            raise UsageError(
                "part",
                f"{shown}: no part '{printable(part)}'",
                hint=f"parts: {', '.join(p.name for p in layout.parts) or 'none'}",
            )
    pickles: dict[str, Any] = {}
    parts = {p.name: _open_part(layout, p, shown, key, pickles) for p in chosen}
    kind = "pickle" if any(p.pickle for p in chosen) else layout.kind
    if part is None:
        return Checkpoint(shown, path, layout.root, kind, parts, layout.side_files, layout.ignored, _pickles=pickles)
    # One part of a pipeline is a plain model of its own: its folder is the root, its tensors have plain names.
    from dataclasses import replace

    inside = f"{part}/"
    own = parts[part]
    index = own.index.removeprefix(inside) if own.index else None
    lone = replace(own, name="", config_file="config.json" if own.config_file else None, index=index)
    side, ignored = (
        tuple(n.removeprefix(inside) for n in names if n.startswith(inside))
        for names in (layout.side_files, layout.ignored)
    )
    root, kind = layout.root / part, "pickle" if kind == "pickle" else "hf"
    return Checkpoint(shown, root, root, kind, {"": lone}, side, ignored, part, _pickles=pickles)


def _open_part(layout: Layout, part: PartLayout, shown: str, key: str | None, pickles: dict[str, Any]) -> Part:
    tensors: dict[str, TensorRef] = {}
    oddities: list[str] = []
    in_file: dict[str, str] = {}
    config: Mapping[str, Any] | None = None
    config_file, told = part.config, ""
    for relative in part.files:
        path = str(layout.root / relative)
        if part.pickle:
            from surgery.store.pickle import load_pickle

            pickles[path] = load_pickle(Path(path), key=key)
            refs = [_pickle_ref(name, tensor, path) for name, tensor in pickles[path].items()]
        elif relative.endswith(".gguf"):
            from surgery.store.gguf import GgufValues, read_gguf

            file = read_gguf(Path(path))
            pickles[path] = GgufValues(file)
            config, config_file, told = file.config, "config.json", file.told
            refs = [
                TensorRef(t.name, t.dtype, t.shape, path, t.offset if t.is_range else -1, nbytes_of(t.dtype, t.shape))
                for t in file.tensors
            ]
        else:
            header: Header = read_header(path)
            oddities += [f"{relative}: {oddity}" for oddity in header.oddities]
            base = header.data_start
            refs = [
                TensorRef(n, s.dtype, s.shape, path, base + s.start, s.stop - s.start)
                for n, s in header.tensors.items()
            ]
        found = {ref.name: ref for ref in refs}
        if not tensors.keys().isdisjoint(found):
            name = next(n for n in found if n in tensors)
            raise CheckpointError(
                "inconsistent",
                f"{shown}: '{printable(name)}' is in two files, {in_file[name]} and {relative}",
                hint="shards must not share a tensor; write the checkpoint again",
            )
        tensors |= found
        in_file |= dict.fromkeys(found, relative)
    if part.weight_map is not None:
        _check_index(part, in_file, shown)
    if part.config is not None:
        config = read_json(layout.root / part.config)
        if not isinstance(config, dict):
            raise CheckpointError(
                "malformed", f"{layout.root / part.config}: not a JSON object", hint="the config is damaged"
            )
    files = tuple(str(layout.root / f) for f in part.files)
    return Part(part.name, part.base, tensors, config, config_file, files, tuple(oddities), part.index, told)


def _check_index(part: PartLayout, in_file: Mapping[str, str], shown: str) -> None:
    assert part.weight_map is not None
    prefix = f"{part.name}/" if part.name else ""
    faults = []
    for name, file in part.weight_map.items():
        if in_file.get(name) != prefix + file:
            place = in_file.get(name)
            faults.append(
                f"'{printable(name)}' should be in {file} and is " + (f"in {place}" if place else "in no file")
            )
    faults += [
        f"'{printable(n)}' lies in {f} and is not in the index" for n, f in in_file.items() if n not in part.weight_map
    ]
    if faults:
        more = f" (and {len(faults) - 10} more)" if len(faults) > 10 else ""
        raise CheckpointError(
            "inconsistent",
            f"{shown}: {part.index} does not match the files: {'; '.join(faults[:10])}{more}",
            hint="the index and the shards come from different downloads; fetch both again",
        )


def _pickle_ref(name: str, tensor: "torch.Tensor", path: str) -> TensorRef:
    from surgery.store.dtypes import name_of

    try:
        dtype = name_of(tensor.dtype)
    except CheckpointError as err:
        raise CheckpointError("unknown-dtype", f"{path}: '{printable(name)}': {err.message}", hint=err.hint) from None
    return TensorRef(name, dtype, tuple(tensor.shape), path, -1, nbytes_of(dtype, tuple(tensor.shape)))


def _tensor_bytes(tensor: "torch.Tensor") -> Any:
    from surgery.store.dtypes import as_bytes

    return as_bytes(tensor)
