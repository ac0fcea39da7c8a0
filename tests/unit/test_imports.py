"""Which way imports point, and what may not be imported before it is needed. Read from the sources, nothing is run.

The order is errors <- store <- graph <- arch <- data <- steering <- ops, train, evals <- cli: steering attention knows
models, and is used by operations, measures and commands alike.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "surgery"
KERNELS = ROOT.parent / "kernels" / "src"  # imported as surgery.kernels

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
    """One import: where it stands, what it names, whether it runs when the module is loaded, and whether it never runs
    because only a type checker sees it."""

    where: str
    target: str
    at_top: bool
    for_types: bool


def layer(module: str) -> str:
    """The first name below the package: of `surgery.store.header` it is `store`."""
    return module.split(".")[1] if "." in module else "__init__"


def module_of(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        parts = ("surgery", "kernels", *path.relative_to(KERNELS).with_suffix("").parts)
    else:
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def every_import(path: Path, module: str) -> Iterator[Import]:
    """Every import of a file that is loaded as `module`."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, at_top: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            typed = for_types or only_for_types(child)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            place = f"{module}:{getattr(child, 'lineno', 0)}"
            if isinstance(child, ast.Import):
                yield from (Import(place, alias.name, at_top, typed) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join(package.split(".")[: len(package.split(".")) - child.level + 1]) if child.level else ""
                target = ".".join(filter(None, (base, child.module)))
                # `from surgery import x` may name a module.
                yield from (Import(place, f"{target}.{alias.name}", at_top, typed) for alias in child.names)
            yield from visit(child, at_top and not inside, typed)

    yield from visit(ast.parse(path.read_text()), True, False)


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Every import of a file, those inside functions too, without those that only a type checker sees."""
    return tuple(i for i in every_import(path, module_of(path)) if not i.for_types)


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


def check_no_circle(sources: Mapping[str, Path]) -> None:
    """Raises CycleError where modules import one another in a circle, also inside functions or for types alone: a file
    that cannot be read without the other is half of one file. The package itself counts for nothing: its version is all
    that is taken from it."""
    needed = {}
    for module, path in sources.items():
        targets = {i.target for i in every_import(path, module)}
        named = {t if t in sources else t.rpartition(".")[0] for t in targets}
        needed[module] = {t for t in named if t in sources and "." in t} - {module}
    TopologicalSorter(needed).prepare()


def test_no_modules_import_one_another() -> None:
    check_no_circle({module_of(p): p for p in (*MODULES, *KERNELS.rglob("*.py"))})


@pytest.mark.parametrize(
    "closing", ["from pkg import a", "def f():\n    from . import a", "if TYPE_CHECKING:\n    import pkg.a"]
)
def test_a_circle_is_seen(closing: str, tmp_path: Path) -> None:
    texts = {"__init__": "", "a": "from .b import x", "b": "from pkg.c import x", "c": "x = 1"}
    sources = {"pkg" if n == "__init__" else f"pkg.{n}": tmp_path / f"{n}.py" for n in texts}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    check_no_circle(sources)
    (tmp_path / "c.py").write_text(closing)
    with pytest.raises(CycleError, match="pkg.a"):
        check_no_circle(sources)
