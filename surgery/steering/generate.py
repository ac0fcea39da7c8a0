"""AdaptVis (arXiv 2503.01773) as a way to generate: look at the first answer's confidence, then steer by it.

The prompt is run once, unsteered. The probability of the first token says how sure the model is of each sample; it
chooses that sample's alpha. In causal models no earlier row depends on the last one, so the last position is taken off
the cache and run again, steered: one decoding step in place of a second prefill, and the image encoder runs once. Where
that is not exact (prefix-LM families, caches that cannot be cropped) the whole prompt is run again.

The pass is a forward hook, so generate's modes, processors and streamers work as always. A copy of this file travels
with patched checkpoints (see attention.py); `generate` below is what transformers calls then.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .attention import MODES, Applied, Rule, Steering, SteeringError, UnsupportedModel, is_active, steering

VERSION = 1
CONFIDENCES = ("max-prob", "option-prob", "margin", "entropy")
# Families whose prompt rows never see the last one, tried by tests: running the last position again is exact.
CAUSAL = frozenset(
    (
        *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "smolvlm"),
        *("idefics3", "internvl", "gemma3", "mistral3", "aya_vision", "llama"),
    )
)
PREFIX_LM = frozenset(("paligemma", "colpali", "git", "pi0"))
# Arguments of a forward that have a value for each position of the prompt, last axis; the second pass takes the last.
_BY_POSITION = ("position_ids", "token_type_ids", "mm_token_type_ids", "cache_position")
_KEPT = ("past_key_values", "use_cache", "output_hidden_states", "return_dict")


@dataclass(frozen=True)
class Policy:
    """Which alpha a sample gets: `alpha1` below the threshold `beta` of its confidence c, else `alpha2`.

    `confidence` is "max-prob" (the paper's: over the whole vocabulary), "option-prob" (over the first tokens of the
    options, `options`), "margin" (first minus second probability) or "entropy" (1 - H/log V, over the options if
    given); larger is surer. `decimals` rounds c before comparing (the reference code rounds to 2). With `tau` the
    alphas are blended: alpha1 + (alpha2 - alpha1)·sigmoid((c - beta)/tau).
    """

    alpha1: float
    alpha2: float
    beta: float
    confidence: str = "max-prob"
    decimals: int | None = None
    tau: float | None = None
    options: tuple[int, ...] | None = None

    def alpha(self, c: float) -> float:
        """The alpha of a sample of confidence `c`; at the threshold itself it is alpha2."""
        if self.tau:
            weight = 1.0 / (1.0 + math.exp(min(700.0, max(-700.0, -(c - self.beta) / self.tau))))
            return self.alpha1 + (self.alpha2 - self.alpha1) * weight
        return self.alpha1 if c < self.beta else self.alpha2


def confidences(logits: torch.Tensor, policy: Policy) -> list[float]:
    """c of every row of [B, V] logits, rounded as the policy says."""
    p = torch.softmax(logits.float(), dim=-1)
    if policy.options is not None and policy.confidence != "max-prob":
        p = p[:, list(policy.options)]
        p = p / p.sum(-1, keepdim=True)
    elif policy.confidence == "option-prob":
        raise SteeringError("confidence option-prob needs the first tokens of the options")
    if policy.confidence in ("max-prob", "option-prob"):
        c = p.amax(-1)
    elif policy.confidence == "margin":
        top = p.topk(2, dim=-1).values
        c = top[:, 0] - top[:, 1]
    elif policy.confidence == "entropy":
        c = 1.0 + torch.xlogy(p, p).sum(-1) / math.log(p.shape[-1])
    else:
        raise SteeringError(f"confidence '{policy.confidence}' is none of {', '.join(CONFIDENCES)}")
    values = c.tolist()
    return values if policy.decimals is None else [round(v, policy.decimals) for v in values]


@dataclass
class Outcome:
    """What a run decided, one value a sample; and how the second pass was made: "none", "cheap" or "full"."""

    confidence: list[float]
    alpha: list[float]
    passes: str = "none"


class TwoPass:
    """The forward hook. `state` carries the rule and the keys; its alphas are set by the policy after the first pass.

    Only the forward that ends with the prompt's last position is looked at, and only once.
    """

    def __init__(self, state: Steering, policy: Policy, *, causal: bool) -> None:
        self.state, self.policy, self.causal = state, policy, causal
        self.outcome: Outcome | None = None
        self._recorded: list[Any] = []
        state.enabled = False

    def before(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        """Sliding layers must keep what falls out of their window until the second pass is over."""
        # Torch calls a hook without kwargs while another thread takes it off.
        if kwargs is not None and is_active(self.state) and self.outcome is None and self.causal:
            self._recorded += start_recording(kwargs.get("past_key_values"))

    def after(self, module: Any, args: tuple[Any, ...], *given: Any) -> Any:
        """The second pass, and the output with its last position's logits replaced; None when nothing changes."""
        if not is_active(self.state) or self.outcome is not None:
            return None  # of another thread, or of a later token
        kwargs, output = given
        state, shown = self.state, shown_argument(args, kwargs)
        if state.offset + shown.shape[1] != state.prompt_length:
            return None
        rows = confidences(output.logits[:, -1], self.policy)
        copies = len(rows) // state.applied[0].keys.shape[0]  # beams and returned sequences of a sample are neighbours
        rows = rows[::copies]
        self.outcome = Outcome(rows, [self.policy.alpha(c) for c in rows])
        state.applied = [replace(a, alpha=tuple(self.outcome.alpha)) for a in state.applied]
        # From here on forwards that hold steered rows are steered: recomputation without a cache, decoded rows.
        state.enabled = True
        if not all(a.identity for a in state.applied):
            second, self.outcome.passes = run_again(module, args, kwargs, output, state, causal=self.causal)
            output = _spliced(output, second)
        stop_recording(self._recorded)
        return output if self.outcome.passes != "none" else None


