"""Steering a model from Python: `steer(model, patch)` around forwards, `generate(model, inputs, policy)` for answers.

    with steer(model, Patch(layers="0-15"), alpha=0.5, inputs=inputs, trace=True) as run:
        model(**inputs)
    run.calls, run.attention(3)

    out, outcome = generate(model, inputs, Policy(alpha1=0.5, alpha2=1.5, beta=0.4), max_new_tokens=20)

Blocks nest, and their rules follow one another. Nothing is left behind on the model, exceptions included; a block in
which nothing was steered is an error. Masks are [B, S] over the prompt, padding included, True for chosen keys.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from surgery.errors import CheckpointError, UsageError, printable
from surgery.steering.attention import Applied, Rule, Steering, SteeringError, TraceRow, UnsupportedModel, steering
from surgery.steering.generate import (
    Outcome,
    Policy,
    check_hits,
    image_mask,
    patched_generate,
    steered_rows,
    text_config,
)
from surgery.steering.patch import PAPER, Patch, check_alpha


@dataclass(frozen=True)
class Run:
    """What happened inside a block."""

    state: Steering

    @property
    def calls(self) -> int:
        """How many attention calls held a steered row."""
        return sum(self.state.hits.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were steered."""
        return tuple(sorted(self.state.hits))

    @property
    def trace(self) -> tuple[TraceRow, ...]:
        """Attention of the steered rows, in the order of the calls; empty unless it was asked for."""
        return tuple(self.state.trace or ())

    def attention(self, layer: int, *, plain: bool = False) -> torch.Tensor:
        """[B, H, K] float32: what the last steered row of `layer` looked at, in its last forward, by absolute position
        (keys out of a sliding window are 0); `plain`: what it would have looked at unsteered. Needs `trace=True`."""
        rows = [t for t in self.trace if t.layer == layer]
        if not rows:
            raise UsageError(
                "trace", f"layer {layer} has no trace", hint="pass trace=True and run the model in the block"
            )
        weights = rows[-1].plain if plain else rows[-1].weights
        return torch.nn.functional.pad(weights[:, :, -1], (rows[-1].first_key, 0))


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what the travelling files raise into errors of ours."""
    try:
        yield
    except SteeringError as err:
        message, _, hint = str(err).partition("; ")
        kind = CheckpointError if isinstance(err, UnsupportedModel) else UsageError
        raise kind("steering", message, hint=hint or "see surgery adaptvis --help") from err


@contextmanager
def steer(
    model: Any,
    patch: Patch | Sequence[Patch] = PAPER,
    *,
    alpha: float | Sequence[float] | None = None,
    inputs: Mapping[str, Any] | None = None,
    image_mask: torch.Tensor | None = None,
    tokenizer: Any = None,
    trace: bool = False,
) -> Iterator[Run]:
    """Steer every forward of `model` inside the block that holds steered rows of the prompt.

    `alpha` is one number or one a sample; None takes each patch's own. The prompt is given by `inputs` (with
    `input_ids`, and `attention_mask` where there is padding) or by a mask of keys. `tokenizer` finds phrases of text.
    `trace` records the attention of the steered rows, at alpha 1 too. Raises UsageError for prompts without such keys,
    padding on the right and alphas that are none; CheckpointError for models that cannot be steered.
    """
    model = bare(model)
    with refusals():
        state = prepare(model, patch, alpha=alpha, inputs=inputs, keys=image_mask, tokenizer=tokenizer, trace=trace)
        with steering(model, state):
            yield Run(state)
        check_hits(model, state)


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    policy: Policy,
    patch: Patch = PAPER,
    *,
    keys: torch.Tensor | None = None,
    tokenizer: Any = None,
    force: str = "auto",
    **generate_kwargs: Any,
) -> tuple[Any, Outcome]:
    """Adaptive generation: (what `model.generate` returns, confidence and alpha of every sample). Raises as `steer`."""
    model = bare(model)
    with refusals():
        rule = rule_of(model, patch)
        if keys is None:
            keys = key_mask(model, patch, inputs["input_ids"], tokenizer)
        _check_keys(keys, patch, inputs)
        return patched_generate(model, None, rule, policy, keys=keys, force=force, **inputs, **generate_kwargs)


def bare(model: Any) -> Any:
    """The transformers model itself: one with adapters (PEFT) generates by the model that it wraps."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def prepare(
    model: Any,
    patch: Patch | Sequence[Patch],
    *,
    alpha: float | Sequence[float] | None = None,
    inputs: Mapping[str, Any] | None = None,
    keys: torch.Tensor | None = None,
    tokenizer: Any = None,
    trace: bool = False,
) -> Steering:
    """The state that `steer` puts on the stack."""
    patches = (patch,) if isinstance(patch, Patch) else tuple(patch)
    config = text_config(model)
    ids = inputs.get("input_ids") if inputs is not None else None
    if not patches or (ids is None and keys is None):
        raise UsageError("steering", "the prompt's positions are unknown", hint="pass inputs with input_ids, or a mask")
    attention = inputs.get("attention_mask") if inputs is not None else None
    applied = []
    for one in patches:
        chosen = keys.bool().cpu() if keys is not None else key_mask(model, one, ids, tokenizer)
        _check_keys(chosen, one, inputs)
        rows = steered_rows(one.rows, chosen, attention)
        applied.append(Applied(rule_of(model, one), _alphas(one, alpha, chosen.shape[0]), chosen, rows))
    return Steering(config, applied, trace=trace)


