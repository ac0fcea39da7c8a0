"""mergekit's YAML becomes steps whose keys do not depend on where models lie."""

import json
from pathlib import Path

import pytest

from surgery.errors import UsageError
from surgery.graph.recipes.mergekit_file import parse_mergekit
from surgery.graph.recipes.recipe import Recipe
from surgery.graph.recipes.recipe_file import read_recipe


def parse(text: str) -> Recipe:
    return parse_mergekit(text, Path("merge.yml"))


def config_of(recipe: Recipe, step: int = 0) -> dict:
    return json.loads(recipe.steps[step].params["config"])


LINEAR = """
merge_method: linear
models:
  - {model: ./vlm, parameters: {weight: 0.9}}
  - {model: org/llm@main, parameters: {weight: [0.0, 0.1]}}
dtype: bfloat16
"""


def test_models_become_sources_in_order_of_first_appearance() -> None:
    recipe = parse(LINEAR)
    assert recipe.steps[0].sources == ("./vlm", "org/llm@main") and recipe.inputs == {
        "./vlm": "./vlm",
        "org/llm@main": "org/llm@main",
    }
    assert config_of(recipe) == {
        "merge_method": "linear",
        "models": [{"model": 0, "parameters": {"weight": 0.9}}, {"model": 1, "parameters": {"weight": [0.0, 0.1]}}],
        "dtype": "bfloat16",
    }


def test_the_same_work_elsewhere_has_the_same_config() -> None:
    moved = LINEAR.replace("./vlm", "/elsewhere/vlm").replace("org/llm@main", "copy")
    assert parse(LINEAR).steps[0].params == parse(moved).steps[0].params


def test_slices_filters_and_a_base_model_are_kept() -> None:
    recipe = parse(
        """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [2, 6]}
parameters:
  t:
    - {filter: self_attn, value: [0, 1]}
    - value: 0.5
"""
    )
    config = config_of(recipe)
    assert config["base_model"] == 0 and config["slices"][0]["sources"][1] == {"model": 1, "layer_range": [2, 6]}
    assert config["parameters"]["t"] == [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}]


def test_an_adapter_is_a_source_of_its_own() -> None:
    recipe = parse("merge_method: linear\nmodels: [{model: m+lora, parameters: {weight: 1}}]\n")
    assert recipe.steps[0].sources == ("m", "lora") and config_of(recipe)["models"][0]["model"] == [0, 1]


def test_what_mergekit_reads_and_passes_over_is_read() -> None:
    text = LINEAR.replace("weight: 0.9", "weight: []")
    assert config_of(parse(text))["models"][0] == {"model": 0, "parameters": {"weight": []}}
    text = LINEAR.replace("model: ./vlm", "model: {model: {path: ./vlm, revision: v1}, override_architecture: X}")
    assert parse(text).steps[0].sources[0] == "./vlm@v1"


def test_documents_name_one_another() -> None:
    recipe = parse(
        """
name: last
merge_method: linear
models: [{model: first, parameters: {weight: 1}}, {model: c, parameters: {weight: 1}}]
---
name: first
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
"""
    )
    assert [s.name for s in recipe.steps] == ["first", "last"] and set(recipe.outputs) == {"last"}
    assert set(recipe.inputs) == {"a", "b", "c"} and recipe.steps[1].sources == ("first", "c")


def test_a_recipe_file_may_be_mergekits(tmp_path: Path) -> None:
    (tmp_path / "m.yml").write_text(LINEAR)
    assert read_recipe(tmp_path / "m.yml").steps[0].op == "merge"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LINEAR + "dytpe: bfloat16\n", "merge.yml:7: unknown key 'dytpe'"),
        (LINEAR.replace("weight: 0.9}", "weight: {a: 1}}"), "unknown key 'a'"),
        (LINEAR + "slices: [{sources: []}]\n", "exactly one of models, slices, modules"),
        ("merge_method: linear\n", "exactly one of models, slices, modules"),
        (LINEAR.replace("bfloat16", "bfloat17"), "dtype is bfloat17"),
        ("merge_method: a\nslices: [{sources: [{model: a, layer_range: [4, 2]}]}]", "layer_range [4, 2]"),
        (LINEAR + "---\n" + LINEAR, "two documents have no name"),
        (LINEAR.replace("model: ./vlm", "model: 3"), "merge.yml:4: a model is a path"),
        (LINEAR + "surgery: {layer: 1}\n", "unknown key 'layer'"),
        (LINEAR.replace("weight: 0.9", "weight: .nan"), "merge.yml:4: weight is nan"),
        (LINEAR.replace("[0.0, 0.1]", "[0.0, .inf]"), "merge.yml:5: weight is inf"),
        ("merge_method: linear\nmodels: [a, b]\n", "item 1 of models must map names to values"),
        (LINEAR + "tokenizer: {tokens: {a: {source: {kind: model_token, model: b}}}}\n", "one of token and token_id"),
        (LINEAR + "tokenizer: {tokens: {a: {source: {kind: mean}}}}\n", "kind is 'mean'"),
    ],
)
def test_a_fault_names_its_line(text: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(text)
    assert says in raised.value.message, raised.value.message
