"""What two configs and two tokenizers say before a merge, and what a class takes for what its config leaves out."""

import json
from pathlib import Path
from typing import Any

import pytest
import vlm_pairs

from surgery.arch.language.families import DEFAULTS
from surgery.arch.language.preflight import compare_configs, examine, rope
from surgery.arch.language.towers import find_towers, shapes_of
from surgery.arch.language.vocabulary import first_tokens, rows_by_policy
from surgery.store.checkpoint import open_checkpoint


def test_defaults_are_those_of_the_classes() -> None:
    from transformers import CONFIG_MAPPING

    for kind, facts in DEFAULTS.items():
        config = CONFIG_MAPPING[kind]()
        for key, value in facts.items():
            if key == "rope_theta":
                assert config.rope_parameters["rope_theta"] == value, kind
            elif key == "hidden_act":
                assert (getattr(config, "hidden_activation", None) or config.hidden_act) == value, kind
            elif key == "rms_norm_eps":
                assert (getattr(config, "rms_norm_eps", None) or config.norm_eps) == value, kind
            else:
                assert getattr(config, key) == value, (kind, key)


@pytest.mark.parametrize("family", vlm_pairs.CONFIGS)
def test_real_pairs_of_every_family_pass(family: str, tmp_path: Path) -> None:
    """A donor with its family's settings is no reason to stop, and configs that leave defaults out say the same."""
    pair = vlm_pairs.make_pair(tmp_path, family)
    host, donor = (json.loads((p / "config.json").read_text()) for p in (pair.host, pair.donor))
    assert compare_configs(host, donor).faults == ()
    short = {"model_type": donor["model_type"], "hidden_size": donor["hidden_size"]}
    assert compare_configs({"text_config": short}, short).faults == compare_configs(short, short).warnings == ()


QWEN2_VL = {"model_type": "qwen2_vl_text", "hidden_size": 8192}


@pytest.mark.parametrize(
    ("host", "donor", "says"),
    [
        (QWEN2_VL, {"model_type": "qwen2", "hidden_size": 8192}, "num_attention_heads: host 64, donor 32"),
        ({"model_type": "gpt2", "n_head": 4, "n_embd": 64}, {"n_head": 8, "n_embd": 64}, "num_attention_heads"),
        ({"num_attention_heads": 8, "head_dim": 8}, {"num_attention_heads": 8, "head_dim": 16}, "head_dim"),
        ({"num_local_experts": 8}, {"num_local_experts": 4}, "num_local_experts: host 8, donor 4"),
        ({"hidden_activation": "gelu"}, {"hidden_act": "silu"}, "hidden_act"),
    ],
)
def test_what_stops_a_merge(host: dict[str, Any], donor: dict[str, Any], says: str) -> None:
    assert any(says in fault for fault in compare_configs({"text_config": host}, donor).faults)


@pytest.mark.parametrize(
    ("host", "donor", "says"),
    [
        (QWEN2_VL, QWEN2_VL | {"rope_theta": 10000.0}, "rope rope_theta: host 1000000.0, donor 10000.0"),
        (QWEN2_VL, QWEN2_VL | {"rms_norm_eps": 1e-6}, "rms_norm_eps: host 1e-05, donor 1e-06"),
        ({"norm_eps": 1e-5}, {"norm_eps": 1e-6}, "rms_norm_eps"),
        ({"sliding_window": None}, {"sliding_window": 4096}, "sliding_window: host none, donor 4096"),
        ({"attention_bias": True}, {"attention_bias": False}, "attention_bias"),
        ({"max_position_embeddings": 8}, {"max_position_embeddings": 16}, "max_position_embeddings"),
        ({"vocab_size": 8}, {"vocab_size": 16}, "vocab_size"),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"dtype": "bfloat16"}, {"torch_dtype": "float16"}, "dtype"),
        ({"layer_types": ["full_attention"] * 2}, {"layer_types": ["sliding_attention"] * 2}, ""),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 1e4}, {"rope_theta": 1e4}, "rope factor"),
    ],
)
def test_what_is_warned_of(host: dict[str, Any], donor: dict[str, Any], says: str) -> None:
    found = compare_configs({"text_config": host}, donor)
    assert found.faults == ()
    assert (any(says in w for w in found.warnings)) if says else found.warnings == ()


