"""`surgery probe layers` and `surgery sweep merge` as a user runs them."""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_errors import said_one_error
from PIL import Image

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def donor(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_language import save_relative

    return save_relative(tmp_path_factory.mktemp("donor") / "llm", tiny_llava)


FEW = ("--prompt", "bare", "--batch", "4", "--threads", "1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = []
    for i in range(8):
        row: dict[str, Any] = {"id": i, "question": f"{i}+1=", "answer": i + 1, "kind": "text"}
        if i % 2:
            Image.new("L", (8, 8), 20 * i).save(tmp_path / f"{i}.png")
            row |= {"image": f"{i}.png", "kind": "image"}
        rows.append(json.dumps(row))
    (tmp_path / "q.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "q.jsonl"


def is_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        picture.load()
        return picture.format == "PNG" and picture.width > 400


def test_a_profile_comes_as_table_json_csv_and_picture(
    command: Run, tiny_llava: Path, data: Path, tmp_path: Path
) -> None:
    before = hashlib.sha256((tiny_llava / "model.safetensors").read_bytes()).hexdigest()
    args = ("probe", "layers", tiny_llava, "--eval", data, "--ablate", "zero", *FEW, "--group-by", "kind")
    ended = command(*args, "-o", "p.csv", "--png", "p.png", "--json")
    assert ended.code == 0, ended.stderr
    shown = json.loads(ended.stdout)
    assert (shown["ablate"], shown["module"], shown["metric"], shown["items"]) == ("zero", "block", "nll", 8)
    keys = [(r["layer"], r["group"], r["n"]) for r in shown["rows"]]
    assert keys == [(n, g, c) for n in range(4) for g, c in (("all", 8), ("kind=image", 4), ("kind=text", 4))]
    for row in shown["rows"]:
        assert row["difference"] == pytest.approx(row["value"] - row["intact"])
        assert row["low"] <= row["difference"] <= row["high"]
    with (tmp_path / "p.csv").open() as file:
        assert [float(r["value"]) for r in csv.DictReader(file)] == [r["value"] for r in shown["rows"]]
    assert is_picture(tmp_path / "p.png")
    table = command(*args, "--layers", "1-2", "--module", "mlp")
    assert table.code == 0 and len(table.stdout.splitlines()) == 7 and "difference" in table.stdout
    assert hashlib.sha256((tiny_llava / "model.safetensors").read_bytes()).hexdigest() == before
    assert {p.name for p in tmp_path.iterdir()} == {"q.jsonl", "p.csv", "p.png", *(f"{i}.png" for i in (1, 3, 5, 7))}


def test_the_layers_of_the_model_itself_change_nothing(command: Run, tiny_llava: Path, data: Path) -> None:
    args = ("probe", "layers", tiny_llava, "--eval", data, "--ablate", "donor", "--donor", tiny_llava, *FEW, "--json")
    for metric in ("acc", "nll"):
        rows = json.loads(command(*args, "--metric", metric, "--max-new-tokens", "2").stdout)["rows"]
        assert {r["difference"] for r in rows} == {0}
        assert (rows[0]["low"] < 0 < rows[0]["high"]) == (metric == "acc")  # no flips among eight prove little


def test_a_sweep_chooses_on_one_part_and_reports_on_the_other(
    command: Run, tiny_llava: Path, donor: Path, data: Path, tmp_path: Path
) -> None:
    args = ("sweep", "merge", tiny_llava, donor, "--eval", data, *FEW, "--metric", "nll", "--alpha", "1,0.9,0.5")
    ended = command(*args, "--png", "s.png", "-o", "s.csv", "--json", "--group-by", "kind")
    assert ended.code == 0, ended.stderr
    shown = json.loads(ended.stdout)
    everyone = [r for r in shown["rows"] if r["group"] == "all"]
    assert [(r["alpha"], r["n"], r["layers"]) for r in everyone] == [(a, 4, "all") for a in (1.0, 0.9, 0.5)]
    assert everyone[0]["difference"] == 0
    best = min(everyone, key=lambda r: r["value"])
    assert shown["chosen"]["alpha"] == best["alpha"] and {r["n"] for r in shown["chosen"]["test"]} == {4, 2}
    assert is_picture(tmp_path / "s.png") and len((tmp_path / "s.csv").read_text().splitlines()) == 10
    table = command(*args, "--window", "2", "--stride", "2", "--dev", "0", "--alpha", "0.5", "--png", "w.png")
    assert table.code == 0 and "0.50 / 0.50" in table.stdout and "chosen" not in table.stdout
    assert len(table.stdout.splitlines()) == 3 and is_picture(tmp_path / "w.png")


def test_what_is_not_finite_is_said_and_not_drawn(
    command: Run, tiny_llava: Path, donor: Path, data: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(donor, tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    next(t for n, t in tensors.items() if "layers.1.mlp.up_proj" in n)[0, 0] = float("nan")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    args = ("probe", "layers", tiny_llava, "--eval", data, *FEW, "--ablate", "donor", "--donor", "broken")
    ended = command(*args, "--json", "--png", "p.png")
    rows = json.loads(ended.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["rows"]
    assert [r["layer"] for r in rows if r["difference"] is None] == [1] and is_picture(tmp_path / "p.png")
    assert "1 of 4 rows are not finite" in ended.stderr
    ended = command(*args, "--layers", "1", "--png", "none.png")
    assert ended.code == 0 and "not finite" in ended.stdout and not (tmp_path / "none.png").exists()
    sweep = ("sweep", "merge", tiny_llava, "broken", "--eval", data, *FEW, "--metric", "nll")
    shown = json.loads(command(*sweep, "--alpha", "1,0.5", "--json").stdout)
    assert shown["chosen"]["alpha"] == 1
    ended = command(*sweep, "--alpha", "0.5")
    assert ended.code == 0 and "finite for no merge: none is chosen" in ended.stderr


def test_where_nothing_can_be_written_is_said_before_the_work(
    command: Run, tiny_llava: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    ended = command("probe", "layers", tiny_llava, "--eval", data, *FEW, "-o", "file/rows.csv")
    assert "cannot write in" in said_one_error(ended, "output.not-writable")


@pytest.mark.parametrize("kind", ["probe", "sweep"])
def test_a_killed_run_goes_on_to_the_same_table(
    command: Run, tiny_llava: Path, donor: Path, data: Path, tmp_path: Path, kind: str
) -> None:
    args: tuple[Any, ...] = ("probe", "layers", tiny_llava, "--eval", data, *FEW)
    if kind == "sweep":
        args = ("sweep", "merge", tiny_llava, donor, "--eval", data, *FEW, "--metric", "nll", "--alpha", "1,0.8,0.4")
    whole = command(*args, "--records", "r.jsonl", "--json")
    assert whole.code == 0, whole.stderr
    lines = (tmp_path / "r.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == (6 if kind == "probe" else 4)
    (tmp_path / "r.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:9])
    again = command(*args, "--records", "r.jsonl", "--resume", "--json")
    assert (again.code, again.stdout) == (0, whole.stdout), again.stderr
    assert (tmp_path / "r.jsonl").read_bytes() == b"".join(lines)
    said_one_error(command(*args, "--records", "r.jsonl"), "output.exists")
    assert "batch" in said_one_error(
        command(*args, "--batch", "2", "--records", "r.jsonl", "--resume"), "usage.other-settings"
    )
    data.write_text(data.read_text().replace("0+1=", "0+2="))
    assert "items" in said_one_error(command(*args, "--records", "r.jsonl", "--resume"), "usage.other-settings")
    said_one_error(command(*args, "--resume"), "usage.resume")


def test_a_dry_run_reads_headers_and_writes_nothing(command: Run, tiny_llava: Path, donor: Path, data: Path) -> None:
    ended = command("probe", "layers", tiny_llava, "--eval", data, "--layers", "2-", "--dry-run")
    assert ended.code == 0 and "layers   2, 3" in ended.stdout and "8 items 3 times" in ended.stdout
    args = ("sweep", "merge", tiny_llava, donor, "--eval", data, "--window", "2", "--alpha", "1,0.5", "--dry-run")
    shown = json.loads(command(*args, "--json").stdout)
    assert (shown["items"], shown["measurements"], shown["layers"]) == (8, 4, ["0-1", "1-2", "2-3"])


def test_refusals(
    command: Run, tiny_llava: Path, tiny_llama: Path, tiny_dit: Path, donor: Path, data: Path, tmp_path: Path
) -> None:
    probe = ("probe", "layers", tiny_llava, "--eval", data, *FEW)
    sweep = ("sweep", "merge", tiny_llava, donor, "--eval", data, *FEW)
    said_one_error(command(*probe, "--ablate", "donor"), "usage.ablate")
    said_one_error(command(*probe, "--ablate", "zero", "--base", tiny_llama), "usage.ablate")
    said_one_error(command(*probe, "--ablate", "donor", "--donor", tiny_llama, "--base", tiny_llama), "usage.ablate")
    said_one_error(command(*probe, "--ablate", "noise"), "usage.ablate")
    said_one_error(command(*probe, "--module", "norm"), "usage.module")
    said_one_error(command(*probe, "--layers", "9"), "usage.layers")
    said_one_error(command(*probe, "--group-by", "sort"), "usage.group")
    said_one_error(command(*probe, "--metric", "bleu"), "usage.metric")
    said_one_error(command(*probe, "--png", "x.jpg"), "usage.out")
    said_one_error(command(*sweep, "--alpha", "1,x"), "usage.alpha")
    said_one_error(command(*sweep, "--alpha", "1.5"), "usage.alpha")
    said_one_error(command(*sweep, "--dev", "1"), "usage.dev")
    said_one_error(command(*sweep, "--stride", "2"), "usage.window")
    said_one_error(command(*sweep, "--window", "9"), "usage.window")
    assert command("sweep", "merge", tiny_llava, tiny_dit, "--eval", data, *FEW).code == 3
    said_one_error(command("sweep", "merge", tiny_llava, tiny_llama, "--eval", data, *FEW), "checkpoint.unrelated")
    said_one_error(command("probe", "layers", tiny_dit, "--eval", data), "checkpoint.not-language")
    (tmp_path / "p.csv").write_text("mine")
    assert (
        said_one_error(command(*probe, "-o", "p.csv"), "output.exists") and (tmp_path / "p.csv").read_text() == "mine"
    )
