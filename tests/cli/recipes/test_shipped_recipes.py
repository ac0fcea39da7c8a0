"""Every file in recipes/: it can be read and planned, and the cheap ones run as written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.graph.recipes.recipe import build_steps
from surgery.graph.recipes.recipe_file import read_recipe
from surgery.steps import load_step
from surgery.store.checkpoint import open_checkpoint
from surgery.store.names import open_named

Run = Callable[..., Any]
RECIPES = Path(__file__).resolve().parents[3] / "recipes"
FILES = sorted(p.relative_to(RECIPES).as_posix() for p in RECIPES.rglob("*.y*ml"))
# Large models of the hub, which have to be fetched first; their plans on tiny ones are tested with their methods.
FETCHED = {name for name in FILES if name.startswith("vlm-merge/")} | {"adaptvis/llava15.yaml"}


@pytest.fixture(autouse=True)
def no_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is there from the hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_is_read_and_planned(command: Run, tmp_path: Path, name: str) -> None:
    recipe = read_recipe(RECIPES / name)
    ops = build_steps(recipe, load_step)  # of models of the hub too, which cannot be planned here
    assert recipe.steps and len(ops) == len(recipe.steps)
    first = (RECIPES / name).read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 30  # what it makes, and what it costs
    ended = command("plan", RECIPES / name, "--json", "--offline")
    if name in FETCHED:
        assert ended.code == 7 and "Traceback" not in ended.stderr, ended.stderr
        assert any(source in ended.stderr for source in recipe.inputs.values()), ended.stderr
    else:
        assert ended.code == 0, ended.stderr
        rows = json.loads(ended.stdout)["steps"]
        assert {row["name"] for row in rows} == {step.name for step in recipe.steps}
        assert all(row["state"] in ("run", "fused") for row in rows)
        assert all(sum(row["tensors"].values()) or row["op"].startswith("eval-") for row in rows)
    assert not list(tmp_path.iterdir())


def test_the_edits_run_as_written(command: Run, tmp_path: Path) -> None:
    ended = command("run", RECIPES / "edits.yaml")
    assert (ended.code, ended.stdout) == (0, "out/deeper\n"), ended.stderr
    assert len({n.split(".")[1] for n in open_checkpoint(tmp_path / "out/deeper").tensors if "_blocks." in n}) == 8


def test_the_measured_cast_runs_as_written(command: Run, tmp_path: Path) -> None:
    small = ("before.samples=20", "after.samples=20", "before.steps=2", "after.steps=2")
    few = [word for change in small for word in ("--set", change)]
    ended = command("run", RECIPES / "measured_cast.yaml", "--json", *few)
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["half"]["digest"] == found["after"]["report"]["model"] != found["before"]["report"]["model"]
    assert found["before"]["report"]["frechet"] > 0


# Recipes that train, with changes that leave a few steps of each kind; the classifier is small enough as it is.
FEW_STEPS = {
    "digits_classifier.yaml": [],
    "dit_digits.yaml": ["trained.steps=3", "trained.batch=8", "trained.val_every=2"],
    "graft_digits.yaml": ["hyena.samples=32", "hyena.steps=2", "hyena.finetune_steps=2"],
    "llava_scenes.yaml": ["trained.steps=4", "trained.batch=2", "trained.held_out=8", "trained.val_every=2"],
    "coe/tiny.yaml": ["trained.steps=2", "trained.batch=2", "trained.length=16", "trained.held_out=4"],
}


def test_every_recipe_that_trains_is_run() -> None:
    steps = {name: [step.op for step in read_recipe(RECIPES / name).steps] for name in set(FILES) - FETCHED}
    trains = {name for name, ops in steps.items() if any(op.startswith("train-") or op == "graft" for op in ops)}
    assert trains - set(FEW_STEPS) == {"coe/paper_544m.yaml"}  # an hour on an H100


@pytest.mark.parametrize("name", FEW_STEPS)
def test_a_recipe_that_trains_runs_from_end_to_end(command: Run, tmp_path: Path, name: str) -> None:
    words = [word for change in FEW_STEPS[name] for word in ("--set", change)]
    ended = command("run", RECIPES / name, *words, "--json", "-q")
    assert ended.code == 0, ended.stderr
    ((output, row),) = json.loads(ended.stdout).items()
    assert not row["found"] and row["path"] == dict(read_recipe(RECIPES / name).outputs)[output]
    assert command("verify", row["path"]).code == 0
    again = command("run", RECIPES / name, *words)
    assert (again.code, again.stdout) == (0, f"{row['path']}\n") and "already the result" in again.stderr
    ended = command("replay", row["path"], "--to", "again")
    assert ended.code == 0 and "the same" in ended.stderr, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "is_good"),
    [
        ("digits_classifier.yaml", lambda found: found["accuracy"] > 0.97),
        ("coe/tiny.yaml", lambda found: found["val_loss"]["end"] < 0.9 * found["val_loss"]["start"]),
        ("llava_scenes.yaml", lambda found: found["accuracy"]["one"] > 0.92 and found["accuracy"]["two"] > 0.85),
        ("dit_digits.yaml", lambda found: abs(found["val_loss"] / 0.2232 - 1) < 0.03),
    ],
    ids=["classifier", "coe", "scenes", "dit"],
)
def test_what_a_recipe_trains_is_as_good_as_what_is_shipped(
    command: Run, tmp_path: Path, name: str, is_good: Callable[[dict[str, Any]], bool]
) -> None:
    ended = command("run", RECIPES / name, "--json", "-q")
    assert ended.code == 0, ended.stderr
    (row,) = json.loads(ended.stdout).values()
    found = json.loads((tmp_path / row["path"] / "surgery.json").read_text())["steps"][-1]["training"]
    assert is_good(found), found


def test_the_recipe_of_the_shipped_model_is_how_it_was_made() -> None:
    made = open_named("dit-digits").lineage
    recipe = read_recipe(RECIPES / "dit_digits.yaml")
    assert made is not None
    step = made["steps"][-1]
    (trained,) = (op for name, op in build_steps(recipe, load_step).items() if name == "trained")
    assert step["op"] == trained.name
    assert {k: v for k, v in step["params"].items() if k != "data"} == {
        k: getattr(trained, k) for k in step["params"] if k != "data"
    }


@pytest.mark.slow
def test_the_graft_recipe_runs_and_is_found_again(command: Run, tmp_path: Path) -> None:
    path = RECIPES / "graft_digits.yaml"
    first = command("run", path, "-o", "hyena")
    assert (first.code, first.stdout) == (0, "hyena\n"), first.stderr
    training = json.loads((tmp_path / "hyena" / "surgery.json").read_text())["steps"][-1]["training"]
    assert training["val_loss"] < 1.1 * training["val_loss_original"]
    again = command("run", path, "-o", "hyena")
    assert (again.code, again.stdout) == (0, "hyena\n") and "already the result" in again.stderr
    # The command says the same as the recipe, so it finds the same work done.
    same = command(
        "graft", "-r", "attn=hyena-x", "-l", "50%", "dit-digits", "--data", "digits", "--finetune-steps", "200",
        "-o", "by-hand", "--json",
    )  # fmt: skip
    assert json.loads(same.stdout)["digest"] == f"sha256:{open_checkpoint(tmp_path / 'hyena').digest}"
