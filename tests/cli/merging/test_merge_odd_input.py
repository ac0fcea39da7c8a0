"""Hosts, donors and places as people really have them: links, spaces, lone files, other dtypes, results of ours, and
runs that end in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_pairs
from safetensors.torch import load_file, save_file
from vlm_pairs import Pair

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def plain(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge of the pair with no options: what every detour must end with."""
    import surgery

    return surgery.apply("merge", pair.host, pair.donor, out=tmp_path_factory.mktemp("plain") / "out").path


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_links_and_spaces_lead_to_the_same_bytes(pair: Pair, plain: Path, command: Command, tmp_path: Path) -> None:
    """A folder under another name, and one of links to blobs as the hub's cache is: the output has files of its own."""
    shutil.copytree(pair.donor, tmp_path / "the donor (7b)")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snap").mkdir()
    for number, file in enumerate(sorted(pair.host.iterdir())):
        shutil.copy(file, tmp_path / f"blobs/{number}")
        (tmp_path / "snap" / file.name).symlink_to(f"../blobs/{number}")
    (tmp_path / "a host").symlink_to("snap")
    ended = command("merge", "a host", "the donor (7b)", "-o", "the output")
    assert ended.code == 0 and ended.stdout == "the output\n", ended.stderr
    assert weights(tmp_path / "the output") == weights(plain)
    assert not any(f.is_symlink() for f in (tmp_path / "the output").iterdir())
    assert (tmp_path / "the output/config.json").read_bytes() == (pair.host / "config.json").read_bytes()


def test_a_lone_file_is_a_host_and_a_donor(pair: Pair, plain: Path, command: Command, tmp_path: Path) -> None:
    shutil.copy(pair.host / "model.safetensors", tmp_path / "my host.v2.safetensors")
    ended = command("merge", "my host.v2.safetensors", pair.donor / "model.safetensors", "-o", "out")
    assert ended.code == 0 and "has no config.json: heads and rotary settings were not compared" in ended.stderr
    assert weights(tmp_path / "out") == weights(plain)
    assert {f.name for f in Path("out").iterdir()} == {"model.safetensors", "README.md", "surgery.json"}


