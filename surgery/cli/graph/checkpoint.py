"""Commands about one checkpoint: inspect, log, verify."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.operation import open_source
from surgery.errors import CheckpointError, Mismatch, printable
from surgery.store.checkpoint import Checkpoint
from surgery.store.record import params_text, undigested

Source = Annotated[
    str, typer.Argument(metavar="CKPT", help="Folder, file, alias, hub id, or - for a path on standard input.")
]


def inspect(
    source: Source,
    as_json: flags.AsJson = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on what the format allows but no writer should do.")
    ] = False,
    key: Annotated[str | None, typer.Option("--key", help="Dictionary to open inside a pickle, e.g. ema.")] = None,
    offline: flags.Offline = False,
) -> None:
    """Show what a checkpoint holds, from headers alone.

    Example:  surgery inspect dit-digits
    """
    checkpoint = open_source(source, offline=offline, key=key)
    oddities = [o for part in checkpoint.parts.values() for o in part.oddities]
    if strict and oddities:
        raise CheckpointError(
            "odd", f"{checkpoint.name}: {oddities[0]}", hint="write the file again with surgery or safetensors"
        )
    facts = checkpoint.to_json()
    facts["dtypes"] = _count_dtypes(checkpoint)
    facts["parts"] = {p.name or ".": len(p.tensors) for p in checkpoint.parts.values()}
    facts["blocks"] = _blocks(checkpoint)
    facts["oddities"] = oddities
    lineage = checkpoint.lineage
    facts["made_by"] = lineage["steps"][-1]["op"] if lineage else None
    facts["undigested"] = len(undigested(lineage)) if lineage else None
    if tensors:
        facts["rows"] = [{"name": n, "dtype": r.dtype, "shape": list(r.shape)} for n, r in checkpoint.tensors.items()]
    if as_json:
        output.data_json(facts)
        return
    output.data(f"{checkpoint.name}  {checkpoint.path}")
    made = f"   made by surgery {printable(facts['made_by'])}" if lineage else ""
    made += f"; its record has no digest of {facts['undigested']:,} tensors" if facts["undigested"] else ""
    output.data(f"layout      {facts['layout']}{made}")
    output.data(f"digest      {facts['digest']}")
    output.data(f"parameters  {facts['parameters']:,}")
    output.data(f"tensors     {facts['tensors']:,}   {', '.join(f'{d} {n:,}' for d, n in facts['dtypes'].items())}")
    output.data(f"bytes       {output.count(facts['bytes'], 'B')}")
    for oddity in oddities:
        output.warn(oddity)
    output.data("")
    if tensors:
        output.table(
            ["tensor", "dtype", "shape"],
            [[r["name"], r["dtype"], "×".join(map(str, r["shape"]))] for r in facts["rows"]],
        )
    else:
        output.table(
            ["block", "tensors", "parameters"], [[b["block"], b["tensors"], b["parameters"]] for b in facts["blocks"]]
        )


def log(
    source: Source,
    as_json: flags.AsJson = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also say how each group of tensors came to be.")] = False,
    dot: flags.Dot = False,
    svg: flags.Svg = None,
    offline: flags.Offline = False,
) -> None:
    """Show how a checkpoint came to be, back to the root.

    Examples:

      surgery log out/hyena

      surgery log out/hyena --svg history.svg
    """
    checkpoint = open_source(source, offline=offline)
    record = checkpoint.lineage
    if record is None:
        raise CheckpointError(
            "no-lineage",
            f"{checkpoint.name}: no surgery.json beside the weights",
            hint="not made by surgery: it is a root of the graph",
        )
    if svg is not None or dot:
        from surgery.graph.picture import draw_dot, draw_svg, lineage_picture
        from surgery.store.writer import atomic_write

        picture = lineage_picture(checkpoint.name, record)
        if svg is not None:
            atomic_write(svg, draw_svg(picture).encode())
            output.note(f"drawn: {svg}")
        if dot:
            output.data(draw_dot(picture))
            return
    if as_json:
        output.data_json(record)
        return
    output.data(str(checkpoint.path))
    for line in _tree(record, dict(record["ancestors"]), tensors, ""):
        output.data(printable(line, limit=10_000))


def verify(source: Source, as_json: flags.AsJson = False, offline: flags.Offline = False) -> None:
    """Check every byte of a produced checkpoint against its record; exit 1 when anything differs.

    Example:  surgery verify out/hyena
    """
    from surgery.graph.lineage import verify as check

    checkpoint = open_source(source, offline=offline)
    faults = check(checkpoint)
    total, missing = len(checkpoint.tensors), len(undigested(checkpoint.lineage or {"tensors": {}}))
    if as_json:
        rows = {"path": str(checkpoint.path), "ok": not faults, "faults": faults}
        output.data_json(rows | {"tensors": total, "undigested": missing})
    elif not faults and missing:
        output.data(
            f"ok  {checkpoint.path}  {total - missing:,} of {total:,} tensors and every file match the record; "
            f"{missing:,} tensors have no digest there (--hash header): only their names, dtypes, shapes and sizes do"
        )
    elif not faults:
        output.data(f"ok  {checkpoint.path}  {total:,} tensors and every file match the record")
    else:
        for fault in faults:
            output.data(fault)
    if faults:
        raise Mismatch(
            "differs",
            f"{checkpoint.name}: {len(faults)} differences from its record, first: {faults[0]}",
            hint="rebuild it with the command that surgery log shows",
        )


def _count_dtypes(checkpoint: Checkpoint) -> dict[str, int]:
    found: dict[str, int] = {}
    for ref in checkpoint.tensors.values():
        found[ref.dtype] = found.get(ref.dtype, 0) + 1
    return found


def _blocks(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Tensors grouped by block: the name up to its first number, or its first piece."""
    from math import prod

    groups: dict[str, list[int]] = {}
    for name, ref in checkpoint.tensors.items():
        match = re.match(r"(.*?\.\d+)\.", name)
        block = match[1] if match else name.split(".")[0]
        groups.setdefault(block, [0, 0])
        groups[block][0] += 1
        groups[block][1] += prod(ref.shape)
    from surgery.store.layout import natural

    return [
        {"block": b, "tensors": n, "parameters": p} for b, (n, p) in sorted(groups.items(), key=lambda g: natural(g[0]))
    ]


