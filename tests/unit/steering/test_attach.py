"""A patch that travels: weight files byte for byte, code that needs no package of ours, loading with and without it."""

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlms import tiny_vlm

from surgery.errors import CheckpointError, UsageError
from surgery.graph.lineage import verify
from surgery.graph.op import PlanContext, build_op
from surgery.graph.run import RunOptions, run_op
from surgery.ops.adaptvis import AdaptVis
from surgery.steering.carried import carried_faults, readme
from surgery.steering.explain import check_answers, check_files
from surgery.steering.generate import Policy, SteeringError, stored_patch
from surgery.steering.patch import Patch
from surgery.steering.session import generate
from surgery.store.checkpoint import Checkpoint, open_checkpoint

torch.set_num_threads(1)
BRANCHES = ((1.01, 0.5), (0.0, 1.5))  # thresholds that force an alpha
NUMBERS = {"alpha1": 0.5, "alpha2": 1.5, "beta": 0.4}
HOW = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saved models by family, made when asked for. Read only."""
    root = tmp_path_factory.mktemp("vlms")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            tiny_vlm(family).model.save_pretrained(root / family)
            (root / family / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
        return root / family

    return folder


def attach(source: Path, out: Path, **params: Any) -> Path:
    return run_op(
        build_op(AdaptVis, params or NUMBERS), [open_checkpoint(source)], out, options=RunOptions(workers=1)
    ).path


def weights(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors*")}


def plan(base: Checkpoint, **params: Any) -> Any:
    return build_op(AdaptVis, params).plan(PlanContext(), base)


def same(one: Any, two: Any) -> bool:
    """Scores of all steps, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.logits, two.logits, strict=True))


def near(one: Any, two: Any) -> bool:
    return all(torch.allclose(a, b, atol=2e-5, rtol=0) for a, b in zip(one.logits, two.logits, strict=True))


def test_weight_files_are_the_parents_byte_for_byte(folders: Any, tmp_path: Path) -> None:
    source = folders("llava")
    out = attach(source, tmp_path / "out")
    assert weights(out) == weights(source)
    made, base = open_checkpoint(out), open_checkpoint(source)
    assert made.digest == base.digest and verify(made) == []
    record = made.lineage
    assert record is not None and list(record["parents"].values())[0]["digest"] == record["digest"]
    assert {row["how"] for row in record["changes"]} == {"keep"}


@pytest.mark.parametrize("shards", ["5GB", "60KB"])
def test_hard_links_share_the_weights_with_the_parent(shards: str, tmp_path: Path) -> None:
    tiny_vlm("llava").model.save_pretrained(tmp_path / "in", max_shard_size=shards)
    how = RunOptions(workers=1, link="hard")
    run_op(build_op(AdaptVis, NUMBERS), [open_checkpoint(tmp_path / "in")], tmp_path / "out", options=how)
    assert (len(weights(tmp_path / "in")) == 1) == (shards == "5GB")
    for file in (tmp_path / "in").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).samefile(file)
    assert not (tmp_path / "out/config.json").samefile(tmp_path / "in/config.json")
    assert verify(open_checkpoint(tmp_path / "out")) == []


