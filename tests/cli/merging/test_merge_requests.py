"""Requests of `surgery merge` that deserve an answer of their own, and what it says when it is done."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_pairs
from safetensors.torch import load_file
from vlm_pairs import Pair

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return vlm_pairs.make_pair(tmp_path_factory.mktemp("mllama"), "mllama")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(a: Path, b: Path) -> set[str]:
    one, two = tensors(a), tensors(b)
    return {n for n in one if not torch.equal(one[n].view(torch.uint8), two[n].view(torch.uint8))}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--density", "0.5"], "--density 0.5: linear keeps every change whole"),
        (["--method", "swap", "--density", "0.5"], "swap keeps every change"),
        (["--base", "BASE", "--method", "sce", "--density", "0.5"], "sce keeps every change"),
        (["--base", "BASE", "--method", "ties", "--alpha", "1.6"], "--alpha 1.6: outside [0, 1]"),
        (["--method", "karcher", "--alpha", "0.5"], "karcher finds its own weights"),
        (["--method", "karcher", "--rounding", "stochastic"], "which rounds to nearest"),
        (["--base", "BASE", "--method", "della", "--compat", "paper"], "--compat paper: della is made by mergekit"),
        (["--method", "karcher", "--arithmetic", "stream"], "karcher is made by mergekit's kernel"),
        (["--method", "karcher", "--numerics", "fast"], "--numerics fast"),
        (["--alpha", ""], "--alpha"),
        (["--method", "passthrough"], "passthrough takes exactly 1 models, not 2"),
        (["--method", "tie"], "'ties'"),
        (["--method", "dare-tie"], "'dare-ties'"),
        (["--layers", "1,,2"], "--layers '1,,2': an empty item is not a layer"),
        (["--include", "embed,head"], "--include embed --include head"),
        (["--layer-map", "0:9"], "layer 9 is out of range, "),
        (["--engine", "kernels"], "--engine kernels is --arithmetic kernels here"),
    ],
)
def test_an_option_without_effect_is_refused(
    args: list[str], says: str, pair: Pair, command: Command, tmp_path: Path
) -> None:
    given = [str(pair.base) if a == "BASE" else a for a in args]
    ended = command("merge", pair.host, pair.donor, *given, "-o", "out")
    assert ended.code == 2 and says in ended.stderr and ended.stdout == "", ended.stderr
    assert not list(tmp_path.iterdir())


def test_two_weights_that_were_both_given_may_be_beyond_one(pair: Pair, command: Command) -> None:
    ends = [
        command("merge", pair.host, pair.donor, "--base", pair.base, "--method", "ties", "--alpha", "1.6", *more, "-q",
                "-o", f"out{n}")
        for n, more in enumerate((["--alpha2", "0.2"], ["--force"]))
    ]  # fmt: skip
    assert [e.code for e in ends] == [0, 0], ends


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_a_base_that_a_kernel_may_have_is_its_base(method: str, pair: Pair, command: Command, tmp_path: Path) -> None:
    """With a base these work on task vectors; the base is no third model."""
    from mergekit.merge_methods import merge_tensors

    ended = command("merge", pair.host, pair.donor, "--base", pair.base, "--method", method, "--alpha", "0.7", "-q",
                    "-o", "out")  # fmt: skip
    assert ended.code == 0, ended.stderr
    name = "layers.1.mlp.up_proj.weight"
    parts = [tensors(pair.base)[f"model.{name}"], tensors(pair.host)[f"language_model.model.{name}"],
             tensors(pair.donor)[f"model.{name}"]]  # fmt: skip
    want = merge_tensors(parts, method, parameters={"weight": [0.7, 1 - 0.7]}, base_index=0, dtype=torch.float32,
                         out_dtype=torch.bfloat16)  # fmt: skip
    assert torch.equal(tensors(tmp_path / "out")[f"language_model.model.{name}"], want)


def test_layers_without_counterpart_are_named_and_gradients_pass_over_them(mllama: Pair, command: Command) -> None:
    ended = command("merge", mllama.host, mllama.donor, "--layers", "1,4", "-o", "out")
    assert ended.code == 2 and "layers 1, 4 are cross-attention" in ended.stderr
    assert "layers with one: 0, 2-3, 5" in ended.stderr
    ended = command("merge", mllama.host, mllama.donor, "--alpha", "1.0,0.7", "--dry-run", "--json")
    plan = json.loads(ended.stdout)
    rows = [(w["layers"], w["host"], w["donor"]) for w in plan["weights"]]
    assert rows == [([0], 1.0, 0.0), ([2], 0.9, 0.1), ([3], 0.8, 0.2), ([5], 0.7, 0.3), ([], 1.0, 0.0)]
    assert "outside layers: host 1 / donor 0" in command(
        "merge", mllama.host, mllama.donor, "--alpha", "1.0,0.7", "--dry-run"
    ).stdout  # fmt: skip
    weights = {t["canonical"]: (t["host"], t["donor"], t["weights"]) for t in plan["tensors"]}
    assert weights["layers.2.mlp.up_proj.weight"] == (
        "language_model.model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", [0.9, 0.1],
    )  # fmt: skip


def test_a_map_of_layers_may_be_a_file(pair: Pair, command: Command, tmp_path: Path) -> None:
    Path("map.json").write_text('{"0": 1, "3": 2}')
    first = command("merge", pair.host, pair.donor, "--layer-map", "map.json", "--force", "-o", "out", "-q")
    assert first.code == 0, first.stderr
    assert {n.split(".")[3] for n in changed(pair.host, tmp_path / "out") if ".layers." in n} == {"0", "3"}
    record = json.loads(Path("out/surgery.json").read_text())
    assert record["steps"][0]["params"]["layer_map"] == "0:1,3:2" and "map.json" not in json.dumps(record)
    name = "language_model.model.layers.3.mlp.up_proj.weight"
    donor = tensors(pair.donor)["model.layers.2.mlp.up_proj.weight"].float()
    want = tensors(pair.host)[name].float() * torch.tensor(0.9) + donor * torch.tensor(1 - 0.9)
    assert torch.equal(tensors(tmp_path / "out")[name], want.bfloat16())
    for bad, code in (("[1, 2]", 2), ("{}", 2), ('{"a": 1}', 2), ("{", 3)):
        Path("bad.json").write_text(bad)
        ended = command("merge", pair.host, pair.donor, "--layer-map", "bad.json", "-o", "none")
        assert ended.code == code and "bad.json" in ended.stderr, ended.stderr
    Path("bad.json").write_text('{"0": 0, "00": 1}')
    ended = command("merge", pair.host, pair.donor, "--layer-map", "bad.json", "-o", "none")
    assert ended.code == 2 and "'0:1' is no new pair" in ended.stderr, ended.stderr
    assert command("merge", pair.host, pair.donor, "--layer-map", "nofile.json").code == 3


def test_a_tied_head_is_not_asked_for(command: Command, tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, "gemma3")
    ended = command("merge", pair.host, pair.donor, "--include", "head", "-o", "out")
    assert ended.code == 2 and "tied to the embeddings" in ended.stderr and "--include embed" in ended.stderr


def test_arguments_the_other_way_round_are_noticed(pair: Pair, command: Command) -> None:
    ended = command("merge", pair.donor, pair.host, "-o", "out")
    assert ended.code == 0 and "the result is a text model; HOST stands first" in ended.stderr
    assert command("merge", pair.donor, pair.host, "-o", "none", "--strict").code == 3


def test_a_model_with_itself_changes_nothing_and_is_not_warned_of(pair: Pair, command: Command, tmp_path: Path) -> None:
    ended = command("merge", pair.host, pair.host, "-o", "out", "--json")
    assert ended.code == 0 and "less than 80 %" not in ended.stderr
    assert all(r["transfer"] is None for r in json.loads(ended.stdout)["measured"]["layers"])
    assert not changed(pair.host, tmp_path / "out")


def test_the_end_says_what_it_took(pair: Pair, command: Command) -> None:
    ended = command("merge", pair.host, pair.donor, "-o", "out")
    assert re.search(r"^done     [\d.]+ KiB in [\d.]+ s, [\d.]+ GB/s, peak memory [\d.]+ MiB$", ended.stderr, re.M)
    spent = json.loads(command("merge", pair.host, pair.donor, "-o", "again", "--json").stdout)["spent"]
    sizes = sum(f.stat().st_size for f in Path("again").iterdir() if f.name != "surgery.json")
    assert spent["bytes"] == sizes and spent["seconds"] > 0 and spent["peak_memory"] > 10 << 20
    assert "done " not in command("merge", pair.host, pair.donor, "-o", "quiet", "-q").stderr


def test_the_record_says_which_layers_got_which_weights(pair: Pair, command: Command) -> None:
    command("merge", pair.host, pair.donor, "--layers", "1-2", "--alpha", "1.0,0.8", "-o", "out", "-q")
    resolved = json.loads(Path("out/surgery.json").read_text())["measured"]["resolved"]
    assert resolved["layers"] == [1, 2] and resolved["prefix"] == "language_model.model."
    assert [(w["layers"], w["host"]) for w in resolved["weights"]] == [([1], 1.0), ([2], 0.8)]


def test_a_missing_base_is_looked_for(pair: Pair, command: Command, tmp_path: Path) -> None:
    """In the records of both, however far back, then in the donor's config, then in its card."""
    shutil.copytree(pair.donor, "plain")
    args = ["--method", "ties", "-o", "out"]
    (tmp_path / "plain/README.md").write_text('---\nlicense: mit\nbase_model:\n  - "org/base-7b"\n---\n# Plain\n')
    assert "plain says that it comes from org/base-7b" in command("merge", pair.host, "plain", *args).stderr
    (tmp_path / "plain/README.md").write_text("---\nbase_model: org/other\n---\n")
    assert "it comes from org/other" in command("merge", pair.host, "plain", *args).stderr
    (tmp_path / "plain/README.md").write_text("base_model: not-in-front-matter\n")
    assert "comes from" not in command("merge", pair.host, "plain", *args).stderr
    config = json.loads((tmp_path / "plain/config.json").read_text())
    (tmp_path / "plain/config.json").write_text(json.dumps(config | {"_name_or_path": "org/named"}))
    assert "it comes from org/named" in command("merge", pair.host, "plain", *args).stderr
    # Two chains of edits from one root.
    for name, source in (("a", pair.base), ("b", "a"), ("c", pair.base)):
        assert command("scale", source, "--by", "1.01", "--only", "*norm*", "-o", name, "-q").code == 0
    ended = command("merge", "b", "c", *args)
    assert ended.code == 2 and "both come from base: --base base" in ended.stderr, ended.stderr


