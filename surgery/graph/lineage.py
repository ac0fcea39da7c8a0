"""`surgery.json`: what was done, to which parents, with which result; and checking a folder against it.

The record's own digest leaves out time and environment, its own and its ancestors', so two machines doing the same work
agree on it. Every parent's record travels along under `ancestors`.
"""

import json
import time
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UsageError, printable
from surgery.graph.op import Bytes, Compute, Given, Keep, Plan, Trained
from surgery.store import digests
from surgery.store.checkpoint import Checkpoint
from surgery.store.digests import content_digest
from surgery.store.header import header_digest
from surgery.store.layout import LINEAGE_FILE, REPORT_FILE
from surgery.store.record import is_intact, is_unhashed, record_digest, undigested

_quoted = json.encoder.encode_basestring
_NUMBER = r"(?<=\.)[0-9]{1,9}(?=\.)"  # the index of a block inside a tensor's name


def node_key(
    *,
    op: str,
    version: int,
    params: Mapping[str, Any],
    parents: Iterable[Checkpoint],
    inputs: Mapping[str, str],
    files: Mapping[str, str],
    seed: int,
    device: str,
    torch: str,
    plugin: str | None = None,
    hashing: bool = True,
) -> str:
    """The identity of a node: equal keys mean equal results. `inputs` are digests of data read beside the parents,
    `files` what stands for the files beside the weights; `device` is a class ("cpu", "cuda"), `torch` major.minor,
    `plugin` the distribution that brings the operation. Without `hashing`, a parent whose digests are not known is the
    files that it lies in."""
    return digests.canonical_digest(
        ({"plugin": plugin} if plugin else {})
        | {
            "op": op,
            "version": version,
            "params": dict(params),
            "inputs": dict(inputs),
            "files": dict(files),
            "seed": seed,
            "device": device,
            "torch": torch,
            "parents": [p.identity(hashing=hashing) for p in parents],
        }
    )


def make_record(
    *,
    op: str,
    version: int,
    params: Mapping[str, Any],
    seed: int,
    key: str,
    parents: list[Checkpoint],
    plan: Plan,
    tensors: Mapping[str, str] | None,
    files: list[dict[str, Any]],
    environment: Mapping[str, Any],
    training: Mapping[str, Any],
    plugin: str | None = None,
    measured: Mapping[str, Any] | None = None,
    hashing: bool = True,
    claimed: int = 0,
) -> dict[str, Any]:
    """The lineage document of a checkpoint about to be published. `tensors` maps full names to sha256; None: one that
    is only a step of a chain and never written, which its key stands for. `measured` is left out of the record's
    digest: sums of floats differ in their last digits from one processor to another. A run without `hashing` leaves
    tensors and parents without digests, and the record says how many and which; `claimed` tensors have those that only
    the record of a parent says."""
    names = _parent_names(parents)
    edits = [plain(edit) for edit in plan.config_edits]
    ancestors: dict[str, Any] = {}
    for parent in parents:
        if parent.lineage:
            own = dict(parent.lineage)
            ancestors.update(own.pop("ancestors", {}))
            ancestors[parent.lineage["record"]] = own
    rows: dict[str, dict[str, Any]] = {}
    if tensors is not None:
        rows = {
            e.full_name: ({"sha256": sha} if (sha := tensors.get(e.full_name)) is not None else {})
            | {"dtype": e.dtype, "shape": list(e.shape)}
            for e in plan.entries
        }
    step = {
        "op": op,
        "version": version,
        "params": dict(params),
        "seed": seed,
        "parents": names,
        "key": f"sha256:{key}",
    }
    if plugin:
        step["plugin"] = plugin
    if training:
        step["training"] = plain(training)
    record: dict[str, Any] = {
        "surgery": 1,
        "digest": _digest_of(rows, files, key) if tensors is not None else f"derived:{key}",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if tensors is not None else "",
        "output": {"files": files},
        "steps": [step],
        "parents": {n: _parent(p, hashing) for n, p in zip(names, parents, strict=True)},
        "changes": _changes(plan, names),
        "dropped": list(plan.dropped),
        "config_edits": edits,
        "tensors": rows,
        "environment": dict(environment),
        "ancestors": ancestors,
    }
    unknown = [n for n, row in record["parents"].items() if is_unhashed(row["digest"])]
    if (missing := len(undigested(record))) or claimed or unknown:
        record["undigested"] = {"tensors": missing, "claimed": claimed, "parents": unknown}
    if measured:
        record["measured"] = plain(measured)
    record["record"] = record_digest(record)
    return record


def plain(value: Any) -> Any:
    """`value` as it comes back from a JSON file, so that the record's digest does too; NaN and infinities as words."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def encode(record: Mapping[str, Any]) -> bytes:
    """The bytes of `surgery.json`: indented but for the tensor rows, one a line."""
    outer = {k: v for k, v in record.items() if k not in ("tensors", "ancestors")}
    text = json.dumps(outer, indent=1, ensure_ascii=False).rstrip("}").rstrip()
    rows = ",\n".join(f"  {_quoted(n)}: {_row(r)}" for n, r in record["tensors"].items())
    ancestors = json.dumps(record["ancestors"], ensure_ascii=False)
    return f'{text},\n "tensors": {{\n{rows}\n }},\n "ancestors": {ancestors}\n}}\n'.encode("utf-8", "surrogatepass")


def _row(row: Mapping[str, Any]) -> str:
    """A tensor's row as JSON; there may be a hundred thousand."""
    if len(row) == 3:
        return f'{{"sha256": "{row["sha256"]}", "dtype": "{row["dtype"]}", "shape": {row["shape"]}}}'
    return json.dumps(row)


