"""The metrics against closed forms and against definitions written as loops."""

import numpy as np
import pytest

from surgery.errors import UsageError
from surgery.evals.images import metrics


def whitened(n: int, d: int, seed: int) -> np.ndarray:
    """Rows whose sample mean is 0 and whose N-1 covariance is exactly the identity (up to rounding)."""
    x = np.random.default_rng(seed).normal(size=(n, d))
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / (n - 1))).T


@pytest.mark.parametrize("d", [1, 3, 17])
def test_frechet_of_two_gaussians_is_the_closed_form(d: int) -> None:
    a, b = whitened(200, d, 0), 2 * whitened(150, d, 1)
    b[:, 0] += 1
    assert metrics.frechet(a, b) == pytest.approx(1 + d, abs=1e-9)  # N(0, I) against N(e1, 4 I)
    assert metrics.frechet(b, a) == pytest.approx(1 + d, abs=1e-9)


def test_frechet_agrees_with_the_nuclear_norm_of_the_cross_product() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(60, 7)) @ rng.normal(size=(7, 7)), rng.normal(size=(41, 7)) + 0.5
    ca, cb = a - a.mean(0), b - b.mean(0)
    # tr (S_a^1/2 S_b S_a^1/2)^1/2 is the sum of singular values of ca cb^T / sqrt((n-1)(m-1))
    cross = np.linalg.svd(ca @ cb.T, compute_uv=False).sum() / np.sqrt(59 * 40)
    shift = a.mean(0) - b.mean(0)
    expected = shift @ shift + (ca**2).sum() / 59 + (cb**2).sum() / 40 - 2 * cross
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_a_set_with_itself_is_zero_even_when_singular() -> None:
    x = np.random.default_rng(3).normal(size=(20, 64)) * 10
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-7)
    assert "20 samples for 64 features" in str(metrics.rank_note(x, x))
    assert metrics.rank_note(np.eye(5)[:, :3], np.eye(5)[:, :3]) is None


def test_frechet_is_unmoved_by_rotation_and_translation() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(80, 5)), rng.normal(size=(70, 5)) * 1.5
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    assert metrics.frechet(a @ turn + 9, b @ turn + 9) == pytest.approx(metrics.frechet(a, b), rel=1e-9)


def test_the_bootstrap_interval_holds_the_estimate_and_shrinks_with_samples() -> None:
    rng = np.random.default_rng(5)
    a, small, large = rng.normal(size=(400, 4)), rng.normal(size=(60, 4)) + 0.5, rng.normal(size=(1500, 4)) + 0.5
    narrow, wide = metrics.bootstrap_frechet(a, large, 100, 0), metrics.bootstrap_frechet(a, small, 100, 0)
    for (low, high), gen in ((narrow, large), (wide, small)):
        assert low < metrics.frechet(a, gen) < high
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 2
    assert metrics.bootstrap_frechet(a, small, 100, 0) == wide
    both = metrics.bootstrap_frechet(a, large, 100, 0, resample_reference=True)
    assert both[1] - both[0] > narrow[1] - narrow[0]


def test_the_bootstrap_interval_covers_the_mean_over_fresh_sets() -> None:
    rng = np.random.default_rng(6)
    reference = rng.normal(size=(500, 3))
    fresh = [rng.normal(size=(120, 3)) * 1.2 + 0.3 for _ in range(60)]
    mean = np.mean([metrics.frechet(reference, x) for x in fresh])
    hits = sum(low <= mean <= high for low, high in (metrics.bootstrap_frechet(reference, x, 60, 1) for x in fresh))
    assert hits >= 52  # nominal 57 of 60


def test_inception_score_of_one_hot_uniform_is_the_number_of_classes() -> None:
    assert metrics.inception_score(np.tile(np.eye(10), (30, 1))) == pytest.approx((10, 0))
    assert metrics.inception_score(np.full((50, 4), 0.25)) == pytest.approx((1, 0))


def test_inception_score_agrees_with_a_loop_over_splits() -> None:
    rng = np.random.default_rng(7)
    p = rng.dirichlet(np.ones(6), size=100)
    scores = []
    for part in (p[:34], p[34:67], p[67:]):  # 100 // 33 = 3 nearly equal splits
        marginal = part.mean(axis=0)
        kl = [sum(row[c] * np.log(row[c] / marginal[c]) for c in range(6)) for row in part]
        scores.append(np.exp(np.mean(kl)))
    assert metrics.inception_score(p, 33) == pytest.approx((np.mean(scores), np.std(scores)))


def test_inception_score_refuses_logits() -> None:
    with pytest.raises(UsageError, match="probability distribution"):
        metrics.inception_score([[2.0, -1.0], [0.5, 0.5]])
    with pytest.raises(UsageError, match="row 1"):
        metrics.inception_score([[0.5, 0.5], [0.9, 0.9]])


