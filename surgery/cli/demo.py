"""The demo: grafting end to end on real digits, as commands that can be repeated one by one.

Each row is a checkpoint made by an operation, sampled with the same noise and compared with the same reference. With
several seeds it is the study of the paper's ordering (Grafting, arXiv 2506.05340, Tab. 2 and 4, at a laptop's size).
"""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.errors import UsageError
from surgery.graph.op import build_op
from surgery.graph.run import RunOptions, run_op
from surgery.ops.table import load_op
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.names import open_named

_FINETUNE = 200
_THREADS = 1  # part of what a bit-equal repetition needs; models this small gain nothing from more


@dataclass(frozen=True)
class Row:
    """One model of the comparison: how it is made from the base (None: it is the base)."""

    label: str
    folder: str
    op: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def command(self, base: str, out: Path, seed: int) -> str:
        """The command that makes it."""
        if self.op is None:
            return ""
        words = ["surgery", *(["train", "diffusion"] if self.op == "train-diffusion" else [self.op])]
        for key, value in self.params.items():
            for item in value if isinstance(value, list) else [value]:
                words += [f"--{key.replace('_', '-')}", str(item)]
        return shlex.join([*words, base, "--seed", str(seed), "--threads", str(_THREADS), "-o", str(out)])


def _graft(label: str, folder: str, replace: str, layers: str, **params: Any) -> Row:
    return Row(label, folder, "graft", {"replace": [replace], "layers": layers, **params})


def _stages(name: str, folder: str, replace: str, layers: str) -> list[Row]:
    stage1: dict[str, Any] = {"init": "distill", "data": "digits"}
    return [
        _graft(f"{name}: random", f"{folder}-random", replace, layers, init="random"),
        _graft(f"{name}: stage 1", f"{folder}-stage1", replace, layers, **stage1),
        _graft(f"{name}: stage 1+2", f"{folder}-stage12", replace, layers, **stage1, finetune_steps=_FINETUNE),
    ]


