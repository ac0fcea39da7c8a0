"""Commands that change layers in memory and measure: probe layers, sweep merge."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.evals.vqa import check_groups, read_template
from surgery.cli.operation import open_source
from surgery.errors import UsageError
from surgery.graph.machine import check_device

_MODEL_HELP = "Folder, alias, hub id, or - for a path on standard input."
_Eval = Annotated[
    Path, typer.Option("--eval", metavar="FILE", help="Questions: .jsonl, .json or .tsv, as for eval vqa.")
]
_Metric = Annotated[
    str, typer.Option("--metric", help="acc (share of right answers) or nll (-log p of the right one).")
]
_Group = Annotated[str | None, typer.Option("--group-by", metavar="FIELD", help="Also by the values of a field.")]
_Prompt = Annotated[str, typer.Option("--prompt", help="direct, cot or bare, as for eval vqa.")]
_Template = Annotated[str | None, typer.Option("--chat-template", metavar="FILE", help="Another template, or none.")]
_Seed = Annotated[int, typer.Option("--seed", help="Which items are drawn, and which go to --dev.")]
_Longest = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, for acc.")]
_Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE.csv", help="Write the rows of the table.")]
_Png = Annotated[Path | None, typer.Option("--png", metavar="FILE.png", help="Draw them.")]
_Records = Annotated[
    Path | None, typer.Option("--records", metavar="FILE.jsonl", help="Keep every measurement, for --resume.")
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with the measurements in --records.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be measured, from headers alone.")]


def probe_layers(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    eval_data: _Eval,
    ablate: Annotated[
        str, typer.Option("--ablate", help="zero, uniform (1/rows, as published), base or donor (that one's weights).")
    ] = "zero",
    module: Annotated[str, typer.Option("--module", help="attn, mlp or block.")] = "block",
    layers: Annotated[
        str, typer.Option("-l", "--layers", metavar="LIST", help="Layers to probe: all, 0-3,7, 12:28, 20-.")
    ] = "all",
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Whose layers --ablate base puts in.")
    ] = None,
    donor: Annotated[
        str | None, typer.Option("--donor", metavar="MODEL", help="Whose layers --ablate donor puts in.")
    ] = None,
    metric: _Metric = "nll",
    group_by: _Group = None,
    prompt: _Prompt = "direct",
    chat_template: _Template = None,
    limit: flags.DrawnItems = None,
    seed: _Seed = 0,
    batch: flags.BatchOfItems = 8,
    max_new_tokens: _Longest = 64,
    dtype: flags.Dtype = "auto",
    attn: flags.Attn = None,
    device: flags.Device = "cpu",
    threads: flags.Threads = None,
    out: _Out = None,
    png: _Png = None,
    records: _Records = None,
    resume: _Resume = False,
    dry_run: _DryRun = False,
    overwrite: flags.Overwrite = False,
    offline: flags.Offline = False,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Which layers matter: change one layer at a time in memory, measure, put it back. Nothing is written to the model.

    Example:  surgery probe layers ./vlm --eval questions.jsonl --ablate zero --group-by category --png out/profile.png

    With another model's layers:  surgery probe layers ./vlm --eval q.jsonl --ablate donor --donor ./llm --metric acc
    """
    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    _prepare(device, threads, (("-o", out, ".csv"), ("--png", png, ".png")), overwrite, records, resume)
    named = {"base": base, "donor": donor}
    source = named.pop(ablate, None)
    if next(iter(v for v in named.values() if v), None) or (ablate in ("base", "donor") and source is None):
        raise UsageError(
            "ablate", f"--ablate {ablate} does not go with these models", hint="--ablate donor --donor MODEL, or base"
        )
    host = open_source(model, offline=offline)
    other = open_source(source, offline=offline) if source is not None else None
    from surgery.arch.language.load import language_config, load
    from surgery.arch.language.locate import locate_tower
    from surgery.arch.layers import parse_spans

    items = _items(eval_data, limit, seed, group_by)
    language_config(host)
    chosen = parse_spans(layers, locate_tower(host).count)
    if dry_run:
        _show_plan(len(items), len(chosen) + 1, {"layers": list(chosen), "ablate": ablate, "module": module}, as_json)
        return
    from surgery.evals.layers.measures import measure
    from surgery.evals.layers.profile import probe_layers as probe
    from surgery.evals.layers.profile import rows

    loaded = load(host, dtype=dtype, attn=attn, device=device)
    how = {"prompt": prompt, "template": read_template(chat_template), "batch": batch}
    measured = measure(loaded, items, metric, **how, max_new_tokens=max_new_tokens, name=host.name, note=output.note)
    what = how | {"metric": metric, "ablate": ablate, "module": module, "dtype": dtype, "attn": attn}
    what |= _scoring(metric, max_new_tokens)
    keeping = _kept(records, "probe-layers", what, items, host, other, resume, overwrite)
    with keeping as kept, output.Progress() as report:
        profile = probe(
            loaded, measured, metric, chosen, ablate=ablate, module=module, other=other, name=host.name,
            kept=kept, report=report,
        )  # fmt: skip
    table = rows(profile, items, group_by)
    settings = {"model": host.name, "digest": f"sha256:{host.digest}", "eval": str(eval_data), "items": len(items)}
    settings |= {"metric": metric, "ablate": ablate, "module": module, "prompt": prompt}
    settings |= {"other": other.name if other else None}
    if as_json:  # numbers first: a full disk must not cost them
        output.data_json(settings | {"rows": table})
    else:
        header = ("layer", "group", "n", "intact", metric, "difference", "95 %")
        output.table(header, [(r["layer"], r["group"], r["n"], *_numbers(r)) for r in table])
    if out is not None:
        _write_csv(out, table)
    if png is not None:
        title = f"{Path(host.name).name}: {module} of one layer, {ablate}"
        _draw(png, table, "layer", "group", title=title, x_label="layer", metric=metric)
    _mention(out, png)


