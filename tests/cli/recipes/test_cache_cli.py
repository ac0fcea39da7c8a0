"""The cache's commands, completion, and pictures of graphs."""

import json
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.store import cache

Run = Callable[..., Any]
RECIPE = """\
surgery: 1
inputs: {base: BASE}
steps:
  a: {op: cast, from: base, with: {dtype: bfloat16}}
  b: {op: slice, from: a, with: {layers: 0-2}}
  c: {op: slice, from: a, with: {layers: 3-5}}
  d: {op: cast, from: c, with: {dtype: float16}, cache: true}
  e: {op: reshard, from: d, with: {shard_size: 100kB}}
outputs: {b: out/b, e: out/e}
"""


def listed(command: Run) -> list[dict[str, Any]]:
    return json.loads(command("cache", "ls", "--json").stdout)["nodes"]


def test_an_empty_cache_is_no_error(command: Run, own_cache: Path) -> None:
    assert command("cache", "ls").code == command("cache", "verify").code == 0
    assert command("cache", "gc", "--max-size", "0").stdout.startswith("removed 0 results")
    assert command("cache", "path").stdout == f"{own_cache}/v1\n"


def test_nodes_are_listed_found_and_collected_the_longest_unused_first(command: Run, recipe: Path) -> None:
    assert command("run", recipe).code == 0
    rows = listed(command)
    assert [(row["op"], row["parents"]) for row in rows] == [("cast", ["tiny"]), ("cast", ["c"])]
    path = command("cache", "path", rows[0]["key"][:10]).stdout.strip()
    assert path == rows[0]["path"] and command("verify", path).code == 0
    cache.touch(rows[0]["key"])
    assert [row["key"] for row in listed(command)] == [rows[1]["key"], rows[0]["key"]]
    keep = max(row["size"] for row in rows)
    ended = command("cache", "gc", "--max-size", str(keep), "--dry-run", "--json")
    assert json.loads(ended.stdout)["removed"] == [rows[1]["key"]] and len(listed(command)) == 2
    assert command("cache", "gc", "--max-size", str(keep)).stdout.startswith("removed 1 results")
    assert [row["key"] for row in listed(command)] == [rows[0]["key"]]
    assert command("run", recipe).code == 0 and command("cache", "path", "zz").code == 2


def test_a_node_in_use_is_not_collected(command: Run, recipe: Path) -> None:
    assert command("run", recipe).code == 0
    key = listed(command)[0]["key"]
    with cache.in_use(key):
        ended = command("cache", "gc", "--max-size", "0", "--json")
    assert json.loads(ended.stdout)["held"] == [key]
    assert [row["key"] for row in listed(command)] == [key]
    assert command("cache", "gc", "--max-size", "0").code == 0 and listed(command) == []


def test_verify_drops_what_is_damaged(command: Run, recipe: Path) -> None:
    assert command("run", recipe).code == 0
    node = Path(listed(command)[0]["path"])
    file = node / "config.json"
    file.chmod(0o644)
    file.write_text("{}")
    ended = command("cache", "verify")
    assert ended.code == 1 and "2 results checked, 1 dropped" in ended.stdout and not node.exists()
    assert command("cache", "verify").code == 0


def test_leftovers_of_dead_processes_are_removed(command: Run, recipe: Path, own_cache: Path) -> None:
    assert command("run", recipe).code == 0
    left = own_cache / "v1/nodes/ab" / f".{'ab' * 32}.surgery-abababababab"
    (left / "out").mkdir(parents=True)
    assert command("cache", "gc", "--max-size", "1GB").code == 0 and not left.exists()


def test_a_cache_folder_that_may_not_be_read_is_named(command: Run, own_cache: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        os, "listdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", path))
    )
    (own_cache / "v1").mkdir()
    ended = command("cache", "ls")
    assert ended.code == 3 and str(own_cache) in ended.stderr and "SURGERY_CACHE" in ended.stderr


# Pictures


def test_the_plan_is_drawn(command: Run, recipe: Path, tmp_path: Path) -> None:
    ended = command("plan", recipe, "--svg", "graph.svg")
    assert ended.code == 0
    root = ElementTree.fromstring((tmp_path / "graph.svg").read_text())
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"base", "a", "b", "c", "d", "e"} <= set(texts)
    boxes = [r for g in root.iter("{http://www.w3.org/2000/svg}g") for r in g.iter("{http://www.w3.org/2000/svg}rect")]
    places = [
        (float(b.get("x", "")), float(b.get("y", "")), float(b.get("width", "")), float(b.get("height", "")))
        for b in boxes
    ]
    for i, (x, y, w, h) in enumerate(places):
        for u, v, s, t in places[i + 1 :]:
            assert x + w <= u or u + s <= x or y + h <= v or v + t <= y  # no two boxes overlap
    dot = command("plan", recipe, "--dot").stdout
    assert dot.startswith("digraph") and dot.count("->") == 5


def test_a_history_is_drawn(command: Run, recipe: Path, tmp_path: Path) -> None:
    assert command("run", recipe).code == 0
    assert command("log", "out/e", "--svg", "log.svg").code == 0
    text = (tmp_path / "log.svg").read_text()
    ElementTree.fromstring(text)
    for word in ("out/e", "reshard v1", "init v1", "slice v1", "never written"):
        assert word in text
    assert command("log", "out/e", "--dot").stdout.count("->") == 4


def test_hostile_names_do_not_leave_the_picture() -> None:
    from surgery.graph.picture import Box, Picture, draw_dot, draw_svg

    name = '</text><script>"x\\\n\x1b[31m'
    picture = Picture((Box("a", name, (name,), "run"),), ())
    ElementTree.fromstring(draw_svg(picture))
    assert "<script>" not in draw_svg(picture) and "\x1b" not in draw_dot(picture)


# Completion


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["ca"], {"cast", "cache"}),
        (["cast", "--d"], {"--dtype", "--device", "--dry-run"}),
        (["cache", ""], {"ls", "gc", "path", "verify"}),
        (["inspect", "dit-d"], {"dit-digits"}),
        (["cast", "--dtype", ""], set()),
    ],
)
def test_completion_knows_commands_options_and_aliases(command: Run, words: list[str], some: set[str]) -> None:
    ended = command("completion", "bash", "--", *words)
    found = set(ended.stdout.split())
    assert ended.code == 0 and some <= found and bool(found) == bool(some)


def test_the_bash_script_completes(command: Run, tmp_path: Path) -> None:
    import sys

    script = command("completion", "bash").stdout
    probe = 'COMP_WORDS=(surgery ver); COMP_CWORD=1; _surgery; echo "${COMPREPLY[@]}"'
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", f"{script}\n{probe}"], capture_output=True, text=True, env=env)
    assert done.stdout == "verify\n", done.stderr
    for shell in ("zsh", "fish"):
        assert "surgery" in command("completion", shell).stdout
    assert command("completion", "csh").code == 2
