"""adaptvis analyze: what a model's attention to pictures says."""

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.evals.vqa import read_template
from surgery.cli.operation import open_source
from surgery.graph.machine import check_device


def analyze(
    model: flags.Ckpt,
    data: Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="Questions, with boxes for the overlap.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Keep the report as JSON.")
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE.csv", help="Also a line a layer.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Also four charts.")] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Layers of a knock-out [default: an eighth].")
    ] = None,
    no_knock_out: Annotated[bool, typer.Option("--no-knock-out", help="Leave the knock-outs out.")] = False,
    limit: flags.FirstQuestions = None,
    batch: flags.BatchOfQuestions = 8,
    max_new_tokens: flags.LongestAnswer = 20,
    chat_template: flags.ChatTemplate = None,
    seed: flags.BootstrapSeed = 0,
    overwrite: flags.Overwrite = False,
    device: flags.Device = "cpu",
    dtype: flags.Dtype = "auto",
    attn: flags.SteeredAttn = None,
    threads: flags.Threads = None,
    offline: flags.Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Where plain answers look: attention on the picture by layer, overlap with the things that are asked about and
    whether it goes with right answers, confidence, and what knock-outs cost.

    Example:  surgery adaptvis analyze llava-scenes scenes/test.jsonl -o report.json --csv layers.csv --plot report.png
    """
    from surgery.data.spatial.items import items_digest, read_items

    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    for flag, path, suffix in (("-o", out, ".json"), ("--csv", csv, ".csv"), ("--plot", plot, ".png")):
        flags.check_file(flag, path, suffix, overwrite=overwrite)
    check_device(device)
    base = open_source(model, offline=offline)
    template = read_template(chat_template)
    items = read_items(data, limit=limit)
    flags.use_threads(threads)
    from surgery.arch.language.load import load
    from surgery.evals.attention.analyze import analyze as work
    from surgery.evals.attention.analyze import per_layer_csv
    from surgery.evals.spatial.evaluate import Asking

    asking = Asking(template=template, max_new_tokens=max_new_tokens, batch=batch)
    loaded = load(base, dtype=dtype, attn=attn, device=device)
    with output.Progress() as report:
        found = work(loaded, items, asking, window=window, knock_out=not no_knock_out, seed=seed, report=report)
    result = {
        "model": model,
        "digest": f"sha256:{base.digest}",
        "data": str(data),
        "items": items_digest(items),
        **found,
    }
    _write(result, out, csv, plot, per_layer_csv)
    if as_json:
        output.data_json(result)
    else:
        _show(result)


def _write(result: dict[str, Any], out: Path | None, csv: Path | None, plot: Path | None, as_csv: Any) -> None:
    import json

    from surgery.store.writer import atomic_write

    if out is not None:
        atomic_write(out, (json.dumps(result, indent=2) + "\n").encode())
        output.note(f"report: {out}")
    if csv is not None:
        atomic_write(csv, as_csv(result).encode())
        output.note(f"layers: {csv}")
    if plot is not None:
        from surgery.evals.attention.charts import analysis

        analysis(result, plot, title=f"{result['model']}, {result['n']} questions, accuracy {result['accuracy']:.3f}")
        output.note(f"charts: {plot}")


def _show(result: dict[str, Any]) -> None:
    low, high = result["interval"]
    first = result["layers"][0]
    output.data(
        f"{result['n']} questions, accuracy {result['accuracy']:.4f} [{low:.3f}, {high:.3f}]; the picture is "
        f"{first['image_share_of_tokens']:.0%} of the tokens\n"
    )
    header = ("layer", "on picture", "text : image per token", "spread", "inside boxes", "AUROC inside", "AUROC cosine")
    rows = []
    for row in result["layers"]:
        rows.append(
            (row["layer"], f"{row['image_mass']:.3f}", f"{row['text_to_image_per_token']:.1f}", f"{row['entropy']:.3f}",
             output.share(row["inside"]), _auroc(row, "inside"), _auroc(row, "cosine"))
        )  # fmt: skip
    output.table(header, rows)
    if first["inside_if_uniform"] is not None:
        output.data(
            f"\nboxes cover {first['inside_if_uniform']:.3f} of the picture, which even attention would put inside them"
        )
    sure = result["confidence"]
    ranks = output.share(sure["auroc"])
    output.data(f"\nconfidence  mean {sure['mean']:.3f}, AUROC {ranks}, calibration error {sure['ece']:.3f}")
    output.table(
        ("right answer", "n", "confidence", "accuracy", "95 %"),
        [
            (g, r["n"], f"{r['confidence']:.3f}", f"{r['accuracy']:.3f}", output.interval(r["interval"]))
            for g, r in result["relations"].items()
        ],
    )
    if result["flow"]:
        output.data("")
        output.table(
            ("without sight", "layers", "p before", "p after", "drop", "95 %"),
            [
                (row["rows"], "-".join(map(str, dict.fromkeys(row["layers"]))), f"{row['before']:.3f}",
                 f"{row['after']:.3f}", f"{row['drop']:+.3f}", output.interval(row["interval"]))
                for row in result["flow"]
            ],
        )  # fmt: skip


def _auroc(row: dict[str, Any], score: str) -> str:
    pair = row[f"{score}_auroc_interval"]
    return output.share(row[f"{score}_auroc"]) + (f" {output.interval(pair)}" if pair else "")