def start_recording(cache: Any) -> list[Any]:
    """Let sliding layers of a cache keep what falls out of their window; those that did not do so before."""
    layers = [y for y in getattr(cache, "layers", ()) if hasattr(y, "record_past") and not y.record_past]
    for layer in layers:
        layer.activate_past_recording()
    return layers


def stop_recording(layers: list[Any]) -> None:
    """Back to the window alone."""
    for layer in layers:
        layer.crop(0)
        layer.record_past = False
    layers.clear()


def run_again(
    module: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
    state: Steering,
    *,
    causal: bool,
) -> tuple[Any, str]:
    """Run the steered rows of a forward that just ended once more, `state` being on the stack: (output, how).

    "cheap" runs the positions from the first steered row on, over the cache of the others: exact where `causal`. "full"
    runs the same forward on an emptied cache. Raises SteeringError when neither can be done.
    """
    cache, shown = output.get("past_key_values"), shown_argument(args, kwargs)
    count = cheap_rows(state, cache, shown) if causal else None
    if count is not None:
        cache.crop(-count)
        return module.forward(**last_positions(kwargs, cache, shown, count)), "cheap"
    if cache is not None and state.offset:
        raise SteeringError(
            f"a {type(cache).__name__} that held {state.offset} positions before cannot be run again; use a dynamic "
            "cache, and no prefill_chunk_size with a static one"
        )
    if cache is not None:
        cache.reset()
    return module.forward(*args, **kwargs), "full"


def cheap_rows(state: Steering, cache: Any, shown: torch.Tensor) -> int | None:
    """How many positions at the prompt's end hold all steered rows; None where they cannot be run again by themselves:
    caches that cannot be cropped, images among them (they would have to be embedded again)."""
    first = int(torch.stack([a.rows.any(0) for a in state.applied]).any(0).int().argmax())
    images = any(bool(a.keys[:, first:].any()) for a in state.applied)
    count = state.prompt_length - first
    return None if cache is None or images or count > shown.shape[1] or not croppable(cache) else count


