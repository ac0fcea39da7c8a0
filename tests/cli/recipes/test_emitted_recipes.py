"""`--emit-recipe`: any command of an operation as a recipe, which gives the same result when it is made anew."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_language import save_relative

from surgery.graph.recipes.recipe_file import read_recipe
from surgery.ops.table import OPS

Run = Callable[..., Any]

# Operation -> the words of commands; {name} is a checkpoint of `models`, {scratch} a folder.
COMMANDS: Mapping[str, list[list[str]]] = {
    "init": [["dit-digits", "--seed", "5"], ["qwen3-moe-tiny", "--set", "num_hidden_layers=1", "--dtype", "bfloat16"]],
    "cast": [["--dtype", "bf16", "--except", "*.norm1.*", "dit-digits"]],
    "rename": [["dit-digits", "-r", "/^(pos_embed)\\.(.*)$/=\\1.é'\"${x}\x7f\u2028\ufeff\U0001f600.\\2"]],
    "slice": [["--layers", "0-2", "dit-digits", "--seed", "3"]],
    "extract": [["{llava}", "--prefix", "language_model.=model.", "--config-key", "text_config"]],
    "reshard": [["dit-digits", "--shard-size", "300KB"]],
    "scale": [["dit-digits", "--by", "1e-5", "--only", "*attn1*", "--only", "/norm/"]],
    "graft": [
        ["-r", "attn=hyena:k=4@1", "dit-digits", "--seed", "2"],
        [
            "-r",
            "mlp=r2",
            "-l",
            "0",
            "dit-digits",
            "--data",
            "digits",
            "--samples",
            "16",
            "--steps",
            "2",
            "--lr",
            "2e-4",
        ],
    ],
    "merge": [
        ["{llava}", "{donor}", "--alpha", "1.0,0.9,0.8", "--exclude", "norms"],
        ["{llava}", "{donor}", "--base", "{base}", "--method", "dare-ties", "--seed", "4", "--rounding", "stochastic"],
        ["--config", "{scratch}/one.yml", "--seed", "6"],
        ["--config", "{scratch}/several.yml"],
    ],
    "lora-extract": [["{llama}", "{other}", "--rank", "2", "--only", "*q_proj*", "--only", "*down_proj*"]],
    "lora-apply": [["{other}", "{adapter}"]],
    "coe": [["{moe}", "-C", "2", "--routers", "noise:0.01", "--verify", "keys"], ["{chain}", "--collapse"]],
    "adaptvis-attach": [
        ["llava-scenes", "--alpha1", "0.5", "--alpha2", "1.5", "--beta", "0.4", "--layers", "1-2"],
        ["llava-scenes", "--from", "{scratch}/tuned.json"],
    ],
    "train-coe": [
        ["{chain}", "--gate-steps", "1", "--steps", "1", "--batch", "2", "--length", "16", "--held-out", "4"]
    ],
    "train-diffusion": [["dit-digits", "--data", "digits", "--steps", "2", "--batch", "4", "--val-every", "0"]],
    "train-classifier": [["digits", "--steps", "3", "--batch", "8", "--lr", "1e-3", "--seed", "1"]],
    "train-scenes": [["--steps", "2", "--batch", "2", "--val-every", "0", "--held-out", "8"]],
}
DOCUMENT = (
    "models: [{{model: {llama}, parameters: {{weight: 0.25}}}}, {{model: {other}, parameters: {{weight: 0.5}}}}]\n"
)
CASES = [(op, words) for op, several in COMMANDS.items() for words in several]


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small checkpoints by name, and files that commands read in `scratch`."""
    import surgery

    scratch = tmp_path_factory.mktemp("models")
    found = {"llama": tiny_llama, "llava": tiny_llava, "scratch": scratch}
    found["other"] = surgery.apply("scale", tiny_llama, out=scratch / "other", by=0.9, only=["*_proj*"]).path
    found["donor"] = save_relative(scratch / "donor", tiny_llava)
    found["base"] = save_relative(scratch / "base", tiny_llava, noise=0.02)
    words = {"rank": 2, "only": ["*q_proj*"]}
    found["adapter"] = surgery.apply("lora-extract", tiny_llama, found["other"], out=scratch / "lora", **words).path
    found["moe"] = surgery.apply("init", out=scratch / "moe", arch="qwen3-moe-tiny").path
    found["chain"] = surgery.apply("coe", found["moe"], out=scratch / "chain", iterations=2, verify="keys").path
    one = DOCUMENT.format(**found)
    (scratch / "one.yml").write_text(f"merge_method: linear\ndtype: float32\n{one}")
    (scratch / "several.yml").write_text(
        f"name: first\nmerge_method: linear\ndtype: float32\n{one}---\n"
        f"name: unused\nmerge_method: linear\ndtype: float32\n{one}---\n"
        f"merge_method: passthrough\ndtype: float32\nmodels: [{{model: first}}]\n"
    )
    tuned = {"surgery_tune": 1, "alpha1": 0.5, "alpha2": 1.2, "beta": 0.3, "layers": "0-1"}
    (scratch / "tuned.json").write_text(json.dumps(tuned))
    return found


def test_every_operation_has_a_case() -> None:
    assert set(COMMANDS) == set(OPS)


@pytest.mark.parametrize(("op", "words"), CASES, ids=[f"{op}{n}" for n, (op, _) in enumerate(CASES)])
def test_the_recipe_gives_what_the_command_gives(
    command: Run,
    tmp_path: Path,
    models: dict[str, Path],
    op: str,
    words: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*op.split("-", 1)] + [w.format(**models) if w.startswith("{") else w for w in words]
    emitted = command(*words, "-o", "by recipe", "--emit-recipe")
    assert (emitted.code, emitted.stderr) == (0, "") and sorted(tmp_path.iterdir()) == []
    (tmp_path / "r.yaml").write_text(emitted.stdout)
    ended = command(*words, "-o", "by command", "-q")
    assert ended.code == 0, ended.stderr
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("empty")))  # else it would be copied from there
    ended = command("run", "r.yaml", "--json")
    assert ended.code == 0, ended.stderr
    ((name, row),) = json.loads(ended.stdout).items()
    assert row["path"] == "by recipe" and not row["found"] and row["source"] is None and row["taken"] == 0
    one, two = (json.loads((tmp_path / f"by {n}" / "surgery.json").read_text()) for n in ("command", "recipe"))
    assert one["digest"] == two["digest"] and one["steps"][-1]["key"] == two["steps"][-1]["key"]
    assert one["record"] == two["record"] and one["steps"] == two["steps"]


def test_a_path_that_is_no_text_comes_back(command: Run, tmp_path: Path, tiny_dit: Path) -> None:
    """Of a name with a byte that is not UTF-8; it stands in the recipe as an escape."""
    odd = os.fsdecode(b"caf\xe9 ${x}")
    os.symlink(tiny_dit, tmp_path / odd)
    emitted = command("cast", odd, "--dtype", "bf16", "--emit-recipe")
    (tmp_path / "r.yaml").write_bytes(emitted.stdout.encode("ascii"))
    assert read_recipe(tmp_path / "r.yaml").inputs == {"input1": odd}


def test_options_that_a_recipe_does_not_hold_are_named(command: Run) -> None:
    ended = command("cast", "dit-digits", "--dtype", "bf16", "--threads", "2", "--shard-size", "1MB", "--emit-recipe")
    assert ended.code == 0 and "--threads is said to surgery run" in ended.stderr and "op: reshard" in ended.stderr
    ended = command("reshard", "dit-digits", "--shard-size", "1MB", "--emit-recipe")
    assert ended.code == 0 and ended.stderr == ""
