"""HOST DONOR+ADAPTER is the merge of what `surgery lora apply` makes of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_pairs
from safetensors.torch import load_file

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> vlm_pairs.Pair:
    return vlm_pairs.make_pair(tmp_path_factory.mktemp("pair"), "llava")


@pytest.fixture
def lora(pair: vlm_pairs.Pair, command: Command) -> str:
    """An adapter of the text models: from the base a part of the way to the donor."""
    ended = command("lora", "extract", pair.donor, pair.base, "-r", "4", "-o", "lora", "-q")
    assert ended.code == 0, ended.stderr
    return "lora"


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def apart(one: str | Path, two: str | Path) -> float:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    return max(float((a[n].float() - b[n].float()).abs().max()) for n in a)


WAYS = {
    "linear": [],
    "some layers": ["--layers", "1-2", "--alpha", "0.5"],
    "the donor's tensors": ["--alpha", "0", "--layers", "0-1"],
    "float32": ["--alpha", "0", "--dtype", "float32"],
    "ties": ["--method", "ties"],
    "a kernel": ["--method", "dare_ties", "--density", "0.5", "--seed", "3"],
}


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_of_the_donor_is_in_what_is_merged(
    way: str, lora: str, pair: vlm_pairs.Pair, command: Command
) -> None:
    assert command("lora", "apply", pair.base, lora, "-o", "applied", "-q").code == 0
    options = [*WAYS[way], *(["--base", pair.base] if "--method" in WAYS[way] else [])]
    for donor, out in ((f"{pair.base}+{lora}", "out"), ("applied", "wanted"), (pair.base, "without")):
        ended = command("merge", pair.host, donor, *options, "-o", out)
        assert ended.code == 0, ended.stderr
        if out == "out":
            said = ended.stderr
        elif out == "wanted":  # down to the table of how much arrives
            assert _table(said) == _table(ended.stderr)
    assert apart("out", "wanted") <= (1e-3 if way == "a kernel" else 0.0) < apart("out", "without")
    record = json.loads(Path("out/surgery.json").read_text())
    assert record["steps"][0]["parents"][1:3] == ["base", "lora"] and record["parents"]["lora"]["digest"]
    assert command("verify", "out").code == 0


def _table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.split() and line.split()[0] in ("0", "1", "2", "3")]


def test_every_model_may_have_one(lora: str, pair: vlm_pairs.Pair, command: Command) -> None:
    shutil.copytree(lora, "second")
    settings = json.loads(Path("second/adapter_config.json").read_text())
    Path("second/adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 8}))
    shutil.copytree(pair.donor, "llm")
    for model, adapter, out in (("llm", lora, "host"), (pair.donor, "second", "donor"), (pair.base, "second", "base")):
        assert command("lora", "apply", model, adapter, "-o", out, "-q").code == 0
    options = ["--method", "task-arithmetic", "--layers", "0-1", "--alpha", "0.7"]
    names = [f"llm+{lora}", f"{pair.donor}+second", "--base", f"{pair.base}+second"]
    ended = command("merge", *names, *options, "-o", "out")
    assert ended.code == 0, ended.stderr
    assert command("merge", "host", "donor", "--base", "base", *options, "-o", "wanted", "-q").code == 0
    assert apart("out", "wanted") == 0 < apart("out", "llm")
    page = Path("out/README.md").read_text()
    for row in ("| host | llm |", "| adapter of the host | lora |", "| adapter of the base | second |", "- second"):
        assert row in page, page
    assert command("replay", "out", "--to", "again", "-q").code == 0


def test_it_is_planned_and_told_as_a_recipe(lora: str, pair: vlm_pairs.Pair, command: Command) -> None:
    words = ["merge", pair.host, f"{pair.base}+{lora}", "--layers", "1"]
    ended = command(*words, "--dry-run")
    assert ended.code == 0 and f"donor    {pair.base}+lora  " in ended.stdout, ended.stderr
    assert json.loads(command(*words, "--dry-run", "--json").stdout)["adapters"] == {"donor": "lora"}
    Path("r.yml").write_text(command(*words, "--emit-recipe").stdout)
    assert command("run", "r.yml", "-o", "one").code == 0 and command(*words, "-o", "two").code == 0
    assert apart("one", "two") == 0
    assert json.loads(Path("one/surgery.json").read_text())["steps"] == json.loads(
        Path("two/surgery.json").read_text()
    )["steps"]  # fmt: skip


@pytest.mark.parametrize(
    ("donor", "code", "says"),
    [
        ("{base}+lora+lora", 2, "no model with one adapter"),
        ("+lora", 2, "no model with one adapter"),
        ("lora", 2, "lora: an adapter, no model"),
        ("{base}+{donor}", 2, "no adapter, there is no adapter_config.json"),
        ("{base}+nowhere", 3, "nowhere"),
        ("{host}+lora", 3, "the adapter was trained on another model"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    donor: str, code: int, says: str, lora: str, pair: vlm_pairs.Pair, command: Command
) -> None:
    ended = command("merge", pair.host, donor.format(**vars(pair)), "-o", "out")
    assert ended.code == code and says in ended.stderr, ended.stderr
    assert not Path("out").exists() and "Traceback" not in ended.stderr


def test_a_path_with_a_plus_in_it_is_one_model(pair: vlm_pairs.Pair, command: Command) -> None:
    shutil.copytree(pair.donor, "a+b")
    assert command("merge", pair.host, "a+b", "-o", "out", "-q").code == 0