def sweep_merge(
    host: Annotated[str, typer.Argument(metavar="HOST", help=f"The model that keeps its layout. {_MODEL_HELP}")],
    donor: Annotated[str, typer.Argument(metavar="DONOR", help="The text model that is merged in.")],
    eval_data: _Eval,
    alpha: Annotated[str, typer.Option("--alpha", metavar="LIST", help="Shares of the host.")] = "1,0.9,0.8,0.7",
    layers: Annotated[
        list[str] | None,
        typer.Option("-l", "--layers", metavar="LIST", help="Layers to merge, as for merge; several times."),
    ] = None,
    window: Annotated[int | None, typer.Option("--window", min=1, help="Also every window of so many layers.")] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="From one window to the next [default: 1].")
    ] = None,
    dev: Annotated[
        float, typer.Option("--dev", help="Share of the items to choose on; the rest is reported. 0: choose nothing.")
    ] = 0.5,
    force: Annotated[
        bool, typer.Option("--force", help="Merge models that do not look related, as surgery merge.")
    ] = False,
    metric: _Metric = "acc",
    group_by: _Group = None,
    prompt: _Prompt = "direct",
    chat_template: _Template = None,
    limit: flags.DrawnItems = None,
    seed: _Seed = 0,
    batch: flags.BatchOfItems = 8,
    max_new_tokens: _Longest = 64,
    dtype: flags.Dtype = "auto",
    attn: flags.Attn = None,
    device: flags.Device = "cpu",
    threads: flags.Threads = None,
    out: _Out = None,
    png: _Png = None,
    records: _Records = None,
    resume: _Resume = False,
    dry_run: _DryRun = False,
    overwrite: flags.Overwrite = False,
    offline: flags.Offline = False,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Measure merges at several host shares and layers without writing a checkpoint.

    The best is chosen on one part of the items (--dev) and reported on the rest.

    Example:  surgery sweep merge ./vlm ./llm --alpha 1,0.9,0.8 --eval questions.jsonl --png out/curve.png

    Windows:  surgery sweep merge ./vlm ./llm --alpha 0.5 --window 8 --stride 4 --eval questions.jsonl --metric nll
    """
    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    _prepare(device, threads, (("-o", out, ".csv"), ("--png", png, ".png")), overwrite, records, resume)
    shares = _shares(alpha)
    if not 0 <= dev < 1:
        raise UsageError("dev", f"--dev {dev:g}: not a share of the items", hint="from 0 to below 1")
    if stride is not None and window is None:
        raise UsageError("window", "--stride goes with --window", hint="say how many layers a window has")
    vlm, llm = open_source(host, offline=offline), open_source(donor, offline=offline)
    from surgery.arch.language.load import load
    from surgery.evals.layers.selections import selections

    items = _items(eval_data, limit, seed, group_by)
    chosen, warnings = selections(vlm, llm, layers or [], window, stride, force=force)
    for warning in warnings:
        output.warn(warning)
    if dry_run:
        points = {"alpha": shares, "layers": [s.label for s in chosen], "tensors": [len(s.tensors) for s in chosen]}
        _show_plan(len(items), 1 + len(chosen) * sum(share != 1 for share in shares), points, as_json)
        return
    from surgery.evals.layers.measures import measure
    from surgery.evals.layers.sweep import pick, rows, split_items
    from surgery.evals.layers.sweep import sweep_merge as sweep

    everything = list(range(len(items)))
    choose, rest = split_items(items, dev, seed, group_by) if dev else (everything, everything)
    loaded = load(vlm, dtype=dtype, attn=attn, device=device)
    how = {"prompt": prompt, "template": read_template(chat_template), "batch": batch}
    measured = measure(loaded, items, metric, **how, max_new_tokens=max_new_tokens, name=vlm.name, note=output.note)
    what = how | {"metric": metric, "dtype": dtype, "attn": attn}
    what |= _scoring(metric, max_new_tokens)
    keeping = _kept(records, "sweep-merge", what, items, vlm, llm, resume, overwrite)
    with keeping as kept, output.Progress() as report:
        found = sweep(loaded, measured, metric, llm, shares, chosen, name=vlm.name, done=kept, report=report)
    table = rows(found, items, choose, group_by)
    result: dict[str, Any] = {
        "host": vlm.name, "donor": llm.name, "eval": str(eval_data), "items": len(items), "metric": metric,
        "prompt": prompt, "dev": len(choose) if dev else 0, "rows": table,
    }  # fmt: skip
    best = pick(found, choose) if dev else None
    if best is not None:
        label, share = best
        reported = [r for r in rows(found, items, rest, group_by) if (r["layers"], r["alpha"]) == best]
        result["chosen"] = {"layers": label, "alpha": share, "test": reported}
    elif dev:
        output.warn(f"{metric} is finite for no merge: none is chosen; see --dtype")
    if as_json:
        output.data_json(result)
    else:
        _show_sweep(table, metric, best, reported if best else [], (len(choose), len(rest)))
    if out is not None:
        _write_csv(out, table)
    if png is not None:
        _draw_sweep(png, table, vlm.name, llm.name, metric, window=window if len(shares) == 1 else None)
    _mention(out, png)


def _show_sweep(
    table: Sequence[dict[str, Any]],
    metric: str,
    best: tuple[str, float] | None,
    reported: Sequence[dict[str, Any]],
    counts: tuple[int, int],
) -> None:
    header = ("layers", "host / donor", "group", "n", "host alone", metric, "difference", "95 %")
    shown = [(r["layers"], _shown_share(r["alpha"]), r["group"], r["n"], *_numbers(r)) for r in table]
    output.table(header, shown)
    if best is not None:
        where = f"layers {best[0]}, {_shown_share(best[1])}"
        output.data(f"\nchosen on these {counts[0]} items: {where}; on the other {counts[1]}:")
        output.table(header[2:], [(r["group"], r["n"], *_numbers(r)) for r in reported])


def _prepare(
    device: str,
    threads: int | None,
    files: Sequence[tuple[str, Path | None, str]],
    overwrite: bool,
    records: Path | None,
    resume: bool,
) -> None:
    check_device(device)
    flags.check_records("--records", records, resume=resume)
    for flag, path, suffix in files:
        flags.check_file(flag, path, suffix, overwrite=overwrite or resume)
    flags.use_threads(threads)


def _items(data: Path, limit: int | None, seed: int, group_by: str | None) -> list[Any]:
    from surgery.evals.vqa.rows import read_items

    items = read_items(data, limit=limit, seed=seed)
    check_groups(items, [group_by] if group_by else [])
    return items


def _scoring(metric: str, max_new_tokens: int) -> dict[str, Any]:
    """What accuracies depend on and likelihoods do not."""
    from surgery.evals.vqa.evaluate import RULES

    return {"max_new_tokens": max_new_tokens, "rules": RULES} if metric == "acc" else {}


@contextmanager
def _kept(
    path: Path | None,
    kind: str,
    what: dict[str, Any],
    items: list[Any],
    model: Any,
    other: Any,
    resume: bool,
    overwrite: bool,
) -> Iterator[Any]:
    """What was measured before, if a file of records is kept; the file belongs to these models, items and settings."""
    from surgery.evals.layers.measures import Kept
    from surgery.evals.records import Records, fingerprint
    from surgery.evals.vqa.evaluate import asked
    from surgery.graph.files import files_digest

    if path is None:
        yield Kept()
        return
    template = what["template"]
    settings = what | {
        "template": fingerprint(template) if template else None,
        "model": f"sha256:{model.digest}",
        "config": files_digest(model),
        "other": f"sha256:{other.digest}" if other else None,
        "items": fingerprint([asked(item) for item in items]),
    }
    with Records(path, kind, settings, resume=resume, overwrite=overwrite) as records:
        yield Kept(records)


def _show_plan(items: int, passes: int, plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.data_json({"items": items, "measurements": passes, **plan})
        return
    for key, value in plan.items():
        output.data(f"{key:8} " + (", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    output.data(f"measures {items:,} items {passes:,} times, the model as it is among them")


def _shares(text: str) -> list[float]:
    try:
        found = [float(piece) for piece in text.split(",")]
    except ValueError:
        raise UsageError("alpha", f"--alpha {text}: not a list of numbers", hint="for example 1,0.9,0.8") from None
    if not all(0 <= share <= 1 for share in found) or len(set(found)) != len(found):
        raise UsageError(
            "alpha", f"--alpha {text}: shares are different numbers from 0 to 1", hint="1 is the host, 0 the donor"
        )
    return found


def _shown_share(alpha: float) -> str:
    return f"{alpha:.2f} / {1 - alpha:.2f}"


def _numbers(row: dict[str, Any]) -> tuple[str, ...]:
    if row["difference"] is None:
        means = ("not finite" if row[key] is None else f"{row[key]:.4f}" for key in ("intact", "value"))
        return (*means, "", "")
    interval = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
    return f"{row['intact']:.4f}", f"{row['value']:.4f}", f"{row['difference']:+.4f}", interval


def _write_csv(path: Path, table: Sequence[dict[str, Any]]) -> None:
    import csv

    from surgery.store.writer import atomic_write

    text = StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    atomic_write(path, text.getvalue().encode())


def _draw(
    path: Path, table: Sequence[dict[str, Any]], x: str, by: str, *, title: str, x_label: str, metric: str
) -> None:
    """Differences with their intervals, a line a group."""
    from surgery.evals.pictures import curves

    series: dict[str, list[tuple[float, float]]] = {}
    bands: dict[str, list[tuple[float, float, float]]] = {}
    drawn = _drawable(path, table)
    for row in drawn:
        series.setdefault(row[by], []).append((row[x], row["difference"]))
        bands.setdefault(row[by], []).append((row[x], row["low"], row["high"]))
    if not drawn:
        return
    label = f"{metric}, difference to {'host' if x_label.startswith('first') else 'intact'}"
    curves(series, path, x_label=x_label, y_label=label, title=title, log_y=False, bands=bands, whole_x=x == "layer")


def _drawable(path: Path, table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have a place in a picture; says how many have none, and that there is no picture without any."""
    rows = [row for row in table if row["difference"] is not None]
    if len(rows) < len(table):
        what = "are not drawn" if rows else "there is no picture"
        output.warn(f"{path}: {len(table) - len(rows)} of {len(table)} rows are not finite: {what}")
    return rows


