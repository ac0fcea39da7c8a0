"""`surgery coe` as people run it: what it makes, says, refuses, and takes back to the byte."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_errors import said_one_error
from tiny_moe import FIELDS, save_moe

from surgery.arch.moe.families import FAMILIES
from surgery.store.checkpoint import open_checkpoint
from surgery.store.header import plan_header, read_header

Run = Callable[..., Any]


def test_append_is_exact_and_says_so(command: Run, moe: Path) -> None:
    ended = command("coe", moe, "-C", "2", "--mode", "append", "-o", "coe")
    assert ended.code == 0 and ended.stdout == "coe\n"
    assert "function: bit-exact" in ended.stderr
    ended = command("verify", "coe")
    assert ended.code == 0, ended.stdout
    record = json.loads(Path("coe/surgery.json").read_text())
    assert record["measured"]["verified"] == "logits"


def test_split_says_how_much_rounding_it_is(command: Run, moe: Path) -> None:
    ended = command("coe", moe, "-o", "coe", "--json")
    facts = json.loads(ended.stdout)["measured"]
    assert facts["function"].startswith("rounding (max ") and facts["max_difference"] < 2e-6


def test_collapse_is_the_exact_inverse(command: Run, moe: Path) -> None:
    assert command("coe", moe, "-C", "2", "-o", "coe", "--verify", "keys").code == 0
    assert command("coe", "coe", "--collapse", "-o", "back").code == 0
    ended = command("diff", moe, "back")
    assert ended.code == 0, ended.stdout
    same = {p.name for p in moe.iterdir()} - {"surgery.json"}
    assert {p.name for p in Path("back").iterdir()} - {"surgery.json"} == same
    for name in same:
        assert (moe / name).read_bytes() == (Path("back") / name).read_bytes(), name


@pytest.mark.parametrize(
    ("kind", "fused"),
    # What a family's checkpoints have on disk, and where it differs the module's own names.
    [*((kind, False) for kind in FIELDS), ("qwen3_moe", True), ("mixtral", True), ("granitemoe", True)],
)
def test_every_family_and_layout_converts_loads_and_collapses(
    kind: str, fused: bool, command: Run, tmp_path: Path
) -> None:
    """Sharded, with names and shapes as Transformers asks for them, and back byte for byte."""
    from transformers.utils import logging

    from surgery.arch.moe.build import model_class

    logging.set_verbosity_error()
    base = save_moe(tmp_path / "base", kind, fused=fused, shard="60KB")
    before = {f.name: f.read_bytes() for f in base.glob("*.safetensors")}
    assert len(before) > 1
    assert command("coe", base, "-C", "3", "-o", "coe", "--verify", "keys").code == 0
    shards = {f.name: f.read_bytes() for f in Path("coe").glob("*.safetensors")}
    extra = shards.pop("model-coe-00001.safetensors")
    assert len(extra) > 0 and shards == before
    _, info = model_class(FAMILIES[kind]).from_pretrained("coe", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert command("coe", "coe", "--collapse", "-o", "back", "--verify", "keys").code == 0
    assert {f.name: f.read_bytes() for f in Path("back").glob("*.safetensors")} == before
    assert Path("back/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert command("diff", base, "back").code == 0


def test_what_is_added_is_small_and_in_one_file(command: Run, moe: Path) -> None:
    assert command("coe", moe, "-C", "2", "-o", "coe", "--verify", "none").code == 0
    files = {p.name for p in Path("coe").iterdir()}
    assert files == {
        "model-00001-of-00001.safetensors",
        "model-coe-00001.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "coe_base_config.json",
        "coe_chain.py",
        "configuration_coe.py",
        "modeling_coe_qwen3_moe.py",
        "surgery.json",
    }
    added = read_header("coe/model-coe-00001.safetensors").tensors
    assert {n.partition(".mlp.")[2]: (s.dtype, s.shape) for n, s in added.items()} == {
        "coe_gates.0.weight": ("F32", (16, 64)),
        "coe_alpha": ("F32", (1, 64)),
        "coe_beta": ("F32", (2, 64)),
    }
    config = json.loads(Path("coe/config.json").read_text())
    assert config["model_type"] == "coe_qwen3_moe" and config["coe_topk"] == [2, 2]


def test_a_dry_run_says_what_it_costs_from_headers_alone(command: Run, moe: Path) -> None:
    ended = command("coe", moe, "-C", "2", "--mode", "append", "--dry-run")
    assert ended.code == 0
    for words in (
        "qwen3_moe  2 of 2 layers converted",
        "K=4 -> C=2 k=4 N=16 (=8 per layer)",
        "adds       6 tensors",
        "routed FLOPs per token 2.00x",
        "function   bit-exact",
        "do not know these models",
    ):
        assert words in ended.stdout, words
    assert command("coe", moe, "--dry-run", "--json").stdout.startswith("{")
    assert not list(Path().iterdir())


def test_hard_links_share_the_bytes_of_the_base(command: Run, moe: Path, tmp_path: Path) -> None:
    shutil.copytree(moe, "base")
    assert command("coe", "base", "-o", "coe", "--link", "hard", "--verify", "none").code == 0
    assert os.path.samefile("base/model.safetensors", "coe/model-00001-of-00001.safetensors")
    assert command("verify", "coe").code == 0
    assert command("coe", "base", "-o", "copied", "--verify", "none").code == 0
    assert not os.path.samefile("base/model.safetensors", "copied/model-00001-of-00001.safetensors")


def test_some_layers_only(command: Run, moe: Path) -> None:
    assert command("coe", moe, "-o", "coe", "--layers", "1").code == 0
    names = read_header("coe/model-coe-00001.safetensors").tensors
    assert {n.split(".")[2] for n in names} == {"1"}


def test_noise_changes_the_function_of_split_and_not_that_of_append(command: Run, moe: Path) -> None:
    ended = command("coe", moe, "-o", "a", "--mode", "append", "--routers", "noise:0.5")
    assert ended.code == 0 and "function: bit-exact" in ended.stderr
    ended = command("coe", moe, "-o", "b", "--routers", "noise:0.5")
    assert ended.code == 0 and "does not keep the function" in ended.stderr and "function: changed (max" in ended.stderr
    gate = open_checkpoint(Path("a")).read("model.layers.0.mlp.coe_gates.0.weight")
    base = open_checkpoint(moe).read("model.layers.0.mlp.gate.weight")
    assert float((gate - base).std() / base.std()) == pytest.approx(0.5, rel=0.1)


def test_sharing_one_router_adds_none(command: Run, moe: Path) -> None:
    ended = command("coe", moe, "-o", "coe", "--routers", "share", "--gate", "scalar")
    assert ended.code == 0 and "function: rounding" in ended.stderr
    shapes = {
        n.partition(".mlp.")[2]: s.shape for n, s in read_header("coe/model-coe-00001.safetensors").tensors.items()
    }
    assert shapes == {"coe_alpha": (1, 1), "coe_beta": (2, 1)}


def test_blocks_past_the_depth_are_left_alone(command: Run, moe: Path) -> None:
    """DeepSeek-V3 ships one more block, for predicting the token after the next, which Transformers does not load."""
    shutil.copytree(moe, "other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert command("coe", "other", "-o", "coe", "--verify", "keys").code == 0
    assert {n.split(".")[2] for n in read_header("coe/model-coe-00001.safetensors").tensors} == {"0"}


# --- bad input (section 7) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("-C", "5", "--mode", "split"), "usage.too-few-experts", ("K=4 cannot be split in 5", "--mode append")),
        (("-C", "0"), "usage.iterations", ()),
        (("--topk-per-iter", "3,2"), "usage.topk", ("sums to 5", "K=4")),
        (("--topk-per-iter", "4"), "usage.topk", ("1 numbers for 2 passes",)),
        (("--topk-per-iter", "x"), "usage.topk", ("not a list",)),
        (("--topk-per-iter", "2,4", "--mode", "append"), "usage.topk", ("first pass",)),
        (("--topk-per-iter", "4,99", "--mode", "append"), "usage.topk", ("16 experts",)),
        (("--mode", "splt"), "usage.bad-option", ("split",)),
        (("--routers", "noise:x"), "usage.bad-option", ("noise:0.01",)),
        (("--routers", "noise:99"), "usage.bad-option", ()),
        (("--gate", "matrix"), "usage.bad-option", ()),
        (("--shared", "none"), "usage.bad-option", ()),
        (("--reselect", "maybe"), "usage.bad-option", ()),
        (("--aux", "x"), "usage.bad-option", ()),
        (("--verify", "x"), "usage.bad-option", ()),
        (("--link", "soft"), "usage.bad-option", ()),
        (("--layers", "7"), "usage.bad-layers", ()),
        (("--mode", "paper"), "usage.not-preserving", ("--i-know-it-changes-the-model",)),
        (("--collapse",), "usage.not-coe", ()),
    ],
)
def test_a_wrong_request_is_one_line(args: tuple[str, ...], code: str, words: Any, command: Run, moe: Path) -> None:
    said_one_error(command("coe", moe, "-o", "out", *args), code, *words)
    assert not Path("out").exists()


def test_few_experts_are_appended_without_being_asked(command: Run, moe: Path) -> None:
    ended = command("coe", moe, "-C", "5", "--dry-run")
    assert ended.code == 0 and "mode append" in ended.stdout


def test_an_output_that_is_there_is_left_alone(command: Run, moe: Path) -> None:
    Path("out").mkdir()
    Path("out/file").touch()
    said_one_error(command("coe", moe, "-o", "out"), "output.exists")


def test_a_chain_is_not_converted_again(command: Run, moe: Path) -> None:
    command("coe", moe, "-o", "coe", "--verify", "none")
    said_one_error(command("coe", "coe", "-o", "out"), "usage.already-coe", "--collapse")


@pytest.mark.parametrize(
    ("kind", "words"), [("phimoe", "sparsemixer"), ("llama4", "scales the expert's input"), ("llama", "supported: ")]
)
def test_models_that_cannot_be_chains_are_refused_with_the_reason(
    kind: str, words: str, command: Run, moe: Path
) -> None:
    shutil.copytree(moe, "other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps({**config, "model_type": kind}))
    ended = command("coe", "other", "-o", "out")
    assert ended.code == 2 and words in ended.stderr


def test_a_model_without_experts_in_any_layer(command: Run, tmp_path: Path) -> None:
    save_moe(tmp_path / "dense", "qwen3_moe", mlp_only_layers=[0, 1])
    said_one_error(command("coe", "dense", "-o", "out"), "usage.no-experts", "no layer has experts")


def test_layers_without_experts_cannot_be_chosen(command: Run, tmp_path: Path) -> None:
    save_moe(tmp_path / "half", "qwen3_moe", mlp_only_layers=[0])
    said_one_error(command("coe", "half", "-o", "out", "--layers", "0"), "usage.layers", "layer 0 has no experts")
    assert command("coe", "half", "-o", "out").code == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"num_experts": 8, "num_local_experts": 8}, "checkpoint.experts-disagree"),
        ({"num_experts_per_tok": 99}, "checkpoint.experts-disagree"),
        ({"num_experts_per_tok": None}, "checkpoint.bad-config"),
    ],
)
def test_a_config_that_disagrees_with_the_names(change: dict[str, Any], code: str, command: Run, moe: Path) -> None:
    shutil.copytree(moe, "other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps({**config, **change}))
    ended = command("coe", "other", "-o", "out")
    said_one_error(ended, code)
    assert ended.code == 3 and not Path("out").exists()


def test_an_expert_that_is_missing(command: Run, moe: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(moe, "other")
    tensors = load_file("other/model.safetensors")
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    save_file(tensors, "other/model.safetensors", metadata={"format": "pt"})
    said_one_error(command("coe", "other", "-o", "out"), "checkpoint.missing-tensor", "experts.7.up_proj")


# --- size ------------------------------------------------------------------------------------------------------------


def test_sixty_gigabytes_convert_without_reading_them(surgery: Run, tmp_path: Path) -> None:
    """A sparse file of the size of Qwen3-30B-A3B: the process never imports torch, and stays below 200 MB."""
    import resource

    h, i, n, depth, vocab = 2048, 768, 128, 48, 151_936
    names = [("model.embed_tokens.weight", (vocab, h)), ("lm_head.weight", (vocab, h)), ("model.norm.weight", (h,))]
    for layer in range(depth):
        lead = f"model.layers.{layer}."
        names += [(f"{lead}self_attn.q_proj.weight", (4096, h)), (f"{lead}self_attn.o_proj.weight", (h, 4096))]
        names += [(f"{lead}self_attn.{x}_proj.weight", (512, h)) for x in "kv"]
        names += [(f"{lead}mlp.gate.weight", (n, h))]
        for e in range(n):
            names += [(f"{lead}mlp.experts.{e}.{x}_proj.weight", (i, h)) for x in ("gate", "up")]
            names += [(f"{lead}mlp.experts.{e}.down_proj.weight", (h, i))]
    header, places = plan_header([(name, "BF16", shape) for name, shape in names], metadata={"format": "pt"})
    big = tmp_path / "big"
    big.mkdir()
    with open(big / "model.safetensors", "wb") as handle:
        handle.write(header)
        handle.truncate(len(header) + sum(count for _, count in places.values()))
    assert (big / "model.safetensors").stat().st_size > 60e9
    config = {
        "model_type": "qwen3_moe", "hidden_size": h, "moe_intermediate_size": i, "num_experts": n,
        "num_experts_per_tok": 8, "num_hidden_layers": depth, "vocab_size": vocab,
    }  # fmt: skip
    (big / "config.json").write_text(json.dumps(config))
    script = (
        "import sys; from surgery.cli.main import main; sys.argv = ['surgery', 'coe', 'big', '-o', 'coe']\n"
        "try: main()\n"
        "finally:\n"
        "    peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
        "    print(peak, 'torch' in sys.modules, file=sys.stderr)"
    )
    import subprocess
    import sys

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0, ended.stderr
    peak, torch_there = ended.stderr.split()[-2:]
    assert int(peak) < 200_000 and torch_there == "False", ended.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
    out = tmp_path / "coe"
    assert sum(f.stat().st_blocks * 512 for f in out.iterdir()) < 100e6
    assert (out / "model-00001-of-00001.safetensors").stat().st_size == (big / "model.safetensors").stat().st_size
