"""What a recipe comes down to: every step planned from headers alone, and what has to be done for it.

A step whose parents are not made yet plans on what they would be (`graph.planned`). A step that is neither an output,
nor asked to be cached, nor read by several others is fused: its tensors are made on the way and never written. Every
other one is looked for by its key, where it should lie, in the cache, and where an equal result was put before.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.errors import printable
from surgery.graph.evaluation import check_no_report
from surgery.graph.files import file_digests, settled
from surgery.graph.machine import installed
from surgery.graph.op import Given, Op, Plan, PlanContext, Trained, resolved_params
from surgery.graph.planned import Planned, PlannedStep, planned_checkpoint
from surgery.graph.recipes.recipe import Recipe, Step
from surgery.graph.run import (
    RunOptions,
    check_plan,
    default_target,
    find_result,
    is_hashing,
    plan_key,
)
from surgery.store import cache
from surgery.store.checkpoint import Checkpoint, open_checkpoint

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Node:
    """One step and where it stands.

    `state`: "done" (its output lies there), "cached", "copy" (an equal result lies at `source`), "fused" (made on the
    way), "run". `why` says why it is not at hand. `needed`: whether an output depends on doing it. `key` is None where
    that of a parent is only known once it is made.
    """

    step: Step
    op: Op
    plan: Plan
    parents: tuple[Checkpoint, ...]
    options: RunOptions
    key: str | None
    state: str
    why: str
    checkpoint: Checkpoint
    target: Path | None = None
    source: Path | None = None
    needed: bool = False

    @property
    def pending(self) -> bool:
        """Whether it has to be planned again once its parents are there."""
        return any(isinstance(p, Planned) and p.pending for p in self.parents)


@dataclass(frozen=True)
class Scene:
    """What planning a recipe needs beside it; `folder` is for the side files of steps that are not made yet."""

    recipe: Recipe
    ops: Mapping[str, Op]
    outputs: Mapping[str, Path | None]
    options: RunOptions
    folder: Path
    warn: Warn
    numbers: Iterator[int] = field(default_factory=itertools.count)  # of the folders there

    @property
    def fused(self) -> set[str]:
        """Steps that need not be written."""
        readers: dict[str, list[Step]] = {}
        for step in self.recipe.steps:
            for source in set(step.sources):
                readers.setdefault(source, []).append(step)
        return {
            step.name
            for step in self.recipe.steps
            if step.name not in self.outputs
            and not step.cache
            and len(readers.get(step.name, ())) == 1
            and self.ops[step.name].trainer is None
            and _reads_tensors_one_by_one(self.ops[readers[step.name][0].name])
        }


def _reads_tensors_one_by_one(op: Op) -> bool:
    """Trainers, and operations that look at their parents as a whole, want checkpoints that lie on a disk."""
    return op.trainer is None and not any(hasattr(op, word) for word in ("measure", "check"))


def plan_nodes(scene: Scene, open_input: Callable[[str], Checkpoint]) -> dict[str, Node]:
    """Every step by name, in an order in which they can be done."""
    given: dict[str, Checkpoint] = {}
    nodes: dict[str, Node] = {}
    fused = scene.fused
    for step in scene.recipe.steps:
        for source in step.sources:
            if source in scene.recipe.inputs and source not in given:
                given[source] = open_input(scene.recipe.inputs[source])
        parents = tuple(given[s] if s in given else nodes[s].checkpoint for s in step.sources)
        nodes[step.name] = plan_node(scene, step, parents, fused=step.name in fused)
    return _with_needs(nodes, scene)


def plan_node(scene: Scene, step: Step, parents: tuple[Checkpoint, ...], *, fused: bool) -> Node:
    """Plan one step on its parents and look whether its result is at hand."""
    op, options = scene.ops[step.name], replace(scene.options, seed=step.seed)
    check_no_report(parents)
    plan = op.plan(PlanContext(options.seed, options.offline), *parents)
    check_plan(plan)
    fused = fused and not any(isinstance(e, Trained | Given) for e in plan.entries)
    if not fused and (step.name not in scene.outputs or step.cache):
        options = replace(options, hash="full")  # it goes to the cache, where things are found by their digests
    waits = [s for s, p in zip(step.sources, parents, strict=True) if isinstance(p, Planned) and not p.identified]
    key = None if waits else plan_key(op, plan, list(parents), options)
    node = Node(step, op, plan, parents, options, key, "run", "", parents[0] if parents else _NOTHING)
    if fused:
        pending = any(isinstance(p, Planned) and p.pending for p in parents)
        made = _planned(scene, node, pending=pending, written=False)
        return replace(node, state="fused", checkpoint=made, why="its tensors are made on the way")
    is_output = step.name in scene.outputs
    target = scene.outputs[step.name] if is_output else None
    if is_output and target is None and key is not None:
        target = default_target(op, list(parents), key)
    node = replace(node, target=target)
    if key is not None:
        at_hand = _find(scene, node, key, is_output=is_output)
        if at_hand is not None:
            return at_hand
    why = f"'{waits[0]}' is made first" if waits else _why(scene, node)
    node = replace(node, why=why)
    return replace(node, checkpoint=_planned(scene, node, pending=True, written=True))


def _find(scene: Scene, node: Node, key: str, *, is_output: bool) -> Node | None:
    """The node with its result, if that lies anywhere."""
    name, target = node.step.name, node.target
    if is_output and target is not None and not node.options.overwrite:
        found = find_result(target, key, hashing=is_hashing(node.plan, node.options))
        if found is not None:
            return replace(node, state="done", checkpoint=open_checkpoint(target, name=name), source=target)
    place = cache.find_node(key, scene.warn)
    known = cache.recall(key) if place is None else None
    if known is not None and Path(known.path) not in (target and target.absolute(), cache.node_path(key)):
        whole = cache.find_whole(Path(known.path), key, scene.warn)
        place = Path(known.path) if whole is not None else None
    if place is None:
        return None
    checkpoint = open_checkpoint(place, name=name)
    return replace(node, state="copy" if is_output else "cached", checkpoint=checkpoint, source=place)


def _planned(scene: Scene, node: Node, *, pending: bool, written: bool) -> Planned:
    known = cache.recall(node.key) if written and node.key else None
    hashing = is_hashing(node.plan, node.options)
    # Where the content is known though it is gone, steps that read it have keys, which the content of files is in.
    plan = settled(node.plan, node.parents) if known is not None else node.plan
    made = PlannedStep(node.op, plan, node.parents, node.options.seed, node.key or "", hashing)
    folder = scene.folder / str(next(scene.numbers))
    return planned_checkpoint(node.step.name, made, folder, pending=pending, written=written, known=known)


def _with_needs(nodes: dict[str, Node], scene: Scene) -> dict[str, Node]:
    needed: set[str] = set()
    for name in reversed(nodes):
        node = nodes[name]
        if name in scene.outputs or name in needed:
            needed.add(name)
            if node.state in ("run", "fused"):
                needed.update(s for s in node.step.sources if s in nodes)
    return {name: replace(node, needed=name in needed) for name, node in nodes.items()}


def about(node: Node) -> dict[str, Any]:
    """What a step is, in words that can be compared with what it was."""
    hashing = is_hashing(node.plan, node.options)
    waits = any(isinstance(p, Planned) and not p.identified for p in node.parents)
    identities = [
        p.identity(hashing=hashing) if not isinstance(p, Planned) or p.identified else {"derived": "not made"}
        for p in node.parents
    ]
    return {
        "op": node.op.name,
        "version": node.op.version,
        "params": resolved_params(node.op),
        "seed": node.options.seed,
        "device": node.options.device,
        "parents": dict(zip(node.step.sources, identities, strict=True)),
        "inputs": dict(node.plan.inputs),
        "files": {} if waits else file_digests(node.op, node.plan, node.parents),
        "torch": installed("torch"),
        "hash": node.options.hash,
    }


def _why(scene: Scene, node: Node) -> str:
    """Why the result is not at hand: what is otherwise than when the step was last run."""
    if node.options.overwrite and node.target is not None and node.target.exists():
        return "--overwrite was asked for"
    before = cache.recall_step(str(scene.recipe.path.absolute()), node.step.name)
    if before is None:
        return "never made here"
    now = about(node)
    if changes := list(_changes(before, now)) or list(_other_files(before, now)):
        return "; ".join(changes)
    return "its result was not digested" if before.get("hash") == "header" else "its result is gone"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for word in ("op", "version", "seed", "device", "torch"):
        if before.get(word) != now[word]:
            yield f"{word} was {printable(str(before.get(word)))}, is {now[word]}"
    then: Mapping[str, Any] = before.get("params") or {}
    for name in dict.fromkeys((*then, *now["params"])):
        if then.get(name) != now["params"].get(name):
            yield f"{name} was {_short(then.get(name))}, is {_short(now['params'].get(name))}"
    old: Mapping[str, Any] = before.get("parents") or {}
    for name in dict.fromkeys((*old, *now["parents"])):
        rows = old.get(name), now["parents"].get(name)
        if rows[0] != rows[1]:
            unsure = any(word in (row or {}) for row in rows for word in ("unhashed", "files"))
            yield f"'{printable(name)}' is another" + (", or was digested once and once not" if unsure else "")
    if before.get("inputs") != now["inputs"]:
        yield "the data that it reads is another"


def _other_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    """Files beside the weights: said where nothing else is otherwise, which files often follow."""
    old: Mapping[str, Any] = before.get("files") or {}
    changed = [n for n in dict.fromkeys((*old, *now["files"])) if old and old.get(n) != now["files"].get(n)]
    names = dict.fromkeys(printable(n.split(":", 1)[-1]) for n in changed)
    return [f"another {', '.join(list(names)[:3])}"] if names else []


def _short(value: Any) -> str:
    return printable(",".join(map(str, value)) if isinstance(value, list) else str(value), limit=40)


_NOTHING = Checkpoint("", Path(), Path(), "hf", {}, ())
