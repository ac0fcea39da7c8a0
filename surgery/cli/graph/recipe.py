"""Commands about recipes: run, plan, schema."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.operation import HASH, check_words, note_alone, note_undigested, open_source
from surgery.graph.machine import check_device
from surgery.graph.run import RunOptions, RunResult
from surgery.graph.shards import parse_size
from surgery.steps import load_step
from surgery.store.layout import REPORT_FILE, read_json
from surgery.store.record import undigested

if TYPE_CHECKING:
    from surgery.graph.op import Plan
    from surgery.graph.recipes.nodes import Node
    from surgery.graph.recipes.recipe import Recipe, Step

Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="Output folder [default: the recipe's].")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Another value: seed=3, inputs.base=PATH, STEP.PARAM=…; repeatable."
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of one computation; recorded.")]
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Tensors in work at once [default: the cores, at most 4].")
]
Memory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Memory of the whole process [default: 60 % of what is free]."),
]
Hash = Annotated[str, HASH]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that surgery made.")]


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, ours or mergekit's.")],
    out: Out = None,
    set_: Set = None,
    threads: Threads = 1,
    device: flags.Device = "cpu",
    workers: Workers = 0,
    max_memory: Memory = None,
    link: Annotated[
        str,
        typer.Option("--link", metavar="copy|hard", help="How an equal result becomes an output."),
    ] = "copy",
    hash_: Hash = "full",
    engine: Annotated[
        str,
        typer.Option(
            "--engine", metavar="local|ray", help="Where the work is done: here, or on the Ray cluster of RAY_ADDRESS."
        ),
    ] = "local",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole plan from headers alone, as surgery plan; write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    offline: flags.Offline = False,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Carry out the steps of a recipe. What lies there already, or in the cache, is not made again.

    Steps that are no output are made on the way and never written, where the operations allow it; with cache: true, or
    when several steps read them, they are kept in the cache. mergekit's files run as they are.

    Examples:

      surgery run recipes/graft_digits.yaml -o out/hyena

      surgery run recipes/deeper_digits.yaml --set deeper.layers=0-4,1-5 -o out/deeper --dry-run
    """
    from surgery.graph.recipes.recipe_file import read_recipe

    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    options = _options(
        device,
        threads,
        workers,
        max_memory,
        overwrite,
        offline,
        resume=resume,
        link=link,
        hash_=hash_,
        engine=engine,
    )
    read = read_recipe(recipe, changes=set_ or ())
    if dry_run:
        print_plans([(read, out)], options, as_json=as_json)
        return
    run_and_report(read, out, options, as_json=as_json)


def run_and_report(recipe: "Recipe", out: Path | None, options: RunOptions, *, as_json: bool) -> None:
    """Do what a recipe says, tell how it went, print the paths of its outputs."""
    from surgery.graph.recipes.schedule import run_recipe

    with output.Progress() as report:
        results = run_recipe(
            recipe,
            load_step,
            partial(open_source, offline=options.offline),
            out,
            options=options,
            report=report,
            notice=_notice,
            warn=output.warn,
        )
    for name, result in results.items():
        if result.source is not None:
            output.note(f"{result.path}: an equal result was there: {result.source}")
        elif result.found:
            output.note(f"{result.path}: already the result of this recipe")
        if result.reused:
            output.note(f"{name}: resumed: {result.reused} tensors were reused")
        if result.taken:
            output.note(f"{name}: {result.taken:,} computed tensors were taken from earlier results")
        note_alone(result)
        note_undigested(result)
    if as_json:
        output.data_json(
            {
                n: {
                    "path": str(r.path),
                    "digest": r.record["digest"],
                    "undigested": len(undigested(r.record)),
                    "found": r.found,
                    "source": str(r.source) if r.source else None,
                    "reused": r.reused,
                    "taken": r.taken,
                    **_numbers(r),
                }
                for n, r in results.items()
            }
        )
        return
    for result in results.values():
        output.data(str(result.path))


def _numbers(result: RunResult) -> dict[str, Any]:
    """What an evaluation found."""
    listed = any(row["path"] == REPORT_FILE for row in result.record["output"]["files"])
    return {"report": read_json(result.path / REPORT_FILE)} if listed and not result.record["tensors"] else {}


def plan(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="YAML files, ours or mergekit's.")],
    out: Out = None,
    set_: Set = None,
    threads: Threads = 1,
    device: flags.Device = "cpu",
    workers: Workers = 0,
    max_memory: Memory = None,
    hash_: Hash = "full",
    overwrite: Overwrite = False,
    offline: flags.Offline = False,
    as_json: flags.AsJson = False,
    dot: flags.Dot = False,
    svg: flags.Svg = None,
    quiet: flags.Quiet = False,
) -> None:
    """Say what a recipe will do and cost, from headers alone: every step, what is at hand and why the rest is not.

    With several recipes --json prints one object, {"recipes": [...]}.

    Examples:

      surgery plan recipes/deeper_digits.yaml

      surgery plan recipes/*.yaml --json

      surgery plan recipes/dit_digits.yaml --svg graph.svg
    """
    from surgery.graph.recipes.recipe_file import read_recipe

    output.Talk.quiet = quiet
    options = _options(device, threads, workers, max_memory, overwrite, offline, hash_=hash_)
    read = [(read_recipe(path, changes=set_ or ()), out) for path in recipes]
    print_plans(read, options, as_json=as_json, dot=dot, svg=svg)