def _tree(record: Mapping[str, Any], ancestors: dict[str, Any], tensors: bool, indent: str) -> list[str]:
    """Lines of a record and, indented, of the records that it descends from; each of `ancestors` is told once."""
    step = record["steps"][-1]
    params = params_text(step)
    lines = [f"{indent}└─ {step['op']} v{step['version']}  {params}  seed={step['seed']}"]
    inner = indent + "   "
    if record["digest"].startswith("derived:"):
        lines.append(f"{inner}made on the way, never written")
    else:
        made = f"{record['created']}  torch {record['environment'].get('torch')}"
        lines.append(f"{inner}digest {record['digest'][:23]}…  {made}")
    if missing := undigested(record):
        lines.append(f"{inner}{len(missing):,} of {len(record['tensors']):,} tensors were never digested")
    for name, value in step.get("training", {}).items():
        if not isinstance(value, list | dict):
            lines.append(f"{inner}{name}: {value}")
    if tensors:
        lines += [f"{inner}{c['how']:8} {c['count']:>5}  {c['tensors']}" for c in record["changes"]]
    for name, parent in record["parents"].items():
        own = ancestors.pop(parent["lineage"], None)
        if own is None:
            told = "above" if parent["lineage"] else "root"
            lines.append(f"{inner}└─ {name}  {parent['digest'][:23]}…  ({told})")
        else:
            lines.append(f"{inner}{name}")
            lines += _tree(own, ancestors, tensors, inner)
    return lines
