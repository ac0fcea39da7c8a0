"""The JSON schema of recipes, made from the declarations of the operations: for editors."""

from collections.abc import Mapping
from dataclasses import MISSING
from types import NoneType
from typing import Any, get_args, get_origin

from surgery.graph.op import op_params, parent_range, shown_name

_KINDS: Mapping[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def recipe_schema(ops: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a recipe whose steps are any of `ops` (name -> class)."""
    name = {"type": "string", "minLength": 1}
    names = {"type": "object", "additionalProperties": name}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A surgery recipe",
        "type": "object",
        "required": ["surgery"],
        "additionalProperties": False,
        "properties": {
            "surgery": {"const": 1, "description": "The number of the format."},
            "include": {"anyOf": [name, {"type": "array", "items": name}], "description": "Files this one stands on."},
            "seed": {"type": "integer", "minimum": 0, "description": "Seed of every step that has none."},
            "inputs": {**names, "description": "Name -> folder, file, alias or hub id."},
            "outputs": {**names, "description": "Step -> folder."},
            "steps": {"type": "object", "additionalProperties": {"oneOf": [_step(n, k) for n, k in ops.items()]}},
        },
    }


def _step(name: str, kind: Any) -> dict[str, Any]:
    params = op_params(kind)
    required = [shown_name(n) for n, (_, _, default) in params.items() if default is MISSING]
    fewest, most = parent_range(kind)
    properties: dict[str, Any] = {
        "op": {"const": name, "description": (kind.__doc__ or "").strip().split("\n")[0]},
        "seed": {"type": "integer", "minimum": 0},
        "cache": {"type": "boolean", "description": "Write and keep the result, where it could be made on the way."},
        "with": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                shown_name(n): {**_value(hint), "description": param.help} for n, (hint, param, _) in params.items()
            },
            **({"required": required} if required else {}),
        },
    }
    needed = ["op", *(["with"] if required else [])]
    if most != 0:
        several: dict[str, Any] = {"type": "array", "items": {"type": "string"}, "minItems": fewest}
        if most is not None:
            several["maxItems"] = most
        properties["from"] = {"anyOf": [{"type": "string"}, several]} if fewest <= 1 else several
        needed += ["from"] if fewest else []
    return {"type": "object", "additionalProperties": False, "required": needed, "properties": properties}


def _value(hint: Any) -> dict[str, Any]:
    """What YAML may hold for a parameter; a single word may stand for a list of one, a number for a word."""
    if get_origin(hint) is tuple:
        item = _value(get_args(hint)[0])
        return {"anyOf": [item, {"type": "array", "items": item}]}
    options = [a for a in get_args(hint) if a is not NoneType]
    inner = options[0] if options else hint
    kinds = [_KINDS.get(inner, "string")]
    kinds += {"string": ["integer", "number"], "number": ["string"]}.get(kinds[0], [])
    if options and NoneType in get_args(hint):
        kinds.append("null")
    return {"type": kinds if len(kinds) > 1 else kinds[0]}