def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML.

    Example:  surgery schema > recipe.schema.json
    """
    from surgery.evals.table import EVALS
    from surgery.graph.recipes.schema import recipe_schema
    from surgery.ops.table import OPS

    output.data_json(recipe_schema({name: load_step(name) for name in (*OPS, *EVALS)}))


def _options(
    device: str,
    threads: int,
    workers: int,
    max_memory: str | None,
    overwrite: bool,
    offline: bool,
    *,
    resume: bool = False,
    link: str = "copy",
    hash_: str = "full",
    engine: str = "local",
) -> RunOptions:
    check_device(device)
    check_words(link, hash_)
    extra = {"workers": workers} if workers else {}
    return RunOptions(
        device=device,
        threads=threads,
        max_memory=parse_size(max_memory) if max_memory is not None else None,
        overwrite=overwrite,
        resume=resume,
        offline=offline,
        link=link,
        hash=hash_,
        engine=engine,
        **extra,
    )


def _notice(step: "Step", plan: "Plan") -> None:
    """Said before the work of a step starts."""
    for warning in plan.warnings:
        output.warn(f"step '{step.name}': {warning}")


def print_plans(
    recipes: "list[tuple[Recipe, Path | None]]",
    options: RunOptions,
    *,
    as_json: bool,
    dot: bool = False,
    svg: Path | None = None,
) -> None:
    """What is said of recipes before they run: words, JSON, or a picture."""
    from surgery.graph.recipes.schedule import without_collector

    with without_collector():  # in a call of its own: plans are gone again when the collector comes back
        _print_plans(recipes, options, as_json=as_json, dot=dot, svg=svg)


def _print_plans(
    recipes: "list[tuple[Recipe, Path | None]]", options: RunOptions, *, as_json: bool, dot: bool, svg: Path | None
) -> None:
    from surgery.graph.recipes.estimate import disk_report, node_report
    from surgery.graph.recipes.schedule import prepared

    reports: list[dict[str, Any]] = []
    pictures: list[tuple[str, list[Any]]] = []
    for recipe, out in recipes:
        opener = partial(open_source, offline=options.offline)
        with prepared(recipe, load_step, opener, out, options=options, warn=output.warn) as (scene, nodes):
            rows = [node_report(node) for node in nodes.values()]
            disks = disk_report(nodes.values())
            reports.append({"recipe": str(recipe.path), "steps": rows, "inputs": dict(recipe.inputs), "disks": disks})
            pictures.append((str(recipe.path), rows))
            if not (as_json or dot):
                _show(recipe, list(nodes.values()), rows, disks, several=len(recipes) > 1)
    if as_json:
        output.data_json(reports[0] if len(reports) == 1 else {"recipes": reports})
    if dot or svg is not None:
        from surgery.graph.picture import draw_dot, draw_svg, recipe_picture

        picture = recipe_picture([(r["inputs"], r["steps"]) for r in reports])
        if dot:
            output.data(draw_dot(picture))
        if svg is not None:
            from surgery.store.writer import atomic_write

            atomic_write(svg, draw_svg(picture).encode())
            output.note(f"drawn: {svg}")


def _show(
    recipe: "Recipe", nodes: "list[Node]", rows: list[dict[str, Any]], disks: list[dict[str, Any]], *, several: bool
) -> None:
    if several:
        output.data(f"{recipe.path}")
    for node, row in zip(nodes, rows, strict=True):
        reads = f" from {', '.join(row['from'])}" if row["from"] else ""
        where = f"  ->  {row['path']}" if row["path"] else ""
        output.data(f"step '{row['name']}': {row['op']}{reads}{where}")
        reason = f"  ({row['why']})" if row["why"] else ""
        output.data(f"  {_STATES[row['state']]}{reason}")
        for line in getattr(node.op, "describe", lambda p: [])(node.plan):
            output.data(f"  {line}")
        counts = ", ".join(f"{n:,} {kind}" for kind, n in row["tensors"].items() if n) or "none"
        output.data(f"  tensors  {counts}")
        if row["state"] in ("run", "copy"):
            size = row["bytes"]
            output.data(
                f"  bytes    {output.count(size['read'], 'B')} read, {output.count(size['written'], 'B')} written"
                f"; tensors in memory {output.count(row['peak_memory'], 'B')} at most"
            )
        for warning in node.plan.warnings:
            output.warn(f"step '{row['name']}': {warning}")
    for disk in disks:
        text = f"disk     {output.count(disk['needed'], 'B')} needed, {output.count(disk['free'], 'B')} free"
        output.data(f"{text} at {disk['folder']}")
        if not disk["enough"]:
            output.warn(f"{disk['folder']}: too little space: the run would be refused")
    output.data("")


_STATES = {
    "done": "done: its output lies there",
    "cached": "cached",
    "copy": "copied from an equal result",
    "fused": "made on the way, not written",
    "run": "to be made",
    "not needed": "not needed",
}
