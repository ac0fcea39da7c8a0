"""mergekit files on the command line: towers, several documents, the recipes of recipes/vlm-merge on tiny models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_pairs
import yaml
from safetensors.torch import load_file, save_file
from vlm_pairs import Pair

Command = Callable[..., Any]
RECIPES = Path(__file__).resolve().parents[3] / "recipes" / "vlm-merge"
HUB = {
    "llava-hf/llama3-llava-next-8b-hf": "host",
    "hkust-nlp/dart-math-llama3-8b-prop2diff": "donor",
    "meta-llama/Meta-Llama-3-8B": "base",
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def blended(pair: Pair, name: str, share: float) -> torch.Tensor:
    host, donor = tensors(pair.host)[name], tensors(pair.donor)[name.removeprefix("language_model.")]
    return (host.float() * torch.tensor(share) + donor.float() * torch.tensor(1 - share)).bfloat16()


def layer_of(name: str) -> int | None:
    pieces = name.split(".")
    return int(pieces[3]) if name.startswith("language_model.model.layers.") else None


@pytest.mark.parametrize("recipe", sorted(p.name for p in RECIPES.glob("*.yml")))
def test_the_shipped_recipes_run_on_folders(recipe: str, pair: Pair, command: Command, tmp_path: Path) -> None:
    text = (RECIPES / recipe).read_text()
    for hub, role in HUB.items():
        text = text.replace(hub, str(getattr(pair, role)))
    # The tiny model has four layers: what the recipe says of 32 is scaled.
    text = text.replace('"6-"', '"1-"').replace('"11-"', '"2-"')
    Path("recipe.yml").write_text(text)
    ended = command("run", "recipe.yml", "-o", "out", "-q")
    assert ended.code == 0, ended.stderr
    if "ties" not in recipe:
        other = command("merge", "--config", "recipe.yml", "-o", "again", "-q")
        assert (
            other.code == 0
            and (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
        )
    host, out = tensors(pair.host), tensors(tmp_path / "out")
    first = {"llava-next-dart.yml": 0, "layerswap-5.yml": 1, "late-layers.yml": 2, "ties-paper.yml": 0}[recipe]
    for name, tensor in out.items():
        layer = layer_of(name)
        merged = (layer is not None and layer >= first) or name == "language_model.model.norm.weight"
        if not merged:
            assert torch.equal(tensor, host[name]), name
        elif recipe in ("llava-next-dart.yml", "layerswap-5.yml"):
            assert torch.equal(tensor, blended(pair, name, 0.9)), name
        elif recipe == "ties-paper.yml":
            assert layer is None or not torch.equal(tensor, host[name])
        elif layer is not None:  # the gradient runs over all layers of the tower: 1.0, 0.9, 0.8 at t = 0, 1/2, 1
            share = 1.0 - 0.2 * layer / (vlm_pairs.LAYERS - 1)
            step = (host[name].float().abs() * 2.0**-7).clamp_min(1e-9)
            assert ((tensor.float() - blended(pair, name, share).float()).abs() <= step).all()
    assert command("verify", "out").code == 0


def test_a_document_names_the_host_by_itself_and_by_any_method(pair: Pair, command: Command, tmp_path: Path) -> None:
    document = {
        "merge_method": "ties",
        "base_model": str(pair.base),
        "models": [
            {"model": str(pair.host), "parameters": {"weight": 0.8}},
            {"model": str(pair.donor), "parameters": {"weight": 0.2}},
        ],
        "parameters": {"density": 0.3},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    Path("ties.yml").write_text(yaml.safe_dump(document))
    assert command("merge", "-c", "ties.yml", "-o", "out", "-q").code == 0
    args = ["--base", pair.base, "--method", "ties", "--alpha", "0.8", "--density", "0.3", "--arithmetic", "kernels"]
    assert command("merge", pair.host, pair.donor, *args, "-o", "flags", "-q").code == 0
    one, two = tensors(tmp_path / "out"), tensors(tmp_path / "flags")
    assert all(torch.equal(one[n], two[n]) for n in one) and len(one) == len(two)


def test_several_documents_build_on_one_another(pair: Pair, command: Command) -> None:
    first = {
        "name": "middle",
        "merge_method": "linear",
        "models": [{"model": str(p), "parameters": {"weight": 0.5}} for p in (pair.donor, pair.base)],
    }
    last = {
        "merge_method": "linear",
        "models": [
            {"model": str(pair.donor), "parameters": {"weight": 0.5}},
            {"model": "middle", "parameters": {"weight": 0.5}},
        ],
    }
    Path("two.yml").write_text(yaml.safe_dump_all([last, first]))
    dry = command("merge", "-c", "two.yml", "--dry-run", "--json")
    assert dry.code == 0 and [s["name"] for s in json.loads(dry.stdout)["steps"]] == ["middle", "merged"]
    refused = command("merge", "-c", "two.yml", "-o", "out", "--layers", "0-1")
    assert refused.code == 2 and "--layers does not go with --config" in refused.stderr
    ended = command("merge", "-c", "two.yml", "-o", "out", "-q")
    assert ended.code == 0, ended.stderr
    name = "model.layers.0.mlp.up_proj.weight"
    donor, base, out = (tensors(p)[name].float() for p in (pair.donor, pair.base, Path("out")))
    assert (out - (0.75 * donor + 0.25 * base)).abs().max() < 2e-3


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("merge_method: linear\nmodels: [{model: HOST}]\n", "needs weight"),
        ("merge_method: linaer\nmodels: [{model: DONOR}]\n", "did you mean 'linear'"),
        ("merge_method: slerp\nmodels: [{model: DONOR}, {model: BASE}]\nparameters: {t: 0.5}\n", "base_model"),
        ("merge_method: slerp\nbase_model: BASE\nmodels: [{model: DONOR}]\n", "slerp needs t"),
        ("merge_method: passthrough\nslices: [{sources: [{model: DONOR, layer_range: [0, 9]}]}]\n", "has 4 layers"),
        ("merge_method: linear\nmodels: [{model: DONOR, parameters: {weight: one}}]\n", "wrong type"),
        ("merge_method: ties\nmodels: [{model: DONOR, parameters: {weight: 1}}]\n", "needs a base_model"),
        (
            "merge_method: ties\nbase_model: BASE\nparameters: {weight: 1}\n"
            "slices: [{sources: [{model: DONOR, layer_range: [0, 2]}]}]\n",
            "base_model is not among the sources",
        ),
        ("merge_method: model_stock\nbase_model: BASE\nmodels: [{model: DONOR}]\n", "takes at least 3 models"),
        (
            "merge_method: della\nbase_model: BASE\nmodels: [{model: DONOR}]\n"
            "parameters: {weight: 1, density: 0.1, epsilon: 0.15}\n",
            "Epsilon must be chosen",
        ),
        (
            "merge_method: linear\nmodels: [{model: DONOR}, {model: BASE}]\nparameters: {weight: 1}\n"
            "surgery: {layers: 0-1}\n",
            "not of which model",
        ),
    ],
)
def test_a_document_that_cannot_be_met_is_one_line(document: str, says: str, pair: Pair, command: Command) -> None:
    for role in ("host", "donor", "base"):
        document = document.replace(role.upper(), str(getattr(pair, role)))
    Path("bad.yml").write_text(document)
    ended = command("merge", "-c", "bad.yml", "-o", "out")
    assert ended.code == 2 and says in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--layers", "0-1"], "surgery: {host: MODEL, layers: …}"),
        (["--method", "ties"], "merge_method: NAME"),
        (["--alpha", "0.5"], "parameters: {weight: …}"),
        (["--dtype", "float16"], "out_dtype: NAME"),
        (["--rounding", "stochastic"], "its models, parameters and dtype"),
        (["--param", "t=1"], "parameters: {NAME: VALUE}"),
    ],
)
def test_options_that_a_document_says_itself_are_refused(
    options: list[str], says: str, pair: Pair, command: Command
) -> None:
    models = [{"model": str(p), "parameters": {"weight": 0.5}} for p in (pair.donor, pair.base)]
    Path("x.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    ended = command("merge", "-c", "x.yml", *options, "-o", "out")
    assert ended.code == 2 and f"{options[0]} does not go with --config" in ended.stderr and says in ended.stderr
    assert not Path("out").exists()


def test_a_parameter_that_the_method_lacks_is_warned_of(pair: Pair, command: Command) -> None:
    models = [{"model": str(p), "parameters": {"weight": 0.5}} for p in (pair.donor, pair.base)]
    document = {"merge_method": "linear", "models": models, "parameters": {"int8_mask": True, "normalise": False}}
    Path("x.yml").write_text(yaml.safe_dump(document))
    ended = command("merge", "-c", "x.yml", "--dry-run", "--json")
    said = json.loads(ended.stdout)["warnings"]
    assert [w for w in said if "'int8_mask'" in w] and [w for w in said if "did you mean 'normalize'?" in w], said


def test_our_block_takes_the_base_model_as_host(pair: Pair, command: Command, tmp_path: Path) -> None:
    models = [{"model": str(p), "parameters": {"weight": 0.5}} for p in (pair.donor, pair.base)]
    document = {"merge_method": "linear", "base_model": str(pair.base), "models": models, "surgery": {"layers": "1-2"}}
    Path("x.yml").write_text(yaml.safe_dump(document))
    assert command("merge", "-c", "x.yml", "-o", "out", "-q").code == 0
    base, out = tensors(pair.base), tensors(tmp_path / "out")
    changed = {name.split(".")[2] for name in out if not torch.equal(out[name], base[name])}
    assert changed == {"1", "2"}
    document["surgery"] = {"layers": [0, 3]}
    Path("x.yml").write_text(yaml.safe_dump(document))
    assert "into     " in (said := command("merge", "-c", "x.yml", "--dry-run").stdout) and "layers 0, 3" in said, said


def test_a_file_and_names_do_not_go_together(pair: Pair, command: Command) -> None:
    Path("x.yml").write_text("merge_method: linear\n")
    assert command("merge", pair.host, pair.donor, "-c", "x.yml").code == 2
    assert command("merge", "-c", "missing.yml").code == 3


def test_the_preflight_looks_at_the_models_of_a_document(pair: Pair, command: Command, tmp_path: Path) -> None:
    shutil.copytree(pair.donor, tmp_path / "donor")
    models = [{"model": str(p), "parameters": {"weight": 0.5}} for p in (pair.host, tmp_path / "donor")]
    Path("x.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    config = json.loads((tmp_path / "donor/config.json").read_text())
    config |= {"rope_parameters": None, "rope_theta": 500000.0}
    (tmp_path / "donor/config.json").write_text(json.dumps(config))
    ended = command("merge", "-c", "x.yml", "-o", "out")
    assert ended.code == 0 and "donor: rope rope_theta: host 10000.0, donor 500000.0" in ended.stderr, ended.stderr
    assert command("merge", "-c", "x.yml", "-o", "strict", "--strict").code == 3
    generator = torch.Generator().manual_seed(9)
    other = {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in tensors(tmp_path / "donor").items()}
    save_file(other, tmp_path / "donor/model.safetensors", metadata={"format": "pt"})
    ended = command("merge", "-c", "x.yml", "-o", "unrelated")
    assert ended.code == 3 and "do not look related" in ended.stderr and not Path("unrelated").exists()
    assert command("merge", "-c", "x.yml", "-o", "unrelated", "--force", "-q").code == 0
