"""mergekit files give what mergekit gives: our values against `run_merge` on tiny Llamas, and our settings against its.

Methods made by mergekit's kernels are equal bit for bit, those made in pieces within one step of the stored dtype.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_runs import check, ours, theirs
from safetensors.torch import load_file

import surgery
from surgery.arch.merging.documents.settings import evaluate
from surgery.errors import UsageError
from surgery.graph.recipes.mergekit_file import parse_mergekit

LAYERS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three Llamas of one base, in bfloat16, with tokenizers of different words."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).state_dict()
    for index, name in enumerate(("base", "a", "b")):
        model = LlamaForCausalLM(config)
        noisy = {n: t + index * 0.004 * torch.randn_like(t) for n, t in base.items()}
        model.load_state_dict(noisy)
        model.bfloat16().save_pretrained(root / name)
        words = {f"w{i}" if i < 30 else f"{name}{i}": i for i in range(40)}
        core = Tokenizer(models.WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(root / name)
    return root


def weighted(method: str, weights: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    a, b = weights
    return {
        "merge_method": method,
        "models": [{"model": "A", "parameters": {"weight": a}}, {"model": "B", "parameters": {"weight": b}}],
        **more,
    }


SLICES = [
    {"sources": [{"model": "A", "layer_range": [0, 3]}, {"model": "B", "layer_range": [1, 4]}]},
    {"sources": [{"model": "A", "layer_range": [1, 4]}, {"model": "B", "layer_range": [0, 3]}]},
]
DOCUMENTS: dict[str, tuple[dict[str, Any], int]] = {
    "linear": (weighted("linear", (0.7, 0.4)), 1),
    "linear by gradient and filter": (
        weighted("linear", ([0.1, 0.9], [{"filter": "mlp", "value": [1, 0.2]}, {"value": 0.4}]), dtype="bfloat16"), 1,
    ),
    "linear not normalised, to float32": (
        weighted("linear", (0.7, 0.4), parameters={"normalize": False}, dtype="float32"), 1,
    ),
    "linear rounded twice": (weighted("linear", (0.7, 0.4), dtype="bfloat16", out_dtype="float32"), 0),
    "slerp with slices": (
        {"merge_method": "slerp", "base_model": "A", "slices": SLICES[:1], "dtype": "bfloat16",
         "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.3}]}}, 1,
    ),
    "passthrough stack": (
        {"merge_method": "passthrough", "slices": [
            {"sources": [{"model": "A", "layer_range": [0, 3]}]}, {"sources": [{"model": "B", "layer_range": [1, 4]}]},
        ], "dtype": "bfloat16"}, 0,
    ),
    "passthrough scaled": (
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "A", "layer_range": [0, 4], "parameters": {
            "scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}}]}]}, 1,
    ),
    "ties": (weighted("ties", (0.7, 0.4), base_model="BASE", parameters={"density": 0.4}, dtype="float32"), 0),
    "ties in bfloat16": (weighted("ties", ([0.7, 0.2], 0.4), base_model="BASE", parameters={"density": 0.4}), 0),
    "task arithmetic": (weighted("task_arithmetic", (0.7, -0.4), base_model="BASE", parameters={"lambda": 0.9}), 0),
    "breadcrumbs": (weighted("breadcrumbs_ties", (0.5, 0.5), base_model="BASE", parameters={"density": 0.8}), 0),
    "model stock": (
        {"merge_method": "model_stock", "base_model": "BASE", "models": [{"model": "A"}, {"model": "B"}]}, 0,
    ),
    "karcher": ({"merge_method": "karcher", "models": [{"model": "A"}, {"model": "B"}], "dtype": "float32",
                 "out_dtype": "float16"}, 0),
    "sce with the base among the models": (
        {"merge_method": "sce", "base_model": "BASE", "models": [{"model": m} for m in ("BASE", "A", "B")],
         "parameters": {"select_topk": 0.5}}, 0,
    ),
    "nuslerp": (weighted("nuslerp", (0.5, [0.2, 0.9])), 0),
    "one module": ({"merge_method": "linear", "modules": {"default": {"slices": SLICES}},
                    "parameters": {"weight": [{"filter": "up_proj", "value": 0.9}, {"value": 0.5}]}}, 1),
    "tokenizer of all": (weighted("linear", (0.7, 0.3), base_model="BASE", tokenizer_source="union"), 1),
    "tokenizer with tokens": (
        weighted("linear", (0.7, 0.3), base_model="BASE", tokenizer={
            "source": "union", "pad_to_multiple_of": 8,
            "tokens": {"a31": {"source": "A", "force": True}, "w3": {"source": {"kind": "model_token", "model": "B",
                                                                              "token": "b33"}, "force": True}},
        }), 1,
    ),
}  # fmt: skip


def placed(value: Any, root: Path) -> Any:
    """Names of models as paths."""
    if isinstance(value, dict):
        return {k: placed(v, root) for k, v in value.items()}
    if isinstance(value, list):
        return [placed(v, root) for v in value]
    return str(root / value.lower()) if value in ("A", "B", "BASE") else value


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_give_what_mergekit_gives(name: str, models: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    document, most = DOCUMENTS[name]
    document = placed(document, models)
    if document["merge_method"] == "linear" and document.get("base_model"):
        # mergekit gives the base no weight by default: say so for both.
        document["models"].append({"model": document["base_model"], "parameters": {"weight": 0.0}})
    want, got = theirs(document, tmp_path / "theirs"), ours(document, tmp_path, tmp_path / "ours")
    assert set(got) == set(want)
    inputs = [load_file(models / m / "model.safetensors") for m in ("a", "b")]
    if "tokenizer" in name:
        # mergekit numbers the new tokens of a union in the order of a set: rows are compared by token.
        one, two = (AutoTokenizer.from_pretrained(tmp_path / side).get_vocab() for side in ("ours", "theirs"))
        assert set(one) == set(two)
        for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
            order = [two[token] for token in sorted(one, key=one.__getitem__)]
            want[tensor] = torch.cat([want[tensor][order], want[tensor][len(order) :]])
    for tensor in want:
        same = [i[tensor] for i in inputs if tensor in i]
        check(got[tensor], want[tensor], *same, name=tensor, steps=most)
    mine, their = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    for key in ("num_hidden_layers", "vocab_size", "hidden_size"):
        assert mine[key] == their[key]
    _, said = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]


def test_dare_of_mergekit_does_not_depend_on_workers(models: Path, tmp_path: Path) -> None:
    document = placed(weighted("dare_ties", (0.7, 0.4), base_model="BASE", parameters={"density": 0.5}), models)
    (step,) = parse_mergekit(yaml.safe_dump(document), Path("x.yml")).steps
    outs = []
    for workers in (1, 4):
        from surgery.graph.run import RunOptions

        options = RunOptions(seed=1, workers=workers)
        result = surgery.apply("merge", *step.sources, out=tmp_path / f"o{workers}", options=options, **step.params)
        outs.append((result.path / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_an_adapter_in_a_document_is_what_peft_merges(models: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "a", dtype=torch.bfloat16)
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.02)
    lora.save_pretrained(tmp_path / "lora")
    want = lora.merge_and_unload().state_dict()
    only = {"merge_method": "passthrough", "slices": [
        {"sources": [{"model": f"{models / 'a'}+{tmp_path / 'lora'}", "layer_range": [0, LAYERS]}]}]}  # fmt: skip
    got = ours(only, tmp_path, tmp_path / "applied")
    changed = load_file(models / "a" / "model.safetensors")
    assert {n for n in got if not torch.equal(got[n], changed[n])} == {
        f"model.layers.{i}.{m}.weight" for i in range(LAYERS) for m in ("self_attn.q_proj", "mlp.down_proj")
    }
    for name, tensor in got.items():
        check(tensor, want[name], changed[name], name=name, steps=1)
    # Beside another model, and by a kernel on whole tensors.
    both = {"merge_method": "linear", "models": [
        {"model": f"{models / 'a'}+{tmp_path / 'lora'}", "parameters": {"weight": 0.5}},
        {"model": str(models / "b"), "parameters": {"weight": 0.5}}]}  # fmt: skip
    linear = ours(both, tmp_path, tmp_path / "linear")
    b = load_file(models / "b" / "model.safetensors")
    for name, tensor in linear.items():
        assert torch.equal(tensor, (got[name].float() * 0.5 + b[name].float() * 0.5).bfloat16()), name
    kernel = ours(both | {"merge_method": "nuslerp"}, tmp_path, tmp_path / "nuslerp")
    assert set(kernel) == set(linear)


scalars = st.one_of(st.floats(-2, 2), st.integers(-3, 3))
gradients = st.lists(scalars, min_size=1, max_size=5)
conditions = st.lists(
    st.fixed_dictionaries(
        {"value": st.one_of(scalars, gradients)}, optional={"filter": st.sampled_from(["*", "mlp", "q_"])}
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(scalars, gradients, conditions), st.floats(0, 1), st.sampled_from(["a.mlp.w", "a.q_proj.w", "norm"]))
def test_settings_are_read_as_mergekit_reads_them(setting: Any, t: float, name: str) -> None:
    from mergekit.config import ConditionalParameter, evaluate_setting

    conditional = isinstance(setting, list) and isinstance(setting[0], dict)
    other = [ConditionalParameter(**c) for c in setting] if conditional else setting
    validate: Callable[[Any], float] = float
    assert evaluate(setting, name, t, validate) == evaluate_setting(name, other, t, validate=validate)


def union(models: Path, **more: Any) -> dict[str, Any]:
    return placed(weighted("linear", (0.7, 0.3), **({"tokenizer_source": "union"} | more)), models)


def test_a_union_of_vocabularies_is_the_same_every_time(models: Path, tmp_path: Path) -> None:
    files = []
    for name in "xyz":
        ours(union(models), tmp_path, tmp_path / name)
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.name != "surgery.json"})
    assert files[0] == files[1] == files[2]  # mergekit numbers new tokens anew in each run


def test_rows_of_tokens_are_where_the_document_says(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = {"source": "base", "tokens": {"<|new|>": {"source": {"kind": "zero"}}}}
    options = {"base_model": "A", "tokenizer_source": None, "tokenizer": base}
    got = ours(union(models, **options), tmp_path, tmp_path / "zero")  # mergekit 0.1.5 stops at a KeyError here
    assert got["lm_head.weight"].shape[0] == 41 and not got["lm_head.weight"][40].any()
    assert capfd.readouterr().err == ""
    for source, says in (({"token": "zzz"}, "'zzz'"), ({"token_id": 4000}, "number 4000")):
        row = {"kind": "model_token", "model": "B", **source}
        wrong = options | {"tokenizer": {"source": "base", "tokens": {"w4": {"source": row, "force": True}}}}
        with pytest.raises(UsageError, match=f"does not have: {says}"):
            ours(union(models, **wrong), tmp_path, tmp_path / "wrong")


def test_tokens_that_no_model_has_are_said_once(models: Path, tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(yaml.safe_dump(union(models, tokenizer_source=str(models / "base"))))
    (step,) = parse_mergekit((tmp_path / "x.yml").read_text(), tmp_path / "x.yml").steps
    from surgery.graph.op import PlanContext
    from surgery.ops.merge import Merge

    plan = Merge(**step.params).plan(PlanContext(), *map(surgery.open, step.sources))
    assert [w for w in plan.warnings if "10 tokens" in w and "base30" in w] == list(plan.warnings)
