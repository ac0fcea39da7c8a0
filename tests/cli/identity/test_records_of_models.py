"""Records of what a model answered are of that model with its tokenizer and template: they are never mixed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

COMMANDS = {
    "questions": ["eval", "vqa", "vlm", "--data", "data.jsonl", "--max-new-tokens", "1", "-o", "r.jsonl"],
    "layers": ["probe", "layers", "vlm", "--eval", "data.jsonl", "--layers", "1", "--records", "r.jsonl"],
}


@pytest.mark.parametrize("what", COMMANDS)
def test_records_do_not_go_on_with_another_template(
    what: str, tiny_llava: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llava, tmp_path / "vlm")
    Image.new("RGB", (8, 8)).save("a.png")
    Path("data.jsonl").write_text(json.dumps({"id": "1", "question": "a?", "answer": "1", "image": "a.png"}) + "\n")
    assert command(*COMMANDS[what]).code == 0
    (model / "README.md").write_text("for people")
    assert command(*COMMANDS[what], "--resume").code == 0
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    ended = command(*COMMANDS[what], "--resume")
    assert ended.code == 2 and "other settings: config" in ended.stderr, ended.stderr
