"""The tower that a model's class has is the one that its tensors' names tell; where they tell none, the class does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vlm_pairs
from safetensors.torch import load_file, save_file

import surgery
from surgery.arch.language import exact
from surgery.arch.language.exact import class_tower
from surgery.arch.language.locate import locate_towers
from surgery.arch.language.towers import NoTower, SeveralTowers, find_towers, language_tower, shapes_of
from surgery.errors import CheckpointError
from surgery.store.checkpoint import open_checkpoint


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("layout", ["default", "memory"])
@pytest.mark.parametrize("family", vlm_pairs.CONFIGS)
def test_names_and_class_agree_in_every_family_and_layout(family: str, layout: str, tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, family, layout=layout, shards=2 if layout == "memory" else 1)
    for folder, kind in ((pair.host, vlm_pairs.CONFIGS[family][0]), (pair.donor, None)):
        checkpoint = open_checkpoint(folder)
        found, name = class_tower(checkpoint)
        assert found == language_tower(shapes_of(checkpoint.tensors)) and name == (kind or name)
    # Every name on disk is one of the class's: nothing was left aside.
    host = open_checkpoint(pair.host)
    model = exact._without_weights(host)
    assert set(exact._names_in_memory(model, host.tensors).values()) <= set(model.state_dict())


@pytest.fixture(scope="module")
def pythia(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LLaVA around a GPT-NeoX tower, and a GPT-NeoX near it: neither calls its embeddings embed_tokens, and the head
    is lm_head in one and embed_out in the other."""
    root = tmp_path_factory.mktemp("pythia")
    text = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vlm_pairs._clip(), text_config=text, image_token_index=90, vision_feature_layer=-1
    )
    torch.manual_seed(3)
    host = transformers.LlavaForConditionalGeneration(config)
    donor = transformers.GPTNeoXForCausalLM(text)
    donor.gpt_neox.load_state_dict(host.model.language_model.state_dict())
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.003)
    host.save_pretrained(root / "host")
    donor.save_pretrained(root / "donor")
    return root / "host", root / "donor"


def test_a_tower_that_names_do_not_tell_is_merged_by_its_class(
    pythia: tuple[Path, Path], command: Callable[..., Any], tmp_path: Path
) -> None:
    host, donor = pythia
    with pytest.raises(NoTower):
        find_towers(*(shapes_of(open_checkpoint(p).tensors) for p in pythia))
    ended = command("merge", host, donor, "--alpha", "0.6", "--include", "head", "-o", "out")
    assert ended.code == 0 and "found by building the class" in ended.stderr, ended.stderr
    before, theirs, after = tensors(host), tensors(donor), tensors(tmp_path / "out")
    assert list(before) == list(after)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    norms = {f"language_model.model.final_layer_norm.{w}" for w in ("weight", "bias")}
    inside = {n for n in before if n.startswith("language_model.model.layers.")}
    assert changed == inside | norms | {"language_model.lm_head.weight"}
    for name in changed - {"language_model.lm_head.weight"}:
        other = theirs[name.replace("language_model.model.", "gpt_neox.")]
        assert torch.equal(after[name], before[name] * torch.tensor(0.6) + other * torch.tensor(0.4))
    model, said = transformers.LlavaForConditionalGeneration.from_pretrained("out", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    plain = transformers.GPTNeoXForCausalLM(model.config.text_config)
    plain.gpt_neox.load_state_dict({
        n.removeprefix("language_model.model."): t for n, t in after.items() if n.startswith("language_model.model.")
    })  # fmt: skip
    plain.lm_head.weight = model.lm_head.weight
    ids = torch.tensor([[3, 17, 42, 5, 9, 61, 33]])
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)
    # What the class said is part of what was done: the same again, and replayed.
    assert command("replay", "out", "--to", "again").code == 0
    plan = json.loads(command("merge", host, donor, "--dry-run", "--json").stdout)
    assert plan["found_by"] == "LlavaForConditionalGeneration" and plan["prefix"] == "language_model.model."


def test_layers_in_memory_find_their_counterparts_on_disk(pythia: tuple[Path, Path]) -> None:
    """What `probe layers --ablate donor` and `sweep merge` put into a loaded model."""
    from surgery.evals.layers.weights import OtherTower, tower_of

    model = transformers.LlavaForConditionalGeneration.from_pretrained(pythia[0])
    other = OtherTower(tower_of(model), "host", open_checkpoint(pythia[1]))
    theirs = tensors(pythia[1])
    for name in ("layers.2.attention.query_key_value.weight", "layers.0.mlp.dense_h_to_4h.bias"):
        assert torch.equal(other.read(f"model.language_model.{name}"), theirs[f"gpt_neox.{name}"])


def test_a_second_copy_of_the_tower_is_told_apart_by_the_class(command: Callable[..., Any], tmp_path: Path) -> None:
    """Trainers leave averaged or reference weights in the same file; transformers ignores them, and so do we."""
    pair = vlm_pairs.make_pair(tmp_path, "llava_next")
    weights = tensors(pair.host)
    copies = {f"ema.{n}": t.clone() for n, t in weights.items() if n.startswith("language_model.")}
    save_file({**copies, **weights}, pair.host / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SeveralTowers):
        find_towers(*(shapes_of(open_checkpoint(p).tensors) for p in (pair.host, pair.donor)))
    assert command("merge", pair.host, pair.donor, "-o", "out").code == 0
    before, after = tensors(pair.host), tensors(tmp_path / "out")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all(n.startswith("language_model.model.") for n in changed)
    ended = command("merge", pair.host, pair.donor, "--tower", "ema.language_model.model", "-o", "ema")
    assert ended.code == 0 and "by building" not in ended.stderr
    after = tensors(tmp_path / "ema")
    assert all(n.startswith("ema.") for n in before if not torch.equal(before[n], after[n]))
    # Without its config nobody can say, and the request is told what to do.
    (pair.host / "config.json").unlink()
    ended = command("merge", pair.host, pair.donor, "-o", "none")
    assert ended.code == 2 and "several towers fit" in ended.stderr and "--tower PREFIX" in ended.stderr
    assert "no config.json" in ended.stderr and not (tmp_path / "none").exists()


