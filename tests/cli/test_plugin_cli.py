"""The example plug-in, installed as a user would: a command, a recipe step, a name in the lineage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip has installed the plug-in into."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("plugin")
    source = folder / "source"
    source.mkdir()
    for file in (ROOT / "examples/plugin").iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    words = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", *words, str(source)], check=True, capture_output=True, timeout=300)
    return folder / "site"


def run(installed: Path, folder: Path, *words: str, **more: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **more}
    command = [sys.executable, "-m", "surgery", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_an_installed_plugin_is_a_command(installed: Path, tmp_path: Path) -> None:
    assert "clamp  " in run(installed, tmp_path, "--help").stdout
    made = run(installed, tmp_path, "clamp", "dit-digits", "--limit", "0.5", "--only", "*.bias", "-o", "out")
    assert (made.returncode, made.stdout) == (0, "out\n"), made.stderr
    record = json.loads((tmp_path / "out/surgery.json").read_text())
    assert record["steps"][-1]["plugin"] == "surgery-clamp 0.1"
    assert run(installed, tmp_path, "verify", "out").returncode == 0
    replayed = run(installed, tmp_path, "replay", "out", "--to", "again")
    assert replayed.returncode == 0, replayed.stderr
    again = run(installed, tmp_path, "clamp", "dit-digits", "--limit", "nan", "-o", "other")
    assert again.returncode == 2 and not (tmp_path / "other").exists()


def test_an_installed_plugin_is_a_step_of_a_recipe(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "surgery: 1\ninputs: {base: dit-digits}\nsteps:\n"
        "  half: {op: clamp, from: base, with: {limit: 9e9}}\n  out: {op: clamp, from: half, with: {limit: 8e9}}\n"
        "outputs: {out: out}\n"
    )
    made = run(installed, tmp_path, "run", "r.yaml", "-q")
    assert made.returncode == 0, made.stderr
    same = run(installed, tmp_path, "diff", "dit-digits", "out")
    assert same.returncode == 0, same.stdout


def test_plugins_can_be_turned_off(installed: Path, tmp_path: Path) -> None:
    words = ("clamp", "dit-digits", "--limit", "0.5", "-o", "out")
    for chosen in ("", "other"):
        ended = run(installed, tmp_path, *words, SURGERY_PLUGINS=chosen)
        assert ended.returncode == 2 and "no command 'clamp'" in ended.stderr


def test_a_plugin_does_not_take_the_name_of_ours(installed: Path, tmp_path: Path) -> None:
    for name, target in (("cast", "surgery_clamp:Clamp"), ("broken", "no_such_module:Thing"), ("short", "json:dumps")):
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[surgery.ops]\n{name} = {target}\n")
    path = os.pathsep.join([str(tmp_path), str(installed)])
    ours = run(Path(path), tmp_path, "cast", "--help")
    assert "--dtype" in ours.stdout and "--limit" not in ours.stdout
    broken = run(Path(path), tmp_path, "broken", "dit-digits")
    assert broken.returncode == 5 and "plug-in 'broken' of broken 1.0" in broken.stderr
    short = run(Path(path), tmp_path, "short", "dit-digits")
    assert short.returncode == 2 and "has no name" in short.stderr
