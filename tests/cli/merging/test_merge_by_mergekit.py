"""`--arithmetic mergekit`: its own run, held against the plan, with our files and record around it."""

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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return vlm_pairs.make_pair(tmp_path_factory.mktemp("pair"), "llava")


def document(method: str, first: Path, second: Path, **more: Any) -> Path:
    models = [{"model": str(p), "parameters": {"weight": w}} for p, w in ((first, 0.7), (second, 0.3))]
    file = Path(f"{method}.yml")
    file.write_text(yaml.safe_dump({"merge_method": method, "models": models, "dtype": "bfloat16", **more}))
    return file


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties"])
def test_the_whole_run_is_mergekit_s_and_the_record_is_ours(method: str, pair: Pair, command: Command) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    file = document(method, pair.donor, pair.base, base_model=str(pair.base))
    words = ("merge", "-c", file, "--arithmetic", "mergekit", "--seed", "3", "-q")
    ended = command(*words, "-o", "out")
    assert ended.code == 0, ended.stderr
    options = MergeOptions(random_seed=3, copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(file.read_text())), "theirs", options)
    ours, theirs = load_file("out/model.safetensors"), load_file("theirs/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())
    assert command("verify", "out").code == 0
    record = json.loads(Path("out/surgery.json").read_text())
    assert record["steps"][0]["params"]["arithmetic"] == "mergekit" and len(record["parents"]) == 2
    if method == "dare_ties":  # replayed with its seed
        assert command("replay", "out", "--to", "again").code == 0
        assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert command(*words, "-o", "dry", "--dry-run").code == 0 and not Path("dry").exists()


def test_single_files_are_not_handed_over(pair: Pair, command: Command) -> None:
    file = document("linear", pair.donor / "model.safetensors", pair.base)
    ended = command("merge", "-c", file, "--arithmetic", "mergekit", "-o", "out")
    assert ended.code == 2 and "is a single file" in ended.stderr and not Path("out").exists()


def test_models_of_different_layouts_are_never_handed_over(pair: Pair, command: Command) -> None:
    file = document("linear", pair.host, pair.donor, base_model=str(pair.host))
    ended = command("merge", "-c", file, "--arithmetic", "mergekit", "-o", "out")
    assert ended.code == 3 and "differ in layout" in ended.stderr and not Path("out").exists()
    ended = command("merge", pair.host, pair.donor, "--arithmetic", "mergekit", "-o", "out")
    assert ended.code == 2 and "--config FILE" in ended.stderr and not Path("out").exists()


def test_tensors_that_mergekit_leaves_out_are_noticed(pair: Pair, command: Command, tmp_path: Path) -> None:
    """Both models hold a tensor that their architecture does not know: mergekit drops it and ends well."""
    for name in ("donor", "base"):
        shutil.copytree(getattr(pair, name), tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file) | {"model.layers.0.self_attn.extra.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
        save_file(tensors, file, metadata={"format": "pt"})
    file = document("linear", tmp_path / "donor", tmp_path / "base")
    ended = command("merge", "-c", file, "--arithmetic", "mergekit", "-o", "out")
    assert ended.code == 3 and "wrote 39 tensors of 40, without 'model.layers.0.self_attn.extra" in ended.stderr
    assert not Path("out").exists()


def test_options_that_are_carried_out_here_are_not_handed_over(pair: Pair, command: Command) -> None:
    file = document("linear", pair.donor, pair.base, tokenizer_source="union")
    ended = command("merge", "-c", file, "--arithmetic", "mergekit", "-o", "out")
    assert ended.code == 2 and "tokenizer_source of the document is carried out here" in ended.stderr


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("breadcrumbs", {"density": 0.8, "gamma": 0.05}),
        ("dare_linear", {"density": 0.5}),
        ("multislerp", {}),
        ("ram", {}),
        ("ramplus_tl", {"r": 0.2}),
    ],
)
def test_more_methods_of_mergekit_from_a_file(
    method: str, parameters: dict[str, float], pair: Pair, command: Command
) -> None:
    """The kernels, tensor by tensor, give mergekit's whole run, where nothing is drawn bit for bit."""
    base = {} if method == "multislerp" else {"base_model": str(pair.base)}
    other = Path("other")
    assert command("scale", pair.donor, "--by", "0.9", "--only", "*proj.weight", "-o", other, "-q").code == 0
    file = document(method, pair.donor, other, parameters=parameters, out_dtype="bfloat16", **base)
    for arithmetic in ("kernels", "mergekit"):
        ended = command("merge", "-c", file, "--arithmetic", arithmetic, "-o", arithmetic, "-q")
        assert ended.code == 0, ended.stderr
    ours, theirs = (load_file(f"{a}/model.safetensors") for a in ("kernels", "mergekit"))
    first = load_file(pair.donor / "model.safetensors")
    assert ours.keys() == theirs.keys() == first.keys()
    assert any(not torch.equal(ours[n], t) for n, t in first.items())
    for name, tensor in ours.items():
        assert bool(tensor.float().isfinite().all()) and tensor.dtype == first[name].dtype
        assert method == "dare_linear" or torch.equal(tensor, theirs[name]), name