def verify(checkpoint: Checkpoint) -> list[str]:
    """Check a produced checkpoint against its record, reading every byte; the list of faults is empty when it holds.
    Of tensors without a digest (`undigested`), names, dtypes and shapes are checked, and the sizes of their files.

    Raises `CheckpointError` when there is no record to check against.
    """
    record = checkpoint.lineage
    if record is None:
        raise CheckpointError(
            "no-lineage",
            f"{checkpoint.name}: no {LINEAGE_FILE} beside the weights",
            hint="only what surgery made can be verified",
        )
    if checkpoint.selected:
        raise UsageError(
            "part", f"{checkpoint.name}: the record is that of the whole pipeline", hint="verify the pipeline's folder"
        )
    faults = []
    key = record["steps"][-1]["key"].removeprefix("sha256:")
    content = _digest_of(record["tensors"], record["output"]["files"], key)
    if not is_intact(record) or record["digest"] != content:
        faults.append(f"{LINEAGE_FILE}: the record was altered")
    root = checkpoint.root
    listed = {row["path"]: row for row in record["output"]["files"]}
    weights = {str(Path(f).relative_to(root)) for p in checkpoint.parts.values() for f in p.files}
    indexes = {n for n in listed if n.endswith(".index.json")}
    for name, row in listed.items():
        path = root / name
        if path.is_symlink() or not path.is_file():
            faults.append(f"{printable(name)}: missing")
        elif path.stat().st_size != row["size"]:
            faults.append(f"{printable(name)}: {path.stat().st_size} bytes, recorded {row['size']}")
        elif "sha256" in row and digests.file_digest(path) != row["sha256"]:
            faults.append(f"{printable(name)}: altered")
        elif "header" in row and header_digest(path) != row["header"]:
            faults.append(f"{printable(name)}: its header was altered")
    for name in sorted((set(checkpoint.side_files) | weights | set(checkpoint.ignored)) - set(listed) - indexes):
        faults.append(f"{printable(name)}: not in the record")
    recorded = record["tensors"]
    for name, ref in checkpoint.tensors.items():
        row = recorded.get(name)
        if row is None:
            faults.append(f"tensor {printable(name)}: not in the record")
        elif [ref.dtype, list(ref.shape)] != [row["dtype"], row["shape"]]:
            faults.append(
                f"tensor {printable(name)}: {ref.dtype}{list(ref.shape)}, recorded {row['dtype']}{row['shape']}"
            )
        elif "sha256" in row and checkpoint.hash_tensor(ref) != row["sha256"]:
            faults.append(f"tensor {printable(name)}: altered")
    faults += [f"tensor {printable(n)}: missing" for n in recorded if n not in checkpoint.tensors]
    return faults


def _digest_of(rows: Mapping[str, Mapping[str, Any]], files: list[dict[str, Any]], key: str) -> str:
    """The digest of the content; of an evaluation's report, that of its files. Where a tensor has none there is no
    digest, and the work stands for it."""
    if any("sha256" not in row for row in rows.values()):
        return f"unhashed:{key}"
    if not rows and any(row["path"] == REPORT_FILE for row in files):
        return "sha256:" + digests.canonical_digest(sorted([row["path"], row["sha256"]] for row in files))
    return "sha256:" + content_digest((n, r["dtype"], r["shape"], r["sha256"]) for n, r in rows.items())


def _parent_names(parents: list[Checkpoint]) -> list[str]:
    names: list[str] = []
    for parent in parents:
        base = parent.name.rstrip("/").rsplit("/", 1)[-1]
        if not base.strip("."):
            base = parent.path.resolve().name or "parent"
        name, number = base, 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def _parent(parent: Checkpoint, hashing: bool) -> dict[str, Any]:
    lineage = parent.lineage
    return {
        **parent.parent_row(hashing=hashing),
        "config": f"sha256:{parent.config_digest()}",
        "part": parent.selected,
        "source": parent.name,  # as it was typed: where `surgery replay` looks first
        "lineage": lineage["record"] if lineage else None,
        **parent.origin,
    }


def _changes(plan: Plan, names: list[str]) -> list[dict[str, Any]]:
    """How each group of tensors came to be, consecutive numbers in names folded into one row."""
    import re

    groups: dict[tuple[str, str, tuple[str, ...]], list[int]] = {}
    for entry in plan.entries:
        how = {Keep: "keep", Bytes: "bytes", Compute: "compute", Given: "constant", Trained: "train"}[type(entry)]
        sources: tuple[str, ...] = ()
        if isinstance(entry, Compute):
            sources = tuple(names[i] for i in sorted({parent for parent, _ in entry.inputs}))
        elif isinstance(entry, Keep | Bytes):
            sources = (names[entry.parent],)
        numbers = [int(n) for n in re.findall(_NUMBER, entry.full_name)[:1]]
        pattern = re.sub(_NUMBER, "{}", entry.full_name, count=1)
        groups.setdefault((pattern, how, sources), []).extend(numbers)
    return [
        {
            "tensors": p.replace("{}", "{" + ranges(n) + "}", 1) if n else p,
            "count": max(1, len(n)),
            "how": how,
            "from": list(src),
        }
        for (p, how, src), n in groups.items()
    ]


def ranges(numbers: list[int]) -> str:
    """1,3,8-12 for [1, 3, 8, 9, 10, 11, 12]."""
    pieces: list[str] = []
    ordered = sorted(set(numbers))
    start = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
            first, last = ordered[start], ordered[i - 1]
            pieces.append(str(first) if first == last else f"{first}-{last}")
            start = i
    return ",".join(pieces)
