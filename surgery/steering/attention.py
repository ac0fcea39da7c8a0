"""Steered attention: chosen rows of a text model's attention see chosen keys by changed logits (arXiv 2503.01773).

This file and generate.py need torch and transformers alone, on purpose: copies of both travel in `custom_generate/`
beside the weights of a patched checkpoint, and `from_pretrained(folder, trust_remote_code=True).generate(...)` applies
the patch without this package. The package itself builds on the same code.

How it works. Attention and mask functions are registered beside transformers' own, one pair a backend. They call the
backend untouched and recompute the steered rows only, in float32. What is steered is said by a `Steering` in a context
variable: nothing is stored on modules, other models and other threads see nothing. Whether a call holds a steered row
follows from absolute positions, never from shapes: caches, chunks and recomputation without a cache all agree.

Axes: B batch, H heads, G key heads, R steered rows, K keys of a call, S prompt positions, V vocabulary, d head width.
"""

import math
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MODES = ("logit", "mass-preserving", "bias", "abs", "knock-out")
BASES = ("sdpa", "eager", "flex_attention")
# Two copies of this file in one process (the package's, a checkpoint's) must not answer to one name. Transformers looks
# for "sdpa" and "flash" in names, so the backend stands in it as it is.
_PREFIX = f"steered_{zlib.crc32(__name__.encode()):08x}_"


class SteeringError(ValueError):
    """The request cannot be carried out as it stands; after a semicolon the message says what to do."""


class UnsupportedModel(SteeringError):
    """The model has no attention over image keys that could be steered."""


@dataclass(frozen=True)
class Rule:
    """What happens to the logits of steered rows at chosen keys; plain data.

    `layers` None is all of them. `heads` {layer: heads} restricts those layers to heads; layers that it does not name
    are not steered. `table` {layer: {head: alpha}} gives every head an alpha of its own, in place of the run's. `rows`
    is "last", "last:N", "after-image" or "all"; `steps` is "first" (the prompt) or "all" (also every decoded token).
    """

    mode: str = "logit"
    layers: tuple[int, ...] | None = None
    heads: Mapping[int, tuple[int, ...]] | None = None
    table: Mapping[int, Mapping[int, float]] | None = None
    rows: str = "last"
    steps: str = "first"

    def touches(self, layer: int) -> bool:
        """Whether the rule changes this layer."""
        chosen = self.table if self.table is not None else self.heads
        return (self.layers is None or layer in self.layers) and (chosen is None or layer in chosen)


class TraceRow(NamedTuple):
    """Attention of the steered rows in one layer of one forward: `weights` as used, `plain` as without steering (both
    [B, H, R, K], float32), absolute positions of the rows and of the first key, and steered keys a sample."""

    layer: int
    rows: tuple[int, ...]
    first_key: int
    weights: torch.Tensor
    plain: torch.Tensor
    columns: torch.Tensor