def test_precision_and_recall_of_a_set_with_itself_are_one() -> None:
    x = np.random.default_rng(8).normal(size=(40, 6)) + 100
    assert metrics.precision_recall(x, x) == (1.0, 1.0)
    duplicates = np.repeat(x[:4], 10, axis=0)  # every ball has radius 0
    assert metrics.precision_recall(duplicates, duplicates[::-1]) == (1.0, 1.0)


def test_precision_and_recall_agree_with_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    ref, gen = rng.integers(0, 6, size=(30, 3)).astype(float), rng.integers(2, 9, size=(25, 3)).astype(float)

    def covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
        radii = []
        for i, c in enumerate(centres):
            radii.append(sorted(((c - o) ** 2).sum() for j, o in enumerate(centres) if j != i)[k - 1])
        balls = list(zip(centres, radii, strict=True))
        return float(np.mean([any(((p - c) ** 2).sum() <= r for c, r in balls) for p in points]))

    for k in (1, 3):
        expected = covered(gen, ref, k), covered(ref, gen, k)
        assert metrics.precision_recall(ref, gen, k) == expected
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "_CHUNK_ELEMENTS", 64)
            assert metrics.precision_recall(ref, gen, k) == expected


def test_sets_far_apart_have_no_precision_and_a_collapsed_set_has_no_recall() -> None:
    rng = np.random.default_rng(10)
    ref = rng.normal(size=(50, 4))
    assert metrics.precision_recall(ref, rng.normal(size=(50, 4)) + 50) == (0.0, 0.0)
    precision, recall = metrics.precision_recall(ref, np.tile(ref[:1], (50, 1)))
    assert precision == 1.0
    assert recall == 1 / 50


def test_kid_agrees_with_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    a, b = rng.normal(size=(9, 3)), rng.normal(size=(7, 3)) + 0.2

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((sum(p * q for p, q in zip(x, y, strict=True)) / 3 + 1) ** 3)

    aa = sum(k(a[i], a[j]) for i in range(9) for j in range(9) if i != j) / 72
    bb = sum(k(b[i], b[j]) for i in range(7) for j in range(7) if i != j) / 42
    ab = sum(k(x, y) for x in a for y in b) / 63
    assert metrics.kid_exact(a, b) == pytest.approx(aa + bb - 2 * ab, rel=1e-12)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_CHUNK_ELEMENTS", 16)
        assert metrics.kid_exact(a, b) == pytest.approx(aa + bb - 2 * ab, rel=1e-12)
    mean, std = metrics.kid(a[:7], b, 7, 3, 0)  # a subset of everything is the exact estimate
    assert mean == pytest.approx(metrics.kid_exact(a[:7], b))
    assert std == pytest.approx(0, abs=1e-12)


def test_kid_is_unbiased_whatever_the_number_of_samples() -> None:
    rng = np.random.default_rng(12)
    values = [metrics.kid_exact(rng.normal(size=(12, 4)), rng.normal(size=(10, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    a, b = rng.normal(size=(300, 4)), rng.normal(size=(250, 4)) + 0.7
    mean, std = metrics.kid(a, b, 50, 60, 3)
    assert mean == pytest.approx(metrics.kid_exact(a, b), abs=4 * std / 60**0.5)
    assert metrics.kid(a, b, 50, 60, 3) == (mean, std)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda: metrics.frechet(np.ones((1, 3)), np.ones((5, 3))), "usage.too-few-samples"),
        (lambda: metrics.frechet(np.ones((5, 3)), np.ones((5, 4))), "usage.feature-widths"),
        (lambda: metrics.frechet(np.ones((5, 3)), [[1, np.nan, 2], [1, 2, 3]]), "usage.non-finite-features"),
        (lambda: metrics.frechet(np.ones(5), np.ones((5, 1))), "usage.bad-features"),
        (lambda: metrics.precision_recall(np.ones((3, 2)), np.ones((9, 2))), "usage.too-few-samples"),
        (lambda: metrics.precision_recall(np.ones((9, 2)), np.ones((9, 2)), 0), "usage.bad-neighbour"),
        (lambda: metrics.kid(np.ones((9, 2)), np.ones((4, 2)), 5), "usage.too-few-samples"),
        (lambda: metrics.kid(np.ones((9, 2)), np.ones((4, 2)), 1), "usage.bad-subsets"),
        (lambda: metrics.bootstrap_frechet(np.ones((9, 2)), np.ones((4, 2)), 5), "usage.bad-bootstrap"),
        (lambda: metrics.inception_score(np.ones((4, 1)), 0), "usage.bad-split"),
    ],
)
def test_bad_input_is_refused_with_a_code(call, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.code == code
    assert caught.value.hint
