"""Text to train on and to measure with: a file, or the sources of Python's standard library, which every machine has.

Token ids come from a tokenizer beside the model, or are the bytes themselves where there is none. torch is imported
where tensors are made.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UsageError
from surgery.store.digests import file_digest

STDLIB = "stdlib"
_FILES = 60


def read_text(name: str) -> str:
    """The text called `name`: "stdlib" (by name the first 60 modules of Python's standard library in plain ASCII), or a
    UTF-8 file. Raises `UsageError` and `CheckpointError`."""
    if name == STDLIB:
        return "".join(_sources())
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        why = err.strerror if isinstance(err, OSError) else "is not UTF-8"
        raise CheckpointError("bad-text", f"{path}: {why}", hint="name a text file, or stdlib") from None
    if not text.strip():
        raise UsageError("bad-text", f"{path}: is empty", hint="name a text file, or stdlib")
    return text


def text_digest(text: str) -> str:
    """sha256 of the text: what a result depends on beside its parents."""
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def source_digest(name: str) -> dict[str, str]:
    """{"data": sha256} of what `name` leads to now; empty when it is not there, which reading it will say."""
    if name == STDLIB:
        return {"data": text_digest(read_text(name))}
    path = Path(name)
    return {"data": "sha256:" + file_digest(path)} if path.is_file() else {}


def token_ids(text: str, tokenizer: Any | None, vocabulary: int) -> Any:
    """The text as a tensor of ids [n]: those of the tokenizer, or its bytes. Raises `UsageError` when an id is not in
    the model's vocabulary."""
    import torch

    if tokenizer is None:
        ids = torch.frombuffer(bytearray(text.encode("utf-8", "replace")), dtype=torch.uint8).long()
    else:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    if ids.numel() and int(ids.max()) >= vocabulary:
        what = "bytes need a vocabulary of 256" if tokenizer is None else "its tokenizer has larger ids"
        raise UsageError(
            "vocabulary", f"a vocabulary of {vocabulary}: {what}", hint="put the model's tokenizer beside its weights"
        )
    return ids


def _sources() -> list[str]:
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        data = path.read_bytes()
        if data.isascii() and len(data) > 2000:
            found.append(data.decode("ascii"))
        if len(found) == _FILES:
            break
    return found
