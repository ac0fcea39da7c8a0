"""Read YAML documents together with the line of every key, so that each fault can name its line.

yaml is imported when a file is read. A key that stands twice is a fault; tags that make objects are not followed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UsageError

Lines = Mapping[tuple[Any, ...], int]


def fault(path: Path, line: int, what: str, *, hint: str) -> UsageError:
    """The error of one line of a file."""
    return UsageError("recipe", f"{path}:{line}: {what}", hint=hint)


def read_text(path: Path) -> str:
    """The text of a recipe. Raises `CheckpointError` where it cannot be read."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise CheckpointError(
            "unreadable", f"{path}: {getattr(err, 'strerror', None) or 'not UTF-8'}", hint="check the path"
        ) from None


def load_documents(text: str, path: Path, *, several: bool) -> list[tuple[Any, Lines]]:
    """Every document of a YAML text with the lines of its keys, by path of keys; without `several`, exactly one.

    Raises `UsageError` naming the line: no YAML, a repeated key, a key that is no word.
    """
    import yaml

    lines: dict[tuple[Any, ...], int] = {}
    visited: set[int] = set()

    def walk(node: Any, at: tuple[Any, ...]) -> None:
        if id(node) in visited:
            return  # an alias: its keys stand where the anchor is, and it may lead in a circle
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: set[Any] = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise fault(path, line, "a key is a list or a mapping", hint="keys are words")
                if key.value in seen and key.value != "<<":
                    raise fault(path, line, f"'{key.value}' stands twice", hint="keep one")
                seen.add(key.value)
                lines[(*at, key.value)] = line
                walk(value, (*at, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*at, index)] = value.start_mark.line + 1
                walk(value, (*at, index))

    def nodes(loader: yaml.SafeLoader) -> Iterator[Any]:
        if not several:
            yield loader.get_single_node()
            return
        while loader.check_node():
            yield loader.get_node()

    try:
        loader = yaml.SafeLoader(text)
        found: list[tuple[Any, Lines]] = []
        for node in nodes(loader):
            lines, visited = {}, set()
            walk(node, ())
            # The value is built after the walk, which says more clearly what is wrong with a key.
            found.append((None if node is None else loader.construct_document(node), lines))
        return found
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        mark = getattr(err, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise fault(
            path,
            line,
            f"not YAML: {getattr(err, 'problem', None) or 'unreadable'}",
            hint="check indentation and quotes",
        ) from None
