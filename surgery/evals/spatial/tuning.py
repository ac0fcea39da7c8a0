"""Choosing alpha1, alpha2 and beta from answers under every alpha of a grid, exactly.

Once each item was answered under each alpha, a policy is arithmetic: alpha1's answers where the confidence is below
beta, alpha2's elsewhere. All pairs of alphas and all thresholds are tried, O(|A|²·n) after sorting. ScalingVis (one
alpha) and the plain model (alpha 1) are among them, so on the items that it is tuned on AdaptVis is never worse: only
held-out items say whether it is better, and the report leads with those.

Axes: n items in order of confidence, A alphas.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import UsageError, closest
from surgery.evals.intervals import paired_bootstrap, wilson

OBJECTIVES = ("accuracy", "balanced", "groups")
ABOVE = 1.01  # a threshold that every confidence is below


@dataclass(frozen=True)
class Trial:
    """One item: the confidence of its unsteered first token, and whether it is right under each alpha of the grid."""

    id: str
    confidence: float
    right: tuple[bool, ...]
    gold: str = ""
    group: str = ""


@dataclass(frozen=True)
class Choice:
    """Two alphas, a threshold, and what they reach on the items they were chosen on."""

    alpha1: float
    alpha2: float
    beta: float
    score: float

    def alpha(self, confidence: float) -> float:
        """As the policy of the same numbers: the threshold itself goes to alpha2."""
        return self.alpha1 if confidence < self.beta else self.alpha2


def search(trials: Sequence[Trial], alphas: Sequence[float], objective: str = "accuracy") -> Choice:
    """The best policy on `trials`.

    objective  "accuracy"; "balanced": mean recall of the gold answers; "groups": share of groups that are right as a
               whole (items without a group are their own)

    Among equals: smaller |alpha1 - 1| + |alpha2 - 1|, then the middle of the widest run of equally good thresholds (a
    threshold that sits on a sample overfits). Where both alphas are one, beta is 0. Raises UsageError without items,
    for an unknown objective, and for alphas that repeat or lack 1.
    """
    check_alphas(alphas)
    if not trials:
        raise UsageError("tune", "there are no items to tune on", hint="give more data, or another --val-fraction")
    rows = sorted(trials, key=lambda t: t.confidence)
    scores = _Scores(rows, objective)
    order = sorted(
        ((a, b) for a in range(len(alphas)) for b in range(len(alphas))),
        key=lambda pair: (abs(alphas[pair[0]] - 1) + abs(alphas[pair[1]] - 1), pair),
    )
    best: tuple[float, int, int, list[float]] | None = None
    for low, high in order:
        values = scores.by_cut(low, high) if low != high else [scores.by_cut(low, low)[0]]
        top = max(values)
        if best is None or top > best[0] + 1e-12:
            best = (top, low, high, values)
    assert best is not None
    top, low, high, values = best
    beta = 0.0 if low == high else _middle(rows, values, top)
    return Choice(alphas[low], alphas[high], beta, top)


def fixed(trials: Sequence[Trial], alphas: Sequence[float], objective: str = "accuracy") -> Choice:
    """The best single alpha (ScalingVis); among equals the one nearest to 1. Raises as `search`."""
    check_alphas(alphas)
    rows = sorted(trials, key=lambda t: t.confidence)
    scores = _Scores(rows, objective)
    best = max(range(len(alphas)), key=lambda i: (scores.by_cut(i, i)[0], -abs(alphas[i] - 1), -i))
    return Choice(alphas[best], alphas[best], 0.0, scores.by_cut(best, best)[0])


def answers_right(trials: Sequence[Trial], alphas: Sequence[float], choice: Choice) -> list[bool]:
    """Whether each item is right under a policy whose alphas are in the grid."""
    index = {a: i for i, a in enumerate(alphas)}
    return [t.right[index[choice.alpha(t.confidence)]] for t in trials]


def score(trials: Sequence[Trial], right: Sequence[bool], objective: str = "accuracy") -> float:
    """The objective's value of given outcomes."""
    rows = [Trial(t.id, t.confidence, (r,), t.gold, t.group) for t, r in zip(trials, right, strict=True)]
    return _Scores(rows, objective).by_cut(0, 0)[0]


