"""Image-quality metrics on feature arrays: Frechet distance, Inception score, precision and recall, kernel distance.

Every function takes plain arrays and knows nothing of images, models or files; everything accumulates in float64.
Rows are samples, columns are features. The numbers mean something only beside the number of samples, the extractor
and the sampler that made them: the Frechet distance falls as samples are added, so never set 1 000 samples beside
50 000. Grafting reports all of these on Inception features (arXiv 2506.05340, table 2 and appendix on evaluation).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from surgery.errors import UsageError

Array = NDArray[np.float64]

_CHUNK_ELEMENTS = 1 << 24  # bound on the elements of one block of a pairwise matrix: 128 MiB in float64


# --- Frechet distance -------------------------------------------------------------------------------------------------


def frechet(a: ArrayLike, b: ArrayLike) -> float:
    """Frechet distance between Gaussians fitted to feature sets `[n, d]` and `[m, d]` (the FID on Inception features).

    `|mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a^1/2 S_b S_a^1/2)^1/2)` with the N-1 covariance. The matrix under
    the outer root is symmetric: its eigenvalues are real and no general matrix root is needed. Never negative.
    Raises UsageError when a set has fewer than 2 rows, is not finite, or when the widths differ.
    """
    a, b = _pair(a, b, minimum=2)
    return _frechet_from(_moments(a), _moments(b))


def bootstrap_frechet(
    a: ArrayLike,
    b: ArrayLike,
    n: int = 200,
    seed: int = 0,
    *,
    strata: ArrayLike | None = None,
    resample_reference: bool = False,
) -> tuple[float, float]:
    """A 95 % interval `(low, high)` for `frechet(a, b)`, from `n` resamples of the rows of `b` with replacement.

    Covered: which samples happened to be drawn from the generator. The reference `a` counts as fixed, as it is when two
    models are measured against it, unless `resample_reference`. Not covered: the seeds of training, the choice of
    extractor, and the finite-sample bias of the estimate itself. A resample repeats rows and so lies farther from the
    reference than the set it came from; only the spread of the resamples is used, shifted so that their mean falls on
    the estimate: the interval is about the value other sets of the same size give on average, not about infinite ones.

    `strata` [m]: rows of `b` are redrawn within each of its values only. Pass the classes of images that were generated
    with fixed numbers per class: their shares do not vary, and letting them vary widens the interval several times.
    Raises UsageError as `frechet` does, and for fewer than 20 resamples.
    """
    a, b = _pair(a, b, minimum=2)
    if n < 20:
        raise UsageError(
            "bad-bootstrap", f"{n} resamples cannot bound a 95 % interval", hint="ask for 20 or more; 200 is usual"
        )
    groups = [np.arange(len(b))]
    if strata is not None:
        kinds = np.asarray(strata)
        if kinds.shape != (len(b),):
            raise UsageError(
                "label-count", f"{list(kinds.shape)} strata for {len(b)} samples", hint="give one per sample"
            )
        groups = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
    rng = np.random.default_rng(seed)
    reference = _moments(a)
    root = _psd_root(reference[1])
    estimate = _frechet_from(reference, _moments(b), root=root)
    values = np.empty(n)
    for i in range(n):
        drawn = _moments(b[np.concatenate([rng.choice(rows, len(rows)) for rows in groups])])
        if resample_reference:
            values[i] = _frechet_from(_moments(a[rng.integers(0, len(a), len(a))]), drawn)
        else:
            values[i] = _frechet_from(reference, drawn, root=root)
    low, high = np.quantile(values, [0.025, 0.975]) - values.mean() + estimate
    return max(0.0, float(low)), float(high)


def rank_note(a: ArrayLike, b: ArrayLike) -> str | None:
    """A sentence when a set has no more rows than features, so that its covariance is singular; None otherwise.

    The Frechet distance is still defined then, but is dominated by the bias of small samples.
    """
    a, b = _pair(a, b, minimum=1)
    width, fewest = a.shape[1], min(len(a), len(b))
    if fewest > width:
        return None
    return f"{fewest} samples for {width} features: a covariance is singular, the Frechet distance is strongly biased"


def _moments(x: Array) -> tuple[Array, Array]:
    mean = x.mean(axis=0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def _psd_root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    root: Array = (vectors * np.sqrt(_clean(values))) @ vectors.T
    return root


def _clean(eigenvalues: NDArray[np.floating]) -> Array:
    # Eigenvalues of a positive semi-definite matrix come out as +-1e-17 where they are zero; the square root would
    # turn each into 1e-9, and a singular 2048-wide covariance has many.
    floor = max(0.0, float(eigenvalues.max(initial=0.0))) * len(eigenvalues) * np.finfo(np.float64).eps
    return np.where(eigenvalues > floor, eigenvalues, 0.0)


def _frechet_from(a: tuple[Array, Array], b: tuple[Array, Array], *, root: Array | None = None) -> float:
    root = _psd_root(a[1]) if root is None else root
    inner = root @ b[1] @ root
    cross = np.sqrt(_clean(np.linalg.eigvalsh((inner + inner.T) / 2))).sum()
    shift = a[0] - b[0]
    return max(0.0, float(shift @ shift + np.trace(a[1]) + np.trace(b[1]) - 2 * cross))


# --- Inception score --------------------------------------------------------------------------------------------------


def inception_score(probs: ArrayLike, split_size: int = 5000) -> tuple[float, float]:
    """Mean and (population) standard deviation over splits of `exp(E_x KL(p(y|x) || p(y)))`; `probs` is [n, classes].

    The rows are cut, in order, into `max(1, n // split_size)` nearly equal splits, so no split is a small remainder;
    with one split the deviation is 0 and says nothing. Raises UsageError when a row is no probability distribution.
    """
    p = _features(probs, "the class probabilities", minimum=1)
    if split_size < 1:
        raise UsageError("bad-split", f"a split of {split_size} samples is empty", hint="the usual size is 5000")
    off = np.abs(p.sum(axis=1) - 1)
    if p.min() < 0 or off.max() > 1e-3:
        row = int(off.argmax() if p.min() >= 0 else p.min(axis=1).argmin())
        raise UsageError(
            "bad-probabilities",
            f"row {row} of the class probabilities is not a probability distribution",
            hint="pass softmax outputs, not logits",
        )
    scores = []
    for part in np.array_split(p, max(1, len(p) // split_size)):
        marginal = part.mean(axis=0)
        # 0 log 0 = 0; where the marginal is 0 the whole column is.
        ratio = np.divide(part, marginal, out=np.ones_like(part), where=part > 0)
        scores.append(np.exp((part * np.log(ratio)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


# --- precision and recall ---------------------------------------------------------------------------------------------


def precision_recall(ref: ArrayLike, gen: ArrayLike, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of generated features `[m, d]` against reference features `[n, d]`.

    Precision: the fraction of generated rows inside the ball of at least one reference row, whose squared radius is its
    squared distance to its `k`-th nearest other reference row; recall with the roles exchanged. The bound is inclusive,
    up to rounding.
    Raises UsageError when a set has no more than `k` rows.
    """
    ref, gen = _pair(ref, gen, minimum=1)
    if k < 1:
        raise UsageError("bad-neighbour", f"there is no {k}-th nearest neighbour", hint="the usual k is 3")
    for name, rows in (("reference", ref), ("generated", gen)):
        if len(rows) <= k:
            raise UsageError(
                "too-few-samples",
                f"the {name} set has {len(rows)} samples, too few for {k} neighbours besides itself",
                hint=f"give at least {k + 1} samples",
            )
    # The origin cancels in distances; moving it to the middle keeps the expanded square accurate.
    centre = ref.mean(axis=0)
    real, made = ref - centre, gen - centre
    return _coverage(made, real, _radii(real, k)), _coverage(real, made, _radii(made, k))


