"""`surgery graft` with training, and grafts of grafts, pipelines and parts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_errors import said_one_error
from graft_runs import digest, listing, small_pictures, training

from surgery.store.checkpoint import open_checkpoint

Run = Callable[..., Any]
STAGE_1 = ("--samples", "64", "--steps", "2", "--batch", "16")
FINETUNE = ("--finetune-steps", "1", "--finetune-batch", "8")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a short stage 1 on a few images of noise."""
    return ("--data", small_pictures(tmp_path_factory.mktemp("few")), *STAGE_1)


# --- training --------------------------------------------------------------------------------------------------------


def test_both_stages_run_on_the_shipped_model_and_are_recorded(command: Run, tmp_path: Path) -> None:
    ended = command(
        "graft",
        "-r",
        "attn=hyena",
        "-l",
        "1,3",
        "dit-digits",
        "--data",
        "digits",
        *STAGE_1,
        *FINETUNE,
        "-o",
        "g",
        "--workers",
        "2",
    )
    assert (ended.code, ended.stdout) == (0, "g\n"), ended.stderr
    assert "warning" not in ended.stderr
    record = training(tmp_path / "g")
    assert [(row["block"], row["op"]) for row in record["stage1"]] == [(1, "hyena-x"), (3, "hyena-x")]
    assert all(row["curve"][0]["step"] == 0 and row["rel_err"] < 2 for row in record["stage1"])
    assert record["data"] == "digits" and record["images"] == 1500
    assert record["settings"]["steps"] == 2 and record["settings"]["finetune_lr"] == 3e-4
    assert record["val_loss_original"] == pytest.approx(0.223, abs=0.003) and record["val_loss"] < 0.4
    assert command("verify", "g").code == 0
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_workers_do_not_change_what_training_makes(command: Run, tiny_dit: Path, tmp_path: Path, short: tuple) -> None:
    for workers in ("1", "2"):
        args = ("graft", "-r", "attn=hyena", "-l", "1,3", tiny_dit, *short, "-o", workers, "--workers", workers)
        assert command(*args).code == 0
    assert digest(tmp_path / "1") == digest(tmp_path / "2")
    assert training(tmp_path / "1") == training(tmp_path / "2")


def test_stage_1_alone_leaves_every_other_tensor_as_it_was(
    command: Run, tiny_dit: Path, tmp_path: Path, short: tuple
) -> None:
    assert command("graft", "-r", "mlp=r3", "-l", "2", tiny_dit, *short, "--init", "distill", "-o", "g").code == 0
    old, new = open_checkpoint(tiny_dit).tensor_digests, open_checkpoint(tmp_path / "g").tensor_digests
    assert {n for n in new if new[n] != old.get(n)} == {n for n in new if n.startswith("transformer_blocks.2.ff.")}


@pytest.mark.parametrize(
    "more",
    [
        ("--lr", "1e30"),
        ("--lr", "1e30", "--workers", "2"),
        ("--capture", "online", "--lr", "1e30"),
        ("--finetune-steps", "3", "--finetune-batch", "8", "--finetune-lr", "1e30"),
        ("--finetune-steps", "1", "--finetune-batch", "8", "--finetune-lr", "1e30"),
    ],
    ids=["stage1", "stage1-forked", "stage1-online", "stage2", "last-step"],
)
def test_a_loss_that_is_not_finite_ends_the_run_and_publishes_nothing(
    command: Run, tiny_dit: Path, tmp_path: Path, short: tuple, more: tuple[str, ...]
) -> None:
    ended = command("graft", "-r", "attn=hyena", "-l", "1,3", tiny_dit, *short, *more, "-o", "g")
    assert ended.code == 9
    said_one_error(ended, "train.non-finite-loss")
    assert not (tmp_path / "g").exists()
    (kept,) = tmp_path.iterdir()  # the hidden state, with the operators that were finished or the best so far
    assert kept.name.startswith(".g.surgery-")
    assert list((kept / "scratch" / "stage1" / "operators").iterdir())


# --- composition -----------------------------------------------------------------------------------------------------


def grafts_of(folder: Path) -> list[tuple[int, str, str]]:
    listed = json.loads((folder / "config.json").read_text())["surgery_grafts"]
    return [(e["block"], e["slot"], e["op"]) for e in listed]


