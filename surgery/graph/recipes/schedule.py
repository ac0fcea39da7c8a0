"""Carry out a recipe: plan everything, do only what is needed and not at hand, put outputs in their places."""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from surgery.errors import Busy, OutputError, ResourceError
from surgery.graph.engine.cluster import Cluster, engine_named
from surgery.graph.engine.local import Engine, run_jobs
from surgery.graph.op import Op, Plan, Trained
from surgery.graph.planned import Planned
from surgery.graph.recipes.estimate import disk_report
from surgery.graph.recipes.nodes import Node, Scene, about, plan_node, plan_nodes
from surgery.graph.recipes.recipe import Recipe, Step, build_steps
from surgery.graph.run import Report, RunOptions, RunResult, check_place, run_op, silent
from surgery.store import cache
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.digests import cache_folder
from surgery.store.layout import LINEAGE_FILE
from surgery.store.record import read_record
from surgery.store.writer import Workspace, check_target

_STEP_MEMORY = 2 << 30  # bytes that a whole step asks of a machine of the cluster, where nothing else is said
_ENVIRONMENT = ("SURGERY_PLUGINS", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
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
    engine: Engine | None = None,
) -> dict[str, RunResult]:
    """Do what the outputs need; returns their results by step name. `notice` sees the plan of each step that has work
    to do."""
    results: dict[str, RunResult] = {}
    engine = engine or engine_named(options.engine, device=options.device)
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

        def current(name: str) -> Node:
            """The node on what its parents have become, held where others may throw it away."""
            node = nodes[name]
            if node.pending:
                parents = tuple(made.get(s, p) for s, p in zip(node.step.sources, node.parents, strict=True))
                node = replace(plan_node(scene, node.step, parents, fused=name in fused), needed=True)
            if node.state in ("cached", "copy") and node.key is not None:
                held.enter_context(cache.in_use(node.key))
            return node

        def keep(node: Node, result: RunResult | None) -> None:
            name = node.step.name
            made[name] = node.checkpoint if result is None else open_checkpoint(result.path, name=name)
            if name in scene.outputs and result is not None:
                results[name] = result

        def do(node: Node) -> None:
            keep(node, _do(scene, node, report, partial(notice, node.step), engine))

        waiting = [name for name, node in nodes.items() if node.needed]
        if not isinstance(engine, Cluster):
            for name in waiting:
                do(current(name))
            return results
        with _Apart(engine) as apart:
            while waiting or apart.running:
                ready = [current(name) for name in _ready(nodes, waiting, apart.running.values())]
                at_hand = [node for node in ready if node.state != "run"]
                if not at_hand:
                    # What goes out does so before anything is done here: neither holds up the other.
                    for node in [n for n in ready if apart.takes(n, alone=len(ready) == 1)]:
                        ready.remove(node)
                        waiting.remove(node.step.name)
                        notice(node.step, node.plan)
                        apart.start(scene, node)
                for node in at_hand or ready[:1]:
                    waiting.remove(node.step.name)
                    do(node)
                idle = not _ready(nodes, waiting, apart.running.values())
                for node, result in apart.ended(wait=idle):
                    keep(node, _done(scene, node, result))
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
    work = _work(scene, node)
    return _done(scene, node, _make(work, report, notice, engine, plan=node.plan))


@dataclass(frozen=True)
class _Work:
    """What making one node's result takes, without the recipe around it: it can be done in another process."""

    op: Op
    parents: tuple[Checkpoint, ...]
    target: Path | None
    options: RunOptions
    in_cache: str | None  # its key, where it goes to the cache


def _work(scene: Scene, node: Node) -> _Work:
    straight = node.step.name in scene.outputs and not node.step.cache
    assert straight or node.key is not None
    target = node.target if straight or node.key is None else cache.node_path(node.key)
    return _Work(node.op, node.parents, target, node.options, None if straight else node.key)


def _make(work: _Work, report: Report, notice: Callable[[Plan], None], engine: Engine, plan: Plan | None) -> RunResult:
    """Make a node's result at its place, or wait for the process that is making it in the cache."""
    make = partial(
        run_op,
        work.op,
        list(work.parents),
        work.target,
        report=report,
        reuse=True,
        engine=engine,
        plan=plan,
        take=True,
    )
    if work.in_cache is None:
        return make(options=work.options, notice=notice)
    return _into_cache(work, make, notice)


