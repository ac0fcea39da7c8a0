"""Stage 2: what it optimises, that a resumed run ends in the same bits, and that it refuses what cannot work."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_dits import COSINE_V, dit_config, fresh_dit

from surgery.arch.dit.diffusion import heldout_loss
from surgery.data.images import ImageSet
from surgery.errors import CheckpointError, NonFiniteLoss, UsageError
from surgery.train.finetune import FinetuneSettings, finetune
from surgery.train.optim import BatchOrder, Ema, learning_rate

CONFIG = dit_config(layers=2, size=4, classes=3)
SCHEDULE = COSINE_V

pytestmark = pytest.mark.usefixtures("one_thread")


def _images(n: int = 40, size: int = 4) -> ImageSet:
    labels = torch.arange(n) % 3
    noise = torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(0))
    images = (labels.view(-1, 1, 1, 1) - 1 + 0.1 * noise).clamp(-1, 1)
    return ImageSet(images, labels, 3, "blobs", torch.arange(0, n, 5), f"blobs-{n}-{size}")


def _settings(**change: object) -> FinetuneSettings:
    base = {"steps": 12, "batch": 8, "lr": 1e-3, "warmup": 3, "ema": 0.9, "save_every": 4, "val_every": 4}
    return FinetuneSettings(**(base | change))  # type: ignore[arg-type]


def _equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class _Stopped(Exception):
    pass


def _stop_at(step: int) -> "object":
    def report(event: str, numbers: Mapping[str, float]) -> None:
        assert event == "stage2" and numbers["steps"] == 12
        if numbers["step"] >= step:
            raise _Stopped

    return report


def test_the_same_run_gives_the_same_bits_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    one = finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings())
    assert _equal(one.ema, two.ema) and _equal(one.raw, two.raw) and one.history == two.history
    assert torch.equal(before, torch.get_rng_state())
    other = finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings(seed=1))
    assert not _equal(one.raw, other.raw)


@pytest.mark.parametrize("stop", [5, 9, 11])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, stop: int) -> None:
    whole = finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings())
    with pytest.raises(_Stopped):
        finetune(
            fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings(), resume_folder=tmp_path, report=_stop_at(stop)
        )
    steps: list[float] = []
    resumed = finetune(
        fresh_dit(CONFIG, seed=0),
        _images(),
        SCHEDULE,
        _settings(),
        resume_folder=tmp_path,
        report=lambda _, numbers: steps.append(numbers["step"]),
    )
    assert steps[0] == (stop // 4) * 4 + 1
    assert _equal(whole.ema, resumed.ema) and _equal(whole.raw, resumed.raw) and whole.history == resumed.history


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings(), resume_folder=tmp_path)
    for model, images, settings in (
        (fresh_dit(CONFIG, seed=1), _images(), _settings()),
        (fresh_dit(CONFIG, seed=0), _images(30), _settings()),
        (fresh_dit(CONFIG, seed=0), _images(), _settings(lr=2e-3)),
    ):
        with pytest.raises(CheckpointError, match="other weights, images or settings"):
            finetune(model, images, SCHEDULE, settings, resume_folder=tmp_path)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "finetune.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a finetuning state"):
        finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings(), resume_folder=tmp_path)


def test_training_lowers_the_held_out_loss_and_reports_the_ema_s() -> None:
    images, model = _images(), fresh_dit(CONFIG, seed=0)
    before, _ = heldout_loss(model, SCHEDULE, *images.val, seed=0, n_draws=4)
    result = finetune(model, images, SCHEDULE, _settings(steps=150, lr=3e-3, val_every=50))
    model.load_state_dict(result.ema)
    after, _ = heldout_loss(model, SCHEDULE, *images.val, seed=0, n_draws=4)
    assert after < 0.8 * before and result.val == after
    assert [h["step"] for h in result.history if "val" in h] == [50, 100, 150]
    assert not model.training


def test_zero_steps_return_the_model_unchanged() -> None:
    model = fresh_dit(CONFIG, seed=0)
    want = {k: v.clone() for k, v in model.state_dict().items()}
    result = finetune(model, _images(), SCHEDULE, _settings(steps=0))
    assert _equal(result.ema, want) and _equal(result.raw, want) and result.history == [] and result.val is None


def test_the_unconditional_row_is_trained() -> None:
    """The null label's embedding changes in every block, which the model's own per-block dropout would not ensure."""
    model = fresh_dit(CONFIG, seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items() if "embedding_table" in k}
    result = finetune(model, _images(), SCHEDULE, _settings(label_dropout=0.5))
    assert len(before) == 2 and all((result.raw[k][3] != v[3]).all() for k, v in before.items())
    kept = finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings(label_dropout=0.0))
    assert all(torch.equal(kept.raw[k][3], v[3]) for k, v in before.items())


def test_distillation_pulls_a_damaged_copy_back_to_its_teacher() -> None:
    teacher, student = fresh_dit(CONFIG, seed=0), fresh_dit(CONFIG, seed=0)
    with torch.no_grad():
        student.proj_out_2.weight.mul_(0.5)
    result = finetune(
        student, _images(), SCHEDULE, _settings(steps=60, lr=5e-3, loss="distill", warmup=0), teacher=teacher
    )
    losses = [h["loss"] for h in result.history]
    assert losses[-1] < 0.2 * losses[0]


def test_both_is_the_sum_of_the_two_losses() -> None:
    first = {}
    for loss in ("diffusion", "distill", "both"):
        settings = _settings(steps=1, loss=loss, distill_weight=0.5, val_every=0)
        result = finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, settings, teacher=fresh_dit(CONFIG, seed=1))
        first[loss] = result.history[0]["loss"]
    assert first["both"] == pytest.approx(first["diffusion"] + 0.5 * first["distill"], rel=1e-6)


def test_distilling_without_a_teacher_is_refused() -> None:
    with pytest.raises(UsageError, match="teacher"):
        finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings(loss="both"))


def test_a_non_finite_loss_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    model = fresh_dit(CONFIG, seed=0)

    def poison(event: str, numbers: Mapping[str, float]) -> None:
        if numbers["step"] == 10:
            with torch.no_grad():
                model.proj_out_2.bias.fill_(float("nan"))

    with pytest.raises(NonFiniteLoss, match="step 11.*step 8, is kept") as caught:
        finetune(model, _images(), SCHEDULE, _settings(), resume_folder=tmp_path, report=poison)
    assert caught.value.status == 9
    resumed = finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings(), resume_folder=tmp_path)
    assert _equal(resumed.raw, finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings()).raw)


def test_an_absurd_rate_ends_in_a_non_finite_loss_not_in_bad_weights() -> None:
    with pytest.raises(NonFiniteLoss, match="no state was kept"):
        finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings(steps=40, lr=1e30, warmup=0, val_every=0))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1},
        {"batch": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"schedule": "step"},
        {"loss": "l1"},
        {"ema": 1.0},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        _settings(**change)


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="sample_size"):
        finetune(fresh_dit(CONFIG, seed=0), _images(size=8), SCHEDULE, _settings())


def test_weights_that_are_not_float32_are_refused() -> None:
    with pytest.raises(UsageError, match="float32"):
        finetune(fresh_dit(CONFIG, seed=0).bfloat16(), _images(), SCHEDULE, _settings())


def test_the_state_file_holds_no_pickle(tmp_path: Path) -> None:
    from safetensors import safe_open

    finetune(fresh_dit(CONFIG, seed=0), _images(), SCHEDULE, _settings(), resume_folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["finetune.safetensors"]
    with safe_open(tmp_path / "finetune.safetensors", framework="pt") as handle:
        assert json.loads(handle.metadata()["surgery"])["step"] == 8
        assert {k.split("/")[0] for k in handle.keys()} == {"raw", "ema", "exp_avg", "exp_avg_sq", "step"}  # noqa: SIM118


def test_the_rate_warms_up_then_holds_or_falls() -> None:
    constant = [learning_rate(s, peak=1.0, steps=100, warmup=4, curve="constant") for s in range(100)]
    assert constant[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and set(constant[4:]) == {1.0}
    cosine = [learning_rate(s, peak=1.0, steps=100, warmup=0, curve="cosine", floor=0.01) for s in range(101)]
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.505) and cosine[100] == pytest.approx(0.01)


def test_an_epoch_of_batches_holds_every_sample_once() -> None:
    order = BatchOrder(10, 4, seed=0)
    seen = torch.cat([order.indices(s) for s in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10)) and sorted(seen[10:].tolist()) == list(range(10))
    assert torch.equal(BatchOrder(10, 4, seed=0).indices(3), order.indices(3))
    assert len(BatchOrder(3, 8, seed=0).indices(0)) == 8


def test_the_moving_average_is_warmed_up() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    ema, want = Ema([p], 0.5), 0.0
    for step in range(20):
        p.data.fill_(float(step + 1))
        ema.update([p], step)
        decay = min(0.5, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * (step + 1)
    assert float(ema.values[0]) == pytest.approx(want, rel=1e-6)
