"""The files beside a merged model's weights: the host's, with the chat template that was asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.arch.carried import side_files
from surgery.errors import CheckpointError, UsageError, closest, printable
from surgery.graph.op import SideFile
from surgery.graph.recipes.documents import read_text
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
    own = checkpoint.file("chat_template.jinja")
    if own is not None:
        return own.read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = checkpoint.file(name)
        if path is not None:
            document = read_json(path)
            found = document.get("chat_template") if isinstance(document, dict) else None
            if isinstance(found, str):
                return found
    return None


def _template_file(path: str) -> str:
    return read_text(Path(path))


def named_template(name: str, models: Sequence[Checkpoint]) -> str | None:
    """The chat template that a mergekit document asks for: `auto` is the one that most of the models have, a name is
    one of mergekit's own, anything with a brace is the template itself."""
    if name == "auto":
        found = [text.strip() for m in models if (text := template_of(m)) is not None]
        return max(found, key=found.count) if found else None
    if "{" in name:
        return name
    from importlib.util import find_spec

    package = find_spec("mergekit")
    folders = package.submodule_search_locations if package is not None else None
    paths = [Path(folder) / "_data" / "chat_templates" for folder in folders or ()]
    for path in paths:
        if (path / f"{name}.jinja").is_file() and "/" not in name:
            return (path / f"{name}.jinja").read_text("utf-8")
    known = sorted(f.stem for path in paths if path.is_dir() for f in path.glob("*.jinja"))
    raise UsageError(
        "chat-template", f"chat_template: {printable(name)}: unknown", hint=closest(name, ["auto", *known])
    )
