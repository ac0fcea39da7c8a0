"""The small LLaVA: planned tensors are those of the real class, training is deterministic and resumes exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from surgery.arch.language.load import load, load_processor
from surgery.arch.tiny_llava import END, IMAGE, TinyLlava, normalise
from surgery.data.spatial.items import Item
from surgery.data.spatial.scenes import WORDS, SceneSettings, ask, draw, place
from surgery.errors import UsageError
from surgery.evals.spatial.evaluate import encode_items
from surgery.graph.run import RunOptions, run_op
from surgery.ops.train_scenes import TrainScenes
from surgery.store.names import open_named
from surgery.train.scenes import SceneTraining, fresh_model, make_batch, rate, train_scenes

SMALL = TinyLlava(WORDS, tower_width=16, width=32, layers=1)
FEW = SceneTraining(steps=4, batch=2, turns=2, save_every=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operation's output after two steps."""
    return run_op(
        TrainScenes(steps=2, batch=2, val_every=0, held_out=10), [], tmp_path_factory.mktemp("scenes") / "out"
    ).path


def test_the_folder_loads_strictly_with_its_processor(trained: Path, tmp_path: Path) -> None:
    loaded = load(open_named(str(trained)))
    Image.fromarray(draw((), SceneSettings(), np.random.default_rng(0))).save(tmp_path / "p.png")
    item = Item("0", (tmp_path / "p.png",), "Where in the picture is the ring?", ("left", "right"), "left")
    inputs = encode_items(loaded, [item])
    assert int((inputs["input_ids"] == IMAGE).sum()) == 36
    assert loaded.tokenizer.convert_ids_to_tokens(int(inputs["input_ids"][0, -1])) == "ring"
    assert loaded.model(**inputs).logits.shape[-1] == len(SMALL.vocabulary)


def test_the_processor_makes_the_pixels_that_training_made(trained: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    made = load_processor(open_named(str(trained))).image_processor(Image.fromarray(pixels), return_tensors="pt")
    assert torch.equal(made["pixel_values"][0], normalise(torch.from_numpy(pixels).float()))


def test_targets_stand_where_the_answer_is_said() -> None:
    batch = make_batch(0, SMALL, SceneSettings(), FEW)
    word = SMALL.vocabulary
    for ids, answers, patches in zip(batch.ids, batch.answers, batch.patches, strict=True):
        at = (answers != -100).nonzero().flatten().tolist()
        assert [int(answers[i]) for i in at] == [int(ids[i + 1]) for i in at] and len(at) == 4
        assert [int(answers[i]) for i in at][1::2] == [END, END]
        assert {word[int(p)] for p in patches[:36]} <= {*WORDS[:6], "nothing"} and (patches[36:] == -100).all()


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def run(steps: int, folder: Path | None) -> torch.nn.Module:
        model = fresh_model(SMALL, seed=1)
        plan = SceneTraining(**{**vars(FEW), "steps": steps})
        train_scenes(model, SMALL, SceneSettings(), plan, resume_folder=folder)
        return model

    whole = run(4, None)

    class Stop(Exception): ...

    def stop(event: str, numbers: dict) -> None:
        if numbers["step"] == 3:
            raise Stop

    first = fresh_model(SMALL, seed=1)
    with pytest.raises(Stop):
        train_scenes(first, SMALL, SceneSettings(), FEW, report=stop, resume_folder=tmp_path)
    resumed = run(4, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [rate(s, peak=1.0, steps=100, warmup=10) for s in range(101)]
    assert rates[0] == 0.1 and set(rates[9:71]) == {1.0} and rates[100] == pytest.approx(0.02)


def test_plans_need_no_weights_and_refuse_nonsense() -> None:
    from surgery.graph.op import PlanContext

    plan = TrainScenes().plan(PlanContext())
    assert sum(int(np.prod(e.shape)) for e in plan.entries) == 178_416
    with pytest.raises(UsageError):
        TrainScenes(steps=0).plan(PlanContext())
    with pytest.raises(UsageError):
        TrainScenes(single=1.5).plan(PlanContext())


def test_a_question_of_each_kind_is_asked() -> None:
    things = place(np.random.default_rng(5), SceneSettings(objects=(3, 3)))
    assert any(ask(t, None, 96) for t in things) and any(ask(a, b, 96) for a in things for b in things if a is not b)


def test_run_options_reach_the_trainer(tmp_path: Path) -> None:
    op = TrainScenes(steps=1, batch=1, val_every=0, held_out=4)
    one = run_op(op, [], tmp_path / "a", options=RunOptions(seed=1))
    two = run_op(op, [], tmp_path / "b", options=RunOptions(seed=1))
    other = run_op(op, [], tmp_path / "c", options=RunOptions(seed=2))
    assert one.record["digest"] == two.record["digest"] != other.record["digest"]
