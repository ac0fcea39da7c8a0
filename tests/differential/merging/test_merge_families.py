"""The merge of every family, in both layouts of its class: what changes, what does not, and what the model computes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vlm_pairs
from safetensors.torch import load_file
from vlm_pairs import Pair

import surgery
from surgery.arch.language.towers import TowerMap, find_towers, shapes_of
from surgery.store.checkpoint import open_checkpoint

FAMILIES = list(vlm_pairs.CONFIGS)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def mapped(pair: Pair) -> TowerMap:
    return find_towers(*(shapes_of(open_checkpoint(p).tensors) for p in (pair.host, pair.donor)))


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.name != "surgery.json"}


def loaded(family: str, folder: Path) -> Any:
    """The model by its own class; nothing may be missing, left over or of another shape."""
    kind = getattr(transformers, vlm_pairs.CONFIGS[family][0])
    model, said = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"], said
    return model.eval()


# Every family in both layouts of its class, in every dtype, in one file and in several.
FORMS = [
    ("default", "bfloat16", 1), ("memory", "bfloat16", 3), ("default", "float16", 3), ("memory", "float16", 1),
    ("default", "float32", 1), ("memory", "float32", 2),
]  # fmt: skip
BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


def steps_apart(got: torch.Tensor, host: torch.Tensor, donor: torch.Tensor, share: float) -> float:
    """The largest distance from the float64 definition (with the weights that float32 holds), rounded once, in steps of
    the dtype at the size of what is added."""
    weights = torch.tensor([share, 1 - share]).double()
    parts = host.double() * weights[0], donor.double() * weights[1]
    size = torch.stack([*(p.abs() for p in parts), sum(parts).abs()]).amax(0).clamp_min(2.0**-14)
    wanted = sum(parts).to(got.dtype).double()
    return float(((got.double() - wanted).abs() / 2.0 ** (size.log2().floor() - BITS[got.dtype])).max())


@pytest.mark.parametrize(("layout", "dtype", "shards"), FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_selected_tensors_are_blended_and_all_others_are_the_host_s(
    family: str, layout: str, dtype: str, shards: int, tmp_path: Path
) -> None:
    pair = vlm_pairs.make_pair(tmp_path, family, layout=layout, dtype=dtype, shards=shards)
    out = surgery.apply("merge", pair.host, pair.donor, out=tmp_path / "out", layers="1-2", alpha="0.7").path
    host, donor, merged = tensors(pair.host), tensors(pair.donor), tensors(out)
    names = mapped(pair)
    cross = names.cross_layers
    chosen = {
        mine: theirs
        for canonical, (mine, theirs) in names.names.items()
        if canonical.startswith(("layers.1.", "layers.2.")) and int(canonical.split(".")[1]) not in cross
    }
    assert chosen and list(merged) == list(host)
    for name, tensor in merged.items():
        assert tensor.dtype == host[name].dtype and tensor.shape == host[name].shape
        if name in chosen:
            want = host[name].float() * torch.tensor(0.7) + donor[chosen[name]].float() * torch.tensor(1 - 0.7)
            assert torch.equal(tensor, want.to(tensor.dtype)), name
            assert steps_apart(tensor, host[name], donor[chosen[name]], 0.7) <= 1, name
        else:
            assert torch.equal(tensor.view(torch.uint8), host[name].view(torch.uint8)), name
    # Files: the same shards with the same headers, the same side files.
    before, after = digests(pair.host), digests(out)
    assert set(after) == set(before) | {"README.md"}
    assert {n: d for n, d in after.items() if not n.endswith((".safetensors", ".md"))} == {
        n: d for n, d in before.items() if not n.endswith(".safetensors")
    }
    for file in pair.host.glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert (out / file.name).read_bytes()[:length] == file.read_bytes()[:length]


@pytest.mark.parametrize(
    ("layout", "dtype", "shards"), [("default", "bfloat16", 2), ("memory", "float16", 1), ("memory", "float32", 2)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_the_host_or_of_the_donor_is_a_copy(
    family: str, layout: str, dtype: str, shards: int, tmp_path: Path
) -> None:
    pair = vlm_pairs.make_pair(tmp_path, family, layout=layout, dtype=dtype, shards=shards)
    same = surgery.apply("merge", pair.host, pair.donor, out=tmp_path / "same", alpha="1").path
    assert {n: d for n, d in digests(same).items() if n != "README.md"} == digests(pair.host)
    other = tensors(surgery.apply("merge", pair.host, pair.donor, out=tmp_path / "other", alpha="0").path)
    host, donor = tensors(pair.host), tensors(pair.donor)
    selected = {
        mine: theirs
        for canonical, (mine, theirs) in mapped(pair).names.items()
        if canonical.startswith("layers.") or canonical == "norm.weight"
    }
    for name, tensor in other.items():
        want = donor[selected[name]] if name in selected else host[name]
        assert torch.equal(tensor.view(torch.uint8), want.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_merged_with_itself_is_itself(family: str, dtype: str, tmp_path: Path) -> None:
    """The same file in halves; in float32, where the products themselves are rounded, within one step."""
    pair = vlm_pairs.make_pair(tmp_path, family, dtype=dtype)
    out = surgery.apply("merge", pair.host, pair.host, out=tmp_path / "out", alpha="0.9,0.37").path
    if dtype != "float32":
        assert {n: d for n, d in digests(out).items() if n != "README.md"} == digests(pair.host)
        return
    before, after = tensors(pair.host), tensors(out)
    for name, tensor in after.items():
        assert (tensor.view(torch.int32) - before[name].view(torch.int32)).abs().max() <= 1, name


@pytest.mark.parametrize("layout", ["default", "memory"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_computes_what_the_blended_text_model_does(family: str, layout: str, tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, family, layout=layout, dtype="float32")
    out = surgery.apply("merge", pair.host, pair.donor, out=tmp_path / "out", alpha="0.6").path
    model = loaded(family, out)
    merged, names = tensors(out), mapped(pair).names
    text = model.config.get_text_config()
    plain = vlm_pairs.donor_class(family)(vlm_pairs.donor_config(family, text))
    blended = {theirs: merged[mine] for mine, theirs in names.values()}
    head = blended.get("lm_head.weight", merged[names["embed_tokens.weight"][0]])
    rows = plain.lm_head.weight.shape[0]
    blended = {n: t[:rows] if n.endswith(("embed_tokens.weight", "lm_head.weight")) else t for n, t in blended.items()}
    said = plain.load_state_dict(blended | {"lm_head.weight": head[:rows]}, strict=False)
    assert not said.missing_keys and not said.unexpected_keys
    ids = torch.tensor([[3, 17, 42, 5, 9, 61, 33]])
    with torch.no_grad():
        more = {"cross_attention_mask": None} if family == "mllama" else {}
        got = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[..., :rows]
        # PaliGemma's prompt sees itself whole, in both directions; the text model is asked for the same.
        seen = {"attention_mask": torch.zeros(1, 1, 7, 7)} if family == "paligemma" else {}
        want = plain.eval()(input_ids=ids, **seen).logits
    assert bool(got.isfinite().all()) and float(want.std()) > 0.01
    assert (got - want).abs().max() <= 1e-5


def test_the_record_and_the_card_say_what_was_done(tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, "llava")
    out = surgery.apply("merge", pair.host, pair.donor, out=tmp_path / "out", layers="1-2").path
    record = json.loads((out / "surgery.json").read_text())
    assert record["steps"][0]["params"]["alpha"] == "0.9" and record["steps"][0]["params"]["layers"] == "1-2"
    rows = record["measured"]["layers"]
    assert [r["layer"] for r in rows] == [1, 2] and all(0.5 < r["transfer"] < 1.2 for r in rows)
    text = (out / "README.md").read_text()
    assert "base_model_relation: merge" in text and "host 0.9, donor 0.1" in text and str(tmp_path) not in text
    again = surgery.apply("merge", pair.host, pair.donor, out=tmp_path / "again", layers="1-2", alpha="0.9")
    assert again.record["digest"] == record["digest"] and again.record["record"] == record["record"]
