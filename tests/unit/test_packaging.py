"""What is packed: every package is listed, the kernels' folder hides no other package, and nothing is listed twice."""

import re
import tomllib
from pathlib import Path

import surgery

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_below(folder: Path, name: str) -> set[str]:
    """Dotted names of the folders with an `__init__.py`."""
    found = (file.parent.relative_to(folder).parts for file in folder.rglob("__init__.py"))
    return {".".join((name, *parts)) for parts in found}


def test_the_list_of_packages_is_that_of_the_folders() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    on_disk = packages_below(ROOT / "surgery", "surgery") | packages_below(ROOT / "kernels" / "src", "surgery.kernels")
    assert len(listed) == len(set(listed)) and set(listed) == on_disk


def test_kernels_are_mapped_into_the_package() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"]["surgery.kernels"] == "kernels/src"
    assert (ROOT / "kernels" / "src" / "__init__.py").is_file()


def test_no_package_is_called_kernels() -> None:
    """transformers and diffusers import `kernels` when it is there; ours must not be taken for it."""
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "surgery" / "kernels").exists()


def test_every_module_lies_in_a_package() -> None:
    loose = [f for f in (ROOT / "surgery").rglob("*.py") if not (f.parent / "__init__.py").is_file()]
    assert loose == []


def test_shipped_files_are_packed() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["surgery"]
    packed = {file for pattern in patterns for file in (ROOT / "surgery").glob(pattern)}
    data = {f for f in (ROOT / "surgery").rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
    assert data - packed == set()


def test_what_is_compiled_is_optional_and_keeps_its_bits() -> None:
    """Without a compiler the package installs all the same; with one, products and sums are not fused."""
    modules = PROJECT["tool"]["setuptools"]["ext-modules"]
    assert [m["name"] for m in modules] == [f"surgery.kernels.merging.{n}" for n in ("_sums", "_halves")]
    for module in modules:
        assert module["optional"] and "-ffp-contract=off" in module["extra-compile-args"]
        assert all((ROOT / source).is_file() for source in module["sources"])
        assert all(source in (ROOT / "Makefile").read_text() for source in module["sources"])  # a change is built


def test_the_version_is_one() -> None:
    assert PROJECT["project"]["version"] == surgery.__version__


def test_the_command_and_the_module_start_the_same_function() -> None:
    assert PROJECT["project"]["scripts"]["surgery"] == "surgery.cli.main:main"
    assert "from surgery.cli.main import main" in (ROOT / "surgery" / "__main__.py").read_text()


def test_files_that_the_project_names_are_there() -> None:
    named = [
        *PROJECT["project"]["license-files"],
        *re.findall(r'^readme = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M),
    ]
    assert named and all((ROOT / name).is_file() for name in named)


def test_no_two_files_of_tests_have_one_name() -> None:
    """The test runner imports them by name alone, and stops at the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
