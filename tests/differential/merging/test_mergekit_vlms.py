"""Two vision-language models of one class by a mergekit file, against mergekit's own run and what it leaves out."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_pairs
from mergekit_runs import check, ours, theirs
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import CheckpointError
from surgery.graph.recipes.mergekit_file import read_mergekit

WEIGHTS = (0.1, 0.7)  # of the first model over its layers; the second has 0.4
Tensors = dict[str, torch.Tensor]


def twins(root: Path, family: str, layout: str = "default") -> tuple[Path, Path]:
    """A tiny model of a family, and the same with other values."""
    first, second = vlm_pairs.make_pair(root / "pair", family, layout=layout).host, root / "second"
    shutil.copytree(first, second)
    noise = torch.Generator().manual_seed(3)
    changed = {
        n: (t.float() + 0.05 * torch.randn(t.shape, generator=noise)).to(t.dtype)
        for n, t in load_file(first / "model.safetensors").items()
    }
    save_file(changed, second / "model.safetensors", metadata={"format": "pt"})
    return first, second


def blend(first: Path, second: Path) -> dict[str, Any]:
    listed = [
        {"model": str(first), "parameters": {"weight": list(WEIGHTS)}},
        {"model": str(second), "parameters": {"weight": 0.4}},
    ]
    return {"merge_method": "linear", "models": listed}


def both(root: Path, family: str, layout: str = "default") -> tuple[Tensors, Tensors, list[Tensors]]:
    """(ours, mergekit's, the inputs)."""
    pair = twins(root, family, layout or "default")
    document = blend(*pair)
    return (
        ours(document, root, root / "ours"),
        theirs(document, root / "theirs"),
        [load_file(p / "model.safetensors") for p in pair],
    )


@pytest.mark.parametrize(("family", "layout"), [("llava", "memory"), ("idefics2", ""), ("idefics3", "")])
def test_a_file_in_the_names_of_the_class_is_merged_as_mergekit_does(family: str, layout: str, tmp_path: Path) -> None:
    got, want, inputs = both(tmp_path, family, layout)
    assert set(got) == set(want) and any("vision" in n for n in want)
    for name, tensor in want.items():
        check(got[name], tensor, *(i[name] for i in inputs), name=name, steps=1)


def test_the_tower_of_a_llava_is_merged_where_mergekit_leaves_it_out(tmp_path: Path) -> None:
    """Of `language_model.model.*`, the names that LLaVA is saved by, mergekit finds none in its list of the class's own
    names: its output has no tower. Ours has the values that the same model under those names has."""
    got, want, inputs = both(tmp_path / "disk", "llava")
    tower = {n for n in got if n.startswith("language_model.")}
    assert set(got) == set(inputs[0]) and len(tower) == 39 and len(want) == len(got) - len(tower)
    assert not any("language_model" in n or "lm_head" in n for n in want)
    for name in set(got) - tower:
        check(got[name], want[f"model.{name}"], *(i[name] for i in inputs), name=name, steps=1)
    pair = twins(tmp_path / "memory", "llava", "memory")
    for path in pair:  # the same values as on disk, by the other names
        held = load_file(tmp_path / "disk" / path.relative_to(tmp_path / "memory") / "model.safetensors")
        save_file({named(n): t for n, t in held.items()}, path / "model.safetensors", metadata={"format": "pt"})
    same = theirs(blend(*pair), tmp_path / "memory" / "theirs")
    assert set(same) == {named(n) for n in got}
    for name, tensor in got.items():
        check(tensor, same[named(name)], *(i[name] for i in inputs), name=name, steps=1)


def named(name: str) -> str:
    """A tensor of LLaVA by the name that its class has for it."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return f"model.{name.replace('language_model.model.', 'language_model.', 1)}"


def test_what_lies_outside_layers_has_the_first_weight_in_qwen2_5_vl_too(tmp_path: Path) -> None:
    """mergekit's definition of the class calls the projector's MLP a stack of two layers of one name, and so gives it
    the last weight."""
    got, want, inputs = both(tmp_path, "qwen2_5_vl")
    assert set(got) == set(want)
    merger = {n for n in got if n.startswith("visual.merger.mlp.")}
    assert len(merger) == 4
    for name in set(got) - merger:
        check(got[name], want[name], *(i[name] for i in inputs), name=name, steps=1)
    for name in merger:
        one, two = (i[name].float() for i in inputs)
        for made, weight in ((got, WEIGHTS[0]), (want, WEIGHTS[1])):
            expected = ((one * weight + two * 0.4) / (weight + 0.4)).bfloat16()
            check(made[name], expected, one, two, name=name, steps=1)


def test_a_run_of_mergekit_that_leaves_out_a_tower_is_refused(tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "m.yml"
    file.write_text(yaml.safe_dump(blend(*twins(tmp_path, "llava"))))
    (step,) = read_mergekit(file).steps
    with pytest.raises(CheckpointError, match="mergekit wrote 43 tensors of 82") as raised:
        surgery.apply("merge", *step.sources, out=tmp_path / "out", config=step.params["config"], arithmetic="mergekit")
    assert "leave --arithmetic out" in raised.value.hint and not (tmp_path / "out").exists()
