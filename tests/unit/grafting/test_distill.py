"""Stage 1: what is recorded, that every way of feeding it trains the same operator, and how it fails."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_dits import COSINE_V, dit_config, fresh_dit
from torch import nn

from surgery.arch.dit.diffusion import call_model
from surgery.data.images import ImageSet
from surgery.errors import NonFiniteLoss, ResourceError, UsageError
from surgery.train.grafting.capture import Cache, Tap, estimate_bytes, fill, record, record_samples, sources
from surgery.train.grafting.distill import distill
from surgery.train.grafting.operator_store import DistillResult
from surgery.train.grafting.student import DistillSettings, Target, regression_loss
from surgery.train.grafting.workers import run_jobs

CONFIG = dit_config(layers=3, size=8, classes=3)
SCHEDULE = COSINE_V
ATTN, FF = "transformer_blocks.1.attn1", "transformer_blocks.2.ff"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return fresh_dit(CONFIG, seed=0).eval()


@pytest.fixture(scope="module")
def images() -> ImageSet:
    labels = torch.arange(40) % 3
    noise = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = (labels.view(-1, 1, 1, 1) - 1 + 0.1 * noise).clamp(-1, 1)
    return ImageSet(pictures, labels, 3, "blobs", torch.arange(0, 40, 5), "blobs")


def _linear(seed: int) -> nn.Linear:
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        layer.weight.copy_(0.1 * torch.randn(16, 16, generator=generator))
        layer.bias.zero_()
    return layer


def _targets() -> list[Target]:
    gate_a, gate_m = ("transformer_blocks.1.norm1", 1), ("transformer_blocks.2.norm1", 4)
    return [Target(Tap(ATTN, gate=gate_a), _linear(1), "l1"), Target(Tap(FF, gate=gate_m), _linear(2), "l2")]


def _settings(**change: object) -> DistillSettings:
    base = {"samples": 48, "steps": 30, "batch": 16, "lr": 5e-3, "val_samples": 24, "capture": "cache"}
    return DistillSettings(**(base | change))  # type: ignore[arg-type]


def _same(a: Mapping[str, DistillResult], b: Mapping[str, DistillResult]) -> bool:
    return list(a) == list(b) and all(
        a[p].history == b[p].history
        and a[p].rel_err == b[p].rel_err
        and all(torch.equal(v, b[p].state_dict[k]) for k, v in a[p].state_dict.items())
        for p in a
    )


def _sources(images: ImageSet, seed: int = 0, label_dropout: float = 0.1):  # type: ignore[no-untyped-def]
    return sources(images, SCHEDULE, seed=seed, null=3, label_dropout=label_dropout)


@pytest.mark.parametrize("path", [ATTN, FF])
def test_the_recorded_output_is_the_operator_s_on_the_recorded_input(
    teacher: nn.Module, images: ImageSet, path: str
) -> None:
    x_t, t, labels = _sources(images)[0].batch(range(5))
    recorded = record(teacher, [Tap(path)], x_t, t, labels)[path]
    assert recorded["u"].shape == (5, 16, 16)
    with torch.no_grad():
        assert torch.equal(teacher.get_submodule(path)(recorded["u"]), recorded["y"])


def test_recording_changes_neither_the_output_nor_the_hooks(teacher: nn.Module, images: ImageSet) -> None:
    x_t, t, labels = _sources(images)[0].batch(range(5))
    with torch.no_grad():
        before = call_model(teacher, x_t, t, labels)
        record(teacher, [Tap(ATTN)], x_t, t, labels)
        assert torch.equal(call_model(teacher, x_t, t, labels), before)
    assert not teacher.get_submodule(ATTN)._forward_hooks


def test_the_recorded_input_depends_on_the_timestep(teacher: nn.Module, images: ImageSet) -> None:
    x_t, t, labels = _sources(images)[0].batch(range(5))
    one = record(teacher, [Tap(ATTN)], x_t, t, labels)[ATTN]["u"]
    two = record(teacher, [Tap(ATTN)], x_t, 999 - t, labels)[ATTN]["u"]
    assert (one != two).flatten(1).any(1).all()


def test_the_gate_is_the_block_s_own(teacher: nn.Module, images: ImageSet) -> None:
    """h + gate * attn(u) of an adaLN-Zero block, put together from what was recorded."""
    x_t, t, labels = _sources(images)[0].batch(range(3))
    block = "transformer_blocks.1"
    taps = [Tap(ATTN, gate=(block + ".norm1", 1)), Tap(block), Tap(block + ".ff", gate=(block + ".norm1", 4))]
    seen = record(teacher, taps, x_t, t, labels)
    parts = [seen[ATTN], seen[block + ".ff"]]
    total = seen[block]["u"] + sum(part["gate"][:, None] * part["y"] for part in parts)
    assert torch.allclose(total, seen[block]["y"], atol=1e-5)


def test_a_span_of_blocks_is_recorded_with_its_keywords(teacher: nn.Module, images: ImageSet) -> None:
    x_t, t, labels = _sources(images)[0].batch(range(3))
    first, second = teacher.transformer_blocks[0], teacher.transformer_blocks[1]
    tap = Tap("transformer_blocks.0", "transformer_blocks.1", keywords=("timestep", "class_labels"))
    seen = record(teacher, [tap], x_t, t, labels)[tap.path]
    keywords = {"timestep": seen["keyword.timestep"], "class_labels": seen["keyword.class_labels"]}
    assert torch.equal(keywords["timestep"], t) and torch.equal(keywords["class_labels"], labels)
    with torch.no_grad():
        assert torch.equal(second(first(seen["u"], **keywords), **keywords), seen["y"])


def test_samples_are_noised_balanced_and_a_function_of_their_number(images: ImageSet) -> None:
    train, val = _sources(images, label_dropout=0.0)
    x_t, t, labels = train.batch(range(30))
    assert labels.bincount().tolist() == [10, 10, 10] and int(t.min()) < 300 and int(t.max()) > 700
    assert not any((row == x_t).flatten(1).all(1).any() for row in images.images)
    again = train.batch([29, 3])
    assert torch.equal(again[0][1], x_t[3]) and again[1].tolist() == [int(t[29]), int(t[3])]
    assert not torch.equal(val.batch([0])[0], x_t[:1])


def test_some_samples_have_the_null_label(images: ImageSet) -> None:
    labels = _sources(images, label_dropout=0.3)[0].batch(range(300))[2]
    assert 0.2 < float((labels == 3).float().mean()) < 0.4


@pytest.mark.parametrize(
    ("tap", "says"),
    [
        (Tap("transformer_blocks.9.attn1"), "no module"),
        (Tap("transformer_blocks"), "not run"),
        (Tap("transformer_blocks.0.attn1", gate=("transformer_blocks.0.attn1.processor.x", 1)), "no module"),
        (Tap("transformer_blocks.0", keywords=("nothing",)), "no tensor"),
        (Tap("transformer_blocks.0.norm1.emb"), "more than once"),
    ],
)
def test_a_tap_that_records_nothing_sensible_is_refused(
    teacher: nn.Module, images: ImageSet, tap: Tap, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        record_samples(teacher, [tap], _sources(images)[0], [0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_gives_back_any_rows_across_shards(
    teacher: nn.Module, images: ImageSet, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.train.grafting.capture._SHARD_BYTES", 8000)
    train, val = _sources(images)
    tap = Tap(ATTN, keywords=())
    cache = Cache(tmp_path / "c", "k")
    assert not cache.complete
    fill({ATTN: cache}, teacher, [tap], {"train": (train, 30), "val": (val, 4)}, batch=8, dtype=dtype)
    assert cache.complete and len(cache.parts("train")) > 1 and not Cache(tmp_path / "c", "other").complete
    ids = torch.tensor([29, 0, 17, 8, 17])
    want = record_samples(teacher, [tap], train, ids.tolist())[ATTN]
    got = cache.rows("train", ids)
    tolerance = {"atol": 1e-5} if dtype == "float32" else {"rtol": 1e-2, "atol": 1e-2}
    assert all(torch.allclose(got[name], want[name], **tolerance) and got[name].dtype == torch.float32 for name in want)
    written = sum(p.stat().st_size for p in (tmp_path / "c").glob("*.safetensors"))
    estimate = estimate_bytes(teacher, [tap], train, samples=34, dtype=dtype)
    assert estimate < written < 1.2 * estimate


def test_online_and_cached_training_of_the_same_samples_give_the_same_weights(
    teacher: nn.Module, images: ImageSet
) -> None:
    cached = distill(teacher, _targets(), images, SCHEDULE, _settings())
    online = distill(teacher, _targets(), images, SCHEDULE, _settings(capture="online"))
    for path in (ATTN, FF):
        for name, value in cached[path].state_dict.items():
            assert torch.allclose(value, online[path].state_dict[name], atol=1e-5)
        assert cached[path].rel_err == pytest.approx(online[path].rel_err, rel=1e-4)


def test_any_number_of_workers_gives_the_same_bits(teacher: nn.Module, images: ImageSet) -> None:
    one = distill(teacher, _targets(), images, SCHEDULE, _settings(workers=1))
    two = distill(teacher, _targets(), images, SCHEDULE, _settings(workers=2))
    assert _same(one, two)


def test_workers_forked_from_a_parent_with_running_threads_finish(teacher: nn.Module, images: ImageSet) -> None:
    torch.set_num_threads(2)
    a = torch.randn(600, 600, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (a @ a).sum().backward()
    two = distill(teacher, _targets(), images, SCHEDULE, _settings(workers=2))
    assert set(two) == {ATTN, FF} and torch.get_num_threads() == 2


def test_the_error_falls_and_the_best_weights_are_kept(teacher: nn.Module, images: ImageSet) -> None:
    targets = _targets()
    before = {t.path: {k: v.clone() for k, v in t.module.state_dict().items()} for t in targets}
    results = distill(teacher, targets, images, SCHEDULE, _settings(steps=120, capture="online"))
    for target in targets:
        result = results[target.path]
        errors = [h["rel_err"] for h in result.history]
        assert result.rel_err == min(errors) < 0.7 * errors[0]
        assert result.history[0]["step"] == 0 and result.history[-1]["step"] == 120
        assert all(torch.equal(v, before[target.path][k]) for k, v in target.module.state_dict().items())


def test_the_relative_error_is_the_mean_squared_error_over_the_variance(teacher: nn.Module, images: ImageSet) -> None:
    target, settings = _targets()[0], _settings(steps=1, lr=1e-9)
    result = distill(teacher, [target], images, SCHEDULE, settings)[ATTN]
    held_out = record_samples(teacher, [target.tap], _sources(images)[1], range(24))[ATTN]
    with torch.no_grad():
        error = (target.module(held_out["u"]) - held_out["y"]).square().mean() / held_out["y"].var(correction=0)
    assert result.history[0]["rel_err"] == pytest.approx(float(error), rel=1e-4)


def test_gate_weighting_changes_the_training_and_needs_a_gate(teacher: nn.Module, images: ImageSet) -> None:
    plain = distill(teacher, _targets(), images, SCHEDULE, _settings())
    weighted = distill(teacher, _targets(), images, SCHEDULE, _settings(gate_weighted=True))
    assert not torch.equal(plain[ATTN].state_dict["weight"], weighted[ATTN].state_dict["weight"])
    with pytest.raises(UsageError, match="gate"):
        distill(teacher, [Target(Tap(ATTN), _linear(0))], images, SCHEDULE, _settings(gate_weighted=True))


def test_the_settings_choose_the_loss_over_the_target_s(teacher: nn.Module, images: ImageSet) -> None:
    weights = {
        loss: distill(teacher, _targets()[:1], images, SCHEDULE, _settings(loss=loss))[ATTN].state_dict["weight"]
        for loss in ("auto", "l1", "l2", "huber:0.1")
    }
    assert torch.equal(weights["auto"], weights["l1"])
    assert not torch.equal(weights["l1"], weights["l2"]) and not torch.equal(weights["l1"], weights["huber:0.1"])


def test_the_losses_equal_their_definitions() -> None:
    g, f = torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0])
    assert float(regression_loss("l1")(g, f)) == 1.75 and float(regression_loss("l2")(g, f)) == 4.625
    assert float(regression_loss("huber")(g, f)) == pytest.approx((0.125 + 2.5) / 2)
    assert float(regression_loss("huber:2")(g, f)) == pytest.approx((0.125 + 2 * (3 - 1)) / 2)


@pytest.mark.parametrize("loss", ["mse", "huber:0", "huber:x", "huber:", "l1:2", ""])
def test_an_unknown_loss_is_refused(loss: str) -> None:
    with pytest.raises(UsageError):
        _settings(loss=loss)


def test_finished_operators_are_not_trained_again(teacher: nn.Module, images: ImageSet, tmp_path: Path) -> None:
    events: list[str] = []
    one = distill(teacher, _targets()[:1], images, SCHEDULE, _settings(), folder=tmp_path)
    assert not list((tmp_path / "recorded").iterdir())
    both = distill(teacher, _targets(), images, SCHEDULE, _settings(), folder=tmp_path)
    again = distill(
        teacher, _targets(), images, SCHEDULE, _settings(), folder=tmp_path, report=lambda e, _: events.append(e)
    )
    assert _same(again, both) and _same({ATTN: both[ATTN]}, one) and events == []
    other = distill(teacher, _targets(), images, SCHEDULE, _settings(seed=1), folder=tmp_path)
    assert not _same(other, both)


def test_an_interrupted_run_keeps_what_was_finished_and_resumes_to_the_same_bits(
    teacher: nn.Module, images: ImageSet, tmp_path: Path
) -> None:
    whole = distill(teacher, _targets(), images, SCHEDULE, _settings())

    def stop(event: str, numbers: Mapping[str, float]) -> None:
        if event == "stage1" and numbers["operator"] == 1 and numbers["step"] >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(teacher, _targets(), images, SCHEDULE, _settings(), folder=tmp_path, report=stop)
    assert len(list((tmp_path / "operators").iterdir())) == 1
    trained: list[float] = []
    resumed = distill(
        teacher,
        _targets(),
        images,
        SCHEDULE,
        _settings(),
        folder=tmp_path,
        report=lambda event, numbers: trained.append(numbers["operators"]) if event == "stage1" else None,
    )
    assert _same(resumed, whole) and set(trained) == {1}


@pytest.mark.parametrize("capture", ["online", "cache"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_non_finite_loss_is_reported_and_the_best_weights_stay(
    teacher: nn.Module, images: ImageSet, tmp_path: Path, capture: str, workers: int
) -> None:
    settings = _settings(lr=1e30, capture=capture, workers=workers)
    with pytest.raises(NonFiniteLoss, match="transformer_blocks"):
        distill(teacher, _targets(), images, SCHEDULE, settings, folder=tmp_path)
    kept = {p.name for p in (tmp_path / "operators").iterdir()}
    assert [name for name in kept if ".unfinished." in name]
    assert not [name for name in kept if name.startswith(FF) and ".unfinished." not in name]


def test_a_cache_without_room_names_the_estimate(
    teacher: nn.Module, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError, match="GB"):
        distill(teacher, _targets(), images, SCHEDULE, _settings(samples=10**12))


def test_auto_goes_online_above_the_limit(teacher: nn.Module, images: ImageSet) -> None:
    events: set[str] = set()
    for limit, cached in ((0, False), (1 << 30, True)):
        events.clear()
        settings = _settings(capture="auto", cache_limit=limit)
        distill(teacher, _targets(), images, SCHEDULE, settings, report=lambda e, _: events.add(e))
        assert ("capture" in events) == cached


def test_the_same_operator_twice_is_refused(teacher: nn.Module, images: ImageSet) -> None:
    with pytest.raises(UsageError, match="twice"):
        distill(teacher, [*_targets(), _targets()[0]], images, SCHEDULE, _settings())


def test_a_job_that_dies_is_an_error_and_ends_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(ResourceError, match="ended without a word"):
        run_jobs([lambda _: os.kill(os.getpid(), signal.SIGKILL), lambda _: time.sleep(60)], workers=2)
    assert time.monotonic() - started < 10


def test_a_job_s_own_error_is_raised_in_the_parent() -> None:
    def fail(_: object) -> None:
        raise UsageError("bad-thing", "the thing is bad", hint="mend it")

    with pytest.raises(UsageError, match="the thing is bad") as caught:
        run_jobs([fail, fail], workers=2)
    assert caught.value.code == "usage.bad-thing" and caught.value.hint == "mend it"


def test_interrupting_the_parent_kills_the_workers_at_once() -> None:
    pids: list[int] = []

    def job(tell) -> None:  # type: ignore[no-untyped-def]
        tell("pid", {"pid": os.getpid()})
        time.sleep(60)

    def report(_: int, __: str, numbers: Mapping[str, float]) -> None:
        pids.append(int(numbers["pid"]))
        if len(pids) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job, job], workers=2, report=report)
    assert time.monotonic() - started < 10
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