def cross_fit(
    trials: Sequence[Trial], alphas: Sequence[float], *, folds: int, seed: int, objective: str = "accuracy"
) -> dict[str, list[bool]]:
    """Outcomes of every item under policies tuned without it: {"adapt", "scaling"} -> right. Groups stay together.

    A lucky split shows as a difference between these and the held-out figures. Raises UsageError for fewer than two
    folds or fewer groups than folds.
    """
    import random

    names = list(dict.fromkeys(t.group or t.id for t in trials))
    if not 2 <= folds <= len(names):
        raise UsageError("folds", f"{folds} folds for {len(names)} groups of items", hint="2 to the number of groups")
    random.Random(seed).shuffle(names)
    fold = {name: i % folds for i, name in enumerate(names)}
    outcome: dict[str, list[bool]] = {"adapt": [False] * len(trials), "scaling": [False] * len(trials)}
    for held in range(folds):
        inside = [t for t in trials if fold[t.group or t.id] != held]
        outside = [i for i, t in enumerate(trials) if fold[t.group or t.id] == held]
        for method, choose in (("adapt", search), ("scaling", fixed)):
            choice = choose(inside, alphas, objective)
            for i, right in zip(outside, answers_right([trials[i] for i in outside], alphas, choice), strict=True):
                outcome[method][i] = right
    return outcome


def report(
    validation: Sequence[Trial],
    test: Sequence[Trial],
    alphas: Sequence[float],
    *,
    objective: str = "accuracy",
    folds: int = 5,
    seed: int = 1,
) -> dict[str, Any]:
    """Everything that `surgery adaptvis tune` finds, as JSON values: the chosen policy, single alphas, accuracies of
    all on validation, test and cross-fitted, the rate of the commonest answer, and the paired 95 % interval of the gain
    over the plain model on test items. `verdict` is "gain", "loss" or "no reliable gain".
    """
    chosen, single = search(validation, alphas, objective), fixed(validation, alphas, objective)
    plain = Choice(1.0, 1.0, 0.0, 0.0)
    policies = {"base": plain, "scaling": single, "adapt": chosen}
    out: dict[str, Any] = {
        "objective": objective,
        "alphas": list(alphas),
        "alpha1": chosen.alpha1,
        "alpha2": chosen.alpha2,
        "beta": chosen.beta,
        "scaling": single.alpha1,
        "validation": _figures(validation, alphas, policies, objective),
        "test": _figures(test, alphas, policies, objective) if test else None,
    }
    both = [*validation, *test]
    groups = len({t.group or t.id for t in both})
    if 2 <= folds <= groups:
        outcome = cross_fit(both, alphas, folds=folds, seed=seed, objective=objective)
        outcome["base"] = answers_right(both, alphas, plain)
        out["cross_fit"] = {m: score(both, r, objective) for m, r in outcome.items()}
        differences = [a - b for a, b in zip(map(int, outcome["adapt"]), map(int, outcome["base"]), strict=True)]
        out["cross_fit"]["gain"] = _gain(differences, seed)
    if test:
        base = answers_right(test, alphas, plain)
        for method, choice in (("adapt", chosen), ("scaling", single)):
            right = answers_right(test, alphas, choice)
            out["test"][f"{method}_gain"] = _gain([int(a) - int(b) for a, b in zip(right, base, strict=True)], seed)
        low, high = out["test"]["adapt_gain"]["interval"]
        out["verdict"] = "gain" if low > 0 else "loss" if high < 0 else "no reliable gain"
    else:
        out["verdict"] = "not tested: all items were tuned on"
    return out


def check_alphas(alphas: Sequence[float]) -> None:
    """Raise UsageError unless the grid holds distinct, finite alphas from 0 up, 1 among them."""
    if len(set(alphas)) < len(alphas) or 1.0 not in alphas or not all(math.isfinite(a) and a >= 0 for a in alphas):
        listed = ",".join(f"{a:g}" for a in alphas)
        raise UsageError(
            "alphas",
            f"--alphas {listed}: distinct numbers from 0 up, with 1 (the plain model) among them",
            hint="--alphas 0.5,0.8,1,1.2,1.5,2",
        )


