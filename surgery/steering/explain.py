"""What steering did to one answer, and whether a checkpoint's patch does what it claims.

Both look at a model that is loaded already and at inputs that its processor made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from surgery.errors import CheckpointError, printable
from surgery.steering.attention import Rule, SteeringError
from surgery.steering.carried import carried_faults
from surgery.steering.generate import Policy, stored_patch
from surgery.steering.generate import generate as patched
from surgery.steering.patch import PAPER, Patch
from surgery.steering.prefill import Prefill
from surgery.steering.session import refusals, steer
from surgery.store.checkpoint import Checkpoint
from surgery.store.record import is_unhashed

_CHECKED = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def explain(
    model: Any,
    inputs: Mapping[str, Any],
    alpha: float | None,
    patch: Patch | Sequence[Patch] = PAPER,
    *,
    tokenizer: Any = None,
    top: int = 5,
) -> dict[str, Any]:
    """Of one prompt: the likeliest first tokens unsteered and under `alpha` (None: the patches' own), each with its
    probability; for every layer the mass of the last row's attention on the steered keys, mean over heads, in the
    unsteered and in the steered run; and what share of the tokens these keys are. JSON values."""
    with Prefill(model, inputs, patch, tokenizer=tokenizer) as prefill:
        keys = torch.stack([a.keys for a in prefill.state.applied]).any(0)
        before, after = prefill.logits[0], prefill.steered(alpha)[0]
    watched = {"alpha": 1.0, "image_mask": keys, "trace": True}  # changes nothing, and sees every layer
    with torch.no_grad(), steer(model, **watched) as unsteered:
        model(**inputs)
    inner = steer(model, patch, alpha=alpha, inputs=inputs, tokenizer=tokenizer)
    with torch.no_grad(), steer(model, **watched) as steered, inner:
        model(**inputs)
    layers = [
        {"layer": n, "before": _mass(unsteered.attention(n), keys), "after": _mass(steered.attention(n), keys)}
        for n in steered.layers
    ]
    return {
        "first": {"before": _likeliest(before, tokenizer, top), "after": _likeliest(after, tokenizer, top)},
        "mass": layers,
        "share": float(keys.float().mean()),
    }


def _mass(weights: torch.Tensor, keys: torch.Tensor) -> float:
    """Of [1, H, K] weights, what lies on keys [1, K], mean over heads."""
    return float(weights[0][:, keys[0].to(weights.device)].sum(-1).mean())


def _likeliest(logits: torch.Tensor, tokenizer: Any, top: int) -> list[list[Any]]:
    p, ids = torch.softmax(logits, -1).topk(min(top, len(logits)))
    words = [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids.tolist()]
    return [[word, value] for word, value in zip(words, p.tolist(), strict=True)]


def patch_of(base: Checkpoint) -> tuple[Rule, Policy, str]:
    """Rule, policy and key selection that a checkpoint carries. Raises CheckpointError for keys, versions or values
    that this version does not know."""
    try:
        return stored_patch(base.config["adaptvis"])
    except (SteeringError, TypeError, ValueError, AttributeError) as err:
        raise CheckpointError(
            "patch",
            f"{base.name}: config.json, adaptvis: {printable(str(err))}",
            hint="attach the patch again, or use the version of surgery that wrote it",
        ) from err


def check_files(base: Checkpoint) -> list[str]:
    """Faults of a patched folder that show without its model: code that is missing or another's, a patch that cannot be
    read, weights that are not the parent's. Raises CheckpointError when it carries no patch."""
    faults = carried_faults(base)
    patch_of(base)
    record = base.lineage
    step = record["steps"][-1] if record else None
    if record is not None and step is not None and step["op"] == "adaptvis-attach":
        parent = next(iter(record["parents"].values()))
        told = [d for d in (record["digest"], parent["digest"]) if not is_unhashed(d)]  # what was digested
        if any(digest != f"sha256:{base.digest}" for digest in told):
            faults.append("the weights are not those of the model that the patch was attached to")
    return faults


def check_answers(base: Checkpoint, model: Any, inputs: Mapping[str, Any]) -> list[str]:
    """Faults of a patch that show when the model answers `inputs`: first-token logits of every alpha of the patch must
    differ from the unpatched ones, switching off must give exactly those, and the folder's own code must do the same as
    ours. The folder's code is run only if it is this version's, byte for byte."""
    spec = dict(base.config["adaptvis"])
    _, policy, _ = patch_of(base)
    with refusals():
        plain = type(model).generate(model, **inputs, **_CHECKED).logits
        off = patched(model=model, adaptvis=False, **inputs, **_CHECKED).logits
        faults = [] if _same(plain, off) else ["switched off, the patch still changes the answer"]
        carried = None if carried_faults(base) else model.load_custom_generate(str(base.root), trust_remote_code=True)
        for name, forced in _branches(spec):
            ours = patched(model=model, **forced, **inputs, **_CHECKED).logits
            acts = _acts(policy, name)
            if acts and torch.equal(ours[0], plain[0]):
                faults.append(f"{name}: the answer is that of the unpatched model")
            if carried is not None and not _same(carried(model=model, **forced, **inputs, **_CHECKED).logits, ours):
                faults.append(f"{name}: the code in the folder answers otherwise than this package")
    return faults


def _branches(spec: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Each alpha of the patch, and what makes a call take it."""
    if spec.get("scale") is not None:
        return [("scale", {})]
    always = {"alpha1": 1.01, "alpha2": 0.0}
    return [(name, {"adaptvis_beta": beta, "adaptvis_tau": None}) for name, beta in always.items()]  # type: ignore[dict-item]


def _acts(policy: Policy, name: str) -> bool:
    """Whether this branch changes anything by definition."""
    return (policy.alpha1 if name in ("scale", "alpha1") else policy.alpha2) != 1.0


def _same(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
