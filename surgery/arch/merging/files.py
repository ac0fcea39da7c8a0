"""The files beside a merged model's weights: the host's, with the chat template that was asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.arch.carried import side_files
from surgery.errors import CheckpointError
from surgery.graph.documents import read_text
from surgery.graph.op import SideFile
from surgery.store.checkpoint import Checkpoint
from surgery.store.layout import read_json


def files_of(
    host: Checkpoint, donor: Checkpoint, edited: Mapping[str, Any], *, chat_template: str | None
) -> tuple[SideFile, ...]:
    """The host's side files, those in `edited` changed; `chat_template` is None or "host", "donor", or a file."""
    files = list(side_files(host, dict(edited)))
    if chat_template is None or chat_template == "host":
        return tuple(files)
    text = template_of(donor) if chat_template == "donor" else _template_file(chat_template)
    if text is None:
        raise CheckpointError(
            "no-template", f"{donor.name}: no chat template beside its weights", hint="--chat-template FILE"
        )
    files = [f for f in files if f.relative not in ("chat_template.jinja", "chat_template.json")]
    return (*files, SideFile("chat_template.jinja", content=text.encode()))


def template_of(checkpoint: Checkpoint) -> str | None:
    """The chat template beside the weights, wherever the libraries of its time put it."""
    root = checkpoint.root
    if (root / "chat_template.jinja").is_file():
        return (root / "chat_template.jinja").read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (root / name).is_file():
            document = read_json(root / name)
            found = document.get("chat_template") if isinstance(document, dict) else None
            if isinstance(found, str):
                return found
    return None


def _template_file(path: str) -> str:
    return read_text(Path(path))
