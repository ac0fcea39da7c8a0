"""The command that runs recipes."""

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli import output
from surgery.cli.operation import open_source
from surgery.graph.run import RunOptions
from surgery.ops.table import load_op


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Output folder [default: the recipe's].")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads for training; recorded.")] = 1,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:0, mps.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that surgery made.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No talk on stderr.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More talk on stderr.")] = False,
) -> None:
    """Carry out the steps of a recipe; outputs that are there already are kept.

    Example:  surgery run recipes/graft_digits.yaml -o out/hyena
    """
    from surgery.graph.recipe import read_recipe, run_recipe

    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    options = RunOptions(device=device, threads=threads, overwrite=overwrite, resume=resume, offline=offline)
    with output.Progress() as report:
        results = run_recipe(
            read_recipe(recipe),
            load_op,
            lambda name: open_source(name, offline=offline),
            out,
            options=options,
            report=report,
        )
    if as_json:
        output.data_json(
            {n: {"path": str(r.path), "digest": r.record["digest"], "found": r.found} for n, r in results.items()}
        )
        return
    for result in results.values():
        if result.found:
            output.note(f"{result.path}: already the result of this recipe")
        output.data(str(result.path))