def croppable(cache: Any) -> bool:
    """Whether positions can be taken off the cache's end without a trace (not static, quantized, recurrent ones)."""
    return all(
        type(y).__name__ == "DynamicLayer"
        or (
            type(y).__name__ == "DynamicSlidingWindowLayer" and (y.record_past or y.get_seq_length() < y.sliding_window)
        )
        for y in getattr(cache, "layers", (None,))
    )


@contextmanager
def two_pass(model: Any, state: Steering, policy: Policy, *, force: str = "auto") -> Iterator[TwoPass]:
    """Inside the block the first prompt that `model` is given is answered by the policy; `outcome` says how.

    `force` is "auto", "cheap" (an error for prefix-LM families, where it is not exact) or "full".
    """
    hook = TwoPass(state, policy, causal=is_causal(model, state.config, force))
    with steering(model, state):
        watches = [
            model.register_forward_pre_hook(hook.before, with_kwargs=True),
            model.register_forward_hook(hook.after, with_kwargs=True),
        ]
        try:
            yield hook
        finally:
            for watch in watches:
                watch.remove()


def is_causal(model: Any, config: Any, force: str = "auto") -> bool:
    """Whether earlier rows never depend on later ones, so that the cheap second pass is exact; `config` is the text
    model's. Families that were not tried count as not."""
    kind = model.config.model_type
    looks_ahead = kind in PREFIX_LM or getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if force == "cheap" and looks_ahead:
        raise SteeringError(f"{kind}: prompt rows see the last one, so the cheap second pass is not exact; use 'full'")
    return force != "full" and not looks_ahead and (force == "cheap" or kind in CAUSAL)


def shown_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What has the length of the forward: ids [B, Q] or embeddings [B, Q, D]."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if ids is not None else kwargs["inputs_embeds"]


def last_positions(kwargs: Mapping[str, Any], cache: Any, shown: torch.Tensor, count: int) -> dict[str, Any]:
    """The arguments of a forward over the last `count` positions alone, the others being in the cache."""
    out = {k: kwargs[k] for k in _KEPT if k in kwargs} | {"past_key_values": cache, "logits_to_keep": 1}
    out |= {k: kwargs[k][..., -count:] for k in _BY_POSITION if kwargs.get(k) is not None}
    out["input_ids" if shown.ndim == 2 else "inputs_embeds"] = shown[:, -count:]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer, made beforehand
        out["attention_mask"] = {k: m if m is None else m[:, :, -count:] for k, m in mask.items()}
    elif mask is not None:
        out["attention_mask"] = mask[:, :, -count:] if mask.ndim == 4 else mask
    return out