class _Scores:
    """Values of an objective for all thresholds between two alphas; rows are in order of confidence."""

    def __init__(self, rows: Sequence[Trial], objective: str) -> None:
        if objective not in OBJECTIVES:
            raise UsageError("objective", f"no objective '{objective}'", hint=closest(objective, list(OBJECTIVES)))
        self.rows = rows
        # Thresholds fall between different confidences only: cut k sends the first k rows to alpha1.
        between = (k for k in range(1, len(rows)) if rows[k - 1].confidence < rows[k].confidence)
        self.cuts = [0, *between, len(rows)]
        names = [t.group or t.id for t in rows]
        self.groups = names if objective == "groups" else None
        counts: dict[str, int] = {}
        for t in rows:
            counts[t.gold] = counts.get(t.gold, 0) + 1
        one = {g: 1.0 / (len(counts) * n) for g, n in counts.items()}
        self.weights = [one[t.gold] if objective == "balanced" else 1.0 / len(rows) for t in rows]

    def by_cut(self, low: int, high: int) -> list[float]:
        """The value at every cut, `low` and `high` being positions of alphas in the grid."""
        if self.groups is not None:
            return self._groups(low, high)
        # Whole counts where weights are equal, so that equal policies have equal values to the bit.
        equal = len(set(self.weights)) == 1
        unit = 1.0 if equal else None
        gained = [(t.right[low] - t.right[high]) * (unit or w) for t, w in zip(self.rows, self.weights, strict=True)]
        value = math.fsum(t.right[high] * (unit or w) for t, w in zip(self.rows, self.weights, strict=True))
        sums = [value]
        for g in gained:
            value += g
            sums.append(value)
        return [round(sums[k] / len(self.rows) if equal else sums[k], 12) for k in self.cuts]

    def _groups(self, low: int, high: int) -> list[float]:
        assert self.groups is not None
        wrong: dict[str, int] = {}
        for name, t in zip(self.groups, self.rows, strict=True):
            wrong[name] = wrong.get(name, 0) + (not t.right[high])
        whole = sum(n == 0 for n in wrong.values())
        values = [whole]
        for name, t in zip(self.groups, self.rows, strict=True):
            before = wrong[name]
            wrong[name] += (not t.right[low]) - (not t.right[high])
            whole += (wrong[name] == 0) - (before == 0)
            values.append(whole)
        return [values[k] / len(wrong) for k in self.cuts]


def _middle(rows: Sequence[Trial], values: Sequence[float], top: float) -> float:
    """The middle of the widest run of thresholds whose value is `top`. Cut k is any threshold above row k-1's
    confidence and up to row k's; all of them lie in [0, ABOVE]."""
    scores = [t.confidence for t in rows]
    between = [k for k in range(1, len(rows)) if scores[k - 1] < scores[k]]
    starts = [0.0, *(scores[k - 1] for k in between), scores[-1]]
    stops = [scores[0], *(scores[k] for k in between), ABOVE]
    runs: list[list[float]] = []
    last = -2
    for i, value in enumerate(values):
        if value < top - 1e-12:
            continue
        if last == i - 1 and runs:
            runs[-1][1] = stops[i]
        else:
            runs.append([starts[i], stops[i]])
        last = i
    low, high = max(runs, key=lambda run: run[1] - run[0])
    middle = (low + high) / 2
    return middle if middle > low else high  # neighbouring numbers: the upper one still lies in the run


def _figures(
    trials: Sequence[Trial], alphas: Sequence[float], policies: Mapping[str, Choice], objective: str
) -> dict[str, Any]:
    """Accuracy with Wilson's interval of each method, the objective where it is another, counts a single alpha."""
    golds: dict[str, int] = {}
    for t in trials:
        golds[t.gold] = golds.get(t.gold, 0) + 1
    out: dict[str, Any] = {
        "n": len(trials),
        "majority": max(golds.values()) / len(trials),
        "right": {f"{a:g}": sum(t.right[i] for t in trials) for i, a in enumerate(alphas)},
    }
    for method, choice in policies.items():
        right = answers_right(trials, alphas, choice)
        out[method] = {"accuracy": sum(right) / len(right), "interval": list(wilson(sum(right), len(right)))}
        if objective != "accuracy":
            out[method][objective] = score(trials, right, objective)
    low = sum(t.confidence < policies["adapt"].beta for t in trials)
    out["adapt"]["low_confidence"] = low / len(trials)
    return out


def _gain(differences: Sequence[int], seed: int) -> dict[str, Any]:
    return {
        "mean": sum(differences) / len(differences),
        "interval": list(paired_bootstrap(differences, seed=seed)),
        "won": sum(d > 0 for d in differences),
        "lost": sum(d < 0 for d in differences),
    }
