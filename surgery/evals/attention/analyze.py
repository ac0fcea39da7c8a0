"""What the attention of plain answers says about a model, after section 4 of AdaptVis (arXiv 2503.01773).

Everything is read from the last prompt row of the unsteered pass: how much of it lies on the picture, whether it lies
on the things that are asked about and whether that goes with right answers, how confidence goes with them, and what is
lost when rows do not see the picture in some layers (attention knock-out).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from surgery.arch.language.load import Loaded
from surgery.data.spatial.items import Item
from surgery.evals.attention.geometry import pictures
from surgery.evals.attention.maps import rows
from surgery.evals.attention.overlap import cosine, covered, inside_share
from surgery.evals.intervals import paired_bootstrap, wilson
from surgery.evals.spatial.evaluate import Asking, ask, encode_items, spellings
from surgery.evals.spatial.metrics import auroc, calibration_error, confidence_bins
from surgery.steering.patch import Patch
from surgery.steering.prefill import Prefill

Report = Callable[[str, Mapping[str, float]], None]
KNOCKED = {"last": "last row", "after-image": "all rows after the picture"}
_SCORES = ("cosine", "inside")


def analyze(
    loaded: Loaded,
    items: Sequence[Item],
    asking: Asking,
    *,
    window: int | None = None,
    knock_out: bool = True,
    seed: int = 0,
    report: Report = lambda event, numbers: None,
) -> dict[str, Any]:
    """The report, as JSON values: `layers` (mass, entropy, overlap and its AUROC), `confidence`, `relations`, `flow`.

    Overlap needs items with boxes and is None without. `window` is the number of layers of a knock-out, by default an
    eighth of them, at least one; windows follow one another. Intervals are 95 %, bootstrapped over items.
    """
    config = loaded.model.config
    count = config.get_text_config(decoder=True).num_hidden_layers
    window = window or max(1, count // 8)
    windows = [(start, min(count, start + window) - 1) for start in range(0, count, window)] if knock_out else []
    seen: list[dict[str, Any]] = []
    for start in range(0, len(items), asking.batch):
        batch = items[start : start + asking.batch]
        answers = ask(loaded, batch, asking)
        inputs = encode_items(loaded, batch, template=asking.template)
        attention = rows(loaded, inputs, 1.0)  # [layers, B, H, K]
        lost = _knocked(loaded, batch, inputs, windows)
        for i, (item, answer) in enumerate(zip(batch, answers, strict=True)):
            look = _look(loaded, inputs, attention[:, i], item, i)
            flow = {name: {w: p[i] for w, p in found.items()} for name, found in lost.items()}
            right = bool(answer["answers"]["base"]["right"])
            seen.append({"right": right, "confidence": answer["confidence"], "gold": item.answer, "flow": flow} | look)
        report("analysis", {"done": len(seen), "n": len(items)})
    return {
        "n": len(seen),
        "accuracy": sum(s["right"] for s in seen) / len(seen),
        "interval": list(wilson(sum(s["right"] for s in seen), len(seen))),
        "with_boxes": sum(s["cosine"] is not None for s in seen),
        "layers": [_layer(seen, layer, seed) for layer in range(count)],
        **_confidence(seen),
        "flow": _flow(seen, windows, seed),
    }


def _look(loaded: Loaded, inputs: Mapping[str, Any], attention: Any, item: Item, i: int) -> dict[str, Any]:
    """Of one sample: per layer mass, entropy and overlap. `attention` is [layers, H, K]."""
    ids = inputs["input_ids"][i].cpu().numpy()
    image = ids == loaded.model.config.image_token_id
    mask = inputs["attention_mask"][i].cpu().numpy().astype(bool) if "attention_mask" in inputs else image | True
    on = attention[:, :, image].astype(np.float64)  # [layers, H, I]
    mass = on.sum(-1)
    inner = on / np.maximum(mass[..., None], 1e-30)
    entropy = -(inner * np.log(np.maximum(inner, 1e-30))).sum(-1) / math.log(max(2, int(image.sum())))
    n_image, n_all = int(image.sum()), int(mask.sum())
    found: dict[str, Any] = {
        "mass": mass.mean(1).tolist(),
        "entropy": entropy.mean(1).tolist(),
        "image_tokens": n_image,
        "tokens": n_all,
        "cosine": None,
        "inside": None,
    }
    if item.boxes and len(item.images) == 1:
        size = _size(item)
        one = {k: v[i : i + 1] for k, v in inputs.items() if k in ("input_ids", "image_sizes", "image_grid_thw")}
        where = pictures(loaded.model.config, loaded.processor, one, [size])[0]
        cover = covered(where, [box for _, box in item.boxes])
        maps = attention[:, :, where.keys].astype(np.float64).mean(1)
        found["cosine"] = [cosine(a, cover) for a in maps]
        found["inside"] = [inside_share(a, cover) for a in maps]
        found["uniform"] = float(cover.mean())
    return found


def _size(item: Item) -> tuple[int, int]:
    from surgery.evals.vqa.rows import Picture

    width, height = Picture(item.id, item.images[0]).open().size
    return int(width), int(height)


def _layer(seen: Sequence[Mapping[str, Any]], layer: int, seed: int) -> dict[str, Any]:
    mass = np.array([s["mass"][layer] for s in seen])
    share = np.array([s["image_tokens"] / s["tokens"] for s in seen])
    boxed = [s for s in seen if s["cosine"] is not None]
    row: dict[str, Any] = {
        "layer": layer,
        "image_mass": float(mass.mean()),
        "image_share_of_tokens": float(share.mean()),
        # How many times more attention a text token gets than an image token.
        "text_to_image_per_token": float(np.mean((1 - mass) / (1 - share) / np.maximum(mass / share, 1e-12))),
        "entropy": float(np.mean([s["entropy"][layer] for s in seen])),
    }
    for score in _SCORES:
        values = [s[score][layer] for s in boxed]
        right = [s["right"] for s in boxed]
        row[score] = float(np.mean(values)) if values else None
        row[f"{score}_auroc"] = auroc(values, right) if values else None
        row[f"{score}_auroc_interval"] = _auroc_interval(values, right, seed)
    row["inside_if_uniform"] = float(np.mean([s["uniform"] for s in boxed])) if boxed else None
    return row


def _auroc_interval(values: Sequence[float], right: Sequence[bool], seed: int, draws: int = 400) -> list[float] | None:
    """Percentile interval over items drawn with replacement; None where one class is empty or nearly so."""
    if min(sum(right), len(right) - sum(right)) < 2:
        return None
    rng = np.random.default_rng(seed)
    scores, labels = np.asarray(values), np.asarray(right)
    found = []
    for _ in range(draws):
        chosen = rng.integers(len(scores), size=len(scores))
        value = auroc(scores[chosen].tolist(), labels[chosen].tolist())
        if value is not None:
            found.append(value)
    return [float(v) for v in np.quantile(found, [0.025, 0.975])]


def _confidence(seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sure, right = [float(s["confidence"]) for s in seen], [bool(s["right"]) for s in seen]
    bins = confidence_bins(sure, right)
    for b in bins:
        b["interval"] = list(wilson(round(b["accuracy"] * b["n"]), b["n"])) if b["n"] else None
    relations = {}
    for gold in sorted({s["gold"] for s in seen}):
        mine = [s for s in seen if s["gold"] == gold]
        relations[gold] = {
            "n": len(mine),
            "confidence": float(np.mean([s["confidence"] for s in mine])),
            "accuracy": sum(s["right"] for s in mine) / len(mine),
            "interval": list(wilson(sum(s["right"] for s in mine), len(mine))),
        }
    found = {"auroc": auroc(sure, right), "ece": calibration_error(sure, right), "mean": float(np.mean(sure))}
    return {"confidence": found | {"bins": bins}, "relations": relations}


def _knocked(
    loaded: Loaded, items: Sequence[Item], inputs: Mapping[str, Any], windows: Sequence[tuple[int, int]]
) -> dict[str, dict[Any, list[float]]]:
    """{rows: {window: probability of the right answer of each sample}}, None as window for nothing knocked out."""
    found: dict[str, dict[Any, list[float]]] = {}
    if not windows:
        return found
    gold = [[spellings(loaded.tokenizer, item.answer)[0]] for item in items]
    with Prefill(loaded.model, inputs, tokenizer=loaded.tokenizer) as run:
        plain = _p(run.option_scores(run.logits, gold))
        for name in KNOCKED:
            found[name] = {None: plain}
            for window in windows:
                patch = Patch(mode="knock-out", layers=f"{window[0]}-{window[1]}", rows=name)
                found[name][window] = _p(run.option_scores(run.steered(1.0, patch), gold))
    return found


def _p(scores: Sequence[Sequence[float]]) -> list[float]:
    return [math.exp(row[0]) for row in scores]


def _flow(seen: Sequence[Mapping[str, Any]], windows: Sequence[tuple[int, int]], seed: int) -> list[dict[str, Any]]:
    """Per rows and window: the mean probability of the right answer before and after, the drop and its interval."""
    out = []
    for name in KNOCKED if windows else ():
        before = [s["flow"][name][None] for s in seen]
        for window in windows:
            after = [s["flow"][name][window] for s in seen]
            drop = [b - a for b, a in zip(before, after, strict=True)]
            low, high = paired_bootstrap(drop, samples=2000, seed=seed)
            out.append(
                {"rows": name, "layers": list(window), "before": float(np.mean(before)), "after": float(np.mean(after))}
                | {"drop": float(np.mean(drop)), "interval": [low, high]}
            )
    return out


def per_layer_csv(result: Mapping[str, Any]) -> str:
    """The layers as comma-separated values, a line a layer; what is unknown is empty."""
    names = [k for k in result["layers"][0] if not k.endswith("_interval")]
    extra = [f"{s}_auroc_{end}" for s in _SCORES for end in ("low", "high")]
    lines = [",".join([*names, *extra])]
    for row in result["layers"]:
        cells = [row[n] for n in names]
        for score in _SCORES:
            cells += row[f"{score}_auroc_interval"] or [None, None]
        lines.append(",".join("" if c is None else str(c) if isinstance(c, int) else f"{c:.6g}" for c in cells))
    return "\n".join(lines) + "\n"
