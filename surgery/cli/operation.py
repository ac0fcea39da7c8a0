"""A command made from an operation's declaration: its parameters become options; run options are the same for all."""

import inspect
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from surgery.cli import output
from surgery.errors import UsageError, printable
from surgery.graph.evaluation import check_no_report
from surgery.graph.machine import check_device
from surgery.graph.op import (
    Param,
    Plan,
    PlanContext,
    build_op,
    check_parents,
    op_params,
    parent_range,
    shown_name,
)
from surgery.graph.run import RunOptions, RunResult, check_plan, run_op
from surgery.graph.shards import parse_size
from surgery.ops.table import load_op
from surgery.store.checkpoint import Checkpoint
from surgery.store.names import known_aliases, open_named
from surgery.store.record import undigested
from surgery.store.tensors import Part, TensorRef

_UNMADE = "arch:"  # in front of the name of an architecture: its shape alone, for --dry-run

HASH = typer.Option(
    "--hash",
    metavar="full|header",
    help="header: hash nothing for the record alone. Much cheaper; what has no digest cannot be verified.",
)
_COMMON: dict[str, tuple[Any, Any]] = {
    "out": (
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Output folder [default: ./<source>-<operation>-<8 hex>]."),
    ),
    "seed": (int, typer.Option("--seed", help="Seed of everything random; recorded.")),
    "device": (str, typer.Option("--device", help="cpu, cuda, cuda:0, mps.")),
    "threads": (int, typer.Option("--threads", min=1, help="Threads for training; recorded, since sums depend on it.")),
    "workers": (
        int,
        typer.Option(
            "--workers", min=0, show_default=False, help="Tensors in work at once [default: the cores, at most 4]."
        ),
    ),
    "shard_size": (
        str | None,
        typer.Option(
            "--shard-size",
            metavar="SIZE",
            help="Largest size of a weight file, e.g. 500MB, 2GiB [default: 5GB; kept files stay as they are].",
        ),
    ),
    "max_memory": (
        str | None,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            help="Memory of the whole process; tensors wait for room [default: 60 % of what is available].",
        ),
    ),
    "link": (
        str,
        typer.Option(
            "--link",
            metavar="copy|hard",
            help="Files that stay whole: copied (shared where the disk can), or hard links.",
        ),
    ),
    "hash": (str, HASH),
    "engine": (
        str,
        typer.Option("--engine", metavar="local|ray", help="Where tensors are made: here, or on a Ray cluster."),
    ),
    "dry_run": (bool, typer.Option("--dry-run", help="Print the plan and its cost from headers alone; write nothing.")),
    "emit_recipe": (bool, typer.Option("--emit-recipe", help="Print the command as a recipe; run nothing.")),
    "resume": (bool, typer.Option("--resume", help="Go on with a run of the same command that was interrupted.")),
    "overwrite": (bool, typer.Option("--overwrite", help="Replace an output that surgery made, in one step.")),
    "offline": (bool, typer.Option("--offline", help="Never ask the network; hub ids come from the local cache.")),
    "as_json": (bool, typer.Option("--json", help="Print one JSON object instead of the path or the table.")),
    "quiet": (bool, typer.Option("-q", "--quiet", help="No talk on stderr.")),
    "verbose": (bool, typer.Option("-v", "--verbose", help="More talk on stderr.")),
}
COMMON_DEFAULTS: dict[str, Any] = {
    "out": None,
    "seed": 0,
    "device": "cpu",
    "threads": 1,
    "workers": 0,
    "shard_size": None,
    "max_memory": None,
    "link": "copy",
    "hash": "full",
    "engine": "local",
    "dry_run": False,
    "emit_recipe": False,
    "resume": False,
    "overwrite": False,
    "offline": False,
    "as_json": False,
    "quiet": False,
    "verbose": False,
}


Sources = Callable[[dict[str, Any], Mapping[str, Any]], "list[str] | None"]


