"""mergekit files on other layouts than Llama's: stacks by other names, several of them, tensors of one model alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_pairs
import yaml
from mergekit_runs import check, ours, theirs
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import CheckpointError, UsageError
from surgery.graph.recipes.mergekit_file import read_mergekit


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of tiny models of one base (`gpt2`, `gpt2-b`, …), in bfloat16. Read only."""
    import transformers as tr

    root = tmp_path_factory.mktemp("layouts")
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    llama = dict(sizes, num_key_value_heads=2, max_position_embeddings=64)
    builds: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: tr.GPT2LMHeadModel(
            tr.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=40, n_positions=64)
        ),
        "mamba": lambda: tr.MambaForCausalLM(
            tr.MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=40, state_size=4)
        ),
        "t5": lambda: tr.T5ForConditionalGeneration(
            tr.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=40)
        ),
        "mistral": lambda: tr.MistralForCausalLM(tr.MistralConfig(**llama)),
        "qwen2": lambda: tr.Qwen2ForCausalLM(tr.Qwen2Config(**llama)),
        "tied": lambda: tr.MistralForCausalLM(tr.MistralConfig(**llama, tie_word_embeddings=True)),
    }
    for name, build in builds.items():
        torch.manual_seed(1)
        model = build().bfloat16()
        model.save_pretrained(root / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(root / f"{name}-b")
    return root


def blend(root: Path, one: str, two: str, first: Any = (0.1, 0.7), **more: Any) -> dict[str, Any]:
    listed = [
        {"model": str(root / one), "parameters": {"weight": list(first)}},
        {"model": str(root / two), "parameters": {"weight": 0.4}},
    ]
    return {"merge_method": "linear", "models": listed, **more}


def warnings_of(document: dict[str, Any], folder: Path) -> list[str]:
    (folder / "w.yml").write_text(yaml.safe_dump(document))
    (step,) = read_mergekit(folder / "w.yml").steps
    from surgery.graph.op import PlanContext
    from surgery.ops.merge import Merge

    return list(Merge(**step.params).plan(PlanContext(), *map(surgery.open, step.sources)).warnings)


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_stacks_by_other_names_are_merged_as_mergekit_does(name: str, models: Path, tmp_path: Path) -> None:
    document = blend(models, name, f"{name}-b")
    want, got = theirs(document, tmp_path / "theirs"), ours(document, tmp_path, tmp_path / "ours")
    inputs = [load_file(models / n / "model.safetensors") for n in (name, f"{name}-b")]
    assert set(got) == set(want)
    for tensor in want:
        check(got[tensor], want[tensor], *(i[tensor] for i in inputs), name=tensor, steps=1)
    slices = [
        {"sources": [{"model": str(models / name), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(models / f"{name}-b"), "layer_range": [1, 3]}]},
    ]
    stacked = {"merge_method": "passthrough", "slices": slices}
    want, got = theirs(stacked, tmp_path / "theirs2"), ours(stacked, tmp_path, tmp_path / "ours2")
    assert set(got) == set(want) and all(torch.equal(got[n], want[n]) for n in want)
    config = json.loads((tmp_path / "ours2" / "config.json").read_text())
    assert config[{"gpt2": "n_layer", "mamba": "num_hidden_layers"}[name]] == 4


def test_a_file_without_the_head_s_prefix_goes_with_one_that_has_it(models: Path, tmp_path: Path) -> None:
    bare = {n.removeprefix("transformer."): t for n, t in load_file(models / "gpt2-b" / "model.safetensors").items()}
    mask = torch.tril(torch.ones(64, 64)).reshape(1, 1, 64, 64)
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(bare | {"h.0.attn.bias": mask}, hub / "model.safetensors", metadata={"format": "pt"})
    (hub / "config.json").write_text((models / "gpt2" / "config.json").read_text())
    got = ours(blend(models, "gpt2", str(hub)), tmp_path, tmp_path / "out")
    same = ours(blend(models, "gpt2", "gpt2-b"), tmp_path, tmp_path / "same")
    assert set(got) == set(same) and all(torch.equal(got[n], same[n]) for n in same)
    kept = ours(blend(models, str(hub), "gpt2"), tmp_path, tmp_path / "masked")
    assert torch.equal(kept["h.0.attn.bias"], mask)  # a mask, which is no weight, is neither merged nor missed


def test_each_stack_has_its_own_gradient(models: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    got = ours(blend(models, "t5", "t5-b", (0, 1)), tmp_path, tmp_path / "t5")
    one, two = (load_file(models / n / "model.safetensors") for n in ("t5", "t5-b"))
    for stack in ("encoder", "decoder"):
        for number, weight in ((0, 0.0), (1, 1.0)):
            name = f"{stack}.block.{number}.layer.0.SelfAttention.q.weight"
            want = (one[name].float() * weight + two[name].float() * 0.4) / (weight + 0.4)
            check(got[name], want.bfloat16(), one[name], two[name], name=name, steps=1)
    # A vision encoder's layers too: as mergekit's modules.
    pair = vlm_pairs.make_pair(tmp_path / "pair", "mistral3")
    host = load_file(pair.host / "model.safetensors")
    other = {n: (t.float() + 0.01 * torch.randn_like(t.float())).to(t.dtype) for n, t in host.items()}
    (tmp_path / "second").mkdir()
    for file in pair.host.glob("*.json"):
        (tmp_path / "second" / file.name).write_text(file.read_text())
    save_file(other, tmp_path / "second" / "model.safetensors", metadata={"format": "pt"})
    document = blend(pair.host, "", str(tmp_path / "second"), base_model=str(pair.host), dtype="bfloat16")
    theirs(document, tmp_path / "theirs")
    ours(document, tmp_path, tmp_path / "ours")
    want, mine = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / side, dtype=torch.bfloat16).state_dict()
        for side in ("theirs", "ours")
    )
    large = max(float(t.abs().max()) for t in want.values())
    assert set(want) == set(mine) and any("vision" in n for n in want)
    for name, tensor in want.items():
        check(mine[name], tensor, torch.full_like(tensor, min(large, 0.25)), name=name, steps=1)


