"""What a result takes from its parents beside tensors, such as the tokenizer, is part of what it is known by."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vlm_pairs
from PIL import Image
from tiny_gguf import TEMPLATE, save_gguf

from surgery.arch.language import load
from surgery.errors import ResourceError
from surgery.store.writer import Workspace

OTHER = TEMPLATE.replace("<|im_start|>", "<|im_start|>other: ")


def template_in(folder: str) -> str:
    return str(json.loads(Path(folder, "tokenizer_config.json").read_text())["chat_template"])


@pytest.mark.usefixtures("own_cache")
def test_gguf_files_with_equal_tensors_are_not_one_parent(command: Callable[..., Any], tmp_path: Path) -> None:
    for name, changes in {"one": {}, "two": {"template": OTHER}, "three": {"context": 64}}.items():
        save_gguf(tmp_path / f"{name}.gguf", **changes)
    Path("r.yml").write_text(
        "surgery: 1\ninputs: {host: ./one.gguf}\noutputs: {made: ./made-1}\nsteps:\n"
        "  half: {op: cast, from: host, with: {dtype: bfloat16}, cache: true}\n"
        "  made: {op: cast, from: half, with: {dtype: float32}}\n"
    )
    assert command("run", "r.yml").code == 0
    ended = command("run", "r.yml", "--set", "inputs.host=./two.gguf", "-o", "made-2")
    assert ended.code == 0 and "equal result" not in ended.stderr, ended.stderr
    assert command("run", "r.yml", "--set", "inputs.host=./three.gguf", "-o", "made-3").code == 0
    assert [template_in(f"made-{n}") for n in (1, 2, 3)] == [TEMPLATE, OTHER, TEMPLATE]
    contexts = [json.loads(Path(f"made-{n}/config.json").read_text())["max_position_embeddings"] for n in (1, 2, 3)]
    assert contexts == [128, 128, 64]
    # What does not differ is found: in the cache, and where an equal result was put.
    again = command("run", "r.yml", "--set", "inputs.host=./two.gguf", "-o", "made-4")
    assert "an equal result was there" in again.stderr and template_in("made-4") == OTHER


@pytest.mark.usefixtures("own_cache")
def test_a_gguf_file_put_in_place_of_another_makes_another_result(command: Callable[..., Any], tmp_path: Path) -> None:
    for template in (TEMPLATE, OTHER):
        save_gguf(tmp_path / "host.gguf", template=template)
        for words in (["cast", "host.gguf", "--dtype", "bf16"], ["merge", "host.gguf", "made", "--alpha", "0.5"]):
            if words[0] == "merge" and not Path("made").exists():
                assert command("cast", "host.gguf", "--dtype", "bf16", "-o", "made").code == 0
            ended = command(*words)
            assert ended.code == 0 and "already done" not in ended.stderr, ended.stderr
            assert template_in(ended.stdout.strip()) == template
            assert "already done" in command(*words).stderr


@pytest.mark.usefixtures("own_cache")
def test_a_run_that_was_stopped_does_not_go_on_with_another_tokenizer(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise ResourceError("disk-full", "no space left", hint="free some")

    host = save_gguf(tmp_path / "host.gguf")
    Path("r.yml").write_text(
        "surgery: 1\ninputs: {host: ./host.gguf}\noutputs: {made: ./made}\nsteps:\n"
        "  made: {op: cast, from: host, with: {dtype: bfloat16}}\n"
    )
    for words in (["cast", host, "--dtype", "bf16", "-o", "out"], ["run", "r.yml"]):
        save_gguf(host)
        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "publish", full)
            assert command(*words).code == 5
        save_gguf(host, template=OTHER)
        ended = command(*words, "--resume")
        assert ended.code == 4 and "of another command or other parents" in ended.stderr, ended.stderr
        save_gguf(host)
        ended = command(*words, "--resume")
        assert ended.code == 0 and "tensors were reused" in ended.stderr, ended.stderr
        assert template_in(ended.stdout.strip()) == TEMPLATE


def edit(file: Path, *, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


EDITS = {
    "the tokenizer": ("tokenizer.json", '"version"', ' "version"'),
    "its settings": ("tokenizer_config.json", "{", '{"x": 1,'),
    "the config": ("config.json", '"max_position_embeddings": 512', '"max_position_embeddings": 256'),
    "how it generates": ("generation_config.json", "{", '{"temperature": 0.5,'),
    "the template": ("chat_template.jinja", "one", "two"),
}


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(tiny_llama, tmp_path / "llm")
    (copy / "chat_template.jinja").write_text("template one")
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")
    return copy


@pytest.mark.parametrize("what", EDITS)
@pytest.mark.usefixtures("own_cache")
def test_another_file_beside_the_weights_is_another_result(
    what: str, folder: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    name, old, new = EDITS[what]
    Path("r.yml").write_text(
        "surgery: 1\ninputs: {llm: ./llm}\noutputs: {made: ./made}\nsteps:\n"
        "  half: {op: cast, from: llm, with: {dtype: bfloat16}}\n"  # never written: its files come from the input's
        "  made: {op: rename, from: half, with: {rule: ['model.norm.*=model.last.*']}}\n"
    )
    words = (["cast", "llm", "--dtype", "bf16"], ["run", "r.yml", "--hash", "header"], ["run", "r.yml"])
    for command_line in words:
        first = command(*command_line, "-o", "first") if "run" in command_line else command(*command_line)
        assert first.code == 0, first.stderr
        before = Path(first.stdout.strip(), name).read_text()
        edit(folder / name, old=old, new=new)
        second = command(*command_line, "-o", "second") if "run" in command_line else command(*command_line)
        assert second.code == 0 and "equal result" not in second.stderr and "already" not in second.stderr
        assert Path(second.stdout.strip(), name).read_text() != before
        edit(folder / name, old=new, new=old)
        shutil.rmtree("first", ignore_errors=True)
        shutil.rmtree("second", ignore_errors=True)


@pytest.mark.usefixtures("own_cache")
def test_what_models_are_called_and_where_they_lie_changes_no_key(
    folder: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    """Cards name the models, and tokenizers that are made anew know where they came from."""
    keys = []
    for place in ("llm", "elsewhere/other"):
        if place != "llm":
            Path("elsewhere").mkdir()
            shutil.move("llm", place)
        model = {"model": str(tmp_path / place), "parameters": {"weight": 0.5}}
        other = {"model": f"{place}-2", "parameters": {"weight": 0.5}}
        shutil.copytree(place, f"{place}-2")
        document = {"merge_method": "linear", "models": [model, other], "tokenizer_source": "union"}
        Path("m.yml").write_text(json.dumps(document))
        for words in (["--config", "m.yml"], [place, f"{place}-2", "--alpha", "0.5"]):
            ended = command("merge", *words, "--json")
            assert ended.code == 0, ended.stderr
            keys.append(json.loads(ended.stdout)["key"])
    assert keys[:2] == keys[2:] and keys[0] != keys[1]


@pytest.mark.usefixtures("own_cache")
def test_how_a_model_is_cut_into_files_changes_no_key(command: Callable[..., Any], tmp_path: Path) -> None:
    keys = set()
    for shards in (1, 3):
        pair = vlm_pairs.make_pair(tmp_path / str(shards), "llava", shards=shards)
        ended = command("merge", pair.host, pair.donor, "--json")
        assert ended.code == 0, ended.stderr
        keys.add(json.loads(ended.stdout)["key"])
        assert Path(json.loads(ended.stdout)["path"], "model.safetensors.index.json").exists() is (shards > 1)
        shutil.rmtree(json.loads(ended.stdout)["path"])
    assert len(keys) == 1


@pytest.mark.usefixtures("own_cache")
def test_a_licence_that_a_card_states_is_part_of_the_result(folder: Path, command: Callable[..., Any]) -> None:
    shutil.copytree(folder, "other")
    assert command("merge", "llm", "other", "--alpha", "0.5").code == 0
    edit(Path("other/README.md"), old="license: mit", new="license: apache-2.0")
    ended = command("merge", "llm", "other", "--alpha", "0.5")
    assert ended.code == 0 and "already done" not in ended.stderr
    assert "apache-2.0" in Path(ended.stdout.strip(), "README.md").read_text()


@pytest.mark.usefixtures("own_cache")
def test_what_is_measured_depends_on_the_tokenizer_and_not_on_the_card(
    tiny_llava: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llava, tmp_path / "vlm")
    (model / "README.md").write_text("one")
    Image.new("RGB", (8, 8)).save("a.png")
    Path("data.jsonl").write_text(json.dumps({"id": "1", "question": "a?", "answer": "1", "image": "a.png"}) + "\n")
    Path("r.yml").write_text(
        "surgery: 1\ninputs: {vlm: ./vlm}\noutputs: {scores: scores}\nsteps:\n"
        "  scores: {op: eval-vqa, from: vlm, with: {data: data.jsonl, max_new_tokens: 1}}\n"
    )

    def state() -> tuple[str, str]:
        ended = command("plan", "r.yml", "--json")
        assert ended.code == 0, ended.stderr
        (row,) = json.loads(ended.stdout)["steps"]
        return row["state"], row["why"]

    assert command("run", "r.yml").code == 0
    (model / "README.md").write_text("two")
    assert state() == ("done", "")
    edit(model / "chat_template.jinja", old="{", new=" {")
    assert state() == ("run", "another chat_template.jinja")


def test_a_file_that_changes_while_it_is_copied_is_refused(
    folder: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Workspace.copy_file

    def meddling(self: Workspace, source: Path, relative: str) -> None:
        if relative == "chat_template.jinja":
            edit(folder / relative, old="one", new="two")
        copy(self, source, relative)

    monkeypatch.setattr(Workspace, "copy_file", meddling)
    ended = command("cast", "llm", "--dtype", "bf16", "-o", "out")
    assert ended.code == 3 and "chat_template.jinja: changed while it was read" in ended.stderr, ended.stderr
    assert not Path("out").exists()


CHAIN = """\
surgery: 1
inputs: {host: ./host.gguf}
outputs: {made: ./made}
steps:
  half: {op: cast, from: host, with: {dtype: bfloat16}FIRST}
  less: {op: scale, from: half, with: {by: 0.5, only: ['*mlp*']}}
  made: {op: cast, from: less, with: {dtype: float32}}
