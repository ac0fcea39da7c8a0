"""Two vocabularies row by row: which row of the donor's embedding answers to which row of the host's.

Ids are read from tokenizer.json (or vocab.json) without a tokenizer library. Rows that the host added for images stay
the host's in every policy.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UsageError
from surgery.store.checkpoint import Checkpoint
from surgery.store.layout import read_json

_HEAD = 4 << 20  # characters of a tokenizer's file that are looked at
_FIRST = 1000  # tokens
_OPEN = re.compile(r"\A\s*(\{)")
_VOCAB = re.compile(r'"vocab"\s*:\s*([\[{])')
_PAIR = re.compile(r'("(?:[^"\\]|\\.)*")\s*:\s*([0-9]{1,9})')
_PIECE = re.compile(r'\[\s*("(?:[^"\\]|\\.)*")\s*,')
_PLACEHOLDER = re.compile(r"(?:image|video|vision|audio|boi|eoi|boa|eoa)\w*_token_(?:id|index)")
POLICIES = ("host", "overlap", "by-token")
_LEAST = 0.95  # of the smaller vocabulary must stand at equal ids for `overlap`


def token_table(checkpoint: Checkpoint) -> dict[int, str] | None:
    """Token by id, from the files beside the weights; None where there is no tokenizer that can be read."""
    for name in ("tokenizer.json", "vocab.json"):
        path = checkpoint.file(name)
        if path is not None:
            return _table(read_json(path), path)
    return None


def first_tokens(checkpoint: Checkpoint) -> dict[int, str]:
    """The tokens of the lowest ids, as the head of the tokenizer's file lists them; {} where there is none.

    Enough to tell two tokenizers apart, at a hundredth of the cost of reading a vocabulary of a hundred thousand. What
    a run makes is not made for this.
    """
    for name in ("tokenizer.json", "vocab.json"):
        path = Path(checkpoint.root) / name
        if not checkpoint.path.is_dir() or not path.is_file():
            continue
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_HEAD)
        start = (_VOCAB if name == "tokenizer.json" else _OPEN).search(text)
        if start is None:
            return {}
        if start[1] == "{":
            pairs = _PAIR.finditer(text, start.end())
            found = {int(m[2]): m[1] for m, _ in zip(pairs, range(_FIRST), strict=False)}
        else:
            pieces = _PIECE.finditer(text, start.end())
            found = {n: m[1] for n, m in zip(range(_FIRST), pieces, strict=False)}
        return {n: json.loads(token) for n, token in found.items()}
    return {}


def rows_by_policy(policy: str, host: Checkpoint, donor: Checkpoint, *, host_rows: int, donor_rows: int) -> list[int]:
    """For every row of the host's embedding the donor's row, or -1 where the host's stays.

    `overlap` takes rows [0, n), n being how many ids from 0 on mean the same token in both; `by-token` the rows of the
    same token wherever they are. Rows of the host's image, video and audio tokens stay its own even where the donor
    has such tokens: it never saw one. Raises `CheckpointError` without both tokenizers, and when `overlap` is too
    small.
    """
    mine, theirs = token_table(host), token_table(donor)
    for checkpoint, table in ((host, mine), (donor, theirs)):
        if table is None:
            raise CheckpointError(
                "no-tokenizer",
                f"{checkpoint.name}: --vocab {policy} compares tokens, and there is no tokenizer.json or vocab.json",
                hint="save its tokenizer beside the weights, or use --vocab host",
            )
    assert mine is not None and theirs is not None
    rows = [-1] * host_rows
    if policy == "overlap":
        shared = common_prefix(mine, theirs)
        least = _LEAST * min(len(mine), len(theirs))
        if shared < least:
            raise CheckpointError(
                "vocabulary",
                f"only the first {shared} ids mean the same token in both, of {len(mine)} and {len(theirs)}",
                hint="--vocab by-token maps rows by their tokens, --vocab host leaves embeddings alone",
            )
        for row in range(min(shared, host_rows, donor_rows)):
            rows[row] = row
    elif policy == "by-token":
        by_token = {token: id_ for id_, token in theirs.items() if id_ < donor_rows}
        for id_, token in mine.items():
            if id_ < host_rows and token in by_token:
                rows[id_] = by_token[token]
    else:
        raise UsageError("vocab", f"--vocab {policy}: unknown", hint=f"one of {', '.join(POLICIES)}")
    for row in placeholders(host.part().config or {}):
        if row < host_rows:
            rows[row] = -1
    return rows


def placeholders(config: Mapping[str, Any]) -> set[int]:
    """The ids of the tokens that a config sets aside for images, videos and sound."""
    return {
        value
        for key, value in config.items()
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0 and _PLACEHOLDER.fullmatch(key)
    }


def common_prefix(mine: Mapping[int, str], theirs: Mapping[int, str]) -> int:
    """How many ids from 0 on mean the same token in both."""
    count = 0
    while count in mine and mine[count] == theirs.get(count):
        count += 1
    return count


def runs(rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbouring rows joined: (first host row, first donor row or -1, count), in order."""
    found: list[tuple[int, int, int]] = []
    for row, other in enumerate(rows):
        if found:
            first, start, count = found[-1]
            if (other == -1 and start == -1) or (start != -1 and other == start + count):
                found[-1] = (first, start, count + 1)
                continue
        found.append((row, other, 1))
    return found


def _table(document: Any, path: Path) -> dict[int, str]:
    model = document.get("model", {}) if isinstance(document, dict) else {}
    vocab = model.get("vocab", document if "model" not in document else {})
    table: dict[int, str] = {}
    try:
        if isinstance(vocab, dict):
            table = {int(id_): token for token, id_ in vocab.items()}
        else:
            table = {id_: piece[0] for id_, piece in enumerate(vocab)}
        for added in document.get("added_tokens", []) if "model" in document else []:
            table[int(added["id"])] = added["content"]
    except (TypeError, ValueError, KeyError, IndexError):
        raise CheckpointError("malformed", f"{path}: no vocabulary that can be read", hint="save it again") from None
    return table
