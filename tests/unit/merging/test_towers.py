"""The language tower of every family is found from headers, in both layouts, and answers to the right donor layers."""

from pathlib import Path

import pytest
import vlm_pairs

from surgery.arch.language.families import FAMILIES, family_of
from surgery.arch.language.towers import find_towers, language_tower, parse_layer_map, shapes_of
from surgery.errors import CheckpointError, UsageError
from surgery.store.checkpoint import open_checkpoint

IN_MEMORY = {"idefics2": "model.text_model.", "idefics3": "model.text_model.", "smolvlm": "model.text_model."}


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return shapes_of(open_checkpoint(folder).tensors)


@pytest.mark.parametrize("layout", ["default", "memory"])
@pytest.mark.parametrize("family", vlm_pairs.CONFIGS)
def test_the_tower_of_every_family_is_found_in_both_layouts(family: str, layout: str, tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, family, layout=layout)
    host = open_checkpoint(pair.host)
    known = family_of(host.config)
    assert known is not None and known.host == vlm_pairs.CONFIGS[family][0]
    found = find_towers(shapes(pair.host), shapes(pair.donor))
    if layout == "default":
        assert found.host_prefix == known.towers[0]
    else:
        assert found.host_prefix == IN_MEMORY.get(family, "model.language_model.")
    cross = (1, 4) if family == "mllama" else ()
    assert found.cross_layers == cross and list(found.layers.values()) == list(range(vlm_pairs.LAYERS))
    assert [n for n in found.layers] == [n for n in range(vlm_pairs.LAYERS + len(cross)) if n not in cross]
    donor = language_tower(shapes(pair.donor))
    assert sum(c.startswith("layers.") for c in found.names) == sum(len(layer) for layer in donor.layers.values())
    assert "norm.weight" in found.names and "embed_tokens.weight" in found.names
    assert ("lm_head.weight" in found.names) == any(n.endswith("lm_head.weight") for n in host.tensors)
    # What lies beside the tower is never part of it.
    inside = {mine for mine, _ in found.names.values()} | set(found.host_only)
    beside = [n for n in host.tensors if n not in inside]
    assert beside and all(n.startswith(known.beside) for n in beside)


# Layouts that no class of transformers writes: the original LLaVA's, InternVL2's and MiniCPM-V's own code.
FOREIGN = {
    "llava": {"language_model.model.": "model.", "language_model.lm_head": "lm_head",
              "multi_modal_projector.": "model.mm_projector.", "vision_tower.": "model.vision_tower.vision_tower."},
    "internvl": {"language_model.": "language_model.", "multi_modal_projector.": "mlp1.",
                 "vision_tower.": "vision_model."},
    "idefics2": {"model.text_model.": "llm.model.", "lm_head": "llm.lm_head", "model.vision_model.": "vpm.",
                 "model.connector.": "resampler."},
}  # fmt: skip


@pytest.mark.parametrize(("family", "prefix"), [("llava", "model."), ("internvl", "language_model.model."),
                                                ("idefics2", "llm.model.")])  # fmt: skip
def test_layouts_of_other_code_are_found_by_their_names(family: str, prefix: str, tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, family)
    host = {}
    for name, shape in shapes(pair.host).items():
        start = next((s for s in FOREIGN[family] if name.startswith(s)), "")
        host[FOREIGN[family].get(start, "") + name.removeprefix(start)] = shape
    found = find_towers(host, shapes(pair.donor))
    known = find_towers(shapes(pair.host), shapes(pair.donor))
    assert found.host_prefix == prefix and found.names.keys() == known.names.keys() and len(host) > len(found.names)


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert {f.host for f in FAMILIES} == {name for name, _ in vlm_pairs.CONFIGS.values()}


def layers(prefix: str, count: int, *, heads: int = 8, hidden: int = 64, tokens: bool = True) -> dict[str, tuple]:
    found = {f"{prefix}layers.{n}.self_attn.k_proj.weight": (heads, hidden) for n in range(count)}
    return found | ({f"{prefix}embed_tokens.weight": (10, hidden)} if tokens else {})


def test_a_shape_that_differs_names_the_field_of_the_config() -> None:
    with pytest.raises(CheckpointError) as raised:
        find_towers(layers("model.", 2, heads=4), layers("model.", 2))
    assert "num_key_value_heads" in raised.value.message and "[4, 64]" in raised.value.message


def test_another_depth_is_refused_and_a_map_pairs_layers() -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        find_towers(layers("model.", 6), layers("model.", 4))
    found = find_towers(layers("model.", 6), layers("model.", 4), layer_map=parse_layer_map("0:0,5:3"))
    assert found.layers == {0: 0, 5: 3} and "layers.5.self_attn.k_proj.weight" in found.names
    with pytest.raises(UsageError, match="layer-map"):
        parse_layer_map("0:0,0:1")


def test_two_towers_that_fit_want_a_choice() -> None:
    host = layers("a.", 2) | layers("b.", 2)
    with pytest.raises(UsageError, match="several towers"):
        find_towers(host, layers("model.", 2))
    assert find_towers(host, layers("model.", 2), prefix="b").host_prefix == "b."
    with pytest.raises(UsageError) as raised:
        find_towers(host, layers("model.", 2), prefix="c")
    assert "--tower c" in raised.value.message


def test_what_only_the_host_has_is_listed_and_what_only_the_donor_has_is_refused() -> None:
    bias = {"model.layers.0.self_attn.k_proj.bias": (8,)}
    assert find_towers(layers("model.", 2) | bias, layers("model.", 2)).host_only == {
        "model.layers.0.self_attn.k_proj.bias": "layers.0.self_attn.k_proj.bias"
    }
    with pytest.raises(CheckpointError, match="k_proj.bias"):
        find_towers(layers("model.", 2), layers("model.", 2) | bias)
    found = find_towers(layers("model.", 2), layers("model.", 2) | bias, ignore_extra=True)
    assert list(found.donor_only) == list(bias)


def test_adapters_inside_the_host_are_named() -> None:
    host = {n.replace("k_proj.weight", "k_proj.base_layer.weight"): s for n, s in layers("model.", 2).items()}
    with pytest.raises(CheckpointError) as raised:
        find_towers(host, layers("model.", 2))
    assert "adapters inside" in raised.value.hint and "merge_and_unload" in raised.value.hint


def test_a_model_without_a_language_tower_says_so() -> None:
    with pytest.raises(CheckpointError, match="no language model"):
        language_tower(layers("vision.", 2, tokens=False))
