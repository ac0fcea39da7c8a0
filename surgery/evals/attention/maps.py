"""What the row that answers looks at: attention over the keys of a prompt, per layer and head, at any alpha.

Axes: H heads, K keys (positions of the prompt).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.arch.language.load import Loaded
from surgery.errors import UsageError
from surgery.evals.attention.geometry import Picture
from surgery.evals.spatial.evaluate import stop_tokens
from surgery.steering.generate import Policy, confidences
from surgery.steering.patch import PAPER, Patch
from surgery.steering.prefill import Prefill
from surgery.steering.session import steer

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Look:
    """One prompt under one alpha: attention [layers, H, K] of the last row, the answer, and the probability of its
    first token."""

    alpha: float
    attention: Array
    answer: str
    confidence: float

    def heads(self, layer: int, head: str = "mean") -> Array:
        """[K] of one layer: the mean over heads, their maximum, or one head by its number. Raises UsageError."""
        weights = self.attention[layer]
        if head == "mean":
            return weights.mean(0)
        if head == "max":
            return weights.max(0)
        if not head.isdigit() or int(head) >= len(weights):
            raise UsageError(
                "head", f"head '{head}': not one of the model's", hint=f"mean, max or 0-{len(weights) - 1}"
            )
        return weights[int(head)]


def look(
    loaded: Loaded,
    inputs: Mapping[str, Any],
    alphas: Sequence[float],
    patch: Patch = PAPER,
    *,
    tokens: int = 8,
) -> list[Look]:
    """One prompt (a batch of one) under each alpha. Every layer is traced, steered or not."""
    out = []
    for alpha in alphas:
        attention = rows(loaded, inputs, alpha, patch)[:, 0]
        with Prefill(loaded.model, inputs, patch, tokenizer=loaded.tokenizer) as run:
            logits = run.steered(alpha)
            ids = run.answer(logits, tokens=tokens, stop=stop_tokens(loaded))[0]
            sure = confidences(logits, Policy(1.0, 1.0, 0.0))[0]
        out.append(Look(alpha, attention, loaded.tokenizer.decode(ids, skip_special_tokens=True).strip(), sure))
    return out


def rows(loaded: Loaded, inputs: Mapping[str, Any], alpha: float, patch: Patch = PAPER) -> Array:
    """Attention of the last prompt row of every sample in every layer: [layers, B, H, K]."""
    import torch

    # A second rule that changes nothing touches all layers, so that those which the patch leaves alone are traced too.
    rules = [replace(patch, alpha=alpha), Patch(keys=patch.keys, text=patch.text, alpha=1.0)]
    with torch.no_grad(), steer(loaded.model, rules, inputs=inputs, tokenizer=loaded.tokenizer, trace=True) as run:
        loaded.model(**inputs, use_cache=False)
    count = loaded.model.config.get_text_config(decoder=True).num_hidden_layers
    return np.stack([run.attention(layer).float().cpu().numpy() for layer in range(count)])


def density(picture: Picture, weights: Array, *, smooth: bool = False) -> NDArray[np.float64]:
    """Attention mass per pixel of the original picture, float64 [height, width]: the mass of each token spread over its
    box, grids that overlap added up. Pixels that the model does not see are NaN. `smooth` interpolates between the
    middles of boxes; the mass is then kept only roughly."""
    from surgery.evals.pictures import need

    image = need("PIL.Image")
    width, height = picture.size
    out = np.zeros((height, width))
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    for grid in picture.grids:
        left, top, right, bottom = grid.box
        rows, cols = grid.keys.shape
        per_pixel = weights[grid.keys].astype(np.float64) * rows * cols / ((right - left) * (bottom - top))
        at_x, at_y = (x - left) / (right - left) * cols, (y - top) / (bottom - top) * rows
        inside = ((at_y >= 0) & (at_y < rows))[:, None] & ((at_x >= 0) & (at_x < cols))[None]
        r, c = at_y.astype(int).clip(0, rows - 1), at_x.astype(int).clip(0, cols - 1)
        if smooth:
            grown = image.fromarray(per_pixel.astype(np.float32)).resize(
                (max(1, round(right - left)), max(1, round(bottom - top))), image.Resampling.BICUBIC
            )
            fine = np.clip(np.asarray(grown, dtype=np.float64), 0, None)
            r = ((y - top) / (bottom - top) * fine.shape[0]).astype(int).clip(0, fine.shape[0] - 1)
            c = ((x - left) / (right - left) * fine.shape[1]).astype(int).clip(0, fine.shape[1] - 1)
            per_pixel = fine
        out += np.where(inside, per_pixel[np.ix_(r, c)], 0.0)
    left, top, right, bottom = picture.seen
    unseen = ~(((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None])
    out[unseen] = np.nan
    return out


def mass(weights: Array, keys: Any) -> float:
    """The share of a row's attention that lies on `keys`, positions of [K]."""
    return float(weights[..., keys].sum(-1).mean())