def test_grafting_a_graft_merges_the_lists_and_keeps_both_edges(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    steps = {
        "a": ("attn=hyena@1,3", tiny_dit),
        "b": ("mlp=r3@3", "a"),  # the other slot
        "c": ("attn=swa:w=2@3,5", "b"),  # one slot again, one new
    }
    for name, (replace, source) in steps.items():
        assert command("graft", "-r", replace, source, "-o", name).code == 0
    assert grafts_of(tmp_path / "b") == [(1, "attn", "hyena-x"), (3, "attn", "hyena-x"), (3, "mlp", "mlp")]
    assert grafts_of(tmp_path / "c") == [
        (1, "attn", "hyena-x"),
        (3, "attn", "swa"),
        (3, "mlp", "mlp"),
        (5, "attn", "swa"),
    ]
    log = json.loads(command("log", "c", "--json").stdout)
    edges = [log, *log["ancestors"].values()]
    assert sorted(e["steps"][-1]["params"]["replace"][0] for e in edges if e["steps"][-1]["op"] == "graft") == sorted(
        r for r, _ in steps.values()
    )
    assert log["parents"]["b"]["digest"] == f"sha256:{digest(tmp_path / 'b')}"
    assert "graft v1" in command("log", "c").stdout
    assert len([p for p in (tmp_path / "c").iterdir() if p.suffix == ".py"]) == 1
    assert command("verify", "c").code == 0


def test_a_composed_graft_runs_and_equals_one_graft_of_everything(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    import torch

    from surgery.api import load

    both = ("-r", "attn=swa:w=20@1", "-r", "mlp=mlp:r=6@4")
    assert command("graft", *both[:2], tiny_dit, "--init", "copy", "-o", "a").code == 0
    assert command("graft", *both[2:], "a", "--init", "copy", "--seed", "7", "-o", "b").code == 0
    assert command("graft", *both, tiny_dit, "--init", "copy", "--seed", "7", "-o", "once").code == 0
    assert digest(tmp_path / "b") == digest(tmp_path / "once")
    assert (tmp_path / "b" / "config.json").read_bytes() == (tmp_path / "once" / "config.json").read_bytes()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"timestep": torch.tensor([3, 900]), "class_labels": torch.tensor([1, 10])}
    with torch.no_grad():
        old, new = (load(p)(x, **given).sample for p in (tiny_dit, tmp_path / "b"))
    # A window over all tokens and a wider MLP with zero outputs change nothing but the order of sums.
    assert (old - new).abs().max() < 1e-5


def test_a_graft_can_be_distilled_on_a_graft(command: Run, tiny_dit: Path, tmp_path: Path, short: tuple) -> None:
    assert command("graft", "-r", "attn=hyena@1", tiny_dit, "-o", "a").code == 0
    ended = command("graft", "-r", "attn=hyena-y@1", "-r", "mlp=r3@0", "a", *short, *FINETUNE, "-o", "b")
    assert ended.code == 0, ended.stderr
    assert [(r["block"], r["slot"]) for r in training(tmp_path / "b")["stage1"]] == [(0, "mlp"), (1, "attn")]
    assert command("sample", "b", "--n", "2", "--steps", "2", "-o", "b.npz").code == 0


def test_grafting_inside_a_pipeline_keeps_its_other_parts(command: Run, tiny_pipeline: Path, tmp_path: Path) -> None:
    assert command("graft", "-r", "attn=hyena", tiny_pipeline, "-o", "p").code == 0
    for name in ("vae/diffusion_pytorch_model.safetensors", "vae/config.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "p" / name).read_bytes() == (tiny_pipeline / name).read_bytes()
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    module, kind = index["transformer"]
    assert kind == "SurgeryDiTTransformer2DModel" and (tmp_path / "p" / "transformer" / f"{module}.py").is_file()
    again = command("graft", "-r", "mlp=r3@0", "p", "-o", "q")
    assert again.code == 0 and len(grafts_of(tmp_path / "q" / "transformer")) == 4
    assert command("verify", "q").code == 0


def test_one_part_of_a_pipeline_becomes_a_model_of_its_own(command: Run, tiny_pipeline: Path, tmp_path: Path) -> None:
    ended = command("graft", "-r", "attn=hyena", f"{tiny_pipeline}:transformer", "-o", "t")
    assert ended.code == 0, ended.stderr
    names = listing(tmp_path / "t")
    assert {n for n in names if not n.endswith(".py")} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "scheduler_config.json",
        "surgery.json",
    }
    assert command("sample", "t", "--n", "1", "--steps", "2", "-o", "t.npz").code == 0
    wrong = command("graft", "-r", "attn=hyena", f"{tiny_pipeline}:unet", "-o", "u")
    assert wrong.code == 2
    said_one_error(wrong, "usage.part")