_ORIGINAL = [
    Row("original", "original"),
    Row(
        f"original + {_FINETUNE} steps",
        "control",
        "train-diffusion",
        {"data": "digits", "steps": _FINETUNE, "val_every": 40},
    ),
]
_SHORT = [
    *_ORIGINAL,
    *_stages("hyena-x 50%", "hyena50", "attn=hyena-x", "50%"),
    _stages("self 100%", "self100", "attn=mha", "all")[2],
]
_FULL = [
    *_ORIGINAL,
    *_stages("self 100%", "self100", "attn=mha", "all"),
    *_stages("hyena-x 50%", "hyena50", "attn=hyena-x", "50%"),
    *_stages("hyena-x 100%", "hyena100", "attn=hyena-x", "all"),
]


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where everything goes.")] = Path("out/demo"),
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds in turn, e.g. 0,1,2; several give intervals.")] = "0",
    full: Annotated[
        bool, typer.Option("--full", help="All grafts of the ordering study, not only the short tour.")
    ] = False,
    n: Annotated[int, typer.Option("--n", min=40, help="Images sampled from each model.")] = 500,
    base: Annotated[str, typer.Option("--base", help="The model to graft.")] = "dit-digits",
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Graft a small diffusion transformer on real digits, end to end: a table, pictures, and the commands to repeat it.

    Example:  surgery demo -o out/demo        (minutes)      surgery demo --full --seeds 0,1,2 -o out/study
    """
    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    chosen = _seeds(seeds)
    started = time.monotonic()
    source = open_named(base)
    import torch

    torch.set_num_threads(_THREADS)
    rows = _FULL if full else _SHORT
    measured: dict[str, list[dict[str, Any]]] = {row.label: [] for row in rows}
    commands: list[str] = []
    for seed in chosen:
        for i, row in enumerate(rows, start=1):
            output.note(f"[{i}/{len(rows)}{f', seed {seed}' if len(chosen) > 1 else ''}] {row.label}")
            folder = out / f"seed{seed}" if len(chosen) > 1 else out
            measured[row.label].append(_row(row, source, base, folder, seed, n, commands))
    report = _report(measured, rows, source, out, chosen)
    report["seconds"] = round(time.monotonic() - started, 1)
    _pictures(measured, rows, out)
    _write_text(out / "commands.sh", "\n".join([f"export OMP_NUM_THREADS={_THREADS}", *commands]) + "\n")
    _write_text(out / "table.json", json.dumps(report, indent=2) + "\n")
    if as_json:
        output.data_json(report)
    else:
        _print(report, out)


def _row(
    row: Row, source: Checkpoint, base: str, folder: Path, seed: int, n: int, commands: list[str]
) -> dict[str, Any]:
    """Make the model, sample it, measure it."""
    from surgery.arch.dit.checkpoints import load_model, scheduler_config
    from surgery.arch.dit.diffusion import NoiseSchedule, heldout_loss
    from surgery.data.images import load_images
    from surgery.evals.images.checkpoint import sample_to_file
    from surgery.evals.images.evaluate import evaluate_images

    path, training, name = source.path, {}, base
    with output.Progress() as report:
        if row.op is not None:
            target = folder / row.folder
            commands.append(row.command(base, target, seed))
            output.note(f"  $ {commands[-1]}")
            params = {k: tuple(v) if isinstance(v, list) else v for k, v in row.params.items()}
            result = run_op(
                build_op(load_op(row.op), params),
                [source],
                target,
                options=RunOptions(seed=seed, threads=_THREADS),
                report=report,
                reuse=True,
            )
            path, name, training = result.path, str(target), result.record["steps"][-1].get("training", {})
        checkpoint = open_checkpoint(path, name=name)
        npz, png = folder / f"{row.folder}.npz", folder / f"{row.folder}.png"
        commands.append(
            shlex.join(
                [
                    "surgery",
                    "sample",
                    name,
                    "--n",
                    str(n),
                    "--sampler",
                    "ddim",
                    "--steps",
                    "20",
                    "--seed",
                    str(seed),
                    "-o",
                    str(npz),
                    "--grid",
                    str(png),
                ]
            )
        )
        sample_to_file(
            checkpoint,
            npz,
            n=n,
            classes=None,
            steps=20,
            guidance=1.0,
            sampler="ddim",
            seed=seed,
            batch=128,
            grid=png,
            report=report,
        )
        commands.append(shlex.join(["surgery", "eval", "images", str(npz), "--ref", "digits"]))
        scores = evaluate_images(npz, "digits")
    images = load_images("digits")
    loss, _ = heldout_loss(
        load_model(checkpoint).float(),
        NoiseSchedule.from_config(scheduler_config(checkpoint)),
        *images.val,
        seed=seed,
        n_draws=8,
    )
    return {
        "path": name,
        "png": str(png),
        "npz": str(npz),
        "val_loss": loss,
        "scores": scores,
        "training": training,
        "digest": checkpoint.digest,
    }


def _report(
    measured: Mapping[str, list[dict[str, Any]]],
    rows: Sequence[Row],
    source: Checkpoint,
    out: Path,
    seeds: Sequence[int],
) -> dict[str, Any]:
    from surgery.evals.ordering import check_order, estimate

    losses, distances = {}, {}
    for label, runs in measured.items():
        losses[label] = estimate([r["val_loss"] for r in runs])
        interval = tuple(runs[0]["scores"]["frechet_interval"])
        distances[label] = estimate([r["scores"]["frechet"] for r in runs], interval=interval)
    table = [
        {
            "model": label,
            "val_loss": losses[label].mean,
            "val_loss_interval": [losses[label].low, losses[label].high],
            "frechet": distances[label].mean,
            "frechet_interval": [distances[label].low, distances[label].high],
            "kid": sum(r["scores"]["kid"] for r in runs) / len(runs),
            "precision": sum(r["scores"]["precision"] for r in runs) / len(runs),
            "recall": sum(r["scores"]["recall"] for r in runs) / len(runs),
            "path": runs[0]["path"],
            "runs": [
                {k: r[k] for k in ("path", "val_loss", "digest")} | {"frechet": r["scores"]["frechet"]} for r in runs
            ],
        }
        for label, runs in measured.items()
    ]
    claims = {
        "val_loss": [check_order(losses, a, b) for a, b in _claims(list(measured))],
        "frechet": [check_order(distances, a, b) for a, b in _claims(list(measured))],
    }
    first = measured[rows[0].label][0]["scores"]
    settings = {k: first[k] for k in ("n", "n_ref", "reference", "extractor", "sampler", "steps", "guidance")}
    return {
        "base": f"sha256:{source.digest}",
        "seeds": list(seeds),
        "settings": settings,
        "rows": table,
        "claims": claims,
        "folder": str(out),
    }


def _claims(labels: Sequence[str]) -> list[tuple[str, str]]:
    """The paper's order among the rows that are there: original, stage 1+2, stage 1, random; 50 % before 100 %."""
    pairs = []
    for name in ("self 100%", "hyena-x 50%", "hyena-x 100%"):
        order = ["original", f"{name}: stage 1+2", f"{name}: stage 1", f"{name}: random"]
        there = [label for label in order if label in labels]
        pairs += list(zip(there, there[1:], strict=False)) if len(there) > 1 else []
    for stage in ("stage 1+2", "stage 1"):
        pair = (f"hyena-x 50%: {stage}", f"hyena-x 100%: {stage}")
        pairs += [pair] if set(pair) <= set(labels) else []
    return pairs


