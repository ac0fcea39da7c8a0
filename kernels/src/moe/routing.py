"""From router logits to (weights, ids): scoring, choice, normalisation, and what a chain adds to it."""

import torch

SCORINGS = ("softmax", "sigmoid", "topk_softmax")


def route(
    logits: torch.Tensor,
    k: int,
    scoring: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    groups: tuple[int, int] | None = None,
    used: torch.Tensor | None = None,
    *,
    base_k: int | None = None,
    penalty: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `k` experts a token and weigh them; differentiable in the logits.

    `logits` [T, N]; returns weights [T, k] fp32 and ids [T, k] int64, the largest weight first. Scores are softmax over
    all experts, sigmoid, or softmax over the chosen logits. `base_k` (default `k`) experts are chosen by score plus
    `bias` [N] (the bias chooses, it never weighs), among the `groups[1]` best of `groups[0]` groups; a group is rated
    by its best score (softmax) or, with sigmoid scores, by the sum of its two best. `normalize` divides by the sum over
    all `base_k`; then everything is multiplied by `scale`. Of these the `k` of largest weight are kept, without further
    normalisation: experts in `used` [T, U] (ids of earlier iterations, -1 for none) are excluded, or lose `penalty` of
    their weight in the comparison. Raises ValueError when fewer than `k` can remain.
    Source: Chain-of-Experts, arXiv 2506.18945, for the chain; DeepSeek-V2 and V3 for groups and bias.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be [tokens, experts], got {tuple(logits.shape)}")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring '{scoring}' is none of {', '.join(SCORINGS)}")
    tokens, experts = logits.shape
    base_k = k if base_k is None else base_k
    if not 1 <= k <= base_k <= experts:
        raise ValueError(f"need 1 <= k <= base_k <= experts, got k={k}, base_k={base_k}, experts={experts}")
    if used is not None and penalty is None and base_k - used.shape[1] < k:
        raise ValueError(f"{used.shape[1]} of {base_k} experts may be used already, which leaves fewer than k={k}")
    logits = logits.float() if logits.dtype != torch.float64 else logits
    score = {"softmax": lambda: logits.softmax(-1), "sigmoid": logits.sigmoid}.get(scoring, lambda: logits)()
    with torch.no_grad():
        choice = score if bias is None else score + bias.to(score.dtype)
        if groups is not None and groups[0] > 1:
            choice = _only_groups(choice, groups, by_two=scoring == "sigmoid")
        chosen = choice.topk(base_k, dim=-1, sorted=False).indices
    weights = score.gather(1, chosen)
    if scoring == "topk_softmax":
        weights = weights.softmax(-1)
    elif normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * scale
    with torch.no_grad():
        key = weights.detach()
        if used is not None and used.shape[1]:
            again = (chosen[:, :, None] == used[:, None, :].to(chosen.dtype)).any(-1)
            key = torch.where(again, torch.full_like(key, -torch.inf) if penalty is None else key - penalty, key)
        kept = key.topk(k, dim=-1).indices
    return weights.gather(1, kept), chosen.gather(1, kept)


def _only_groups(choice: torch.Tensor, groups: tuple[int, int], *, by_two: bool) -> torch.Tensor:
    number, allowed = groups
    tokens, experts = choice.shape
    if experts % number or not 1 <= allowed <= number:
        raise ValueError(f"{experts} experts do not form {number} groups of which {allowed} may be chosen")
    grouped = choice.view(tokens, number, experts // number)
    rating = grouped.topk(min(2, experts // number), dim=-1).values.sum(-1) if by_two else grouped.amax(-1)
    best = rating.topk(allowed, dim=-1, sorted=False).indices
    open_ = torch.zeros_like(rating, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~open_[:, :, None], -torch.inf).flatten(1)