"""


@pytest.mark.parametrize("first", ["", ", cache: true"])
def test_planning_reads_no_tokenizer_of_a_gguf_file(
    first: str, command: Callable[..., Any], tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(base: Any) -> dict[str, bytes]:
        raise AssertionError("the tokenizer was read")

    host = save_gguf(tmp_path / "host.gguf")
    Path("r.yml").write_text(CHAIN.replace("FIRST", first))
    with monkeypatch.context() as patch:
        patch.setattr(load, "tokenizer_files", never)
        for words in (["plan", "r.yml"], ["run", "r.yml", "--dry-run"], ["cast", host, "--dtype", "bf16", "--dry-run"]):
            ended = command(*words)
            assert ended.code == 0 and "warning" not in ended.stderr, ended.stderr
    assert command("run", "r.yml").code == 0 and template_in("made") == TEMPLATE
    # Where the step between is gone, the last one is still known for what it is.
    shutil.rmtree(own_cache / "v1" / "nodes", ignore_errors=True)
    states = {row["name"]: row["state"] for row in json.loads(command("plan", "r.yml", "--json").stdout)["steps"]}
    assert states["made"] == "done" and states["half"] == "not needed", states
    assert "already the result" in command("run", "r.yml").stderr


def test_a_plan_that_needs_the_tokens_of_a_gguf_file_reads_them(command: Callable[..., Any], tmp_path: Path) -> None:
    host = save_gguf(tmp_path / "host.gguf")
    assert command("cast", host, "--dtype", "float32", "-o", "donor").code == 0
    Path("r.yml").write_text(
        "surgery: 1\ninputs: {host: ./host.gguf, donor: ./donor}\noutputs: {made: ./made}\nsteps:\n"
        "  half: {op: cast, from: host, with: {dtype: bfloat16}}\n"
        "  made: {op: merge, from: [half, donor], with: {vocab: by-token}}\n"
    )
    ended = command("plan", "r.yml")
    assert ended.code == 0, ended.stderr
    ended = command("run", "r.yml")
    assert ended.code == 0 and template_in("made") == TEMPLATE, ended.stderr