def test_no_code_of_the_checkpoint_is_run(
    pythia: tuple[Path, Path], command: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(pythia[0], tmp_path / "host")
    marker = tmp_path / "ran"
    (tmp_path / "host/modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((tmp_path / "host/config.json").read_text())
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForImageTextToText": "modeling_own.Own"}
    (tmp_path / "host/config.json").write_text(
        json.dumps(config | {"model_type": "own", "architectures": ["Own"], "auto_map": own})
    )
    ended = command("merge", "host", pythia[1], "-o", "out")
    assert ended.code == 3 and "no language model in it" in ended.stderr and "no class Own" in ended.stderr
    # With a type that transformers has, its own class answers and the folder's stays unread.
    (tmp_path / "host/config.json").write_text(json.dumps(config | {"auto_map": own}))
    assert command("merge", "host", pythia[1], "-o", "out").code == 0
    assert not marker.exists()


def test_models_that_differ_are_refused_without_asking_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of known families the names are known: a donor with biases is another model, and that is said at once."""
    monkeypatch.setattr(exact, "class_tower", lambda base: pytest.fail("asked"))
    for family, other in (("llava", "qwen2_vl"), ("lfm2_vl", "llava"), ("idefics2", "lfm2_vl")):
        host = vlm_pairs.make_pair(tmp_path / family / other, family).host
        donor = vlm_pairs.make_pair(tmp_path / other / family, other).donor
        with pytest.raises(CheckpointError, match="no tower that"):
            locate_towers(open_checkpoint(host), open_checkpoint(donor))


def test_the_class_s_answer_may_be_that_models_differ(pythia: tuple[Path, Path], tmp_path: Path) -> None:
    donor = vlm_pairs.make_pair(tmp_path, "llava").donor
    with pytest.raises(CheckpointError) as raised:
        locate_towers(open_checkpoint(pythia[0]), open_checkpoint(donor))
    assert "the nearest is 'language_model.model.'" in raised.value.message
    assert "num_hidden_layers" in raised.value.message


def test_a_config_of_a_billion_layers_is_not_built(pythia: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pythia[1], tmp_path / "donor")
    config = json.loads((tmp_path / "donor/config.json").read_text())
    (tmp_path / "donor/config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="num_hidden_layers 1,000,000,000"):
        class_tower(open_checkpoint(tmp_path / "donor"))


@pytest.mark.parametrize(
    ("config", "prefix", "embed", "norm"),
    [
        (lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=96), "transformer.", "wte", "ln_f"),
        (
            lambda: transformers.OPTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48,
                                           word_embed_proj_dim=32, vocab_size=96),
            "model.decoder.", "embed_tokens", "final_layer_norm",
        ),
        (
            lambda: transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=96),
            "transformer.", "word_embeddings", "ln_f",
        ),
    ],
    ids=["gpt2", "opt", "bloom"],
)  # fmt: skip
def test_decoders_with_other_words_for_their_parts(
    config: Any, prefix: str, embed: str, norm: str, tmp_path: Path
) -> None:
    transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path / "llm")
    found, _ = class_tower(open_checkpoint(tmp_path / "llm"))
    assert found.prefix == prefix and found.count == 3
    assert found.names["embed_tokens.weight"] == f"{prefix}{embed}.weight"
    assert found.names["norm.weight"] == f"{prefix}{norm}.weight"
    assert len({len(layer) for layer in found.layers.values()}) == 1
    assert len(found.canonical()) >= len(open_checkpoint(tmp_path / "llm").tensors) - 4


def test_a_folder_that_is_no_language_model_cannot_be_asked(tiny_dit: Path) -> None:
    with pytest.raises(CheckpointError):
        class_tower(open_checkpoint(tiny_dit))


def test_the_private_interface_of_transformers_is_what_we_take_it_for() -> None:
    """If this fails with a new version of transformers, `exact` is the file to mend."""
    from inspect import signature

    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    assert list(signature(get_model_conversion_mapping).parameters)[0] == "model"
    wanted = ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    assert list(signature(rename_source_key).parameters)[:5] == wanted
    assert not issubclass(WeightConverter, WeightRenaming)
    one = WeightRenaming("^old", "new")
    assert rename_source_key("old.weight", [one], [], base_model_prefix="m", meta_state_dict={"m.new.weight": 1})[
        0
    ] == ("m.new.weight")


def test_another_interface_is_told_and_no_fault(
    pythia: tuple[Path, Path], command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping

    monkeypatch.delattr(conversion_mapping, "get_model_conversion_mapping")
    ended = command("merge", *pythia, "-o", "out")
    assert ended.code == 3 and "renames tensors in a way that is not known here" in ended.stderr, ended.stderr


def test_merging_two_odd_models_twice_gives_the_same_record(pythia: tuple[Path, Path], tmp_path: Path) -> None:
    results = [surgery.apply("merge", *pythia, out=tmp_path / name, alpha="0.5") for name in ("a", "b")]
    assert results[0].record["record"] == results[1].record["record"]
