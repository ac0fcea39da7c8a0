"""One run of a prompt, many alphas: what tuning and evaluation are made of.

The prompt is run once through the model's own `generate` (positions, masks and image encoding are its affair). Every
further alpha costs one forward of the steered rows over the cache, every answer its own tokens; afterwards the cache is
as it was. Families where that is not exact run the whole prompt again for an alpha, with the images encoded once.

Axes: B batch, V vocabulary, O options.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from surgery.errors import UsageError
from surgery.steering.attention import Steering, is_active, steering
from surgery.steering.generate import (
    Policy,
    cheap_rows,
    confidences,
    is_causal,
    last_positions,
    shown_argument,
    start_recording,
    stop_recording,
)
from surgery.steering.patch import PAPER, Patch
from surgery.steering.session import bare, prepare, refusals


class Prefill:
    """A batch of prompts that has been run unsteered; a context manager, since it steers the model while it is open.

    `logits` [B, V] float32 are those of the first answer token at alpha 1. `passes` counts what was run: "prompt",
    "cheap", "full", "tokens". Raises as `steer`.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        patch: Patch | Sequence[Patch] = PAPER,
        *,
        tokenizer: Any = None,
    ) -> None:
        self.model = bare(model)
        with refusals():
            self.state: Steering = prepare(self.model, patch, inputs=inputs, tokenizer=tokenizer)
        self._patch = (patch,) if isinstance(patch, Patch) else tuple(patch)
        self._tokenizer = tokenizer
        self.batch = self.state.applied[0].keys.shape[0]
        self.passes = {"prompt": 0, "cheap": 0, "full": 0, "tokens": 0}
        self._inputs = inputs
        self._stack = ExitStack()
        self._kwargs: dict[str, Any] = {}
        self._cache: Any = None
        self._recording: list[Any] = []
        # By how many rows are steered: the cache without them, and the arguments of a forward over them.
        self._bases: dict[int, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
        self._whole: list[dict[str, Any]] = []  # with all that sliding layers recorded
        self._plain: list[dict[str, Any]] = []  # the unsteered prompt
        self._steered: list[dict[str, Any]] = []  # the prompt as `steered` left it
        self.logits = torch.empty(0)

    def __enter__(self) -> "Prefill":
        self.state.enabled = False
        with refusals():
            self._stack.enter_context(torch.no_grad())
            self._stack.enter_context(steering(self.model, self.state))
            try:
                self._run_prompt()
            except BaseException:
                self._stack.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._cache = None
        self._stack.close()

    def _run_prompt(self) -> None:
        """The prompt through `generate`, for one token; its forward's arguments are kept for the alphas."""
        causal = is_causal(self.model, self.state.config)

        def before(module: Any, args: tuple[Any, ...], *given: Any) -> None:
            if is_active(self.state) and causal and not self._kwargs:
                self._recording += start_recording(given[0].get("past_key_values"))

        def after(module: Any, args: tuple[Any, ...], *given: Any) -> None:
            if is_active(self.state) and not self._kwargs:
                kwargs, output = given
                self._kwargs, self._cache = dict(kwargs), output.past_key_values
                self.logits = output.logits[:, -1].float().clone()

        # Hooks see the forwards of all threads, and what torch gives them of others' may lack kwargs.
        self._causal = causal
        with ExitStack() as hooks:
            hooks.callback(self.model.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(self.model.register_forward_hook(after, with_kwargs=True).remove)
            inputs = {k: v for k, v in self._inputs.items() if v is not None}
            # The class's generate: a patched checkpoint has its own on the instance.
            type(self.model).generate(
                self.model,
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                cache_implementation="dynamic",
            )
        self.passes["prompt"] += 1
        self._whole = _saved(self._cache)
        stop_recording(list(self._recording))
        self._plain = self._steered = _saved(self._cache)

    def confidence(self, policy: Policy) -> list[float]:
        """c of every sample, as the policy defines it."""
        with refusals():
            return confidences(self.logits, policy)

    def steered(
        self, alpha: float | Sequence[float] | None, patch: Patch | Sequence[Patch] | None = None
    ) -> torch.Tensor:
        """First-token logits [B, V] under `alpha`, one number or one a sample (None: each patch's own); the cache then
        holds the steered prompt. `patch` stands in for the one that the run was made with, this once. Where nothing is
        changed by definition these are `logits` themselves, bit for bit. Raises as `steer`."""
        with refusals():
            patches = self._patch if patch is None else patch
            made = prepare(self.model, patches, alpha=alpha, inputs=self._inputs, tokenizer=self._tokenizer)
            self.state.applied = made.applied
            if all(a.identity for a in self.state.applied):
                _restore(self._cache, self._plain)
                self._steered = self._plain
                return self.logits
            self.state.enabled = True
            try:
                output = self._run_steered()
            finally:
                self.state.enabled = any(a.rule.steps == "all" for a in self.state.applied)
        self._steered = _saved(self._cache)
        return output.logits[:, -1].float()

    def _run_steered(self) -> Any:
        shown = shown_argument((), self._kwargs)
        _restore(self._cache, self._whole)
        count = cheap_rows(self.state, self._cache, shown) if self._causal else None
        if count is None:
            self._cache.reset()
            self.passes["full"] += 1
            return self.model.forward(**self._kwargs)
        if count not in self._bases:
            self._cache.crop(-count)
            for layer in self._cache.layers:
                vars(layer).update({k: False for k in vars(layer) if k == "record_past"})
            self._bases[count] = _saved(self._cache), last_positions(self._kwargs, self._cache, shown, count)
        base, again = self._bases[count]
        _restore(self._cache, base)
        self.passes["cheap"] += 1
        return self.model.forward(**again)

    def answer(self, logits: torch.Tensor, *, tokens: int, stop: Sequence[int] = ()) -> list[list[int]]:
        """Greedy answers from first-token `logits` on, at most `tokens` long and without the stop token; the cache must
        hold the prompt that gave them (`steered` leaves it so)."""
        stops = set(stop)
        answers: list[list[int]] = [[] for _ in range(self.batch)]
        done = [False] * self.batch
        fed = 0
        while True:
            chosen = logits.argmax(-1)
            for i, token in enumerate(chosen.tolist()):
                done[i] = done[i] or token in stops
                if not done[i]:
                    answers[i].append(token)
                    done[i] = len(answers[i]) >= tokens
            if all(done):
                break
            logits = self.feed(chosen[:, None], fed)[:, -1].float()
            fed += 1
        self.take_back()
        return answers

    def option_scores(self, logits: torch.Tensor, options: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Mean log-likelihood a token of every option, given each sample's options as token ids: the closed-set answer
        is the largest. Length-normalised, so that options of several tokens compete fairly."""
        if len(options) != self.batch or not all(o and all(o) for o in options):
            raise UsageError("options", "every sample needs options of at least one token each", hint="check the data")
        first = torch.log_softmax(logits, dim=-1)
        scores = [[float(first[i, o[0]]) for o in listed] for i, listed in enumerate(options)]
        for slot in range(max(map(len, options))):
            rest = [listed[slot] if slot < len(listed) else listed[0] for listed in options]
            width = max(map(len, rest)) - 1
            if width == 0:
                continue
            ids = torch.tensor([[*o, *[o[-1]] * (width + 1 - len(o))] for o in rest], device=logits.device)
            found = torch.log_softmax(self.feed(ids[:, :-1], 0).float(), dim=-1)  # right padding: later than all
            self.take_back()
            for i, option in enumerate(rest):
                if slot < len(options[i]):
                    tail = [float(found[i, t, option[t + 1]]) for t in range(len(option) - 1)]
                    scores[i][slot] += sum(tail)
        return [
            [s / len(o) for s, o in zip(row, listed, strict=True)] for row, listed in zip(scores, options, strict=True)
        ]

    def feed(self, ids: torch.Tensor, fed: int) -> torch.Tensor:
        """Logits [B, n, V] of `ids` [B, n] after the prompt and `fed` further tokens."""
        kwargs: dict[str, Any] = {"input_ids": ids, "past_key_values": self._cache, "use_cache": True}
        positions, mask = self._kwargs.get("position_ids"), self._kwargs.get("attention_mask")
        if positions is not None:
            ahead = torch.arange(1, ids.shape[1] + 1, device=positions.device) + fed
            kwargs["position_ids"] = positions[..., -1:] + ahead
        if mask is not None:
            kwargs["attention_mask"] = torch.nn.functional.pad(mask, (0, fed + ids.shape[1]), value=1)
        self.passes["tokens"] += ids.shape[1]
        return self.model.forward(**kwargs).logits

    def take_back(self) -> None:
        """Drop fed tokens from the cache: it holds the prompt alone again."""
        _restore(self._cache, self._steered)


def _saved(cache: Any) -> list[dict[str, Any]]:
    """What a dynamic cache holds now. Its layers make new tensors as they grow, so references are enough."""
    if any(type(y).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer") for y in cache.layers):
        kind = type(cache).__name__
        raise UsageError(
            "cache", f"a {kind} cannot go back to an earlier state", hint="use a model with dynamic caches"
        )
    return [dict(vars(layer)) for layer in cache.layers]


def _restore(cache: Any, saved: list[dict[str, Any]]) -> None:
    for layer, held in zip(cache.layers, saved, strict=True):
        vars(layer).update(held)
