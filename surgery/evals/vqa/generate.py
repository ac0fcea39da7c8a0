"""Batches of prompts and pictures to answers, greedily, and to the likelihood of given answers.

Prompts are padded on the left. Padding changes sums in the last bits, so a batch of another size may now and then turn
a greedy token; everything that is compared is measured with the same batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgery.arch.language.load import Loaded, quiet_transformers
from surgery.errors import CheckpointError, ResourceError, printable
from surgery.evals.vqa.rows import Item


@dataclass(frozen=True)
class Answer:
    """What a model wrote: the text, its tokens, and whether it came to an end by itself."""

    text: str
    tokens: int
    ended: bool


def batches(items: Sequence[Item], prompts: Sequence[str], size: int) -> Iterator[list[int]]:
    """Positions of items that go together: of similar length, so that little is padded; the order is fixed by them."""
    order = sorted(range(len(items)), key=lambda i: (len(items[i].images), len(prompts[i]), i))
    start = 0
    while start < len(order):
        # Processors want every prompt of a batch with images or every one without.
        with_images = bool(items[order[start]].images)
        stop = start
        while stop < len(order) and stop - start < size and bool(items[order[stop]].images) == with_images:
            stop += 1
        yield order[start:stop]
        start = stop


def encode(loaded: Loaded, prompts: Sequence[str], items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """The model's inputs for prompts of one batch, padded on the left, on the model's device and in its precision."""
    images = [[picture.open() for picture in item.images] for item in items]
    bos = loaded.tokenizer.bos_token
    # A template that writes the first token itself must not get a second one.
    options: dict[str, Any] = {"add_special_tokens": not (bos and prompts[0].startswith(bos))}
    if any(images):
        options["images"] = images
    if loaded.tokenizer.pad_token is None:
        loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    with quiet_transformers():
        try:
            made = loaded.processor(
                text=list(prompts), return_tensors="pt", padding=True, padding_side="left", **options
            )
        except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as err:
            raise CheckpointError(
                "bad-processor",
                f"item '{printable(items[0].id)}' and its batch cannot be encoded: {printable(str(err), limit=160)}",
                hint="see whether the processor and chat template belong to the model: surgery eval vqa --dry-run",
            ) from err
    keep = {
        k: v for k, v in made.items() if isinstance(v, torch.Tensor) and not (k == "token_type_ids" and not any(images))
    }
    device, dtype = loaded.model.device, loaded.model.dtype
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in keep.items()}


@torch.no_grad()
def generate(loaded: Loaded, prompts: Sequence[str], items: Sequence[Item], *, max_new_tokens: int) -> list[Answer]:
    """Greedy answers to the prompts of one batch; settings of the folder that bend greedy decoding are not used.

    Raises ResourceError when the device runs out of memory.
    """
    inputs = encode(loaded, prompts, items)
    config = loaded.model.generation_config
    pad = loaded.tokenizer.pad_token_id
    with quiet_transformers(), _room(len(prompts)):
        made = loaded.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=pad,
        )
    ends = config.eos_token_id if config.eos_token_id is not None else loaded.tokenizer.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    out = []
    for row in made[:, inputs["input_ids"].shape[1] :].tolist():
        count = next((n for n, token in enumerate(row) if token in stops), None)
        kept = row if count is None else row[:count]
        text = loaded.tokenizer.decode(kept, skip_special_tokens=True).strip()
        out.append(Answer(text, len(kept), count is not None))
    return out


@dataclass(frozen=True)
class Scored:
    """One batch of prompts with their answers behind them, ready for a forward pass.

    `inputs` is what the model takes; `rows`, `columns` [n] are the positions whose logits predict the answers' tokens,
    `targets` [n] these tokens; `rows` also says whose answer each belongs to. `size` is the number of items.
    """

    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    size: int

    def total(self, logits: torch.Tensor) -> torch.Tensor:
        """-log p of each item's answer in nats, float64 [size], from logits [n, vocabulary] at `rows`, `columns`."""
        losses = torch.nn.functional.cross_entropy(logits.float(), self.targets, reduction="none").double()
        return torch.zeros(self.size, dtype=torch.float64, device=losses.device).index_add_(0, self.rows, losses)


def with_answers(loaded: Loaded, prompts: Sequence[str], items: Sequence[Item]) -> Scored:
    """The inputs of prompts followed by the right answers (the letter, where there are choices).

    Answers are tokenised by themselves and put behind the prompts' tokens; what stands beside the tokens one by one
    (masks, kinds of tokens) is made longer to match.
    """
    inputs = encode(loaded, prompts, items)
    answers = [loaded.tokenizer(item.answer, add_special_tokens=False)["input_ids"] for item in items]
    if any(not tokens for tokens in answers):
        empty = items[next(i for i, tokens in enumerate(answers) if not tokens)]
        raise CheckpointError(
            "bad-item", f"item '{printable(empty.id)}': its answer has no tokens", hint="check data and tokenizer"
        )
    device, start = inputs["input_ids"].device, inputs["input_ids"].shape[1]
    longest = max(len(tokens) for tokens in answers)
    shape = inputs["input_ids"].shape
    tail = torch.full((len(items), longest), loaded.tokenizer.pad_token_id, dtype=torch.long, device=device)
    mask = torch.zeros_like(tail)
    rows, columns, targets = [], [], []
    for row, tokens in enumerate(answers):
        tail[row, : len(tokens)] = torch.tensor(tokens, device=device)
        mask[row, : len(tokens)] = 1
        rows += [row] * len(tokens)
        columns += range(start - 1, start - 1 + len(tokens))
        targets += tokens
    for name, value in list(inputs.items()):
        if value.shape == shape and not value.is_floating_point():
            more = {"input_ids": tail, "attention_mask": mask}.get(name, torch.zeros_like(tail))
            inputs[name] = torch.cat([value, more.to(value.dtype)], dim=1)
    as_tensor = (torch.tensor(x, dtype=torch.long, device=device) for x in (rows, columns, targets))
    return Scored(inputs, *as_tensor, size=len(items))


@torch.no_grad()
def answer_nll(loaded: Loaded, batch: Scored) -> list[float]:
    """-log p of each answer in nats, by one plain forward pass."""
    with _room(batch.size):
        logits = loaded.model(**batch.inputs, use_cache=False).logits
    return batch.total(logits[batch.rows, batch.columns]).tolist()


class _room:
    """Turns running out of the device's memory into an error that says what to do."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, err: Any, _: Any) -> None:
        if isinstance(err, torch.OutOfMemoryError):
            raise ResourceError(
                "memory", f"a batch of {self._size} does not fit into the device's memory", hint="use a smaller --batch"
            ) from None