def command_function(
    name: str,
    summary: str,
    *,
    own: Mapping[str, tuple[Any, Any, Any]] | None = None,
    sources_of: Sources | None = None,
) -> Callable[..., None]:
    """A function whose signature is the operation's: Typer makes the command of it.

    A command that names its checkpoints in another way than one argument each gives `own` parameters (type, Typer's
    argument or option, default), which stand before the operation's and in the place of one of the same name, and
    `sources_of`: from all values but the run options, and those, it returns the checkpoints' names, takes its own
    values out and may set the operation's; None ends the command there.
    """
    kind = load_op(name)
    params = op_params(kind)
    fewest, most = parent_range(kind)
    own = own or {}

    def command(**values: Any) -> None:
        # An operation may take a run option for its own, as reshard does: it is part of what it makes then.
        common = {k: values[k] if k in params else values.pop(k) for k in _COMMON}
        sources: list[str] | None
        if sources_of is not None:
            output.Talk.quiet, output.Talk.verbose = common["quiet"], common["verbose"]
            sources = sources_of(values, common)
        else:
            sources = [values.pop(f"parent_{i}") for i in range(fewest)] + list(values.pop("more_parents", None) or ())
        if sources is not None:
            _run(kind, values, sources, common)

    signature: list[inspect.Parameter] = [_parameter(k, *row) for k, row in own.items()]
    if sources_of is None:
        signature += _parent_arguments(kind, fewest, most)
    for field, (hint, param, default) in params.items():
        if field not in own:
            signature.append(_parameter(field, *_option(field, hint, param, default)))
    signature += [
        _parameter(k, hint, option, COMMON_DEFAULTS[k])
        for k, (hint, option) in _COMMON.items()
        if k not in params and k not in own
    ]
    signature.sort(key=lambda p: p.default is not inspect.Parameter.empty)
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    command.__doc__ = inspect.getdoc(kind) or summary
    command.__name__ = name.replace("-", "_")
    return command


def _parent_arguments(kind: Any, fewest: int, most: int | None) -> list[inspect.Parameter]:
    """One argument for each checkpoint that the operation must have, and one for all that it may."""
    found: list[inspect.Parameter] = []
    for i in range(fewest):
        label = getattr(kind, "parent_names", ("MODEL",) * fewest)[i]
        argument = typer.Argument(
            metavar=label, help="Folder, file, alias, hub id, or - for a path on standard input.", show_default=False
        )
        found.append(_parameter(f"parent_{i}", str, argument, MISSING))
    if most != fewest:
        argument = typer.Argument(metavar="[MORE]...", help="Further checkpoints.", show_default=False)
        found.append(_parameter("more_parents", list[str] | None, argument, None))
    return found


def _option(field: str, hint: Any, param: Param, default: Any) -> tuple[Any, Any, Any]:
    flag = "--" + shown_name(field).replace("_", "-")
    many = get_origin(hint) is tuple
    kind: Any = list[str] if many else hint
    if param.positional:
        return (
            kind,
            typer.Argument(metavar=param.metavar or field.upper(), help=param.help, show_default=False),
            default,
        )
    flags = [*param.flags, f"{flag}/--no-{flag[2:]}" if hint is bool and default is True else flag]
    extra: dict[str, Any] = {"metavar": param.metavar} if param.metavar else {}
    option = typer.Option(*flags, help=param.help, show_default=default not in (MISSING, None, (), "", False), **extra)
    return kind, option, list(default) if many and default is not MISSING else default


def _parameter(name: str, hint: Any, info: Any, default: Any) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[hint, info],
        default=empty if default is MISSING else default,
    )