def test_nothing_is_left_out_in_silence(models: Path, tmp_path: Path) -> None:
    for first, second in (("mistral", "qwen2"), ("qwen2", "mistral")):  # Qwen2 has biases that Mistral lacks
        with pytest.raises(CheckpointError, match=r"k_proj\.bias") as raised:
            ours(blend(models, first, second), tmp_path, tmp_path / "out")
        assert "one architecture" in raised.value.hint and not (tmp_path / "out").exists()
    head = warnings_of(blend(models, "tied", "mistral"), tmp_path)
    assert len(head) == 1 and "'lm_head.weight' is left out" in head[0]
    assert warnings_of(blend(models, "mistral", "tied"), tmp_path) == []


def test_what_has_no_average_is_refused(models: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(models / "mistral", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="is quantised"):
        ours(blend(models, "mistral-b", str(other)), tmp_path, tmp_path / "out")
    (other / "config.json").write_text(json.dumps(config))
    tensors = load_file(models / "mistral" / "model.safetensors")
    for dtype in (torch.int8, torch.int32):  # a weight of one model alone, then a table that both have
        name = "model.layers.0.mlp.up_proj.weight" if dtype == torch.int8 else "model.table"
        for folder, value in ((other, 3), (tmp_path / "same", 3)):
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(config))
            save_file(
                tensors | {name: torch.full((2, 2), value, dtype=dtype)}, folder / "model.safetensors",
                metadata={"format": "pt"},
            )  # fmt: skip
        if dtype == torch.int8:
            with pytest.raises(CheckpointError, match=r"up_proj\.weight' is not the same in all models and no float"):
                ours(blend(models, "mistral-b", str(other)), tmp_path, tmp_path / "out")
    got = ours(blend(other, "", str(tmp_path / "same")), tmp_path, tmp_path / "out")
    assert torch.equal(got["model.table"], torch.full((2, 2), 3, dtype=torch.int32))
    save_file(
        tensors | {"model.table": torch.zeros((2, 2), dtype=torch.int32)}, other / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"model\.table' is not the same"):
        ours(blend(other, "", str(tmp_path / "same")), tmp_path, tmp_path / "no")


def test_a_model_that_stands_twice_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stands 2 times"):  # mergekit: duplicate merge inputs
        ours(blend(models, "mistral", "mistral"), tmp_path, tmp_path / "out")


def test_slices_need_one_stack(models: Path, tmp_path: Path) -> None:
    slices = [{"sources": [{"model": str(models / "t5"), "layer_range": [0, 1]}]}]
    with pytest.raises(UsageError, match=r"one stack of layers, and it has decoder\.block\. \(2\)"):
        ours({"merge_method": "passthrough", "slices": slices}, tmp_path, tmp_path / "out")


def test_a_raised_dtype_is_said_in_the_config(models: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(models / "mistral-b", dtype=torch.float32).save_pretrained(tmp_path / "f32")
    got = ours(blend(models, "mistral", str(tmp_path / "f32")), tmp_path, tmp_path / "out")
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_methods_that_mergekit_stores_as_float32_keep_the_models_dtype(models: Path, tmp_path: Path) -> None:
    pair = {"base_model": str(models / "mistral"), "models": [{"model": str(models / "mistral-b")}]}
    document = {"merge_method": "arcee_fusion", **pair}
    want, got = theirs(document, tmp_path / "theirs"), ours(document, tmp_path, tmp_path / "ours")
    assert {t.dtype for t in want.values()} == {torch.float32}  # its own config says bfloat16
    assert all(torch.equal(got[n], want[n].bfloat16()) for n in want)
