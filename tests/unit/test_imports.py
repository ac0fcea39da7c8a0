"""Which way imports point, and what may not be imported before it is needed. Read from the sources, nothing is run.

The order is errors <- store <- graph <- arch <- data <- steering <- ops, train, evals <- cli: steering attention knows
models, and is used by operations, measures and commands alike.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "surgery"

# From the bottom up: a module may import what stands before it in this order, and its own layer.
ORDER = (
    ("errors",),
    ("store",),
    ("graph",),
    ("arch",),
    ("data",),
    ("steering",),
    ("ops", "train", "evals"),
    ("cli", "api", "hf", "__main__", "steps"),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
SIBLINGS = {"ops", "train", "evals"}
LIGHT = {"errors", "store", "graph", "cli", "ops", "api", "__main__", "__init__", "steps"}
HEAVY = {
    "torch", "numpy", "transformers", "diffusers", "yaml", "rich", "pydantic", "PIL", "matplotlib", "sklearn", "scipy",
    "safetensors", "huggingface_hub", "accelerate", "triton",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One import: where it stands, what it names, and whether it runs when the module is loaded."""

    where: str
    target: str
    at_top: bool


def layer(module: str) -> str:
    """The first name below the package: of `surgery.store.header` it is `store`."""
    return module.split(".")[1] if "." in module else "__init__"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Every import of a file, those inside functions too, without those that only a type checker sees."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if only_for_types(child):
                continue
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            place = f"{path.relative_to(ROOT.parent)}:{getattr(child, 'lineno', 0)}"
            if isinstance(child, ast.Import):
                yield from (Import(place, alias.name, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
                base = ".".join(package.split(".")[: len(package.split(".")) - child.level + 1]) if child.level else ""
                target = ".".join(filter(None, (base, child.module)))
                # `from surgery import x` may name a module.
                yield from (Import(place, f"{target}.{alias.name}", at_top) for alias in child.names)
            yield from visit(child, at_top and not inside)

    return tuple(visit(ast.parse(path.read_text()), True))


MODULES = sorted(ROOT.rglob("*.py"))


def ours(found: Import) -> str | None:
    """The layer that an import of this package names; None for the package itself (its version) and for others'."""
    name = layer(found.target) if found.target.startswith("surgery.") else None
    return name if name in RANK else None


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    mine = layer(module_of(path))
    if mine == "__init__":
        assert not [i for i in imports(path) if ours(i)]
        return
    upwards = [i for i in imports(path) if (name := ours(i)) and RANK[name] > RANK[mine]]
    assert upwards == []


@pytest.mark.parametrize("path", [p for p in MODULES if layer(module_of(p)) in SIBLINGS], ids=module_of)
def test_siblings_do_not_import_one_another(path: Path) -> None:
    mine = layer(module_of(path))
    assert [i for i in imports(path) if ours(i) in SIBLINGS - {mine}] == []


@pytest.mark.parametrize("path", [p for p in MODULES if layer(module_of(p)) == "ops"], ids=module_of)
def test_operations_do_not_import_one_another(path: Path) -> None:
    assert [i for i in imports(path) if ours(i) == "ops"] == []


@pytest.mark.parametrize("path", [p for p in MODULES if layer(module_of(p)) in LIGHT], ids=module_of)
def test_heavy_packages_wait_until_they_are_needed(path: Path) -> None:
    assert [i for i in imports(path) if i.at_top and i.target.split(".")[0] in HEAVY] == []


def test_the_lowest_layers_need_the_standard_library_alone() -> None:
    """Header, layout and names start before anything is installed."""
    import sys

    for name in ("errors", "store/header", "store/layout", "store/names", "store/writer", "store/journal", "graph/op"):
        found = [i for i in imports(ROOT / f"{name}.py") if i.at_top]
        foreign = {i.target.split(".")[0] for i in found} - set(sys.stdlib_module_names) - {"surgery"}
        assert foreign == set(), name


def test_only_one_module_reaches_for_the_network() -> None:
    network = {"huggingface_hub", "requests", "httpx", "urllib", "socket", "http"}
    found = {module_of(p) for p in MODULES for i in imports(p) if i.target.split(".")[0] in network}
    # The writer asks for this machine's name, for the lock; the cluster engine knocks at the address that it is given.
    assert found <= {"surgery.store.names", "surgery.store.writer", "surgery.graph.engine.cluster"}


def test_no_room_is_called_after_nothing() -> None:
    assert {p.stem for p in MODULES} & {"utils", "helpers", "common", "misc"} == set()


def test_every_module_says_what_it_is() -> None:
    silent = [
        module_of(p) for p in MODULES if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert silent == []