def _run(kind: Any, values: Mapping[str, Any], sources: list[str], common: Mapping[str, Any]) -> None:
    output.Talk.quiet, output.Talk.verbose = common["quiet"], common["verbose"]
    op = build_op(kind, values)
    check_parents(kind, len(sources))
    if common["emit_recipe"]:
        from surgery.cli.emitted import one_step, print_recipe

        named = [open_source(s).name if s == "-" else s for s in sources]  # standard input is read, as for the work
        print_recipe(one_step(op, named, common["seed"]), common, COMMON_DEFAULTS)
        return
    options = run_options(common)
    check_device(options.device)
    unmade = next((s for s in sources if s.startswith(_UNMADE)), None)
    if unmade is not None and values.get("data") is not None:
        name = unmade.removeprefix(_UNMADE)
        raise UsageError(
            "no-weights",
            f"{unmade} is a shape without weights: there is nothing that --data {values['data']} could train",
            hint=f"leave out --data, or make weights and name their folder: surgery init {name} -o DIR",
        )
    parents = [
        _unmade(s, common["dry_run"]) if s.startswith(_UNMADE) else open_source(s, offline=options.offline)
        for s in sources
    ]
    for parent in parents:
        if parent.ignored:
            output.note(f"{parent.name}: left out other forms of the weights: {', '.join(parent.ignored[:4])}")
    resolved = [line for source, parent in zip(sources, parents, strict=True) if (line := _led_to(source, parent))]
    if common["dry_run"]:
        check_no_report(parents)
        plan = op.plan(PlanContext(options.seed, options.offline), *parents)
        check_plan(plan)
        for line in resolved if not common["as_json"] else ():
            output.data(f"source   {line}")
        show_plan(op, plan, as_json=common["as_json"])
        return
    for line in resolved if output.Talk.verbose else ():
        output.note(f"source: {line}")
    planned: list[Plan] = []

    def notice(plan: Plan) -> None:
        planned.append(plan)
        for line in getattr(op, "announce", lambda p: [])(plan):
            output.note(line)
        _notice(plan)

    started = time.perf_counter()
    with output.Progress() as report:
        result = run_op(op, parents, common["out"], options=options, report=report, notice=notice)
    spent = _spent(result, time.perf_counter() - started)
    if result.found:
        output.note("already done: this output is the result of the same command on the same parents")
    if result.reused:
        output.note(f"resumed: {result.reused} tensors were reused")
    note_alone(result)
    note_undigested(result)
    last = result.record["steps"][-1]
    training = {**last.get("training", {}), **result.record.get("measured", {})}
    for line in getattr(op, "summary", lambda t: [])(training) if training else []:
        output.note(line)
    measured = result.record.get("measured", {})
    show_measured(measured)
    for line in getattr(op, "remarks", lambda m: [])(measured):
        output.warn(line)
    if not result.found and (hasattr(op, "announce") or output.Talk.verbose):
        size, rate = output.count(spent["bytes"], "B"), spent["gb_per_second"]
        memory = output.count(spent["peak_memory"], "B")
        output.note(f"done     {size} in {spent['seconds']:.2f} s, {rate:.3f} GB/s, peak memory {memory}")
    if common["as_json"]:
        record = result.record
        step = record["steps"][-1]
        rows = {"path": str(result.path), "digest": record["digest"], "record": record["record"], "key": step["key"]}
        rows |= {"undigested": len(undigested(record))}
        rows |= {"found": result.found, "reused": result.reused, "training": step.get("training", {})}
        rows |= {"measured": measured, "spent": spent}
        if planned and planned[0].report and hasattr(op, "announce"):
            rows |= {"plan": {**planned[0].report, "warnings": list(planned[0].warnings)}}
        output.data_json(rows)
    else:
        output.data(str(result.path))