def _done(scene: Scene, node: Node, result: RunResult) -> RunResult:
    """Remember a result; one in the cache that is an output too is put at the output's place."""
    _remember(scene, node, result)
    if node.step.name in scene.outputs and node.step.cache:
        return _take(replace(node, source=result.path))
    return result


def _into_cache(work: _Work, make: Callable[..., RunResult], notice: Callable[[Plan], None]) -> RunResult:
    """Make a node of the cache, or wait for the process that is making it."""
    assert work.in_cache is not None and work.target is not None
    own = replace(work.options, overwrite=False)
    told = came_late = False
    while True:
        try:
            options = replace(own, resume=own.resume and _unfinished(work.target))
            result = make(options=options, notice=(lambda plan: None) if told else notice)
        except (Busy, OutputError) as err:
            # Another process is at it, or came to its end between a look and the lock.
            if isinstance(err, OutputError) and (came_late or err.code != "output.exists"):
                raise
            told, came_late = True, isinstance(err, OutputError)
            time.sleep(0 if came_late else _PATIENCE)
            continue
        cache.protect(result.path)
        cache.touch(work.in_cache)
        return result


def _ready(nodes: Mapping[str, Node], waiting: Sequence[str], running: Iterable[Node]) -> list[str]:
    """Steps that wait for no other."""
    open_steps = {*waiting, *(node.step.name for node in running)}
    return [name for name in waiting if not open_steps & set(nodes[name].step.sources)]


class _Apart:
    """Steps that are at work on a cluster, each as a whole: those that train, and those that need not wait for each
    other. A step that is alone goes there tensor by tensor instead."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.running: dict[Any, Node] = {}

    def __enter__(self) -> "_Apart":
        return self

    def __exit__(self, *exc: object) -> None:
        self._cluster.cancel(list(self.running))

    def takes(self, node: Node, *, alone: bool) -> bool:
        """Whether the step can and should be done as a whole; steps that read what was never written cannot."""
        if node.state != "run" or any(isinstance(p, Planned) or p.layout == "pickle" for p in node.parents):
            return False
        trains = node.plan.evaluates or any(isinstance(e, Trained) for e in node.plan.entries)
        return trains or not alone or bool(self.running)

    def start(self, scene: Scene, node: Node) -> None:
        """Hand the step over."""
        work = _work(scene, node)
        memory = node.options.max_memory or _STEP_MEMORY
        places = [p.path for p in node.parents] + [cache_folder() / "x"]
        target = work.target or Path("x")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._cluster.check([*places, target])
        options = replace(work.options, max_memory=memory, engine="local")
        handle = self._cluster.start(
            _make_apart,
            replace(work, options=options),
            processors=max(options.workers, options.threads),
            memory=memory,
            environment={n: os.environ[n] for n in _ENVIRONMENT if n in os.environ}
            | {"SURGERY_CACHE": str(cache_folder().absolute())},
        )
        self.running[handle] = node

    def ended(self, *, wait: bool) -> Iterator[tuple[Node, RunResult]]:
        """Steps that have come to their end, with their results; with `wait` at least one, if any is at work."""
        for handle in self._cluster.wait(list(self.running), at_once=not wait) if self.running else ():
            node = self.running.pop(handle)
            yield node, self._cluster.result(handle)


def _make_apart(work: _Work) -> RunResult:
    """On a worker of a cluster: one whole step with the threads of that machine."""
    return _make(work, silent, lambda plan: None, run_jobs, None)


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
    if "undigested" not in result.record:
        key = result.record["steps"][-1]["key"].removeprefix("sha256:")
        config = open_checkpoint(result.path).config_digest()
        known = cache.Known(result.record["digest"].removeprefix("sha256:"), config, str(result.path.absolute()))
        cache.keep_result(key, known)
    cache.keep_step(str(scene.recipe.path.absolute()), node.step.name, about(node))


def _target(outputs: Mapping[str, str], name: str, out: Path | None) -> Path | None:
    if out is not None:
        return out if len(outputs) == 1 else out / name
    return Path(outputs[name]) if outputs[name] else None