def _radii(x: Array, k: int) -> Array:
    out = np.empty(len(x))
    for start, stop in _blocks(len(x), len(x)):
        d2, _ = _squared_distances(x[start:stop], x)
        d2[np.arange(stop - start), np.arange(start, stop)] = np.inf  # a sample is not its own neighbour
        out[start:stop] = np.partition(d2, k - 1, axis=1)[:, k - 1]
    return out


def _coverage(points: Array, centres: Array, radii: Array) -> float:
    inside = 0
    for start, stop in _blocks(len(points), len(centres)):
        d2, rounding = _squared_distances(points[start:stop], centres)
        # Without the slack a tie, or a duplicate on a ball of radius 0, would fall to either side by its last bit.
        inside += int((d2 - 2 * rounding <= radii).any(axis=1).sum())
    return inside / len(points)


def _squared_distances(x: Array, y: Array) -> tuple[Array, Array]:
    """`|x|^2 + |y|^2 - 2xy` for all pairs, and a bound on the rounding error of each."""
    sizes = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)
    return sizes - 2 * (x @ y.T), x.shape[1] * np.finfo(np.float64).eps * sizes


# --- kernel distance --------------------------------------------------------------------------------------------------


def kid(
    a: ArrayLike, b: ArrayLike, subset_size: int = 1000, n_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased MMD^2 over `n_subsets` pairs of random subsets (KID).

    Kernel `(x.y / d + 1)^3`. Subsets are drawn without replacement. Unbiased for independent draws, so it may be
    negative when the sets agree, and unlike the Frechet distance its expectation does not depend on the number of
    samples. Images made with fixed numbers per class are not independent: for few of them it comes out clearly low.
    Raises UsageError when a set is smaller than `subset_size`.
    """
    a, b = _pair(a, b, minimum=2)
    if subset_size < 2 or n_subsets < 1:
        raise UsageError(
            "bad-subsets",
            f"{n_subsets} subsets of {subset_size} samples give no estimate",
            hint="100 of 1000 are usual",
        )
    if subset_size > min(len(a), len(b)):
        raise UsageError(
            "too-few-samples",
            f"a subset of {subset_size} does not fit in sets of {len(a)} and {len(b)} samples",
            hint="ask for smaller subsets, or use the exact estimate",
        )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(n_subsets):
        rows_a = rng.choice(len(a), subset_size, replace=False)
        rows_b = rng.choice(len(b), subset_size, replace=False)
        values.append(_mmd2(a[rows_a], b[rows_b]))
    return float(np.mean(values)), float(np.std(values))


def kid_exact(a: ArrayLike, b: ArrayLike) -> float:
    """The unbiased MMD^2 of the two whole sets, with the kernel of `kid`: no subsets, no randomness.

    `sum_{i!=j} k(a_i,a_j)/(n(n-1)) + sum_{i!=j} k(b_i,b_j)/(m(m-1)) - 2 mean k(a_i,b_j)`, chunked over rows.
    """
    a, b = _pair(a, b, minimum=2)
    return _mmd2(a, b)


def _mmd2(a: Array, b: Array) -> float:
    n, m = len(a), len(b)
    within = _kernel_sum(a, a, diagonal=False) / (n * (n - 1)) + _kernel_sum(b, b, diagonal=False) / (m * (m - 1))
    return float(within - 2 * _kernel_sum(a, b) / (n * m))


def _kernel_sum(x: Array, y: Array, *, diagonal: bool = True) -> float:
    width, total = x.shape[1], 0.0
    for start, stop in _blocks(len(x), len(y)):
        total += float(((x[start:stop] @ y.T / width + 1) ** 3).sum())
    if not diagonal:
        total -= float((((x * x).sum(axis=1) / width + 1) ** 3).sum())
    return total


# --- checks -----------------------------------------------------------------------------------------------------------


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    size = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return ((start, min(rows, start + size)) for start in range(0, rows, size))


def _features(x: ArrayLike, what: str, *, minimum: int) -> Array:
    out = np.asarray(x, dtype=np.float64)
    if out.ndim != 2 or out.shape[1] == 0:
        raise UsageError(
            "bad-features",
            f"{what} have shape {list(out.shape)}, not [samples, features]",
            hint="flatten each sample into one row",
        )
    if len(out) < minimum:
        raise UsageError(
            "too-few-samples",
            f"{what} have {len(out)} samples; at least {minimum} are needed",
            hint="generate or load more samples",
        )
    if not np.isfinite(out).all():
        row = int(np.flatnonzero(~np.isfinite(out).all(axis=1))[0])
        raise UsageError(
            "non-finite-features",
            f"{what} hold NaN or infinite values, first in row {row}",
            hint="look at the images or the extractor that made them",
        )
    return out


def _pair(a: ArrayLike, b: ArrayLike, *, minimum: int) -> tuple[Array, Array]:
    first = _features(a, "the reference features", minimum=minimum)
    second = _features(b, "the generated features", minimum=minimum)
    if first.shape[1] != second.shape[1]:
        raise UsageError(
            "feature-widths",
            f"the reference has {first.shape[1]} features a sample, the generated set {second.shape[1]}",
            hint="extract both with the same extractor",
        )
    return first, second
