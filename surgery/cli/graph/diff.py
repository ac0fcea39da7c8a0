"""The command that compares two checkpoints."""

import math
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.operation import open_source
from surgery.errors import Different, UsageError, closest, printable
from surgery.graph.diff import BlockDiff, Comparison, TensorDiff, block_of, compare

_SHOWN = 10  # names of one kind in a table of words; --json lists all


def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", help="Folder, file, alias, hub id, or - for a path on standard input.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    stat: Annotated[bool, typer.Option("--stat", help="Counts alone, on one line each.")] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="One row for every tensor instead of every block.")
    ] = False,
    tol: Annotated[
        float | None, typer.Option("--tol", help="Values this close count as equal, whatever their dtype.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="What A and B came from: how each moved, by layer and group."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="With --base: what a merge would be stored as [default: as A].")
    ] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave configs and other files out.")] = False,
    as_json: flags.AsJson = False,
    offline: flags.Offline = False,
    quiet: flags.Quiet = False,
) -> None:
    """Compare two checkpoints tensor by tensor; exit 1 when they differ.

    Names, dtypes and shapes come from headers; tensors of equal digest are not read twice; the others are streamed.
    Missing and added are seen from A. Relative L2 is |a-b|/|a|, over the tensors that changed.

    With --base, A is a model with a language tower, B and the base are text models or of A's kind: the table says how
    far each moved from the base, whether in the same direction, and how much of a merge of 0.9 A and 0.1 B would arrive
    after rounding. Where both moved far and not alike, merging them fails.

    Example:  surgery diff dit-digits out/hyena --tensors

    Before a merge:  surgery diff ./vlm ./llm --base ./base
    """
    output.Talk.quiet = quiet
    if base is not None:
        for option, given in (("stat", stat), ("tensors", tensors), ("tol", tol), ("weights-only", weights_only)):
            if given not in (None, False):
                raise UsageError(option, f"--{option} does not go with --base", hint="--json gives every number")
        _moves(a, b, base, dtype, as_json=as_json, offline=offline)
        return
    if dtype is not None:
        raise UsageError("dtype", "--dtype goes with --base", hint="say what A and B came from")
    if tol is not None and not (math.isfinite(tol) and tol >= 0):
        raise UsageError("tol", f"--tol {tol}: not a distance", hint="0 compares values, leave it out for bytes")
    if a == b == "-":
        raise UsageError("stdin", "only one of both can be -", hint="name the other one")
    one, two = open_source(a, offline=offline), open_source(b, offline=offline)
    with output.Progress() as report:
        found = compare(one, two, tolerance=tol, weights_only=weights_only, report=report)
    for note in found.notes:
        output.note(note)
    if as_json:
        output.data_json(to_json(found))
    elif found.different or found.rows:
        for line in _words(found, short=stat):
            output.data(line)
        if found.rows and not stat:
            output.data("")
            _table(found, tensors)
    if not found.different:
        if not as_json:
            close = f"within {tol:g}" if found.rows else "every byte"
            output.data(f"equal  {found.counts[0]:,} tensors, {close}")
        return
    raise Different(
        "differs",
        f"{found.names[0]} and {found.names[1]} differ: {_sentence(found)}",
        hint="--tensors lists every one" if found.beyond and not tensors else _elsewhere(found),
    )


def _moves(a: str, b: str, base: str, dtype: str | None, *, as_json: bool, offline: bool) -> None:
    """Host and donor against their base."""
    from surgery.arch.carried import FLOATS, SHORT_FLOATS
    from surgery.arch.merging.difference import compare_towers

    stored = FLOATS.get(SHORT_FLOATS.get(dtype, dtype)) if dtype is not None else None
    if dtype is not None and stored is None:
        raise UsageError("dtype", f"--dtype {printable(dtype)}: unknown", hint=closest(dtype, list(FLOATS)))

    if [a, b, base].count("-") > 1:
        raise UsageError("stdin", "only one of them can be -", hint="name the others")
    host, donor, origin = (open_source(name, offline=offline) for name in (a, b, base))
    with output.Progress() as report:
        found = compare_towers(host, donor, origin, dtype=stored, report=report)
    if as_json:
        output.data_json(found)
        return
    header = ["where", "|A-base|", "|B-base|", "B to A", "|A-B|", "cosine", "opposed", "transfer"]
    rows = [*found["layers"], *found["groups"], found["all"]]
    output.table(header, [["" if v is None else v for v in row.values()] for row in rows])
    spark = _spark([row["cosine"] for row in found["layers"] if isinstance(row["where"], int)])
    output.note(f"cosine of both moves by layer: {spark}  (-1 to 1)")


def _elsewhere(found: Comparison) -> str:
    """What else to do where no name is in both."""
    if found.equal or found.rows or found.renamed or not (found.missing and found.added):
        return ""
    return "no name is in both; --base MODEL compares the language towers of two models wherever they lie"


def _spark(values: list[float | None]) -> str:
    """One character a value between -1 and 1."""
    levels = "▁▂▃▄▅▆▇█"
    return "".join(" " if v is None else levels[min(7, max(0, int((v + 1) * 4)))] for v in values)


