"""The files beside the weights: what the node's key says of them, and the content of those that a run makes.

A result holds copies of its parents' tokenizers, templates and configs: it is another result where these are others. A
step that was never written has its files from those before it, and some of them lie nowhere until the run starts.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, SurgeryError, printable
from surgery.graph.op import Op, Plan, SideFile, Trained
from surgery.graph.planned import planned_among
from surgery.store import digests
from surgery.store.checkpoint import Checkpoint

_READ_BY_PEOPLE = (".md", ".png", ".jpg", ".svg", ".pdf")


def file_digests(op: Op, plan: Plan, parents: Sequence[Checkpoint]) -> dict[str, str]:
    """What stands for every file of the result, by path, and for every file of the parents where the operation trains
    or measures: it has whole models before it, with their tokenizers and templates. Indexes are not among them: which
    shard holds what is no content. Raises `CheckpointError` for a file that cannot be read."""
    origins = _origins(parents)
    files = [f for f in plan.files if not f.relative.endswith(".index.json")]
    told = {f.relative: _digest(f, origins) for f in files}
    if plan.evaluates or any(isinstance(e, Trained) for e in plan.entries):
        for number, parent in enumerate(parents):
            told |= {f"{number}:{name}": digest for name, digest in _beside(parent, origins).items()}
    return told


def files_digest(checkpoint: Checkpoint) -> str:
    """Digest of all that libraries read beside the tensors of a model: configs, tokenizer, templates. Raises
    `CheckpointError` for a file that cannot be read."""
    return digests.canonical_digest(_beside(checkpoint, _origins([checkpoint])))


def _beside(checkpoint: Checkpoint, origins: Mapping[str, SideFile]) -> dict[str, str]:
    """What stands for each of a checkpoint's side files, and for what a GGUF file says, by part."""
    told = {part.name: part.told for part in checkpoint.parts.values() if part.told}
    for name in checkpoint.side_files:
        if not name.endswith(_READ_BY_PEOPLE):
            told[name] = _digest(SideFile(name, source=str(checkpoint.root / name)), origins)
    return told


def settled(plan: Plan, parents: Sequence[Checkpoint]) -> Plan:
    """The plan with the content of files that are made when the run starts, for it or for a step before it that is
    never written. What cannot be made is left out, with a warning."""
    origins = _origins(parents)
    files: list[SideFile] = []
    lacking: dict[str, list[str]] = {}
    for file in plan.files:
        make = _origin(file, origins).make
        if make is None:
            files.append(file)
            continue
        try:
            files.append(SideFile(file.relative, content=make()))
        except SurgeryError as err:
            lacking.setdefault(f"{err.message}; {err.hint}", []).append(file.relative)
    warnings = [f"the result has no {' and '.join(names)}: {why}" for why, names in lacking.items()]
    return replace(plan, files=tuple(files), warnings=(*plan.warnings, *warnings))


def check_copied(
    plan: Plan, parents: Sequence[Checkpoint], told: Mapping[str, str], rows: Iterable[Mapping[str, Any]]
) -> None:
    """Refuse to publish copies of files that are not what the key says, `told`; `rows` are those of the record."""
    origins = _origins(parents)
    copied = {f.relative for f in plan.files if f.source is not None and _origin(f, origins).digest is None}
    for row in rows:
        name = row["path"]
        if name in copied & told.keys() and told[name] != row["sha256"]:
            raise CheckpointError(
                "changed-parent",
                f"{printable(name)}: changed while it was read",
                hint="run the command again, without --resume",
            )


def _origins(parents: Sequence[Checkpoint]) -> dict[str, SideFile]:
    """The files of steps that are never written, by the path at which they are planned."""
    steps = [p for p in planned_among(list(parents)) if not p.written]
    return {str(step.root / f.relative): f for step in steps for f in step.step.plan.files}


def _origin(file: SideFile, origins: Mapping[str, SideFile]) -> SideFile:
    while file.source is not None and file.source in origins:
        file = origins[file.source]
    return file


def _digest(file: SideFile, origins: Mapping[str, SideFile]) -> str:
    file = _origin(file, origins)
    if file.digest is not None:
        return file.digest
    if file.content is not None:
        return hashlib.sha256(file.content).hexdigest()
    if file.source is None:
        raise CheckpointError(
            "bad-plan", f"'{file.relative}' is made without a digest", hint="a fault in the operation"
        )
    try:
        return digests.file_digest(Path(file.source))
    except OSError as err:
        raise CheckpointError(
            "unreadable", f"{file.source}: {err.strerror}", hint="check the file and its rights"
        ) from None
