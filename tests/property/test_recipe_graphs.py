"""Random graphs of edits: the order of their steps in the file, the number of workers, and what is written or only made
on the way do not show in any output's bytes."""

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.graph.recipes.recipe_file import read_recipe
from surgery.graph.recipes.schedule import run_recipe
from surgery.graph.run import RunOptions
from surgery.ops.table import load_op
from surgery.store.checkpoint import open_checkpoint
from surgery.store.names import open_named

EDITS = (
    "{op: cast, from: SOURCE, with: {dtype: bfloat16}}",
    "{op: cast, from: SOURCE, with: {dtype: float16, only: ['*.w.weight']}}",
    "{op: slice, from: SOURCE, with: {layers: '0-1,1-2'}}",
    "{op: slice, from: SOURCE, with: {layers: '0,2,1'}}",
    "{op: rename, from: SOURCE, with: {rule: 'e=f'}}",
    "{op: reshard, from: SOURCE, with: {shard_size: 1kB}}",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks and a table, in float32. Read only."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.{n}.weight": torch.randn(5, 7, generator=generator) for i in range(3) for n in "wv"}
    save_file(tensors | {"e": torch.randn(9, 3, generator=generator), "n": torch.arange(4)}, path)
    return path


@st.composite
def graphs(draw: Any) -> tuple[list[str], list[str]]:
    """Lines of steps, in an order in which they can run, and names of outputs. A rename of 'e' may stand only once on
    a path, so steps that would follow another are drawn anew."""
    lines: list[str] = []
    renamed = {"base": False}
    for number in range(draw(st.integers(2, 6))):
        source = draw(st.sampled_from(list(renamed)))
        edit = draw(st.sampled_from(EDITS if not renamed[source] else [e for e in EDITS if "rename" not in e]))
        name = f"s{number}"
        lines.append(f"  {name}: {edit.replace('SOURCE', source)}")
        renamed[name] = renamed[source] or "rename" in edit
    names = [f"s{i}" for i in range(len(lines))]
    return lines, draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))


def outcome(model: Path, lines: list[str], outputs: list[str], *, workers: int, cached: bool) -> dict[str, Any]:
    """The digest and the weight files' bytes of every output, made in a folder of its own with an empty cache."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", f"{folder}/cache")
        patch.chdir(folder)
        body = [line.replace("{op", "{cache: true, op") if cached else line for line in lines]
        places = ", ".join(f"{name}: out/{name}" for name in outputs)
        path = Path(folder) / "r.yaml"
        path.write_text(
            f"surgery: 1\ninputs: {{base: {model}}}\nsteps:\n" + "\n".join(body) + f"\noutputs: {{{places}}}\n"
        )
        results = run_recipe(read_recipe(path), load_op, open_named, None, options=RunOptions(workers=workers))
        found = {}
        for name, result in results.items():
            files = {f.name: f.read_bytes() for f in sorted(result.path.glob("*.safetensors"))}
            found[name] = (open_checkpoint(result.path).digest, files)
        return found


SETTINGS = settings(deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


@settings(SETTINGS, max_examples=8)
@given(graph=graphs(), seed=st.integers(0, 99))
def test_any_order_and_number_of_workers_give_the_same_bytes(model: Path, graph: Any, seed: int) -> None:
    lines, outputs = graph
    first = outcome(model, lines, outputs, workers=1, cached=False)
    shuffled = random.Random(seed).sample(lines, len(lines))
    assert outcome(model, shuffled, outputs, workers=4, cached=False) == first


@settings(SETTINGS, max_examples=6)
@given(graph=graphs())
def test_what_is_made_on_the_way_equals_what_is_written(model: Path, graph: Any) -> None:
    lines, outputs = graph
    fused = outcome(model, lines, outputs, workers=2, cached=False)
    written = outcome(model, lines, outputs, workers=2, cached=True)
    assert {n: digest for n, (digest, *_) in fused.items()} == {n: digest for n, (digest, *_) in written.items()}
