"""`surgery eval vqa` and `eval compare`: records, summaries, resuming, refusals, other harnesses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_errors import said_one_error
from PIL import Image

Run = Callable[..., Any]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten questions, half of them with a picture, in two categories."""
    rows = []
    for i in range(10):
        row: dict[str, Any] = {"id": f"q{i}", "question": f"{i}+1=", "answer": i + 1, "kind": "text"}
        if i % 2:
            Image.new("L", (8, 8), 20 * i).save(tmp_path / f"{i}.png")
            row |= {"image": f"{i}.png", "question": "read", "answer": "cat", "kind": "image"}
        rows.append(json.dumps(row))
    (tmp_path / "q.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "q.jsonl"


@pytest.fixture
def ask(command: Run, tiny_llava: Path, data: Path) -> Run:
    few = ("--prompt", "bare", "--max-new-tokens", "3", "--batch", "4", "--threads", "1")
    return lambda *more: command("eval", "vqa", tiny_llava, "--data", data, *few, *more)


def test_records_and_summary_agree(ask: Run, tmp_path: Path) -> None:
    ended = ask("-o", "r.jsonl", "--group-by", "kind", "--json")
    assert ended.code == 0, ended.stderr
    shown = json.loads(ended.stdout)
    head, *rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (shown["n"], {r["id"] for r in rows}) == (10, {f"q{i}" for i in range(10)})
    assert shown["correct"] == sum(r["correct"] for r in rows)
    assert set(shown["groups"]["kind"]) == {"text", "image"} and shown["groups"]["kind"]["text"]["n"] == 5
    assert shown["interval"][0] <= shown["accuracy"] <= shown["interval"][1]
    assert shown["unparsed"] == sum(r["extracted"] is None for r in rows) / 10
    assert {"response", "extracted", "answer", "prompt", "tokens", "cut", "groups"} <= set(rows[0])
    assert head["settings"]["prompt"] == "bare" and head["settings"]["model"].startswith("sha256:")
    table = ask("--group-by", "kind")
    assert table.code == 0 and "kind=image" in table.stdout and "unparsed" in table.stdout.splitlines()[0]


def test_a_killed_run_goes_on_to_the_same_records(ask: Run, tmp_path: Path) -> None:
    assert ask("-o", "r.jsonl").code == 0
    whole = (tmp_path / "r.jsonl").read_bytes()
    said_one_error(ask("-o", "r.jsonl"), "output.exists")
    lines = whole.splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    assert ask("-o", "r.jsonl", "--resume").code == 0
    again = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    kept = {row["id"]: row for row in map(json.loads, lines[1:])}
    assert {row["id"]: row for row in again[1:]} == kept
    assert "max_new_tokens 3, now 5" in said_one_error(
        ask("-o", "r.jsonl", "--resume", "--max-new-tokens", "5"), "usage.other-settings"
    )


def test_changed_questions_are_not_mixed_in(ask: Run, data: Path) -> None:
    assert ask("-o", "r.jsonl").code == 0
    data.write_text(data.read_text().replace("0+1=", "9+9="))
    assert "'q0'" in said_one_error(ask("-o", "r.jsonl", "--resume"), "usage.other-data")


def test_a_larger_limit_goes_on_from_a_smaller_one(ask: Run, tmp_path: Path) -> None:
    assert ask("-o", "r.jsonl", "--limit", "4").code == 0
    before = (tmp_path / "r.jsonl").read_bytes()
    shown = json.loads(ask("-o", "r.jsonl", "--limit", "7", "--resume", "--json").stdout)
    assert shown["n"] == 7 and (tmp_path / "r.jsonl").read_bytes().startswith(before)


def test_a_dry_run_shows_the_prompt_and_writes_nothing(ask: Run, tmp_path: Path) -> None:
    ended = ask("--dry-run", "-o", "r.jsonl")
    assert ended.code == 0 and "<s>0+1=>" in ended.stdout and "10: 5 integer, 5 string" in ended.stdout
    assert not (tmp_path / "r.jsonl").exists()


def test_refusals(ask: Run, command: Run, tiny_llama: Path, tiny_dit: Path, data: Path) -> None:
    said_one_error(ask("--group-by", "sort"), "usage.group")
    said_one_error(ask("--resume"), "usage.resume")
    said_one_error(ask("-o", "r.csv"), "usage.out")
    said_one_error(ask("--chat-template", "gone.jinja"), "checkpoint.unreadable")
    said_one_error(ask("--dtype", "int3"), "usage.dtype")
    said_one_error(ask("--tasks", "x"), "usage.tasks")
    said_one_error(command("eval", "vqa", tiny_llama, "--data", data), "usage.no-images")
    said_one_error(command("eval", "vqa", tiny_dit, "--data", data), "checkpoint.not-language")
    said_one_error(command("eval", "vqa", tiny_llama), "usage.data")
    assert ask("--prompt", "odd").code == 2


def records(path: Path, right: dict[str, bool], **settings: Any) -> Path:
    head = {"surgery_records": 1, "kind": "vqa", "settings": {"model": path.name, "prompt": "direct", **settings}}
    rows = [
        {"id": k, "correct": v, "extracted": "1", "answer": "1", "asked": k, "groups": {"half": str(int(k) // 50)}}
        for k, v in right.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    return path


def test_compare_pairs_the_items(command: Run, tmp_path: Path) -> None:
    a = records(tmp_path / "a.jsonl", {str(i): i < 60 for i in range(100)})
    b = records(tmp_path / "b.jsonl", {str(i): 5 <= i < 80 for i in range(100)})
    shown = json.loads(command("eval", "compare", a, b, "--group-by", "half", "--json").stdout)
    assert (shown["n"], shown["lost"], shown["gained"]) == (100, 5, 20)
    assert shown["difference"] == pytest.approx(0.15)
    assert shown["p"] == pytest.approx(2 * sum(__import__("math").comb(25, k) for k in range(6)) / 2**25)
    low, high = shown["interval"]
    assert 0 < low < 0.15 < high < 0.3
    assert {f["id"] for f in shown["flips"]} == {str(i) for i in (*range(5), *range(60, 80))}
    halves = shown["groups"]["half"]
    assert (halves["0"]["lost"], halves["1"]["gained"]) == (5, 20)
    b.write_text(
        b.read_text().replace(
            '"id": "0", "correct": false, "extracted": "1"',
            f'"id": "0", "correct": false, "extracted": "{"x" * 20_000}"',
        )
    )
    text = command("eval", "compare", a, b, "--flips", "3")
    assert f"{'x' * 59}…" in text.stdout and "x" * 60 not in text.stdout
    assert text.code == 0 and text.stdout.count("wrong") == 3 and "22 more flips" in text.stderr


def test_compare_says_what_else_differs_and_refuses_other_questions(command: Run, tmp_path: Path) -> None:
    a = records(tmp_path / "a.jsonl", {str(i): True for i in range(10)})
    b = records(tmp_path / "b.jsonl", {str(i): True for i in range(5)}, prompt="cot")
    ended = command("eval", "compare", a, b)
    assert ended.code == 0 and "prompt: direct against cot" in ended.stderr and "5 items" in ended.stderr
    shown = json.loads(command("eval", "compare", a, b, "--json").stdout)
    assert shown["n"] == 5 and shown["p"] == 1 and shown["interval"] == [0, 0]
    assert shown["score_interval"][1] > 0.3  # nothing flipped, and five items prove little
    b.write_text(b.read_text().replace('"asked": "3"', '"asked": "other"'))
    said_one_error(command("eval", "compare", a, b), "usage.compare")
    records(b, {"77": True})
    said_one_error(command("eval", "compare", a, b), "usage.compare")
    said_one_error(command("eval", "compare", a, tmp_path / "gone.jsonl"), "checkpoint.unreadable")
    head = json.dumps({"surgery_records": 1, "kind": "probe-layers", "settings": {}})
    b.write_text(head + "\n" + json.dumps({"id": "0", "values": [1.0]}) + "\n")
    assert "it holds probe-layers" in said_one_error(command("eval", "compare", b, b), "usage.compare")


def test_other_harnesses_get_exact_commands(command: Run, tiny_llava: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    ended = command(
        "eval", "vqa", tiny_llava, "--backend", "lmms-eval", "--tasks", "mathvista_testmini_cot,mmstar", "--dry-run"
    )
    assert ended.code == 0
    assert (
        f"-m lmms_eval --model llava_hf --model_args pretrained={tiny_llava} --tasks mathvista_testmini_cot,mmstar"
        in ended.stdout
    )
    assert (
        "judge model behind an API for mathvista_testmini_cot:" in ended.stderr
        and "pip install lmms-eval" in ended.stderr
    )
    error_line = command("eval", "vqa", tiny_llava, "--backend", "lmms-eval", "--tasks", "mmstar")
    assert error_line.code == 5 and "error[resource.missing-package]" in error_line.stderr
    said_one_error(command("eval", "vqa", tiny_llava, "--backend", "vlmevalkit", "--tasks", "MMStar"), "usage.backend")
    said_one_error(command("eval", "vqa", tiny_llava, "--backend", "lmms-eval"), "usage.tasks")
    local = ("--tasks", "mmstar", "--data", "q.jsonl")
    said_one_error(command("eval", "vqa", tiny_llava, "--backend", "lmms-eval", *local), "usage.data")
    said_one_error(command("eval", "vqa", tiny_llava, "--backend", "helm", "--tasks", "x"), "usage.backend")


def test_vlmevalkit_gets_its_config_and_runs_from_a_checkout(command: Run, tiny_llava: Path, tmp_path: Path) -> None:
    import shutil

    model = Path(shutil.copytree(tiny_llava, tmp_path / "next"))
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["LlavaNextForConditionalGeneration"]}
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "run.py").write_text(
        "import json, sys\nc = json.load(open(sys.argv[2]))\nprint(c)\nsys.exit(0 if 'MMStar' in c['data'] else 3)\n"
    )
    args = ("eval", "vqa", model, "--backend", "vlmevalkit", "--checkout", tmp_path / "kit", "-o", "out")
    shown = json.loads(
        command(*args, "--tasks", "MathVista_MINI,MathVerse_MINI_Text_Lite", "--dry-run", "--json").stdout
    )
    (written,) = (json.loads(text) for text in shown["files"].values())
    assert written == {
        "model": {"next": {"class": "LLaVA_Next", "model_path": str(model)}},
        "data": {
            "MathVista_MINI": {"class": "MathVista", "dataset": "MathVista_MINI"},
            "MathVerse_MINI_Text_Lite": {"class": "MathVerse", "dataset": "MathVerse_MINI_Text_Lite"},
        },
    }
    assert shown["installed"] is True and not (tmp_path / "out").exists()
    ended = command(*args, "--tasks", "MMStar")
    assert (ended.code, ended.stdout) == (0, "out\n"), ended.stderr
    assert command(*args, "--tasks", "MathVista_MINI").code == 1
    renamed = Path(shutil.copytree(model, tmp_path / "llava-34b"))
    told = command("eval", "vqa", renamed, "--backend", "vlmevalkit", "--tasks", "MMStar", "--dry-run", "-o", "x")
    assert "chooses it by '34b' in the path" in told.stderr
    said_one_error(command(*args, "--tasks", "Unheard"), "usage.tasks")