def to_json(found: Comparison) -> dict[str, Any]:
    """The whole comparison as JSON values."""
    return {
        "a": found.names[0],
        "b": found.names[1],
        "equal": not found.different,
        "tolerance": found.tolerance,
        "counts": {"a": found.counts[0], "b": found.counts[1], "equal": found.equal, "changed": len(found.rows)},
        "missing": list(found.missing),
        "added": list(found.added),
        "renamed": [{"a": old, "b": new} for old, new in found.renamed],
        "copied": [{"a": old, "b": new} for old, new in found.copied],
        "changed": [_row(row, found.tolerance) for row in found.rows],
        "blocks": [vars(block) for block in found.blocks()],
        "config": [{"key": key, "a": old, "b": new} for key, old, new in found.config],
        "files": [{"path": path, "how": how} for path, how in found.files],
    }


def _row(row: TensorDiff, tolerance: float | None) -> dict[str, Any]:
    return {
        "name": row.name,
        "dtype": list(row.dtypes),
        "shape": [list(s) for s in row.shapes],
        "within": row.within(tolerance),
        "elements": row.elements,
        "changed": row.changed,
        "share": row.share,
        "nonfinite": row.nonfinite,
        "max_abs": row.max_abs if row.compared else None,
        "relative": row.relative,
        "cosine": row.cosine,
        "same_as": row.same_as,
    }


def _words(found: Comparison, *, short: bool) -> list[str]:
    """A count for every kind of difference, and with it the first names."""
    changed = [row for row in found.rows if row.shapes[0] == row.shapes[1]]
    kinds: list[tuple[str, list[str]]] = [
        ("missing", [printable(n) for n in found.missing]),
        ("added", [printable(n) for n in found.added]),
        ("renamed", _folded(found.renamed)),
        ("copied", _folded(found.copied)),
        ("moved", _folded([(row.same_as, row.name) for row in found.rows if row.same_as])),
        ("shape", [_shapes(row) for row in found.rows if row.shapes[0] != row.shapes[1]]),
        ("config", [f"{printable(key)}  {_value(old)} -> {_value(new)}" for key, old, new in found.config]),
        ("files", [f"{printable(path)} {how}" for path, how in found.files]),
    ]
    moved = sum(row.same_as is not None for row in found.rows)
    totals = {"renamed": len(found.renamed), "copied": len(found.copied), "moved": moved}
    lines = [f"{'equal':8} {found.equal:,} of {found.counts[0]:,} and {found.counts[1]:,} tensors"]
    if changed:
        close = len(changed) - sum(not row.within(found.tolerance) for row in changed)
        lines.append(f"{'changed':8} {len(changed):,}" + (f", {close:,} of them within tolerance" if close else ""))
        dtypes: dict[str, int] = {}
        for row in changed:
            if row.dtypes[0] != row.dtypes[1]:
                pair = " -> ".join(row.dtypes)
                dtypes[pair] = dtypes.get(pair, 0) + 1
        lines += [f"{'dtype':8} {n:,}  {pair}" for pair, n in dtypes.items()]
    for kind, items in kinds:
        if items:
            lines.append(f"{kind:8} {totals.get(kind, len(items)):,}")
            if not short:
                lines += [f"         {item}" for item in items[:_SHOWN]]
                lines += [f"         and {len(items) - _SHOWN:,} more"] if len(items) > _SHOWN else []
    return lines


def _table(found: Comparison, tensors: bool) -> None:
    if tensors:
        header = ["tensor", "changed", "max abs", "rel L2", "cosine", "same as"]
        rows = [[printable(r.name), *_numbers(r), printable(r.same_as or "")] for r in found.rows]
    else:
        header = ["block", "tensors", "changed", "share", "max abs", "rel L2", "cosine"]
        rows = [[printable(b.block), b.tensors, b.changed, *_block_numbers(b)] for b in found.blocks()]
    output.table(header, rows)


def _numbers(row: TensorDiff) -> list[Any]:
    if not row.compared:
        return ["", "", "", ""]
    largest = row.max_abs if not row.nonfinite else "not finite"
    return [_percent(row.share), largest, _number(row.relative), _near_one(row.cosine)]


def _block_numbers(block: BlockDiff) -> list[Any]:
    return [_percent(block.share), block.max_abs, _number(block.relative), _near_one(block.cosine)]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}%" if share >= 1e-4 or not share else "<0.01%"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _near_one(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _folded(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """`old -> new` for every pair; one line for a block that went as a whole."""
    blocks: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for old, new in pairs:
        whole = block_of(old), block_of(new)
        alike = old.removeprefix(whole[0]) == new.removeprefix(whole[1])
        blocks.setdefault(whole if alike else (old, new), []).append((old, new))
    lines = []
    for (old, new), members in blocks.items():
        many = len(members) > 1
        one, two = (old, new) if many else members[0]
        lines.append(f"{printable(one)} -> {printable(two)}" + (f"  ({len(members):,} tensors)" if many else ""))
    return lines


def _shapes(row: TensorDiff) -> str:
    return f"{printable(row.name)}  {list(row.shapes[0])} -> {list(row.shapes[1])}"


def _value(value: Any) -> str:
    return printable(str(value), limit=60)


def _sentence(found: Comparison) -> str:
    counts = {
        "changed": len(found.beyond),
        "missing": len(found.missing),
        "added": len(found.added),
        "renamed": len(found.renamed),
        "copied": len(found.copied),
    }
    said = [f"{n:,} {kind}" for kind, n in counts.items() if n]
    pieces = [f"of the tensors {', '.join(said)}"] if said else []
    pieces += [f"config keys {len(found.config):,}"] if found.config else []
    pieces += [f"other files {len(found.files):,}"] if found.files else []
    return "; ".join(pieces)
