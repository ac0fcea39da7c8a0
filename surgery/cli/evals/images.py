"""Commands about images: sample, eval images."""

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.operation import open_source
from surgery.errors import UsageError
from surgery.graph.machine import check_device


def sample(
    model: flags.Model,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="FILE.npz", help="Where the images go (arr_0 uint8, labels, settings)."),
    ],
    n: Annotated[int, typer.Option("--n", min=1, help="How many images.")] = 64,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Classes in turn, e.g. 0,3,7 [default: all].")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")] = 250,
    guidance: Annotated[float, typer.Option("--guidance", help="Classifier-free guidance; 1 is none.")] = 1.0,
    sampler: Annotated[str, typer.Option("--sampler", help="ddpm, ddim or dpm.")] = "ddpm",
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the noise; the noise of image i depends on it and i alone.")
    ] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")] = 64,
    cfg_channels: Annotated[
        str, typer.Option("--cfg-channels", help="Channels that guidance acts on: all, or 3 as in DiT's code.")
    ] = "all",
    device: flags.Device = "cpu",
    threads: flags.Threads = None,
    grid: Annotated[
        Path | None, typer.Option("--grid", metavar="FILE.png", help="Also draw the images, a row a class.")
    ] = None,
    overwrite: flags.Overwrite = False,
    offline: flags.Offline = False,
    as_json: flags.JsonNotPath = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Draw images from a class-conditional diffusion transformer, grafted or not.

    Example:  surgery sample dit-digits --n 100 --sampler ddim --steps 20 -o out/digits.npz --grid out/digits.png
    """
    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    check_device(device)
    for flag, path, suffix in (("-o", out, ".npz"), ("--grid", grid, ".png")):
        flags.check_file(flag, path, suffix, overwrite=overwrite)
    wanted = _classes(classes)
    base = open_source(model, offline=offline)
    from surgery.evals.images.checkpoint import sample_to_file

    with output.Progress() as report:
        settings = sample_to_file(
            base,
            out,
            n=n,
            classes=wanted,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            seed=seed,
            batch=batch,
            cfg_channels=cfg_channels,
            device=device,
            threads=threads,
            grid=grid,
            report=report,
        )
    if grid is not None:
        output.note(f"picture: {grid}")
    if as_json:
        output.data_json({"path": str(out), "grid": str(grid) if grid else None, "settings": settings})
    else:
        output.data(str(out))


def eval_images(
    samples: Annotated[
        Path, typer.Argument(metavar="A.npz", help="Images made by surgery sample, or any npz with arr_0 uint8.")
    ],
    ref: Annotated[
        str, typer.Option("--ref", help="What to compare with: digits, fashion, folder:PATH, npz:PATH or B.npz.")
    ] = "digits",
    features: Annotated[
        str, typer.Option("--features", help="classifier[:PATH], inception:PATH (TorchScript), or npz.")
    ] = "classifier",
    split: Annotated[str, typer.Option("--split", help="Which images of a set: train or val.")] = "train",
    neighbours: Annotated[
        int, typer.Option("-k", "--neighbours", min=1, help="Neighbours of precision and recall.")
    ] = 3,
    bootstrap: Annotated[
        int | None, typer.Option("--bootstrap", min=0, help="Resamples of the interval [default: 200].")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="B.npz", help="Also compare with another sample file.")
    ] = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
) -> None:
    """Frechet distance, KID, Inception score, precision and recall of sampled images.

    Example:  surgery eval images out/digits.npz --ref digits
    """
    from surgery.evals.images.evaluate import compare, evaluate_images

    output.Talk.quiet = quiet
    with output.Progress() as report:
        how: dict[str, Any] = {"features": features, "split": split, "neighbours": neighbours, "bootstrap": bootstrap}
        result = evaluate_images(samples, ref, **how, report=report)
        if baseline is not None:
            result["against"] = compare(evaluate_images(baseline, ref, **how, report=report), result)
    if as_json:
        output.data_json(result)
        return
    interval = result["frechet_interval"]
    shown = f"{result['frechet']:.2f}" + (f"   95 % [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
    output.data(f"Frechet distance  {shown}")
    output.data(f"KID               {result['kid']:.5f}")
    if result["inception_score"] is not None:
        output.data(f"Inception score   {result['inception_score']:.3f}")
    output.data(f"precision         {result['precision']:.3f}")
    output.data(f"recall            {result['recall']:.3f}")
    output.data(f"samples           {result['n']} of {samples}; reference {result['n_ref']} of {result['reference']}")
    output.data(f"extractor         {result['extractor']}")
    how_made = f"{result['sampler']}, {result['steps']} steps, guidance {result['guidance']}"
    output.data(f"sampling          {how_made if result['sampler'] else 'not recorded in the file'}")
    for name, pair in result.get("against", {}).items():
        output.data(f"against baseline  {name} {pair['base']:.4g} -> {pair['other']:.4g}   {pair['difference']:+.4g}")
    for text in result["notes"]:
        output.note(f"note: {text}")


def _classes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise UsageError(
            "classes", f"--classes {text}: not a list of numbers", hint="for example --classes 0,3,7"
        ) from None
