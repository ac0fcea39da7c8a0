"""What the card of a merge says of licences."""

from pathlib import Path

import pytest
import yaml
from safetensors.numpy import save_file

from surgery.arch.merging.card import card, card_base
from surgery.store.checkpoint import Checkpoint, open_checkpoint

REPORT = {"method": "linear", "merged": {"tensors": 1, "bytes": 4}}


def model(root: Path, name: str, front: str | None) -> Checkpoint:
    import numpy as np

    folder = root / name
    folder.mkdir()
    save_file({"w": np.zeros(1, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    if front is not None:
        (folder / "README.md").write_text(f"---\n{front}---\n# {name}\nlicense: of-the-text\n")
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("vlm", "llm", "license", "says", "silent"),
    [
        ("license: mit\n", "license: 'mit'\n", "mit", "vlm mit, llm mit", "differ"),
        ("license: apache-2.0\n", "license:\n- llama3\n", "other", "They differ", "No licence"),
        ("license: apache-2.0\n", None, "apache-2.0", "No licence is stated beside llm", "differ"),
        ("license: cc-by-nc-4.0\n", "tags:\n- x\n", "cc-by-nc-4.0", "That of vlm rules out commercial use", "differ"),
        (None, "tags: [license]\n", None, "builds it again", "icence"),
    ],
)
def test_licences_of_the_parents(
    vlm: str | None, llm: str | None, license: str | None, says: str, silent: str, tmp_path: Path
) -> None:
    text = card(REPORT, [model(tmp_path, "vlm", vlm), model(tmp_path, "llm", llm)])
    front, body = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front).get("license") == license
    assert says in body and silent not in body, body


def test_a_licence_of_its_own_name_is_named(tmp_path: Path) -> None:
    front = "base_model: org/base\nlicense: other\nlicense_name: gemma-nc\n"
    one, two = (model(tmp_path, n, front) for n in ("vlm", "llm"))
    found = yaml.safe_load(card(REPORT, [one, two]).split("---\n")[1])
    assert (found["license"], found["license_name"]) == ("other", "gemma-nc") and card_base(one) == "org/base"