def _spliced(first: Any, second: Any) -> Any:
    """`first` with the last position of `second`."""

    def last(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return new[:, -1:] if old.shape[1] == 1 else torch.cat([old[:, :-1], new[:, -1:]], dim=1)

    first["logits"] = last(first.logits, second.logits)
    if second.get("past_key_values") is not None:
        first["past_key_values"] = second.past_key_values
    if first.get("hidden_states") is not None and second.get("hidden_states") is not None:
        pairs = zip(first.hidden_states, second.hidden_states, strict=True)
        first["hidden_states"] = tuple(last(old, new) for old, new in pairs)
    return first


# --- rows and keys of a prompt ----------------------------------------------------------------------------------------


def steered_rows(rows: str, keys: torch.Tensor, attention: torch.Tensor | None = None) -> torch.Tensor:
    """Which positions are steered rows, [B, S], for keys [B, S]: "last", "last:N", or "after-image" (all positions
    after the last key), or "all". Padding never is. Raises SteeringError for right-padded prompts and other words."""
    if attention is not None and not bool(attention[:, -1].all()):
        raise SteeringError("the batch is padded on the right; set the tokenizer's padding_side to 'left'")
    position = torch.arange(keys.shape[1])
    if rows == "all":
        chosen = torch.ones_like(keys)
    elif rows == "after-image":
        chosen = position > torch.where(keys, position, -1).amax(-1, keepdim=True)
        chosen = chosen & keys.any(-1, keepdim=True)
    else:
        word, _, count = rows.partition(":")
        if word != "last" or not (count or "1").isdigit() or int(count or 1) < 1:
            raise SteeringError(f"rows '{rows}': write last, last:N, after-image or all")
        chosen = (position >= keys.shape[1] - int(count or 1)).expand(keys.shape[0], -1)
    return chosen if attention is None else chosen & attention.bool().cpu()


def image_mask(config: Any, ids: torch.Tensor, which: str = "id") -> torch.Tensor:
    """Positions of `ids` [B, S] that hold image embeddings: by "id", "id+video", or "span" (first to last one, with
    the markers between tiles, as the reference code does). On the CPU."""
    token = getattr(config, "image_token_id", None)
    if token is None:
        raise UnsupportedModel(f"{config.model_type}: no image token id in the config; not an image-text-to-text model")
    ids = ids.cpu()
    mask = ids == token
    if which == "id+video" and getattr(config, "video_token_id", None) is not None:
        mask |= ids == config.video_token_id
    elif which == "span":
        mask = (mask.cumsum(-1) > 0) & (mask.flip(-1).cumsum(-1).flip(-1) > 0)
    elif which not in ("id", "id+video"):
        raise SteeringError(f"image keys '{which}': write id, span or id+video")
    return mask


def text_config(model: Any) -> Any:
    """The config that the text model's attention layers carry; raises UnsupportedModel where there are none."""
    kind = model.config.model_type
    if model.config.is_encoder_decoder or kind == "mllama":
        raise UnsupportedModel(f"{kind}: images enter by cross-attention, where there are no image keys to steer")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{kind}: its attention cannot be replaced from outside (no attention interface)")
    return model.config.get_text_config(decoder=True)


# --- what transformers calls for a patched checkpoint -----------------------------------------------------------------

_STORED = {f.name for f in fields(Policy)} - {"decimals", "options"} | {
    "version", "confidence_decimals", "mode", "layers", "heads", "rows", "steps", "image_keys", "tuned_on", "scale",
}  # fmt: skip


def stored_patch(spec: Mapping[str, Any]) -> tuple[Rule, Policy, str]:
    """Rule, policy and key selection of a config's `adaptvis`. Raises SteeringError for keys or versions not known."""
    if int(spec.get("version", 1)) > VERSION:
        raise SteeringError(f"the patch has version {spec['version']}; this code knows up to {VERSION}")
    unknown = sorted(set(spec) - _STORED)
    if unknown:
        raise SteeringError(f"unknown keys in the stored patch: {', '.join(unknown)}")
    if spec.get("mode", "logit") not in MODES:
        raise SteeringError(f"mode '{spec['mode']}' is none of {', '.join(MODES)}")
    heads = spec.get("heads")
    rule = Rule(
        mode=spec.get("mode", "logit"),
        layers=None if spec.get("layers") is None else tuple(spec["layers"]),
        heads=None if heads is None else {int(layer): tuple(chosen) for layer, chosen in heads.items()},
        rows=spec.get("rows", "last"),
        steps=spec.get("steps", "first"),
    )
    if spec.get("scale") is not None:
        fixed = float(spec["scale"])
        return rule, Policy(fixed, fixed, 0.0), spec.get("image_keys", "id")
    missing = [k for k in ("alpha1", "alpha2", "beta") if spec.get(k) is None]
    if missing:
        raise SteeringError(f"the stored patch lacks {', '.join(missing)}; attach it again")
    policy = Policy(
        *(float(spec[k]) for k in ("alpha1", "alpha2", "beta")),
        confidence=spec.get("confidence", "max-prob"),
        decimals=spec.get("confidence_decimals"),
        tau=spec.get("tau"),
    )
    return rule, policy, spec.get("image_keys", "id")


def generate(inputs: torch.Tensor | None = None, *, model: Any, **kwargs: Any) -> Any:
    """`model.generate` with the patch that config.json carries under `adaptvis`.

    `adaptvis=False` switches it off for a call; `adaptvis_alpha1=0.8` and the like change one value. Prompts without
    image tokens are answered unpatched, with a warning. Raises SteeringError where the patch cannot act.
    """
    spec = dict(getattr(model.config, "adaptvis", None) or {})
    own = {k: kwargs.pop(k) for k in list(kwargs) if k == "adaptvis" or k.startswith("adaptvis_")}
    wanted = own.pop("adaptvis", True)
    spec |= {k.removeprefix("adaptvis_"): v for k, v in own.items()}
    if not wanted:
        return type(model).generate(model, inputs, **kwargs)
    rule, policy, which = stored_patch(spec)
    return patched_generate(model, inputs, rule, policy, which=which, **kwargs)[0]


def patched_generate(
    model: Any,
    inputs: torch.Tensor | None,
    rule: Rule,
    policy: Policy,
    *,
    which: str = "id",
    keys: torch.Tensor | None = None,
    force: str = "auto",
    **kwargs: Any,
) -> tuple[Any, Outcome]:
    """Generate by a rule and a policy; (what `generate` returns, what was decided). `keys` [B, S] replaces the image's.

    A policy of one alpha (ScalingVis) steers the prompt's own pass and needs no second one.
    """
    for name in ("assistant_model", "prompt_lookup_num_tokens", "custom_generate"):
        if kwargs.get(name) is not None:
            raise SteeringError(f"generate with {name} cannot be steered; leave it out")
    if kwargs.get("cache_implementation") == "paged":
        raise SteeringError("continuous batching cannot be steered; use another cache_implementation")
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if ids is None and keys is None:
        raise SteeringError("without input_ids the image's positions are unknown; pass a mask of keys")
    mask = kwargs.get("attention_mask")
    config = text_config(model)
    keys = image_mask(model.config, ids, which) if keys is None else keys.cpu().bool()
    if not bool(keys.any()):
        warnings.warn("no image token in the prompt: it is answered unpatched", stacklevel=3)
        return type(model).generate(model, inputs, **kwargs), Outcome([], [])
    rows = steered_rows(rule.rows, keys, mask)
    fixed = policy.alpha1 == policy.alpha2
    alphas = (policy.alpha1,) * keys.shape[0]
    state = Steering(config, [Applied(rule, alphas if fixed else (1.0,) * keys.shape[0], keys, rows)])
    if fixed:
        with steering(model, state):
            out = type(model).generate(model, inputs, **kwargs)
        outcome = Outcome([], list(alphas))
    else:
        with two_pass(model, state, policy, force=force) as hook:
            out = type(model).generate(model, inputs, **kwargs)
        outcome = hook.outcome or Outcome([], [])
        if not outcome.alpha:
            raise SteeringError("the prompt's last position never came by: nothing was steered")
    check_hits(model, state, skipped=outcome.passes == "none" and not fixed)
    return out, outcome


def check_hits(model: Any, state: Steering, *, skipped: bool = False) -> None:
    """Never a silent no-op: every layer that the rules name must have been steered. `skipped`: nothing was to be."""
    wanted = {i for i in range(state.config.num_hidden_layers) if any(a.rule.touches(i) for a in state.applied)}
    missed = sorted(wanted - set(state.hits))
    if missed and not skipped:
        raise SteeringError(
            f"layers {missed} of {model.config.model_type} were not steered: their attention is another"
        )
