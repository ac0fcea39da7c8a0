"""surgery adaptvis attach, verify and ask, as people run them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_language import save_llava

NUMBERS = ("--alpha1", "0.5", "--alpha2", "1.5", "--beta", "0.4")


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("adaptvis") / "llava")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (24, 24), (200, 40, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_attach_verify_ask(command: Callable, llava: Path, picture: Path, tmp_path: Path) -> None:
    made = command("adaptvis", "attach", llava, "-o", "av", *NUMBERS, "--layers", "0-2")
    assert (made.code, made.stdout) == (0, "av\n"), made.stderr
    assert (tmp_path / "av/model.safetensors").read_bytes() == (llava / "model.safetensors").read_bytes()
    checked = command("adaptvis", "verify", "av", "--json")
    assert checked.code == 0 and json.loads(checked.stdout)["faults"] == []
    answered = command("adaptvis", "ask", "av", picture, "where", "--max-new-tokens", "4", "--json")
    row = json.loads(answered.stdout)
    assert answered.code == 0 and row["alpha"] in (0.5, 1.5) and 0 < row["confidence"] < 1
    assert "layers 0-2" in row["how"]
    log = command("log", "av")
    assert "adaptvis-attach v1" in log.stdout and "(root)" in log.stdout


def test_dry_run_names_family_patch_and_files(command: Callable, llava: Path, tmp_path: Path) -> None:
    shown = command("adaptvis", "attach", llava, "--scale", "0.8", "--dry-run")
    assert shown.code == 0 and not (tmp_path / "av").exists()
    assert "llava, text layers x heads 4 x 4, image token 4" in shown.stdout
    assert "alpha 0.8 for every sample" in shown.stdout and "trust_remote_code=True" in shown.stdout
    assert "tensors unchanged" in shown.stdout and "0 B new" in shown.stdout


def test_ask_steers_and_explains(command: Callable, llava: Path, picture: Path) -> None:
    base = ("adaptvis", "ask", llava, picture, "where", "--max-new-tokens", "3")
    plain = command(*base)
    assert plain.code == 0 and "unsteered" in plain.stderr
    assert command(*base, "--alpha", "1").stdout == plain.stdout
    shown = command(*base, "--alpha", "0", "--explain", "--json")
    row = json.loads(shown.stdout)
    assert [r["layer"] for r in row["mass"]] == [0, 1, 2, 3] and 0 < row["share"] < 1
    assert any(abs(r["before"] - r["after"]) > 1e-4 for r in row["mass"])
    told = command(*base, *NUMBERS, "--explain")
    assert "confidence" in told.stderr and "first token, unsteered" in told.stdout and "layer" in told.stdout


def test_ask_takes_rules_as_data(command: Callable, llava: Path, picture: Path, tmp_path: Path) -> None:
    rules = [{"preset": "knock-out"}, {"mode": "bias", "keys": "text", "text": "red", "heads": "1:0-2", "alpha": 3}]
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    base = ("adaptvis", "ask", llava, picture, "where is red", "--max-new-tokens", "3", "--json")
    ruled = command(*base, "--rules", "rules.json", "--explain")
    row = json.loads(ruled.stdout)
    assert ruled.code == 0, ruled.stderr
    assert row["how"] == "steered by 2 rules" and len(row["mass"]) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["attach", "LLAVA"], 2, "--from t.json"),
        (["attach", "LLAVA", *NUMBERS, "--layers", "0-9"], 2, "valid: 0-3"),
        (["attach", "LLAVA", *NUMBERS, "--heads", "1:7"], 2, "valid: 0-3"),
        (["attach", "LLAVA", "--scale", "nan"], 2, "scale is nan"),
        (["attach", "LLAVA", "--alpha1", "-1", "--alpha2", "1", "--beta", "0.4"], 2, "not a number from 0 up"),
        (["attach", "LLAVA", "--from", "nothing.json"], 2, "nothing.json"),
        (["attach", "dit-digits", *NUMBERS], 3, "not an image-text-to-text checkpoint"),
        (["attach", "LLAVA", *NUMBERS, "-o", "taken"], 4, "taken"),
        (["verify", "LLAVA"], 3, "carries no patch"),
        (["ask", "LLAVA", "none.png", "where", "--alpha", "0.5"], 3, "none.png"),
        (["ask", "LLAVA", "text.png", "where", "--alpha", "0.5"], 3, "not an image"),
        (["ask", "LLAVA", "red.png", "where", "--alpha", "-1"], 2, "not a number from 0 up"),
        (["ask", "LLAVA", "red.png", "where", "--alpha1", "0.5"], 2, "belong together"),
        (["ask", "LLAVA", "red.png", "where", "--alpha", "1", *NUMBERS], 2, "exclude each other"),
        (["ask", "LLAVA", "red.png", "where", *NUMBERS[:-1], "3"], 2, "not in [0, 1.01]"),
        (["ask", "LLAVA", "red.png", "where", "--rules", "none.json"], 2, "none.json"),
        (["ask", "LLAVA", "red.png", "where", "--alpha", "2", "--heads", "7"], 2, "LAYER:HEADS"),
        (["ask", "digits-classifier", "red.png", "where", "--alpha", "2"], 3, "no image token id"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_ends_in_one_line_and_a_hint(
    command: Callable, llava: Path, picture: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    (tmp_path / "text.png").write_text("no picture")
    before = sorted(p.name for p in tmp_path.iterdir())
    ended = command("adaptvis", *(str(llava) if a == "LLAVA" else a for a in arguments))
    assert ended.code == code, ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert lines[-2].startswith("error[") and lines[-1].startswith("hint:") and words in ended.stderr
    assert "Traceback" not in ended.stderr and ended.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_damaged_patch_ends_with_exit_1(command: Callable, llava: Path, tmp_path: Path) -> None:
    command("adaptvis", "attach", llava, "-o", "av", *NUMBERS)
    with (tmp_path / "av/custom_generate/attention.py").open("a") as code:
        code.write("\n")
    ended = command("adaptvis", "verify", "av", "--files-only")
    assert ended.code == 1 and "custom_generate/attention.py" in ended.stdout and "error[verify.patch]" in ended.stderr


def test_attach_says_what_is_patched_and_how_to_load_it(command: Callable, llava: Path, tmp_path: Path) -> None:
    made = command("adaptvis", "attach", llava, "-o", "av", *NUMBERS, "--link", "hard")
    assert (made.code, made.stdout) == (0, "av\n")
    assert "text layers x heads 4 x 4" in made.stderr and "tensors unchanged" in made.stderr
    assert "trust_remote_code=True" in made.stderr and "reused" not in made.stderr
    assert (tmp_path / "av/model.safetensors").samefile(llava / "model.safetensors")


@pytest.mark.parametrize(("key", "value", "said"), [("zzz", 1, "zzz"), ("version", 2, "version 2"), ("beta", [], "")])
def test_a_stored_patch_that_is_not_understood_is_refused_by_all(
    command: Callable, llava: Path, picture: Path, tmp_path: Path, key: str, value: object, said: str
) -> None:
    command("adaptvis", "attach", llava, "-o", "av", *NUMBERS)
    config = json.loads((tmp_path / "av/config.json").read_text())
    config["adaptvis"][key] = value
    (tmp_path / "av/config.json").write_text(json.dumps(config))
    row = {"id": "1", "image": "red.png", "question": "where", "options": ["a", "b"], "answer": "a"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    for words in (
        ("verify", "av"),
        ("ask", "av", picture, "where"),
        ("map", "av", picture, "where", "-o", "heat.png"),
        ("eval", "av", "one.jsonl", "--method", "base,adapt"),
    ):
        failed = command("adaptvis", *words)
        assert failed.code == 3 and "error[checkpoint.patch]: av: config.json, adaptvis" in failed.stderr, failed.stderr
        assert said in failed.stderr and "Traceback" not in failed.stderr
    assert not (tmp_path / "heat.png").exists()


def test_a_picture_that_is_not_there_is_named_before_loading(command: Callable, llava: Path, tmp_path: Path) -> None:
    for words in (("ask", llava, "no.png", "where"), ("map", llava, "no.png", "where", "-o", "heat.png")):
        failed = command("adaptvis", *words)
        assert failed.code == 3 and "error[checkpoint.no-image]: no.png: no such file" in failed.stderr
    assert not (tmp_path / "heat.png").exists()


@pytest.mark.parametrize("group", [("adaptvis",), ("adaptvis", "data")])
def test_groups_show_a_command_that_runs(command: Callable, group: tuple[str, ...]) -> None:
    shown = command(*group, "--help").stdout
    assert "surgery adaptvis data make -o scenes\n" in shown.replace("  ", "")
    listed = command("--help").stdout
    assert "scenes" not in listed.split("adaptvis", 1)[1].splitlines()[0]
