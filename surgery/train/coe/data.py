"""Sequences to train and to measure on: windows of one text, or rows of a JSON file, each a sequence of its own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from surgery.data.text import read_text, text_digest, token_ids
from surgery.errors import CheckpointError, UsageError

_IGNORE = -100
ROWS = (".json", ".jsonl")


@dataclass(frozen=True)
class Sequences(Dataset):
    """Token ids and targets, both [n, length]; a target of -100 is not asked for."""

    ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


@dataclass(frozen=True)
class Split:
    """What is trained on, what is held out, and the digest of the text behind both."""

    train: Sequences
    val: Sequences
    digest: str


def load_split(
    data: str, *, length: int, held_out: int, template: str, tokenizer: Any | None, vocabulary: int
) -> Split:
    """Sequences of `length` tokens of `data`: "stdlib", a text file, or a .json/.jsonl file of rows for `template`.

    Of a text the last `held_out` windows are held out; of rows, `held_out` drawn by numpy's generator of seed 42, as
    the paper's code does. Every token is a target; rows are cut at the right. Raises `UsageError`, `CheckpointError`.
    """
    if data.endswith(ROWS):
        texts = list(_rows(Path(data), template))
        if len(texts) <= held_out:
            raise UsageError("data", f"{data}: {len(texts)} rows, {held_out} held out", hint="lower --held-out")
        order = np.random.RandomState(42).permutation(len(texts))
        both = [
            _padded([texts[i] for i in part], length, tokenizer, vocabulary) for part in np.split(order, [held_out])
        ]
        return Split(both[1], both[0], text_digest("\n".join(texts)))
    text = read_text(data)
    ids = token_ids(text, tokenizer, vocabulary)
    windows = ids[: len(ids) // length * length].view(-1, length)
    if len(windows) <= held_out:
        raise UsageError(
            "data", f"{data}: {len(windows)} sequences of {length} tokens, {held_out} held out", hint="more text"
        )
    train, val = windows[:-held_out], windows[-held_out:]
    return Split(Sequences(train, train), Sequences(val, val), text_digest(text))


def _rows(path: Path, template: str) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        why = err.strerror if isinstance(err, OSError) else "is not UTF-8"
        raise CheckpointError("bad-text", f"{path}: {why}", hint="fetch the file first") from None
    try:
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines() if x.strip()]
        for row in rows:
            yield template.format(**row)
    except (ValueError, KeyError, TypeError, IndexError) as err:
        raise CheckpointError(
            "bad-text", f"{path}: a row does not fit --format: {type(err).__name__} {err}", hint="name its fields"
        ) from None


def _padded(texts: list[str], length: int, tokenizer: Any | None, vocabulary: int) -> Sequences:
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    labels = torch.full_like(ids, _IGNORE)
    for number, text in enumerate(texts):
        row = token_ids(text, tokenizer, vocabulary)[:length]
        ids[number, : len(row)] = row
        labels[number, : len(row)] = row
    return Sequences(ids, labels)


@torch.no_grad()
def mean_loss(model: Any, sequences: Sequences, *, batch: int) -> float:
    """Mean cross-entropy of a target token, in nats."""
    was, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(sequences), batch):
        ids, labels = sequences.ids[start : start + batch], sequences.labels[start : start + batch].to(device)
        logits = model(ids.to(device)).logits[:, :-1].float()
        wanted = labels[:, 1:]
        total += float(
            torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1), ignore_index=_IGNORE, reduction="sum"
            )
        )
        count += int((wanted != _IGNORE).sum())
    model.train(was)
    return total / max(1, count)
