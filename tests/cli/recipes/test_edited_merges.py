"""An edited merge makes the tensors that depend on the edit, and no other: counted where they are made."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vlm_pairs import Pair

from surgery.graph.op import Compute
from surgery.ops.merge import Merge

Run = Callable[..., Any]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tensors that are computed, in pieces or whole."""
    seen: list[str] = []
    stream, run = Merge.stream, Merge.run

    def streamed(self: Merge, task: Compute, readers: list[Any], seed: int) -> Iterator[memoryview]:
        seen.append(task.full_name)
        return stream(self, task, readers, seed)

    def whole(self: Merge, task: Compute, tensors: list[Any], generator: Any) -> Any:
        seen.append(task.full_name)
        return run(self, task, tensors, generator)

    monkeypatch.setattr(Merge, "stream", streamed)
    monkeypatch.setattr(Merge, "run", whole)
    return seen


def layers_of(names: list[str]) -> set[str]:
    return {n.split(".layers.")[1].split(".")[0] for n in names}


def same(a: str, b: str) -> None:
    """Equal weights and equal records."""
    one, two = (json.loads(Path(folder, "surgery.json").read_text()) for folder in (a, b))
    assert one["record"] == two["record"]
    assert Path(a, "model.safetensors").read_bytes() == Path(b, "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "how", ["method: linear", "method: ties", "method: linear, rounding: stochastic", "method: dare_ties"]
)
def test_fewer_layers_of_a_pair(how: str, pair: Pair, command: Run, made: list[str], tmp_path: Path) -> None:
    plain = how.startswith("method: linear")
    sources = "[host, donor]" if plain else "[host, donor, base]"
    text = (
        f"surgery: 1\ninputs: {{host: {pair.host}, donor: {pair.donor}, base: {pair.base}}}\nsteps:\n  merged:\n"
        f'    op: merge\n    from: {sources}\n    with: {{{how}, alpha: "0.6", layers: "1-3"}}\n'
    )
    (tmp_path / "r.yaml").write_text(text)
    assert command("run", "r.yaml", "-o", "a").code == 0
    assert layers_of(made) == {"1", "2", "3"}
    per_layer = len(made) // 3
    made.clear()
    ended = command("run", "r.yaml", "-o", "b", "--set", "merged.layers=1-2", "--json")
    assert ended.code == 0, ended.stderr
    assert (made, json.loads(ended.stdout)["merged"]["taken"]) == ([], 2 * per_layer)
    ended = command("run", "r.yaml", "-o", "c", "--set", "merged.layers=0-2", "--json")
    assert layers_of(made) == {"0"} and len(made) == per_layer
    made.clear()
    assert command("run", "r.yaml", "-o", "d", "--set", "merged.alpha=0.7").code == 0
    assert len(made) == 3 * per_layer


def test_what_was_taken_is_what_would_be_made(
    pair: Pair, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    (tmp_path / "r.yaml").write_text(
        f"surgery: 1\ninputs: {{host: {pair.host}, donor: {pair.donor}}}\nsteps:\n"
        '  merged: {op: merge, from: [host, donor], with: {alpha: "0.6", layers: "1-3"}}\n'
    )
    assert command("run", "r.yaml", "-o", "a").code == 0
    made.clear()
    assert command("run", "r.yaml", "-o", "b", "--set", "merged.layers=1-2").code == 0 and made == []
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "empty"))
    assert command("run", "r.yaml", "-o", "c", "--set", "merged.layers=1-2").code == 0 and made
    same("b", "c")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_another_weight_in_a_document(method: str, pair: Pair, command: Run, made: list[str], tmp_path: Path) -> None:
    base = f"base_model: {pair.base}\n" if method != "linear" else ""

    def document(weight: float) -> None:
        own = f"[{{filter: layers.2., value: {weight}}}, {{value: 0.5}}]"
        (tmp_path / "m.yml").write_text(
            f"merge_method: {method}\n{base}models:\n  - {{model: {pair.base}, parameters: {{weight: 0.5}}}}\n"
            f"  - {{model: {pair.donor}, parameters: {{weight: {own}}}}}\n"
        )

    document(0.3)
    ended = command("run", "m.yml", "-o", "a")
    assert ended.code == 0, ended.stderr
    total = len(made)
    made.clear()
    document(0.4)
    ended = command("run", "m.yml", "-o", "b", "--json")
    (row,) = json.loads(ended.stdout).values()
    assert layers_of(made) == {"2"} and row["taken"] == total - len(made)
