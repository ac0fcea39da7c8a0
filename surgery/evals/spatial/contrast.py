"""Two other ways to decode without training, as baselines: VCD and DoLa. Both are greedy here.

Contrasts are taken on logits of the next token; what the plain model finds implausible is never chosen.

Axes: B batch, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from surgery.errors import UsageError
from surgery.steering.prefill import Prefill

VCD_STEPS = 500  # of 1000 steps of noise; with the weight 1 and the cut-off 0.1 the settings of VCD's own code
PLAUSIBLE = 0.1


def plausible(plain_BV: Tensor, share: float = PLAUSIBLE) -> Tensor:
    """Tokens whose probability is at least `share` of the likeliest one's: bool [B, V]."""
    return plain_BV >= plain_BV.amax(-1, keepdim=True) + math.log(share)


def vcd_logits(plain_BV: Tensor, noisy_BV: Tensor, *, weight: float = 1.0) -> Tensor:
    """(1 + weight)·l(x | picture) - weight·l(x | noisy picture) (visual contrastive decoding, arXiv 2311.16922)."""
    return (1 + weight) * plain_BV - weight * noisy_BV


def dola_logits(final_BV: Tensor, early_BV: Sequence[Tensor]) -> Tensor:
    """log p_final - log p_early, the early layer being the candidate whose distribution is furthest from the final one
    in Jensen-Shannon divergence, chosen for each sample (arXiv 2309.03883)."""
    last = torch.log_softmax(final_BV.float(), -1)
    early = torch.stack([torch.log_softmax(e.float(), -1) for e in early_BV])  # [layers, B, V]
    middle = torch.logsumexp(torch.stack([last.expand_as(early), early]), 0) - math.log(2)
    kl = (last.exp() * (last - middle)).sum(-1) + (early.exp() * (early - middle)).sum(-1)
    chosen = kl.argmax(0)
    return last - early[chosen, torch.arange(len(chosen), device=chosen.device)]


def dola_layers(count: int) -> list[int]:
    """Candidate layers of a model with `count`: the even ones of the upper half, by number of blocks that ran."""
    return [i for i in range(count // 2, count) if i % 2 == 0] or [count - 1]


def noisy(inputs: Mapping[str, Any], *, seed: int, steps: int = VCD_STEPS) -> dict[str, Any]:
    """The inputs with their pixels as VCD disturbs them: `steps` steps of a diffusion process whose variances rise as a
    sigmoid from 1e-5 to 5e-3, on normalised pixels, without clipping. The noise of a batch follows from `seed`."""
    beta = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    kept = float(torch.cumprod(1 - beta, 0)[steps])
    out = dict(inputs)
    for name, value in inputs.items():
        if name.startswith("pixel_values") and isinstance(value, Tensor) and value.is_floating_point():
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            out[name] = math.sqrt(kept) * value + math.sqrt(1 - kept) * noise
    if not any(n.startswith("pixel_values") for n in out):
        raise UsageError("vcd", "the inputs hold no pixels to disturb", hint="leave vcd out of --method")
    return out


class Contrast:
    """A batch of prompts under one of the two methods: `logits` [B, V] of the first answer token, then `answer`."""

    def __init__(self, runs: Sequence[Prefill], combine: Any) -> None:
        self._runs, self._combine = runs, combine
        self.logits: Tensor = combine([r.logits for r in runs])

    def answer(self, *, tokens: int, stop: Sequence[int]) -> list[list[int]]:
        """Greedy answers of at most `tokens` tokens, among plausible tokens, without the stop token."""
        ended = [False] * len(self.logits)
        answers: list[list[int]] = [[] for _ in ended]
        plain, logits = self._runs[0].logits, self.logits
        for fed in range(tokens):
            chosen = logits.masked_fill(~plausible(plain), -math.inf).argmax(-1)
            for i, token in enumerate(chosen.tolist()):
                ended[i] = ended[i] or token in stop
                if not ended[i]:
                    answers[i].append(token)
            if all(ended) or fed == tokens - 1:
                break
            found = [r.feed(chosen[:, None], fed)[:, -1].float() for r in self._runs]
            plain, logits = found[0], self._combine(found)
        for run in self._runs:
            run.take_back()
        return answers


@contextmanager
def vcd(model: Any, inputs: Mapping[str, Any], plain: Prefill, *, seed: int) -> Iterator[Contrast]:
    """`plain` contrasted with the same prompts about disturbed pictures."""
    plain.steered(1.0)  # the cache holds the plain prompt
    with Prefill(model, noisy(inputs, seed=seed)) as other:
        yield Contrast([plain, other], lambda pair: vcd_logits(*pair))


@contextmanager
def dola(model: Any, inputs: Mapping[str, Any]) -> Iterator[Contrast]:
    """The final layer contrasted with early ones, whose states are read by hooks; their logits are those of the
    output head without the final norm, as in DoLa's own code."""
    layers = model.get_decoder().layers
    chosen = dola_layers(len(layers))
    head = model.get_output_embeddings()
    states: dict[int, Tensor] = {}

    def watch(number: int) -> Any:
        def before(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            states[number] = (args[0] if args else kwargs["hidden_states"])[:, -1]

        return before

    with ExitStack() as hooks, torch.no_grad():
        for number in chosen:
            hooks.callback(layers[number].register_forward_pre_hook(watch(number), with_kwargs=True).remove)
        run = hooks.enter_context(Prefill(model, inputs))
        yield Contrast([run], lambda found: dola_logits(found[0], [head(states[n]) for n in chosen]))