def test_a_result_of_ours_is_merged_again(pair: Pair, command: Command, tmp_path: Path) -> None:
    assert command("merge", pair.host, pair.donor, "--layers", "0-1", "-o", "first", "-q").code == 0
    assert command("merge", "first", pair.donor, "--layers", "1-2", "--alpha", "0.5", "-o", "second", "-q").code == 0
    shown = command("log", "second").stdout
    assert shown.count("merge v") == 2 and "layers=0-1" in shown and "layers=1-2" in shown
    assert command("verify", "second").code == 0
    assert command("replay", "second", "--to", "again").code == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "second")
    card = Path("second/README.md").read_text()
    assert "- first" in card and "host 0.5, donor 0.5" in card


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64])
def test_a_donor_of_another_dtype(kind: torch.dtype, pair: Pair, command: Command, tmp_path: Path) -> None:
    """It is read as it is, and the output has the host's dtype."""
    shutil.copytree(pair.donor, "donor")
    whole = {n: t.to(kind) * 1.0009765625 for n, t in load_file(pair.donor / "model.safetensors").items()}
    save_file(whole, tmp_path / "donor/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "donor/config.json").read_text()) | {"dtype": str(kind).removeprefix("torch.")}
    (tmp_path / "donor/config.json").write_text(json.dumps(config))
    ended = command("merge", pair.host, "donor", "-o", "out")
    assert ended.code == 0 and f"dtype: host bfloat16, donor {config['dtype']}" in ended.stderr
    host, out = load_file(pair.host / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    work = torch.float64 if kind == torch.float64 else torch.float32
    for name in ("layers.0.self_attn.q_proj.weight", "norm.weight"):
        one, two = host[f"language_model.model.{name}"].to(work), whole[f"model.{name}"].to(work)
        lam, mu = (torch.tensor(x, dtype=work) for x in (0.9, 1 - 0.9))
        assert torch.equal(out[f"language_model.model.{name}"], (one * lam + two * mu).bfloat16())
    assert command("merge", pair.host, "donor", "--alpha", "0", "-o", "swap", "-q").code == 0
    swapped = load_file(tmp_path / "swap/model.safetensors")["language_model.model.norm.weight"]
    assert torch.equal(swapped, whole["model.norm.weight"].bfloat16())


def test_every_file_of_the_host_comes_along(pair: Pair, command: Command, tmp_path: Path) -> None:
    shutil.copytree(pair.host, "host")
    own = {
        "LICENSE": "mine", "modeling_own.py": "x = 1", "generation_config.json": "{}", "sub/dir/notes.txt": "n",
        "chat_template.json": '{"chat_template": "t"}', "video_preprocessor_config.json": "{}", "a b.txt": "c",
    }  # fmt: skip
    for name, text in own.items():
        (tmp_path / "host" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "host" / name).write_text(text)
    for name in ("README.md", "pytorch_model.bin", ".git/HEAD"):  # another card, stale weights, another history
        (tmp_path / "host" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "host" / name).write_text("old")
    assert command("merge", "host", pair.donor, "-o", "out", "-q").code == 0
    for name, text in own.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not (tmp_path / "out/pytorch_model.bin").exists() and not (tmp_path / "out/.git").exists()
    assert (tmp_path / "out/README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_another_dtype_is_written_into_config_and_index(command: Command, tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, "qwen2_vl", shards=2)
    assert command("merge", pair.host, pair.donor, "--dtype", "float32", "-o", "out", "-q").code == 0
    sizes = [json.loads((f / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
             for f in (pair.host, tmp_path / "out")]  # fmt: skip
    assert sizes[1] == 2 * sizes[0]
    assert '"bfloat16"' not in (tmp_path / "out/config.json").read_text()
    assert {f.name for f in pair.host.glob("*.safetensors")} == {f.name for f in Path("out").glob("*.safetensors")}


SLOW = """
import sys, time
from surgery.cli.main import main
from surgery.arch.merging import tasks

stream = tasks.stream
tasks.stream = lambda *rest: time.sleep(0.05) or stream(*rest)
main()
"""


def test_ctrl_c_leaves_no_output_and_says_how_to_go_on(
    pair: Pair, plain: Path, command: Command, tmp_path: Path
) -> None:
    words = ["merge", str(pair.host), str(pair.donor), "-o", "out", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(tmp_path.glob(".out.surgery-*/journal.jsonl")):
        time.sleep(0.005)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in said
    assert "interrupted; the output is not there" in said and "--resume" in said
    assert not (tmp_path / "out").exists()
    assert command(*words, "--resume").code == 0
    assert weights(tmp_path / "out") == weights(plain) and [f for f in os.listdir() if f.startswith(".out")] == []


def test_a_file_that_may_not_grow_is_told_in_one_line(pair: Pair, tmp_path: Path) -> None:
    """A quota or a full disk, as the system tells it."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"sys.argv = ['surgery', 'merge', {str(pair.host)!r}, {str(pair.donor)!r}, '-o', 'out']\n"
        "from surgery.cli.main import main\nmain()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 5 and "no space left" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_folder_without_rights_is_told_in_one_line(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    (tmp_path / "home").mkdir(mode=0o700)  # somebody else's
    for folder in (pair.host, pair.donor):
        for file in folder.iterdir():
            file.chmod(0o644)
    temporary = Path(tempfile.gettempdir())
    for folder in (tmp_path, *tmp_path.parents, *pair.host.parents):
        if temporary in folder.parents:  # how many lie between depends on whether several processes test
            folder.chmod(0o755)
    code = (
        "import os, sys\n"
        "import numpy, surgery.cli.main, surgery.cli.merge, surgery.arch.merging.pair, surgery.arch.merging.tasks\n"
        f"os.environ['XDG_CONFIG_HOME'] = {str(tmp_path / 'home' / 'settings')!r}\n"
        "os.seteuid(65534)\n"
        f"sys.argv = ['surgery', 'merge', {str(pair.host)!r}, {str(pair.donor)!r}, '-o', 'locked/out']\n"
        "surgery.cli.main.main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 4 and "locked/out: Permission denied" in ended.stderr, ended.stderr
    assert list((tmp_path / "locked").iterdir()) == []