def _spent(result: RunResult, seconds: float) -> dict[str, float]:
    """What the work took: seconds, the bytes of the files written and how many went by in a second, and the most memory
    that this process had resident."""
    size = sum(row["size"] for row in result.record.get("output", {}).get("files", ()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rate = size / seconds / 1e9 if seconds else 0.0
    return {"seconds": round(seconds, 3), "bytes": size, "gb_per_second": round(rate, 4), "peak_memory": peak}


def show_measured(measured: Mapping[str, Any]) -> None:
    """The tables of what an operation measured, on stderr."""
    for rows in measured.values():
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            output.table(list(rows[0]), [list(row.values()) for row in rows], to_stderr=True)


def note_alone(result: RunResult) -> None:
    """Say which tensors were too large for the memory allowed."""
    if result.alone:
        name, size = max(result.alone, key=lambda row: row[1])
        more = f" and {len(result.alone) - 1:,} more" if len(result.alone) > 1 else ""
        output.warn(
            f"'{printable(name)}'{more} did not fit the memory allowed ({output.count(size, 'B')}) and ran alone"
        )


def _notice(plan: Plan) -> None:
    """Said before the work starts."""
    for warning in plan.warnings:
        output.warn(warning)


def run_options(common: Mapping[str, Any]) -> RunOptions:
    """The run options of a command line, checked."""
    extra = {"workers": common["workers"]} if common["workers"] else {}
    check_words(common["link"], common["hash"])
    return RunOptions(
        seed=common["seed"],
        device=common["device"],
        threads=common["threads"],
        shard_size=parse_size(common["shard_size"]) if common["shard_size"] is not None else None,
        max_memory=parse_size(common["max_memory"]) if common["max_memory"] is not None else None,
        link=common["link"],
        hash=common["hash"],
        engine=common["engine"],
        resume=common["resume"],
        overwrite=common["overwrite"],
        offline=common["offline"],
        **extra,
    )


def check_words(link: str, hash_: str) -> None:
    """Refuse words that --link and --hash do not know."""
    for option, word, known in (("link", link, ("copy", "hard")), ("hash", hash_, ("full", "header"))):
        if word not in known:
            raise UsageError("bad-option", f"--{option} {printable(word)}: unknown", hint=" or ".join(known))


def note_undigested(result: RunResult) -> None:
    """Say what the record does not: that some tensors were never digested."""
    if missing := undigested(result.record):
        total = len(result.record["tensors"])
        output.note(f"{len(missing):,} of {total:,} tensors have no digest (--hash header): verify cannot check them")


def open_source(source: str, *, offline: bool = False, key: str | None = None) -> Checkpoint:
    """Open what a command line names; `-` reads one path, or an object with `path`, from standard input."""
    if source == "-":
        import json

        text = os.fsdecode(sys.stdin.buffer.read()).strip()
        if text.startswith("{"):
            try:
                text = str(json.loads(text)["path"])
            except (ValueError, KeyError):
                raise UsageError(
                    "stdin",
                    "standard input is no path and no JSON with one",
                    hint="pipe in the output of a surgery command",
                ) from None
        if not text or "\n" in text:
            raise UsageError(
                "stdin", "standard input must be exactly one path", hint="pipe in the output of a surgery command"
            )
        source = text
    return open_named(source, offline=offline, key=key)


def _led_to(source: str, parent: Checkpoint) -> str | None:
    """What a name that is no path stands for: a repository at a commit, or a folder; None for a path."""
    if parent.origin:
        return f"{printable(source)} = {printable('@'.join(parent.origin.values()))}"
    if source == "-" or source.partition(":")[0] in known_aliases() and not os.path.lexists(source):
        return f"{printable(source)} = {printable(str(parent.path))}"
    return None


def _unmade(source: str, dry_run: bool) -> Checkpoint:
    """What `surgery init NAME` would make, as `arch:NAME`: names, shapes and config without a byte of weights, which is
    all that a plan needs."""
    import json

    name = source.removeprefix(_UNMADE)
    if not dry_run:
        raise UsageError(
            "no-weights", f"{source} has no weights", hint=f"add --dry-run, or make some: surgery init {name} -o DIR"
        )
    plan = build_op(load_op("init"), {"arch": name}).plan(PlanContext(0, True))
    tensors, end = {}, 0
    for entry in plan.entries:
        tensors[entry.name] = TensorRef(entry.name, entry.dtype, entry.shape, source, end, entry.nbytes)
        end += entry.nbytes
    config = next(json.loads(f.content) for f in plan.files if f.relative == "config.json" and f.content is not None)
    part = Part("", plan.parts[0].base, tensors, config, "config.json", ())
    return Checkpoint(source, Path(source), Path(source), "hf", {"": part}, ())


def show_plan(op: Any, plan: Plan, *, as_json: bool) -> None:
    """What --dry-run prints."""
    numbers = plan.bytes_report()
    report = {**plan.report, "bytes": numbers, "warnings": list(plan.warnings)}
    if as_json:
        output.data_json(report)
        return
    for line in getattr(op, "describe", lambda p: [])(plan):
        output.data(line)
    kinds: dict[str, int] = {}
    for entry in plan.entries:
        kinds[type(entry).__name__.lower()] = kinds.get(type(entry).__name__.lower(), 0) + 1
    output.data("tensors  " + ", ".join(f"{n:,} {k}" for k, n in kinds.items()) + f", {len(plan.dropped):,} dropped")
    output.data(f"bytes    {output.count(numbers['kept'], 'B')} kept, {output.count(numbers['written'], 'B')} new")
    for warning in plan.warnings:
        output.warn(warning)
