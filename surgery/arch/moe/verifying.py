"""Whether a converted folder holds what its model will ask for, and computes what its base does.

`check_keys` reads headers and imports nothing heavy; `check_logits` builds both models, one after the other, and
refuses a name that is missing or unexpected.
"""

from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, Mismatch
from surgery.graph.op import Plan
from surgery.store.checkpoint import Checkpoint, open_checkpoint

TOKENS = (4, 64)  # sequences and their length; 256 tokens in all
# Largest difference of float32 logits that counts as rounding, as a share of the largest logit, for half of the tokens:
# in a deep model a near-tie in a router may go the other way for some. A list shared out wrongly moves every token by
# tenths.
ROUNDING = 1e-4


def check_keys(folder: Path, plan: Plan) -> dict[str, Any]:
    """The finished folder opened anew: every planned tensor in its files with its dtype and shape, none besides, and
    the modeling files that its config names. Raises `CheckpointError`."""
    found = open_checkpoint(folder, name=folder.name).tensors
    planned = {e.full_name: (e.dtype, e.shape) for e in plan.entries}
    wrong = [f"'{n}' is missing" for n in planned if n not in found]
    wrong += [f"'{n}' was not planned" for n in found if n not in planned]
    wrong += [f"'{n}' has another shape" for n, r in found.items() if planned.get(n, (0, 0)) != (r.dtype, r.shape)]
    wrong += [f"{f.relative} is missing" for f in plan.files if not (folder / f.relative).is_file()]
    if wrong:
        raise CheckpointError("wrong-tensors", f"{folder.name}: {'; '.join(wrong[:3])}", hint="a fault of ours")
    return {"verified": "keys", "tensors": len(found)}


def fits_in_memory(base: Checkpoint) -> bool:
    """Whether the model, in float32 at most, takes less than half of the memory that is free, and is not so large that
    loading it twice would be most of the work (4 GB)."""
    from math import prod

    if base.layout != "hf" or any(ref.offset < 0 for ref in base.tensors.values()):
        return False
    need = 4 * sum(prod(ref.shape) for ref in base.tensors.values())
    try:
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return False
    return need < min(free // 2, 4_000_000_000)


def check_logits(base: Checkpoint, folder: Path, *, expected: str, collapse: bool) -> dict[str, Any]:
    """Logits of both models on 256 tokens drawn with seed 0.

    "bit-exact" is checked in the dtype that is stored, with equality of every bit; "rounding" in float32 against
    `ROUNDING`. Raises `Mismatch` when the model does not keep what the plan says, `CheckpointError` when a name is
    missing or unexpected.
    """
    import torch

    wide = expected == "rounding"
    before = _logits(base.root, wide=wide)
    after = _logits(folder, wide=wide)
    apart = (after.float() - before.float()).abs().amax(-1)
    largest, usual = float(apart.max()), float(apart.median())
    scale = float(before.float().abs().max())
    facts = {
        "verified": "logits",
        "tokens": TOKENS[0] * TOKENS[1],
        "max_difference": largest,
        "median_difference": usual,
    }
    name = "the plain model" if collapse else "the converted model"
    if expected == "bit-exact" and not torch.equal(before, after):
        raise Mismatch("logits", f"{name}'s logits differ by {largest:.3g} from its base's", hint="a fault of ours")
    if expected == "rounding" and not usual <= ROUNDING * scale:
        raise Mismatch("logits", f"{name}'s logits differ by {usual:.3g}, more than rounding", hint="a fault of ours")
    if expected == "bit-exact":
        said = "bit-exact"
    else:
        said = f"{expected} (max {largest:.1e} on {facts['tokens']} tokens)"
    return facts | {"function": said}


def _logits(folder: Path, *, wide: bool) -> Any:
    """Logits [4, 64, vocabulary] of the model in the folder, loaded strictly and without running code from it."""
    import torch

    from surgery.arch.language.load import load_model

    model: Any = load_model(open_checkpoint(folder, name=folder.name), dtype="float32" if wide else "auto")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, TOKENS, generator=draw)
    # With gradients on, though nothing asks for one, no pass is left out or run together with another.
    model.requires_grad_(False)
    with torch.enable_grad():
        return model(tokens).logits
