"""`--emit-recipe`: what a command would do, as a recipe that does it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.cli import output
from surgery.graph.op import Op, resolved_params
from surgery.graph.recipes.recipe import Recipe, Step

# What JSON leaves as it is and YAML does not read back: controls, line breaks of Unicode, lone surrogates, marks.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
# Run options that a recipe has no place for: surgery run takes them. --shard-size is a step's, reshard.
_OF_RUN = ("device", "threads", "workers", "max_memory", "link", "hash", "engine", "offline")


def one_step(op: Op, sources: list[str], seed: int) -> Recipe:
    """The recipe of one step that does what the command of an operation would, with every parameter."""
    inputs = {f"input{i}": source for i, source in enumerate(sources, 1)}
    step = Step("out", op.name, tuple(inputs), resolved_params(op), seed, 1)
    return Recipe(Path(), inputs, (step,), {step.name: ""})


def print_recipe(recipe: Recipe, common: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """The recipe alone on stdout; on stderr, which of the options that were given it does not hold. `common` and
    `defaults` are the run options of the command."""
    output.data(recipe_text(recipe, common["seed"], common["out"]))
    given = [f"--{name.replace('_', '-')}" for name in _OF_RUN if common[name] != defaults[name]]
    if given:
        output.note(f"{', '.join(given)} is said to surgery run: a recipe does not hold it")
    if common["shard_size"] != defaults["shard_size"] and all("shard_size" not in s.params for s in recipe.steps):
        output.note("--shard-size is a step of its own in a recipe: op: reshard")


def recipe_text(recipe: Recipe, seed: int, out: Path | None) -> str:
    """The YAML of a recipe with one output, and what leads to that; each value is written as JSON, which YAML contains.
    `seed` is that of every step."""
    (last,) = recipe.outputs
    needed = {last}
    for step in reversed(recipe.steps):
        needed.update(step.sources if step.name in needed else ())
    inputs = [f"  {_json(name)}: {_value(source)}" for name, source in recipe.inputs.items() if name in needed]
    lines = ["surgery: 1", f"seed: {seed}", *(["inputs:", *inputs] if inputs else []), "steps:"]
    for step in recipe.steps:
        if step.name not in needed:
            continue
        lines += [f"  {_json(step.name)}:", f"    op: {step.op}"]
        if step.sources:
            lines.append(f"    from: {_json(list(step.sources))}")
        if step.params:
            lines += ["    with:", *(f"      {name}: {_value(value)}" for name, value in step.params.items())]
    if out is not None:
        lines.append(f"outputs: {{{_json(last)}: {_value(str(out))}}}")
    return "\n".join(lines)


def _value(of: Any) -> str:
    """A value of the recipe, where ${…} would stand for something else."""
    return _json(of).replace("${", "$${")


def _json(of: Any) -> str:
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(of, ensure_ascii=False))
