"""Carry out a recipe: plan everything, do only what is needed and not at hand, put outputs in their places."""

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from surgery.errors import Busy, OutputError, ResourceError
from surgery.graph.engine.local import Engine, run_jobs
from surgery.graph.estimate import disk_report
from surgery.graph.nodes import Node, Scene, about, plan_node, plan_nodes
from surgery.graph.op import Plan
from surgery.graph.recipe import Recipe, Step, build_steps
from surgery.graph.run import Report, RunOptions, RunResult, check_place, run_op, silent
from surgery.store import cache
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.layout import LINEAGE_FILE
from surgery.store.record import read_record
from surgery.store.writer import Workspace, check_target

_PATIENCE = 0.5  # seconds between looks at a node that another process is making


@contextmanager
def prepared(
    recipe: Recipe,
    load_op: Callable[[str], object],
    open_input: Callable[[str], Checkpoint],
    out: Path | None,
    *,
    options: RunOptions,
    warn: cache.Warn,
) -> Iterator[tuple[Scene, dict[str, Node]]]:
    """Every step planned; nothing is written but side files of planned steps, which go with the block.

    Outputs go to the recipe's paths, or to `out` (below it when there are several).
    """
    ops = build_steps(recipe, load_op)
    named = dict(recipe.outputs) or {recipe.steps[-1].name: ""}
    outputs = {name: _target(named, name, out) for name in named}
    with tempfile.TemporaryDirectory(prefix="surgery-plan-") as folder:
        scene = Scene(recipe, ops, outputs, options, Path(folder), warn)
        with without_collector():
            nodes = plan_nodes(scene, open_input)
        yield scene, nodes


@contextmanager
def without_collector() -> Iterator[None]:
    """Plans are many small objects without cycles: looking for cycles among them takes a fifth of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def run_recipe(
    recipe: Recipe,
    load_op: Callable[[str], object],
    open_input: Callable[[str], Checkpoint],
    out: Path | None,
    *,
    options: RunOptions,
    report: Report = silent,
    notice: Callable[[Step, Plan], None] = lambda step, plan: None,
    warn: cache.Warn = lambda text: None,
    engine: Engine = run_jobs,
) -> dict[str, RunResult]:
    """Do what the outputs need; returns their results by step name. `notice` sees the plan of each step that has work
    to do."""
    results: dict[str, RunResult] = {}
    with (
        ExitStack() as held,
        prepared(recipe, load_op, open_input, out, options=options, warn=warn) as (scene, nodes),
    ):
        for name, node in nodes.items():
            if node.state == "run" and node.needed and name in scene.outputs and node.target is not None:
                check_target(node.target, overwrite=options.overwrite)  # before hours of work for earlier steps
        _check_disks(nodes.values())
        made: dict[str, Checkpoint] = {}
        fused = scene.fused
        for name, node in nodes.items():
            if not node.needed:
                continue
            if node.pending:
                parents = tuple(made.get(s, p) for s, p in zip(node.step.sources, node.parents, strict=True))
                node = replace(plan_node(scene, node.step, parents, fused=name in fused), needed=True)
            if node.state in ("cached", "copy") and node.key is not None:
                held.enter_context(cache.in_use(node.key))
            result = _do(scene, node, report, partial(notice, node.step), engine)
            made[name] = node.checkpoint if result is None else open_checkpoint(result.path, name=name)
            if name in scene.outputs and result is not None:
                results[name] = result
    return results


def _check_disks(nodes: Iterable[Node]) -> None:
    """Raise `ResourceError` before anything is begun that could not be finished."""
    for disk in disk_report(nodes):
        if not disk["enough"]:
            raise ResourceError(
                "disk-full",
                f"{disk['folder']}: the recipe needs {disk['needed']:,} bytes and {disk['free']:,} are free",
                hint="free some space or name another disk",
            )


def _do(scene: Scene, node: Node, report: Report, notice: Callable[[Plan], None], engine: Engine) -> RunResult | None:
    """Make a node's result or take it from where it lies; None for what is only read on the way."""
    if node.state in ("fused", "cached"):
        return None
    if node.state == "done":
        assert node.target is not None
        return RunResult(node.target, read_record(node.target / LINEAGE_FILE), found=True)
    if node.state == "copy":
        return _take(node)
    is_output = node.step.name in scene.outputs
    if is_output and not node.step.cache:
        result = run_op(
            node.op,
            list(node.parents),
            node.target,
            options=node.options,
            report=report,
            notice=notice,
            reuse=True,
            engine=engine,
            plan=node.plan,
            take=True,
        )
        _remember(scene, node, result)
        return result
    result = _into_cache(node, report, notice, engine)
    _remember(scene, node, result)
    return _take(replace(node, source=result.path)) if is_output else result


def _into_cache(node: Node, report: Report, notice: Callable[[Plan], None], engine: Engine) -> RunResult:
    """Make a node of the cache, or wait for the process that is making it."""
    assert node.key is not None
    target = cache.node_path(node.key)
    own = replace(node.options, overwrite=False)
    told = came_late = False
    while True:
        try:
            result = run_op(
                node.op,
                list(node.parents),
                target,
                options=replace(own, resume=own.resume and _unfinished(target)),
                report=report,
                notice=(lambda plan: None) if told else notice,
                reuse=True,
                engine=engine,
                plan=node.plan,
                take=True,
            )
        except (Busy, OutputError) as err:
            # Another process is at it, or came to its end between a look and the lock.
            if isinstance(err, OutputError) and (came_late or err.code != "output.exists"):
                raise
            told, came_late = True, isinstance(err, OutputError)
            time.sleep(0 if came_late else _PATIENCE)
            continue
        cache.protect(result.path)
        cache.touch(node.key)
        return result


def _unfinished(target: Path) -> bool:
    """Whether an interrupted run to `target` can go on: steps before it may not have begun."""
    return any(target.parent.glob(f".{target.name}.surgery-*/journal.jsonl"))


def _take(node: Node) -> RunResult:
    """Put an equal result at the output's place."""
    assert node.source is not None and node.key is not None
    target = node.target
    assert target is not None
    check_place(target, [open_checkpoint(node.source)])
    record = read_record(node.source / LINEAGE_FILE)
    with Workspace(target, node.key, overwrite=node.options.overwrite) as space:
        space.check_space(0 if node.options.link == "hard" else sum(row["size"] for row in record["output"]["files"]))
        for relative in (*(row["path"] for row in record["output"]["files"]), LINEAGE_FILE):
            if node.options.link == "hard":
                space.link_file(node.source / relative, relative)
            else:
                space.copy_file(node.source / relative, relative)
        space.publish()
    result = RunResult(target, record, found=True, source=node.source)
    opened = open_checkpoint(target)
    recorded = {name: row["sha256"] for name, row in record["tensors"].items()}
    opened.keep_digests(recorded)
    return result


def _remember(scene: Scene, node: Node, result: RunResult) -> None:
    """So that the next run finds it, and can say what was otherwise."""
    key = result.record["steps"][-1]["key"].removeprefix("sha256:")
    config = open_checkpoint(result.path).config_digest()
    known = cache.Known(result.record["digest"].removeprefix("sha256:"), config, str(result.path.absolute()))
    cache.keep_result(key, known)
    cache.keep_step(str(scene.recipe.path.absolute()), node.step.name, about(node))


def _target(outputs: Mapping[str, str], name: str, out: Path | None) -> Path | None:
    if out is not None:
        return out if len(outputs) == 1 else out / name
    return Path(outputs[name]) if outputs[name] else None
