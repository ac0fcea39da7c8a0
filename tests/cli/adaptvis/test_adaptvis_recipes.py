"""The recipes of this corner: what ships was made by them, and the published numbers can be attached."""

from pathlib import Path

from surgery.graph.op import PlanContext
from surgery.graph.recipes.recipe import build_steps
from surgery.graph.recipes.recipe_file import read_recipe
from surgery.ops.table import load_op
from surgery.store.names import open_named

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def test_the_shipped_model_is_made_by_its_recipe() -> None:
    made = open_named("llava-scenes").lineage
    (trained,) = build_steps(read_recipe(RECIPES / "llava_scenes.yaml"), load_op).values()
    assert made is not None and made["steps"][-1]["op"] == trained.name
    assert made["steps"][-1]["params"] == {k: getattr(trained, k) for k in made["steps"][-1]["params"]}
    accuracy = made["steps"][-1]["training"]["accuracy"]
    assert 0.8 < accuracy["two"] < accuracy["one"] < 0.99  # far from chance, and room for a method to move it


def test_the_published_numbers_can_be_attached() -> None:
    (patched,) = build_steps(read_recipe(RECIPES / "adaptvis" / "llava15.yaml"), load_op).values()
    plan = patched.plan(PlanContext(), open_named("llava-scenes"))
    spec = plan.report["spec"]
    assert (spec["alpha1"], spec["alpha2"], spec["beta"], spec["confidence_decimals"]) == (0.5, 1.5, 0.4, 2)