def test_a_base_that_is_not_theirs_is_refused(pair: Pair, command: Command, tmp_path: Path) -> None:
    shutil.copytree(pair.base, "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    args = ["merge", pair.host, pair.donor, "--base", "base", "--method", "task-arithmetic", "-o", "out"]
    ended = command(*args)
    assert ended.code == 3 and "num_attention_heads: host 4, base 8" in ended.stderr, ended.stderr
    assert command(*args, "--force").code == 0


def test_heads_of_other_size_in_equal_shapes_are_refused(pair: Pair, command: Command, tmp_path: Path) -> None:
    """Four heads of 8 over two, and eight heads of 4 over four: every tensor has the same shape in both."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(pair.donor)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 4
    other = transformers.LlamaForCausalLM(config)
    assert not any(other.load_state_dict(tensors(pair.donor)))  # as if it were the same model
    other.to(torch.bfloat16).save_pretrained(tmp_path / "donor")
    ended = command("merge", pair.host, "donor", "-o", "out")
    assert ended.code == 3 and not (tmp_path / "out").exists()
    for said in ("num_attention_heads: host 4, donor 8", "num_key_value_heads: host 2, donor 4", "head_dim: host 8"):
        assert said in ended.stderr


def test_a_share_of_a_layer_that_is_not_there_is_refused(pair: Pair, command: Command) -> None:
    Path("shares.yml").write_text("layers: {4: 0.95}\n")
    ended = command("merge", pair.host, pair.donor, "--alpha", "@shares.yml", "-o", "out")
    assert ended.code == 2 and "layer 4 is out of range, the tower has 4 layers (0-3)" in ended.stderr