def rule_of(model: Any, patch: Patch) -> Rule:
    """The patch with numbers of this model's layers and heads. Raises UsageError for numbers it does not have."""
    config = text_config(model)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    return Rule(
        mode=patch.mode,
        layers=patch.chosen_layers(layers),
        heads=patch.chosen_heads(layers, heads),
        table=patch.chosen_table(layers, heads),
        rows=patch.rows,
        steps=patch.steps,
    )


def key_mask(model: Any, patch: Patch, ids: torch.Tensor, tokenizer: Any = None) -> torch.Tensor:
    """The patch's keys in a prompt: bool [B, S] for ids [B, S], on the CPU."""
    if patch.keys == "text":
        if tokenizer is None:
            raise UsageError("keys", "phrases of text are found by a tokenizer", hint="pass tokenizer=")
        mask = torch.stack([_phrases(row.tolist(), patch.text, tokenizer) for row in ids.cpu()])
    else:
        which, _, number = patch.keys.partition(":")
        mask = image_mask(model.config, ids, "id" if which == "image" else which)
        if number:
            mask = mask & (image_numbers(model, ids) == int(number))
    return ~mask if patch.invert else mask


def image_numbers(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, S]: which image of its prompt a position belongs to, from 1; 0 for text. An image is a run of image tokens:
    models that cut an image into tiles with text between them count every tile."""
    mask = image_mask(model.config, ids)
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return starts.cumsum(-1) * mask


def _phrases(ids: list[int], phrases: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """Tokens that any phrase touches, wherever it stands in the prompt: where the phrase's own tokens stand, else where
    its letters do (spaces aside), since words are cut otherwise in other surroundings."""
    # Pieces as written, without the space markers of byte-level and SentencePiece vocabularies.
    pieces = [re.sub(r"[Ġ▁\s]", "", str(p)) for p in tokenizer.convert_ids_to_tokens(ids)]
    ends = list(accumulate(map(len, pieces)))
    text = "".join(pieces)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for phrase in phrases:
        spans = [
            (i, i + len(own))
            for own in _spelled(phrase, tokenizer)
            for i in range(len(ids))
            if ids[i:][: len(own)] == own
        ]
        letters = "".join(phrase.split())
        for at in [m.start() for m in re.finditer(re.escape(letters), text)] if letters and not spans else ():
            touched = [i for i, end in enumerate(ends) if end > at and end - len(pieces[i]) < at + len(letters)]
            spans.append((touched[0], touched[-1] + 1))
        if not spans:
            raise UsageError("keys", f"'{printable(phrase)}' is not in the prompt", hint="write it as in the question")
        for start, stop in spans:
            mask[start:stop] = True
    return mask


def _spelled(phrase: str, tokenizer: Any) -> list[list[int]]:
    """The phrase in tokens, at the start of a text and inside one."""
    if not callable(tokenizer):
        return []
    found = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (phrase, f" {phrase}")]
    return [own for own in found if own]


def _check_keys(keys: torch.Tensor, patch: Patch, inputs: Mapping[str, Any] | None) -> None:
    if not bool(keys.any()):
        what = "no image token" if patch.keys != "text" else "no such text"
        raise UsageError(
            "no-keys",
            f"the prompt has {what}: there is nothing to steer",
            hint="give it an image through the model's processor, which writes one token for each visual position",
        )
    alone = keys & ~torch.nn.functional.pad(keys, (1, 0))[:, :-1] & ~torch.nn.functional.pad(keys, (0, 1))[:, 1:]
    if (
        patch.keys == "image"
        and not patch.invert
        and inputs
        and "pixel_values" in inputs
        and bool((alone == keys).all())
    ):
        raise UsageError(
            "not-expanded",
            "the prompt has one token an image, not one for each visual position",
            hint="set patch_size, num_additional_image_tokens and vision_feature_select_strategy of the processor",
        )


def _alphas(patch: Patch, alpha: float | Sequence[float] | None, batch: int) -> tuple[float, ...]:
    if alpha is None:
        alpha = patch.alpha if patch.alpha is not None else 1.0
    values = alpha.tolist() if isinstance(alpha, torch.Tensor) else alpha
    listed = [values] * batch if isinstance(values, int | float) else list(values)
    if len(listed) != batch:
        raise UsageError("alpha", f"{len(listed)} alphas for {batch} samples", hint="give one number, or one a sample")
    return tuple(check_alpha("alpha", a, patch.mode) for a in listed)
