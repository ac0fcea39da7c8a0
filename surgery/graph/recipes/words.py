"""Values of a recipe that come from elsewhere: ${env:NAME} and ${input} inside values, and --set KEY=VALUE."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import UsageError, closest, printable
from surgery.graph.recipes.documents import Lines, fault

_WORD = re.compile(r"\$\{([^{}]*)\}")
_OF_STEP = ("seed", "cache", "op", "from")


@dataclass(frozen=True)
class Words:
    """Fills values in: ${env:NAME} is a variable of the environment, ${NAME} what the input of that name stands for,
    $${ a plain ${."""

    path: Path
    lines: Lines
    inputs: Mapping[str, str]

    def filled(self, value: Any, at: tuple[Any, ...], *, own: str | None = None) -> Any:
        """`value` with every word replaced, in lists and mappings too. `own` is an input that cannot name itself."""
        if isinstance(value, list):
            return [self.filled(v, (*at, i)) for i, v in enumerate(value)]
        if isinstance(value, dict):
            return {k: self.filled(v, (*at, k)) for k, v in value.items()}
        if not isinstance(value, str) or "${" not in value:
            return value
        whole = _WORD.fullmatch(value)
        if whole and whole[1].startswith("env:"):
            return parsed(self._word(whole[1], at, own)) if at[0] == "steps" else self._word(whole[1], at, own)
        pieces = value.split("$${")
        return "${".join(_WORD.sub(lambda m: self._word(m[1], at, own), piece) for piece in pieces)

    def _word(self, word: str, at: tuple[Any, ...], own: str | None) -> str:
        line = next((self.lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in self.lines), 1)
        kind, colon, name = word.partition(":")
        if colon and kind == "env":
            if name not in os.environ:
                what = f"the environment has no variable '{printable(name)}'"
                raise fault(self.path, line, what, hint=f"export {printable(name)}=…")
            return os.environ[name]
        if colon or word not in self.inputs or word == own:
            known = [f"${{{n}}}" for n in self.inputs if n != own]
            hint = closest(f"${{{word}}}", [*known, "${env:NAME}"])
            raise fault(self.path, line, f"'${{{printable(word)}}}' stands for nothing", hint=hint)
        value = self.inputs[word]
        if "${" in value:
            raise fault(self.path, line, f"input '{word}' is made of other words itself", hint="write it out")
        return value


def parsed(text: str) -> Any:
    """A word as YAML would read it: a number, a truth, a list, or the word."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def change(document: dict[str, Any], text: str, included: Sequence[str]) -> None:
    """Apply one --set to a recipe: seed, inputs.NAME, outputs.NAME, or of a step STEP.PARAM, STEP.seed, STEP.cache.
    `included` are steps that stand in other files. Raises `UsageError`."""
    key, value = _split(text)
    first, _, rest = key.partition(".")
    rest = rest.removeprefix("with.") if first != "steps" else rest
    if key == "seed":
        document["seed"] = parsed(value)
    elif first in ("inputs", "outputs") and rest:
        names = document.get(first)
        document[first] = {**(names if isinstance(names, dict) else {}), rest: value}
    else:
        steps = document.get("steps")
        steps = steps if isinstance(steps, dict) else {}
        name = _step_name(key, [*steps, *included])
        if name is None:
            words = ["seed", "inputs.NAME", "outputs.NAME", *(f"{n}.PARAM" for n in (*steps, *included))]
            raise UsageError("set", f"--set {printable(text)}: no such place", hint=f"one of {', '.join(words[:12])}")
        if name in steps and isinstance(steps[name], dict):
            change_step(steps[name], name, text)


def change_step(body: dict[str, Any], name: str, text: str) -> None:
    """Apply one --set to a step if it is about that step."""
    key, value = _split(text)
    key = key.removeprefix("steps.")
    if not key.startswith(f"{name}."):
        return
    word = key[len(name) + 1 :]
    if word in _OF_STEP and word != "op":
        body[word] = parsed(value)
    else:
        params = body.get("with")
        body["with"] = {**(params if isinstance(params, dict) else {}), word.removeprefix("with."): parsed(value)}


def _step_name(key: str, steps: Sequence[str]) -> str | None:
    key = key.removeprefix("steps.")
    found = [name for name in steps if key.startswith(f"{name}.") and len(key) > len(name) + 1]
    return max(found, key=len) if found else None


def _split(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UsageError("set", f"--set {printable(text)}: no KEY=VALUE", hint="for example --set seed=3")
    return key, value
