"""Named mixture-of-experts models: their tensors are those of the library's classes, their counts the paper's."""

import json
from pathlib import Path
from typing import Any

import pytest

from surgery.arch.moe.layouts import MODELS, initial_values, set_fields, without_embeddings
from surgery.errors import UsageError

# Section 1.4: parameters without embeddings.
PAPER = [
    ("moe-544m", (), 570_955_776),
    ("coe-544m", (), 571_213_824),
    ("moe-544m", ("n_routed_experts=47",), 432_478_208),
    ("coe-544m", ("n_routed_experts=47",), 432_670_720),
    ("moe-544m", ("num_hidden_layers=8",), 1_141_911_552),
    ("moe-544m", ("num_hidden_layers=12",), 1_712_867_328),
]


@pytest.mark.parametrize(("name", "settings", "count"), PAPER)
def test_counts_are_those_of_the_paper(name: str, settings: tuple[str, ...], count: int) -> None:
    assert without_embeddings(initial_values(set_fields(MODELS[name], settings))) == count


def built(config: dict[str, Any]) -> Any:
    """The model on the meta device."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from surgery.arch.moe.build import model_class
    from surgery.arch.moe.families import COE, FAMILIES

    kind = config["model_type"]
    rest = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "auto_map")}
    with torch.device("meta"):
        if kind.startswith(COE):
            made = model_class(FAMILIES[kind.removeprefix(COE)])
            return made(made.config_class(**rest))
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**rest))


@pytest.mark.parametrize("name", ["moe-544m", "coe-544m"])
def test_counts_are_those_of_the_model_on_the_meta_device(name: str) -> None:
    count = sum(p.numel() for n, p in built(dict(MODELS[name])).named_parameters() if n.startswith("model.layers."))
    assert count == dict((n, c) for n, s, c in PAPER if not s)[name]


@pytest.mark.parametrize("name", [n for n in MODELS if n.endswith("tiny")])
def test_a_made_model_loads_with_every_name_in_place(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from surgery.arch.moe.build import model_class
    from surgery.arch.moe.families import COE, FAMILIES
    from surgery.graph.run import run_op
    from surgery.ops.init import Init

    folder = run_op(Init(name), [], tmp_path / "made").path
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    loader = model_class(FAMILIES[kind.removeprefix(COE)]) if kind.startswith(COE) else AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(12)[None]).logits).all()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("hidden", "no such field"),
        ("hidden=1", "no such field"),
        ("model_type=llama", "no such field"),
        ("hidden_size=wide", "another kind"),
        ("coe_topk=[4]", "2 passes"),
    ],
)
def test_a_wrong_setting_is_named(setting: str, says: str) -> None:
    with pytest.raises(UsageError, match="no value" if "=" not in setting else says):
        set_fields(MODELS["coe-tiny"], (setting,))


def test_more_passes_take_as_many_experts_each() -> None:
    config = set_fields(MODELS["coe-544m"], ("coe_iterations=3",))
    assert config["coe_topk"] == [4, 4, 4]
    assert without_embeddings(initial_values(config)) == 570_955_776 + 2 * 4 * 63 * 1024