def test_shards_stay_as_they_are(tmp_path: Path) -> None:
    tiny_vlm("llava").model.save_pretrained(tmp_path / "in", max_shard_size="60KB")
    assert len(weights(tmp_path / "in")) > 3
    out = attach(tmp_path / "in", tmp_path / "out")
    assert weights(out) == weights(tmp_path / "in")
    assert open_checkpoint(out).digest == open_checkpoint(tmp_path / "in").digest


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "smolvlm", "gemma3", "paligemma"])
def test_the_stored_patch_answers_as_the_package_does(family: str, folders: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    out = attach(folders(family), tmp_path / f"patched_{family}")
    tiny = tiny_vlm(family)
    inputs = tiny.prompt()
    patched = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
    plain = AutoModelForImageTextToText.from_pretrained(out).eval()
    unsteered = tiny.model.generate(**inputs, **HOW)
    for model in (patched, plain):
        model.generation_config = tiny.model.generation_config
    for beta, alpha in BRANCHES:
        wanted, outcome = generate(tiny.model, inputs, Policy(0.5, 1.5, beta), **HOW)
        assert outcome.alpha == [alpha]
        found = patched.generate(**inputs, adaptvis_beta=beta, **HOW)
        assert near(found, wanted) and not near(found, unsteered)
    # Where weights lie in memory decides the last bits of products: within one model equality is exact.
    own = type(patched).generate(patched, **inputs, **HOW)
    assert same(patched.generate(**inputs, adaptvis=False, **HOW), own)
    assert same(patched.generate(**inputs, adaptvis_alpha1=1.0, adaptvis_alpha2=1.0, **HOW), own)
    assert near(own, unsteered) and near(plain.generate(**inputs, **HOW), unsteered)
    called = plain.generate(**inputs, custom_generate=str(out), trust_remote_code=True, **HOW)
    again = patched.generate(inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"}, **HOW)
    assert near(called, again)


def test_it_works_where_this_package_is_not_installed(folders: Any, tmp_path: Path) -> None:
    out = attach(folders("llava"), tmp_path / "alone")
    inputs = tiny_vlm("llava").prompt()
    torch.save(inputs, tmp_path / "inputs.pt")
    wanted, _ = generate(tiny_vlm("llava").model, inputs, Policy(0.5, 1.5, 1.01), max_new_tokens=3, do_sample=False)
    code = f"""
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "surgery":
            raise ImportError("hidden")
sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(out)!r}, trust_remote_code=True).eval()
model.generation_config.eos_token_id = None
inputs = torch.load({str(tmp_path / "inputs.pt")!r})
print(model.generate(**inputs, adaptvis_beta=1.01, max_new_tokens=3, do_sample=False).tolist())
assert "surgery" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == wanted.tolist()


def test_the_copy_beside_a_checkpoint_does_not_answer_to_the_packages_name(folders: Any, tmp_path: Path) -> None:
    """Registrations are global: whichever came last would act for every model."""
    from surgery.steering.attention import backend

    out = attach(folders("llava"), tmp_path / "named")
    model = tiny_vlm("llava").model
    carried = model.load_custom_generate(str(out), trust_remote_code=True)
    theirs = sys.modules[sys.modules[carried.__module__].Steering.__module__].backend
    assert theirs("sdpa") != backend("sdpa")


def test_attaching_again_replaces_the_patch(folders: Any, tmp_path: Path) -> None:
    first = attach(folders("llava"), tmp_path / "first")
    second = attach(first, tmp_path / "second", scale=0.8)
    assert weights(second) == weights(first)
    spec = open_checkpoint(second).config["adaptvis"]
    assert spec["scale"] == 0.8 and "alpha1" not in spec
    page = (second / "README.md").read_text()
    assert page.count("## Attention patch") == 1 and "alpha 0.8 for every sample" in page and "# A model" in page
    again = attach(folders("llava"), tmp_path / "again")
    files = {p.relative_to(first): p.read_bytes() for p in first.rglob("*") if p.is_file() and p.name != "surgery.json"}
    assert files == {
        p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file() and p.name != "surgery.json"
    }


def test_composing_multiplies_and_g_with_its_inverse_is_nothing(folders: Any, tmp_path: Path) -> None:
    first = attach(folders("llava"), tmp_path / "first", alpha1=0.25, alpha2=4.0, beta=0.4, layers="1-2")
    both = attach(first, tmp_path / "both", scale=4.0, compose=True)
    spec = open_checkpoint(both).config["adaptvis"]
    assert (spec["alpha1"], spec["alpha2"], spec["layers"]) == (1.0, 16.0, [1, 2])
    with pytest.raises(UsageError, match="carries no patch"):
        plan(open_checkpoint(folders("llava")), scale=2.0, compose=True)


def test_verify_finds_what_is_wrong(folders: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = attach(folders("llava"), tmp_path / "out")
    tiny = tiny_vlm("llava")
    base = open_checkpoint(out)
    model = copy.deepcopy(tiny.model)
    model.config.adaptvis = base.config["adaptvis"]
    assert check_files(base) == [] and check_answers(base, model, tiny.prompt()) == []
    code = out / "custom_generate" / "generate.py"
    before = code.read_bytes()
    code.write_bytes(before + b"\nraise SystemExit('run')\n")
    assert any("not this version's code" in f for f in check_files(open_checkpoint(out)))
    check_answers(open_checkpoint(out), model, tiny.prompt())  # and it is not run
    code.unlink()
    assert any("does nothing" in f for f in check_files(open_checkpoint(out)))
    code.write_bytes(before)
    tensors = load_file(out / "model.safetensors")
    next(t for t in tensors.values() if t.ndim == 2)[0, 0] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert any("weights are not those" in f for f in check_files(open_checkpoint(out)))
    with pytest.raises(CheckpointError, match="carries no patch"):
        check_files(open_checkpoint(folders("llava")))


def test_saving_a_patched_model_drops_the_code_and_that_is_said(folders: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    out = attach(folders("llava"), tmp_path / "out")
    AutoModelForImageTextToText.from_pretrained(out).save_pretrained(tmp_path / "saved")
    assert "adaptvis" in open_checkpoint(tmp_path / "saved").config
    assert any("does nothing" in f for f in carried_faults(open_checkpoint(tmp_path / "saved")))


def test_a_patch_without_effect_is_found(folders: Any, tmp_path: Path) -> None:
    """A head of zeros answers nothing whatever it sees."""
    out = attach(folders("llava"), tmp_path / "out", scale=0.5)
    model = copy.deepcopy(tiny_vlm("llava").model)
    model.config.adaptvis = open_checkpoint(out).config["adaptvis"]
    torch.nn.init.zeros_(model.lm_head.weight)
    faults = check_answers(open_checkpoint(out), model, tiny_vlm("llava").prompt())
    assert faults == ["scale: the answer is that of the unpatched model"]


def test_numbers_come_from_a_tuning_and_options_go_before_it(folders: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    tuned = {"surgery_tune": 1, "alpha1": 0.8, "alpha2": 1.2, "beta": 0.3, "tuned_on": {"data": "sha256:1"}, "more": 1}
    file.write_text(json.dumps(tuned))
    base = open_checkpoint(folders("llava"))
    spec = plan(base, from_=str(file), beta=0.5).report["spec"]
    assert (spec["alpha1"], spec["alpha2"], spec["beta"], spec["tuned_on"]) == (0.8, 1.2, 0.5, {"data": "sha256:1"})
    assert "alpha1" not in plan(base, from_=str(file), scale=0.5).report["spec"]
    file.write_text("{}")
    with pytest.raises(UsageError, match="not the result of a tuning"):
        plan(base, from_=str(file))
    with pytest.raises(UsageError, match="unreadable|No such file"):
        plan(base, from_=str(tmp_path / "nothing.json"))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "belong together"),
        ({"alpha1": 0.5}, "belong together"),
        ({**NUMBERS, "scale": 1.0}, "exclude each other"),
        ({**NUMBERS, "alpha1": -1.0}, "not a number from 0 up"),
        ({**NUMBERS, "beta": 1.5}, "not in [0, 1.01]"),
        ({**NUMBERS, "layers": "0-9"}, "valid: 0-2"),
        ({**NUMBERS, "layers": ""}, "nothing"),
        ({**NUMBERS, "heads": "0:9"}, "valid: 0-3"),
        ({**NUMBERS, "mode": "double"}, "mass-preserving"),
        ({**NUMBERS, "mode": "knock-out"}, "no alpha to adapt"),
        ({**NUMBERS, "mode": "bias", "alpha1": 0.0}, "logarithm"),
        ({**NUMBERS, "confidence": "max"}, "max-prob"),
        ({**NUMBERS, "image_keys": "pixels"}, "span"),
        ({**NUMBERS, "rows": "first"}, "last:3"),
        ({**NUMBERS, "tau": 0.0}, "hard threshold"),
        ({**NUMBERS, "confidence_decimals": 40}, "0 to 12"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_numbers_are_refused_before_anything_is_written(folders: Any, params: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(open_checkpoint(folders("llava")), **params)
    assert words in str(caught.value)


def test_models_that_cannot_be_patched_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for config, words in (
        ({"model_type": "llama"}, "no image token id"),
        ({"model_type": "mllama", "image_token_index": 5}, "cross-attention"),
    ):
        folder = tmp_path / config["model_type"]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            plan(open_checkpoint(folder), **NUMBERS)


def test_another_way_to_generate_is_not_replaced(folders: Any, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folders("llava"), tmp_path / "own")
    (tmp_path / "own/custom_generate").mkdir()
    (tmp_path / "own/custom_generate/generate.py").write_text("def generate(model, **kwargs): ...\n")
    with pytest.raises(CheckpointError, match="of its own"):
        plan(open_checkpoint(tmp_path / "own"), **NUMBERS)


def test_warnings_name_what_is_unusual(folders: Any) -> None:
    base = open_checkpoint(folders("llava"))
    assert any("does not hide" in w for w in plan(base, scale=0.0).warnings)
    assert any("alpha1 above 1" in w for w in plan(base, alpha1=1.2, alpha2=1.5, beta=0.3).warnings)
    assert plan(base, **NUMBERS).warnings == ()


def test_stored_patches_of_later_versions_and_with_unknown_keys_are_refused() -> None:
    spec = {"version": 1, **NUMBERS}
    rule, policy, keys = stored_patch(spec)
    assert (policy.alpha1, policy.beta, rule.mode, keys) == (0.5, 0.4, "logit", "id")
    with pytest.raises(SteeringError, match="version 2"):
        stored_patch({**spec, "version": 2})
    with pytest.raises(SteeringError, match="unknown keys in the stored patch: alhpa1"):
        stored_patch({**spec, "alhpa1": 0.5})


def test_the_readme_keeps_what_was_there() -> None:
    spec = {**NUMBERS, "layers": [0, 1, 2, 5], "heads": {"1": [0, 3]}}
    once = readme("# Title\n\ntext\n", spec)
    assert once.startswith("# Title\n\ntext\n\n<!-- surgery:adaptvis -->") and "layers 0-2,5, heads 1:0,3" in once
    assert readme(once, spec) == once and readme("", spec).startswith("<!--")


def test_a_text_prompt_is_answered_unpatched_with_a_warning(folders: Any, tmp_path: Path) -> None:
    from surgery.steering.generate import generate as carried

    tiny = tiny_vlm("llava")
    tiny.model.config.adaptvis = {"version": 1, **NUMBERS}
    inputs = tiny.prompt(images=0)
    with pytest.warns(UserWarning, match="no image token"):
        found = carried(model=tiny.model, **inputs, **HOW)
    del tiny.model.config.adaptvis
    plain = tiny.model.generate(**inputs, **HOW)
    assert same(found, plain)


def test_a_patch_for_some_heads_and_layers_is_stored_in_numbers(folders: Any, tmp_path: Path) -> None:
    out = attach(folders("llava"), tmp_path / "out", scale=0.3, layers="1-2", heads="1:0,2", mode="mass-preserving")
    spec = open_checkpoint(out).config["adaptvis"]
    assert spec["layers"] == [1, 2] and spec["heads"] == {"1": [0, 2]}
    tiny = tiny_vlm("llava")
    inputs = tiny.prompt()
    carried = tiny.model.load_custom_generate(str(out), trust_remote_code=True)
    tiny.model.config.adaptvis = spec
    found = carried(model=tiny.model, **inputs, **HOW)
    del tiny.model.config.adaptvis
    patch = Patch(mode="mass-preserving", layers="1-2", heads="1:0,2")
    wanted, _ = generate(tiny.model, inputs, Policy(0.3, 0.3, 0.0), patch, **HOW)
    assert same(found, wanted)