def _pictures(measured: Mapping[str, list[dict[str, Any]]], rows: Sequence[Row], out: Path) -> None:
    from surgery.evals.images.sample import load_samples
    from surgery.evals.pictures import curves, side_by_side

    columns: dict[str, Any] = {}
    series: dict[str, list[tuple[float, float]]] = {}
    finetuning: dict[str, list[tuple[float, float]]] = {}
    labels: Any = None
    for row in rows:
        run = measured[row.label][0]
        samples = load_samples(run["npz"])
        columns[row.label.replace(": ", ":\n")] = samples.images
        labels = samples.labels
        training = run["training"]
        if "stage1" in training and "stage2" not in training:
            for block in training["stage1"]:
                name = f"{row.label.split(':')[0]}, block {block['block']}"
                series[name] = [(p["step"], p["rel_err"]) for p in block["curve"]]
        curve = training.get("stage2", training).get("curve", [])
        if curve:
            finetuning[row.label] = [(p["step"], p["val"]) for p in curve if "val" in p]
    side_by_side(columns, out / "overview.png", labels=labels)
    if series:
        curves(
            series,
            out / "distillation.png",
            x_label="step",
            y_label="relative error, held out",
            title="Stage 1: activation distillation",
        )
    if finetuning:
        curves(
            finetuning,
            out / "finetuning.png",
            x_label="step",
            y_label="held-out diffusion loss",
            title="Stage 2: finetuning (EMA)",
            log_y=False,
        )


def _print(report: Mapping[str, Any], out: Path) -> None:
    several = len(report["seeds"]) > 1
    rows = []
    for row in report["rows"]:
        low, high = row["frechet_interval"]
        loss = f"{row['val_loss']:.4f}" + (
            f" [{row['val_loss_interval'][0]:.4f}, {row['val_loss_interval'][1]:.4f}]" if several else ""
        )
        rows.append(
            [
                row["model"],
                loss,
                f"{row['frechet']:.1f} [{low:.1f}, {high:.1f}]",
                f"{row['precision']:.2f}",
                f"{row['recall']:.2f}",
            ]
        )
    output.table(["model", "held-out loss", "Frechet distance [95 %]", "precision", "recall"], rows)
    s = report["settings"]
    output.data("")
    output.data(
        f"{s['n']} samples each, {s['sampler']} {s['steps']} steps, guidance {s['guidance']:g}; "
        f"reference: {s['n_ref']} {s['reference']}; extractor {s['extractor']}"
    )
    kind = "95 % intervals over seeds (Student's t)" if several else "intervals: bootstrap over images, one seed"
    output.data(kind)
    for metric, claims in report["claims"].items():
        output.data(f"\norder by {metric}")
        for claim in claims:
            output.data(f"  {claim['text']}")
    output.data(
        f"\npictures   {out}/overview.png  {out}/distillation.png  {out}/finetuning.png and a grid beside each model"
    )
    output.data(f"commands   {out}/commands.sh")
    output.data(f"numbers    {out}/table.json   ({report['seconds']:.0f} s)")


def _write_text(path: Path, text: str) -> None:
    from surgery.store.writer import atomic_write

    atomic_write(path, text.encode())


def _seeds(text: str) -> list[int]:
    try:
        found = [int(piece) for piece in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) != len(found) or min(found) < 0:
        raise UsageError("seeds", f"--seeds {text}: not a list of different numbers", hint="for example --seeds 0,1,2")
    return found
