"""What stage 1 and stage 2 share: checks of settings, learning-rate curves, seeds, the order of samples, the average.

Every random draw of a training step comes from a generator seeded with (seed, purpose, step). A resumed run therefore
needs no generator state to go on with the same bits, and two ways of feeding the same steps see the same noise.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from surgery.errors import UsageError


def check_settings(what: str, settings: object, checks: Mapping[str, bool]) -> None:
    """Raises UsageError for the first of `checks`, by the setting's name, that does not hold; `what` is being set."""
    for name, good in checks.items():
        if not good:
            raise UsageError(
                "bad-setting",
                f"{what} with {name} = {getattr(settings, name)!r} is not possible",
                hint="see the command's --help for what it takes",
            )


def generator_for(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator for one use of one step; unrelated for any two different (seed, purpose, step)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, curve: str, floor: float = 0.0) -> float:
    """The rate for 0-based `step`: linear from peak/warmup to peak over `warmup` steps, then "constant", or "cosine"
    down to `floor * peak` at the end of `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if curve == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class BatchOrder:
    """Endless batches of sample indices: one seeded permutation of `n` per epoch, cut without regard to epoch ends.

    `indices(step)` is a function of (n, batch, seed, step) alone, so any step can be asked for first.
    """

    def __init__(self, n: int, batch: int, *, seed: int) -> None:
        self.n, self.batch, self.seed = n, batch, seed
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            self._epochs[epoch] = torch.randperm(self.n, generator=generator_for(self.seed, "epoch", epoch))
        return self._epochs[epoch]

    def indices(self, step: int) -> Tensor:
        """Int64 [batch]: the samples of one step; a sample repeats within a batch only when batch > n."""
        start = step * self.batch
        parts, stop = [], start + self.batch
        while start < stop:
            epoch, offset = divmod(start, self.n)
            take = min(self.n - offset, stop - start)
            parts.append(self._epoch(epoch)[offset : offset + take])
            start += take
        return torch.cat(parts)


class Ema:
    """Exponential moving average of parameters, warmed up: decay at update s (from 0) is min(decay, (1+s)/(10+s)).

    With a plain 0.9999 a run of a few hundred steps would return nearly its initial weights.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        """Move towards `parameters` (same order as at construction) after 0-based update `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in parameters], 1 - decay)


def weights_digest(module: nn.Module) -> str:
    """sha256 of all names, shapes, dtypes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}/{tuple(value.shape)}/{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