def test_rotary_settings_have_one_form() -> None:
    new = {"rope_parameters": {"rope_type": "llama3", "factor": 8, "rope_theta": 500000.0}}
    old = {"rope_scaling": {"type": "llama3", "factor": 8.0}, "rope_theta": 500000}
    assert rope(new) == rope(old) == {"type": "llama3", "factor": 8.0, "rope_theta": 500000.0}
    local = {"rope_type": "default", "rope_theta": 1e4}
    whole = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    nested = {"rope_parameters": {"sliding_attention": local, "full_attention": whole}}
    before = {
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "rope_scaling": {"rope_type": "linear", "factor": 8},
    }
    assert rope(nested) == rope(before)
    assert rope({"rope_theta": 1e4, "partial_rotary_factor": 0.5}) == rope(
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}
    )
    mrope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 1e4}
    assert rope(mrope) == rope({"rope_theta": 1e4})


def tokenizer(folder: Path, tokens: list[str], *, unigram: bool = False) -> None:
    added = [{"id": 7, "content": 'the "vocab": {"a": 0} of a joker', "special": True}]
    vocab: Any = [[t, -1.5] for t in tokens] if unigram else {t: i for i, t in enumerate(tokens)}
    document = {"version": "1.0", "added_tokens": added, "model": {"type": "any", "vocab": vocab, "merges": ["a b"]}}
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))


@pytest.mark.parametrize("unigram", [False, True])
def test_the_first_tokens_are_read_from_the_head_of_the_file(unigram: bool, tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, "llava")
    words = ['"', "\\", "ü", "\n", "{", "]", *(f"w{i}" for i in range(2000))]
    tokenizer(pair.host, words, unigram=unigram)
    found = first_tokens(open_checkpoint(pair.host))
    assert list(found.items()) == list(enumerate(words))[:1000]
    (pair.donor / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    assert first_tokens(open_checkpoint(pair.donor)) == found
    assert first_tokens(open_checkpoint(pair.base)) == {}


def test_another_tokenizer_is_warned_of(tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, "llava")
    tokenizer(pair.host, ["a", "b", "c"])
    tokenizer(pair.donor, ["a", "b", "c", "d"])
    host, donor = open_checkpoint(pair.host), open_checkpoint(pair.donor)
    mapped = find_towers(shapes_of(host.tensors), shapes_of(donor.tensors))
    assert not [w for w in examine(host, donor, mapped).warnings if "tokenizer" in w]
    tokenizer(pair.donor, ["a", "x", "c", "d"])
    (warning,) = (w for w in examine(host, open_checkpoint(pair.donor), mapped).warnings if "tokenizer" in w)
    assert warning == "tokenizer: token 1 is 'b' in the host's and 'x' in the donor's"


@pytest.mark.parametrize("policy", ["overlap", "by-token"])
def test_rows_of_image_tokens_stay_the_host_s(policy: str, tmp_path: Path) -> None:
    """A text model of the same line knows the image token by name and never saw it used."""
    pair = vlm_pairs.make_pair(tmp_path, "qwen2_vl")
    words = [f"w{i}" for i in range(96)]
    for folder in (pair.host, pair.donor):
        tokenizer(folder, words)
    host, donor = open_checkpoint(pair.host), open_checkpoint(pair.donor)
    rows = rows_by_policy(policy, host, donor, host_rows=96, donor_rows=96)
    assert [n for n, row in enumerate(rows) if row < 0] == [90, 91, 92, 93]
