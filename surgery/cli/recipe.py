"""The command that runs recipes."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli import output
from surgery.cli.operation import open_source, show_plan
from surgery.graph.run import RunOptions, check_device
from surgery.ops.table import load_op

if TYPE_CHECKING:
    from surgery.graph.op import Op, Plan
    from surgery.graph.recipe import Step


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Output folder [default: the recipe's].")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads for training; recorded.")] = 1,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:0, mps.")] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plans that need no earlier step's result; write nothing.")
    ] = False,
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
    from surgery.graph.recipe import plan_recipe, read_recipe, run_recipe

    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    check_device(device)
    options = RunOptions(device=device, threads=threads, overwrite=overwrite, resume=resume, offline=offline)
    read = read_recipe(recipe)
    if dry_run:
        show_planned(
            plan_recipe(read, load_op, partial(open_source, offline=offline), options=options), as_json=as_json
        )
        return
    with output.Progress() as report:
        results = run_recipe(
            read,
            load_op,
            partial(open_source, offline=offline),
            out,
            options=options,
            report=report,
            notice=_notice,
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


def _notice(step: "Step", plan: "Plan") -> None:
    """Said before the work of a step starts."""
    for warning in plan.warnings:
        output.warn(f"step '{step.name}': {warning}")


def show_planned(planned: "Iterable[tuple[Step, Op, Plan | None]]", *, as_json: bool) -> None:
    """What the dry run of a recipe prints."""
    rows: list[dict[str, Any]] = []
    for step, op, plan in planned:
        row: dict[str, Any] = {"name": step.name, "op": step.op, "from": list(step.sources), "plan": None}
        if plan is not None:
            row["plan"] = {**plan.report, "bytes": plan.bytes_report(), "warnings": list(plan.warnings)}
        rows.append(row)
        if not as_json:
            reads = f" from {', '.join(step.sources)}" if step.sources else ""
            output.data(f"step '{step.name}': {step.op}{reads}")
            if plan is not None:
                show_plan(op, plan, as_json=False)
            else:
                output.data("planned once the steps that it reads are done")
    if as_json:
        output.data_json({"steps": rows})