def _draw_sweep(
    path: Path, table: Sequence[dict[str, Any]], host: str, donor: str, metric: str, *, window: int | None
) -> None:
    """The metric over the donor's share, a line a selection and group; of windows the difference over their place."""
    from surgery.evals.pictures import curves

    title = f"{Path(donor).name} merged into {Path(host).name}"
    if window is not None:
        spans = {label for label in (r["layers"] for r in table) if re.fullmatch(r"\d+(-\d+)?", label)}
        labels = {label: [int(n) for n in label.split("-")] for label in spans}
        title += f", host share {table[0]['alpha']:g}" if table else ""
        firsts = {label: ends[0] for label, ends in labels.items() if ends[-1] - ends[0] + 1 == window}
        rows = [{**r, "layer": firsts[r["layers"]]} for r in table if r["layers"] in firsts]
        _draw(path, rows, "layer", "group", title=title, x_label=f"first of {window} layers", metric=metric)
        return
    several = len({r["layers"] for r in table}) > 1
    series: dict[str, list[tuple[float, float]]] = {}
    bands: dict[str, list[tuple[float, float, float]]] = {}
    drawn = sorted(_drawable(path, table), key=lambda r: 1 - r["alpha"])
    if not drawn:
        return
    for r in drawn:
        name = f"layers {r['layers']}, {r['group']}" if several else r["group"]
        series.setdefault(name, []).append((1 - r["alpha"], r["value"]))
        bands.setdefault(name, []).append((1 - r["alpha"], r["intact"] + r["low"], r["intact"] + r["high"]))
    curves(series, path, x_label="share of the donor", y_label=metric, title=title, log_y=False, bands=bands)


def _mention(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and path.exists():
            output.note(f"written: {path}")