@dataclass
class Applied:
    """A rule on given prompts: an alpha a sample, and which positions are steered keys and rows ([B, S], bool)."""

    rule: Rule
    alpha: tuple[float, ...]
    keys: torch.Tensor
    rows: torch.Tensor
    _moved: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def identity(self) -> bool:
        """Whether nothing changes, by definition and not by rounding."""
        return self.rule.mode != "knock-out" and self.rule.table is None and all(a == 1.0 for a in self.alpha)

    def row_mask(self, start: int, stop: int, batch: int) -> torch.Tensor:
        """Which rows of the positions [start, stop) are steered: [batch, stop - start]."""
        known = self.rows[:, start:stop]
        later = torch.full((known.shape[0], stop - start - known.shape[1]), self.rule.steps == "all")
        return torch.cat([known, later], dim=1).repeat_interleave(batch // known.shape[0], dim=0)

    def key_mask(self, first: int, count: int, batch: int, device: torch.device) -> torch.Tensor:
        """Which of `count` keys from position `first` on are steered: [B, 1, 1, K]."""
        if device not in self._moved:
            self._moved[device] = self.keys.to(device)
        known = self._moved[device][:, first : first + count]
        padded = torch.nn.functional.pad(known, (0, count - known.shape[1]))
        return padded.repeat_interleave(batch // padded.shape[0], dim=0)[:, None, None]

    def alphas(self, layer: int, heads: int, batch: int, device: torch.device) -> torch.Tensor:
        """[B, H, 1, 1]; 1 where the rule leaves a head alone."""
        if self.rule.table is not None:
            row = [float(self.rule.table[layer].get(h, 1.0)) for h in range(heads)]
            out = torch.tensor(row).repeat(batch, 1)
        else:
            out = torch.tensor(self.alpha).repeat_interleave(batch // len(self.alpha))[:, None].repeat(1, heads)
            if self.rule.heads is not None:
                out[:, [h for h in range(heads) if h not in self.rule.heads[layer]]] = 1.0
        return out.to(device)[:, :, None, None]


class Steering:
    """What is steered while it is on the stack: rules on the text model whose config is `config` (by identity)."""

    def __init__(self, config: Any, applied: Sequence[Applied], *, trace: bool = False, enabled: bool = True) -> None:
        self.config = config
        self.applied = _merged(applied)
        self.trace: list[TraceRow] | None = [] if trace else None
        self.enabled = enabled
        self.hits: Counter[int] = Counter()
        self.offset = 0
        self._masks: list[torch.Tensor] = []

    @property
    def prompt_length(self) -> int:
        """S: prompts are this long, padding included."""
        return self.applied[0].keys.shape[1]

    def begin(self, offset: int, length: int, batch: int) -> None:
        """A forward of the text model starts: it holds the positions [offset, offset + length)."""
        if batch % self.applied[0].keys.shape[0]:
            raise SteeringError(f"{batch} rows are no multiple of the {self.applied[0].keys.shape[0]} steered samples")
        self.offset = offset
        self._masks = [a.row_mask(offset, offset + length, batch) for a in self.applied]

    def acting(self, layer: int) -> list[tuple[Applied, torch.Tensor]]:
        """Rules with a steered row in this layer of this forward, with their row masks [B, Q]."""
        found = zip(self.applied, self._masks, strict=True)
        return [(a, m) for a, m in found if a.rule.touches(layer) and bool(m.any())]


_STACK: ContextVar[tuple[Steering, ...]] = ContextVar("steering", default=())


def is_active(state: Steering) -> bool:
    """Whether `state` steers the thread or task that asks; hooks on a model see the forwards of all of them."""
    return state in _STACK.get()


def _merged(applied: Sequence[Applied]) -> list[Applied]:
    """Alphas of neighbouring logit rules on the same rows and keys multiply; g after 1/g is then nothing at all."""
    out: list[Applied] = []
    for new in applied:
        last = out[-1] if out else None
        if (
            last is not None
            and last.rule == new.rule
            and new.rule.mode == "logit"
            and new.rule.table is None
            and torch.equal(last.keys, new.keys)
            and torch.equal(last.rows, new.rows)
        ):
            product = tuple(a * b for a, b in zip(last.alpha, new.alpha, strict=True))
            product = tuple(1.0 if math.isclose(p, 1.0, rel_tol=1e-9) else p for p in product)
            out[-1] = Applied(new.rule, product, new.keys, new.rows)
        else:
            out.append(new)
    return out


# --- the backend ------------------------------------------------------------------------------------------------------


def backend(base: str) -> str:
    """Register the steered form of a backend (once) and return its name."""
    if base.startswith(_PREFIX):
        return base
    if base not in BASES:
        raise SteeringError(
            f"attention backend '{base}' cannot be steered; load the model with attn_implementation='sdpa' or 'eager'"
        )
    name = _PREFIX + base
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attention, base))
        # Under a name without a mask function transformers makes no mask at all, and says nothing.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _plain(base: str, module: torch.nn.Module) -> Callable[..., Any]:
    """The untouched backend: "eager" is not in the registry, every modeling file has its own."""
    for kind in type(module).__mro__:
        source = sys.modules.get(kind.__module__)
        if base == "eager" and hasattr(source, "eager_attention_forward"):
            return source.eager_attention_forward
        if base != "eager" and hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
            return source.ALL_ATTENTION_FUNCTIONS[base]
    if base == "eager":
        raise SteeringError(f"{type(module).__name__} has no eager attention function; use attn_implementation='sdpa'")
    return ALL_ATTENTION_FUNCTIONS[base]


def _attention(
    base: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """The backend, with the steered rows of its output [B, Q, H, d] recomputed."""
    output, weights = _plain(base, module)(module, query, key, value, attention_mask, **kwargs)
    stack = _STACK.get()
    if not stack:
        return output, weights
    states = [s for s in stack if s.enabled and s.config is getattr(module, "config", None)]
    acting = [(s, a, m) for s in states for a, m in s.acting(module.layer_idx)]
    if not acting:
        return output, weights
    for name in ("cache", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise SteeringError(f"attention with '{name}' cannot be steered (continuous batching, sinks, biases)")
    if module.training:
        raise SteeringError("the model is in training mode; call model.eval() before steering")
    for state in {id(s): s for s, _, _ in acting}.values():
        state.hits[module.layer_idx] += 1
    if all(a.identity for _, a, _ in acting) and not any(s.trace is not None for s in states):
        return output, weights
    return _override(base, module, query, key, value, attention_mask, (output, weights), acting, kwargs)


def _override(
    base: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    result: tuple[torch.Tensor, torch.Tensor | None],
    acting: list[tuple[Steering, Applied, torch.Tensor]],
    kwargs: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    output, weights = result
    (batch, heads, length, width), (groups, count) = query.shape, key.shape[1:3]
    device, offset, layer = query.device, acting[0][0].offset, module.layer_idx
    total = offset + length
    first = max(total - count, 0)  # sliding layers hold the last keys only; static ones have room after `total`
    # Masks of rows stay on the CPU, so that finding the rows costs no wait for the device.
    rows = torch.stack([m.any(0) for _, _, m in acting]).any(0).nonzero()[:, 0].tolist()
    positions = torch.tensor([offset + r for r in rows], device=device)
    q_BGRd = query[:, :, rows].reshape(batch, groups, -1, width).float()
    scale = kwargs.get("scaling") or width**-0.5
    s_BHRK = (q_BGRd @ key.float().transpose(2, 3) * scale).view(batch, heads, len(rows), count)
    if kwargs.get("softcap") is not None:
        s_BHRK = kwargs["softcap"] * torch.tanh(s_BHRK / kwargs["softcap"])
    allowed, bias = _rows_of_mask(base, module, mask, rows, positions, first, count, length, batch, kwargs)
    steered = s_BHRK
    touched = torch.zeros((batch, heads, len(rows), 1), dtype=torch.bool, device=device)
    columns = torch.zeros(batch, dtype=torch.long, device=device)
    for _, applied, row_mask in acting:
        keys = applied.key_mask(first, count, batch, device) & allowed
        columns += keys.any(1).any(1).sum(-1)
        if applied.identity:
            continue
        alpha = applied.alphas(layer, heads, batch, device)
        # A sample without such keys has nothing to steer: it keeps the backend's own bits.
        chosen = (
            row_mask[:, rows].to(device)[:, None, :, None] & _changes(applied, alpha, layer) & keys.any(-1)[..., None]
        )
        steered = torch.where(chosen & keys, _MODES[applied.rule.mode](steered, keys, alpha), steered)
        touched |= chosen
    p_BHRK = _softmax(steered, allowed, bias)
    for state in {id(s): s for s, _, _ in acting if s.trace is not None}.values():
        plain = _softmax(s_BHRK, allowed, bias)
        at = tuple(offset + r for r in rows)
        state.trace.append(TraceRow(layer, at, first, p_BHRK.detach(), plain.detach(), columns))  # type: ignore[union-attr]
    if not bool(touched.any()):
        return output, weights
    o_BGRd = p_BHRK.view(batch, groups, -1, count) @ value.float()
    o_BHRd = o_BGRd.view(batch, heads, len(rows), value.shape[-1])
    new = torch.where(touched, o_BHRd.to(output.dtype), output[:, rows].transpose(1, 2)).transpose(1, 2)
    if weights is not None and kwargs.get("output_attentions"):
        # Whoever asks for weights gets those that were used; the reference code returns unsteered ones.
        weights = weights.clone()
        weights[:, :, rows] = torch.where(touched, p_BHRK.to(weights.dtype), weights[:, :, rows])
    if rows == list(range(length)):
        return new.contiguous(), weights
    output = output.clone()
    output[:, rows] = new
    return output, weights


def _changes(applied: Applied, alpha: torch.Tensor, layer: int) -> torch.Tensor:
    """Which samples and heads [B, H, 1, 1] the rule really changes; the others keep the backend's own bits."""
    if applied.rule.mode != "knock-out":
        return alpha != 1.0
    chosen = torch.ones_like(alpha, dtype=torch.bool)
    if applied.rule.heads is not None:
        chosen[:, [h for h in range(alpha.shape[1]) if h not in applied.rule.heads[layer]]] = False
    return chosen


def _softmax(s: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    s = s if bias is None else s + bias
    return torch.softmax(s.masked_fill(~allowed, torch.finfo(s.dtype).min), dim=-1)


def _rows_of_mask(
    base: str,
    module: Any,
    mask: Any,
    rows: list[int],
    positions: torch.Tensor,
    first: int,
    count: int,
    length: int,
    batch: int,
    kwargs: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Allowed keys of the rows [B or 1, H or 1, R, K], and what a float mask adds beside forbidding."""
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        part = mask[:, :, rows, :count]
        if part.dtype == torch.bool:
            return part, None
        return part > torch.finfo(part.dtype).min / 2, part.float()
    j_RK = torch.arange(first, first + count, device=positions.device)[None].expand(len(rows), -1)
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # Without a mask sdpa is causal for several rows, and sees all keys for one; eager always sees all of them.
        if base == "sdpa" and length > 1 and causal:
            return (j_RK <= positions[:, None])[None, None], None
        return torch.ones_like(j_RK, dtype=torch.bool)[None, None], None
    if hasattr(mask, "mask_mod"):  # flex attention's block mask; its own indices start at 0
        index = [torch.tensor(v, device=positions.device) for v in (range(batch), rows, range(count))]
        b, q, k = (v.view(shape) for v, shape in zip(index, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True))
        return mask.mask_mod(b, torch.zeros_like(b), q, k).expand(batch, len(rows), count)[:, None], None
    raise SteeringError(
        f"attention mask {type(mask).__name__} of shape {getattr(mask, 'shape', '?')} is not understood"
    )


def _mass_preserving(s: torch.Tensor, keys: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    before = s.masked_fill(~keys, -math.inf).logsumexp(-1, keepdim=True)
    after = (alpha * s).masked_fill(~keys, -math.inf).logsumexp(-1, keepdim=True)
    return alpha * s + (before - after).nan_to_num(0.0)  # a sample without such keys: inf - inf, and nothing to keep


# mode -> f(logits [B, H, R, K] after scaling and softcap, keys, alpha [B, H, 1, 1])
_MODES: Mapping[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "logit": lambda s, keys, alpha: alpha * s,
    "mass-preserving": _mass_preserving,
    "bias": lambda s, keys, alpha: s + alpha.log(),
    "abs": lambda s, keys, alpha: s + (alpha - 1.0) * s.abs(),
    "knock-out": lambda s, keys, alpha: torch.full_like(s, torch.finfo(s.dtype).min),
}


# --- putting it on a model --------------------------------------------------------------------------------------------


@dataclass
class _InUse:
    """A steered model: its backend before, the hook on its text model, and how many blocks steer it."""

    before: str
    watch: Any
    blocks: int = 0


_LOCK = threading.RLock()
_IN_USE: dict[int, _InUse] = {}  # by the id of the text config


@contextmanager
def steering(model: Any, state: Steering) -> Iterator[Steering]:
    """Steer `model` inside the block; the backend is back afterwards, exceptions included.

    Blocks nest (their rules follow one another) and may run in several threads: the last one to leave restores.
    """
    config = state.config
    with _LOCK:
        if id(config) not in _IN_USE:
            before = config._attn_implementation
            _set_backend(model, config, backend(before))
            watch = model.get_decoder().register_forward_pre_hook(_begin, with_kwargs=True)
            _IN_USE[id(config)] = _InUse(before, watch)
        _IN_USE[id(config)].blocks += 1
    token = _STACK.set((*_STACK.get(), state))
    try:
        yield state
    finally:
        _STACK.reset(token)
        with _LOCK:
            use = _IN_USE[id(config)]
            use.blocks -= 1
            if use.blocks == 0:
                del _IN_USE[id(config)]
                use.watch.remove()
                _set_backend(model, config, use.before)


def _set_backend(model: Any, config: Any, name: str) -> None:
    for key in model.config.sub_configs:
        if getattr(model.config, key, None) is config:
            model.set_attn_implementation({key: name})
            return
    model.set_attn_implementation(name)


def _begin(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
    """Before a forward of the text model: which positions does it hold? Forwards of other threads see no state.

    A hook that another thread takes off while torch goes through the hooks is called without `kwargs`."""
    states = [s for s in _STACK.get() if s.config is module.config]
    if not states or kwargs is None:
        return
    shown = kwargs.get("inputs_embeds")
    shown = shown if shown is not None else kwargs.get("input_ids", args[0] if args else None)
    cache = kwargs.get("past_key_values")
    offset = int(cache.get_seq_length()) if cache is not None else 0
    for state in states:
        state.begin(offset, shown.shape[1], shown.shape[0])
