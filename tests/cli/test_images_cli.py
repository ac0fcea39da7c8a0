"""`surgery sample`, `eval images`, `init` and the two `train` commands: files, numbers, refusals, help."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_errors import said_one_error

from surgery.store.checkpoint import open_checkpoint

Run = Callable[..., Any]
FEW = ("--n", "6", "--steps", "2", "--threads", "1")


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# --- sample ----------------------------------------------------------------------------------------------------------


def test_samples_are_bytes_with_classes_and_settings_and_a_picture(command: Run, tmp_path: Path) -> None:
    from PIL import Image

    args = ("sample", "dit-digits", "--n", "12", "--sampler", "ddim", "--steps", "3", "--threads", "1")
    ended = command(*args, "-o", "out/s.npz", "--grid", "out/s.png")
    assert (ended.code, ended.stdout) == (0, "out/s.npz\n"), ended.stderr
    assert "out/s.png" in ended.stderr
    with np.load(tmp_path / "out/s.npz", allow_pickle=False) as made:
        assert set(made.files) == {"arr_0", "labels", "settings"}
        assert (made["arr_0"].dtype, made["arr_0"].shape) == (np.uint8, (12, 8, 8, 1))
        assert (made["labels"].dtype, made["labels"].tolist()) == (np.int64, [*range(10), 0, 1])
        settings = json.loads(str(made["settings"]))
    assert set(settings) == {
        "model", "n", "sampler", "steps", "guidance", "seed", "cfg_channels", "spacing", "batch",
    }  # fmt: skip
    from surgery.store.names import open_named

    assert settings["model"] == f"sha256:{open_named('dit-digits').digest}"
    with Image.open(tmp_path / "out/s.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 100 and picture.height > 400
    assert names(tmp_path) == {"out", "out/s.npz", "out/s.png"}


def test_the_same_seed_gives_the_same_file_and_another_another(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    for name, more in {"a": (), "b": (), "c": ("--seed", "1"), "d": ("--guidance", "3")}.items():
        assert command("sample", tiny_dit, *FEW, *more, "-o", f"{name}.npz").code == 0
    a, b, c, d = ((tmp_path / f"{n}.npz").read_bytes() for n in "abcd")
    assert a == b
    with np.load(tmp_path / "a.npz") as one, np.load(tmp_path / "c.npz") as two, np.load(tmp_path / "d.npz") as three:
        assert not np.array_equal(one["arr_0"], two["arr_0"])
        assert not np.array_equal(one["arr_0"], three["arr_0"])
        assert json.loads(str(three["settings"]))["guidance"] == 3.0


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_every_sampler_runs_with_and_without_guidance(
    command: Run, tiny_dit: Path, tmp_path: Path, sampler: str
) -> None:
    for guidance in ("1", "1.5"):
        args = ("--sampler", sampler, "--guidance", guidance, "--classes", "3,7", "--json")
        shown = json.loads(command("sample", tiny_dit, *FEW, *args, "-o", f"{guidance}.npz").stdout)
        assert (shown["path"], shown["grid"], shown["settings"]["sampler"]) == (f"{guidance}.npz", None, sampler)
    with np.load(tmp_path / "1.npz") as made:
        assert made["labels"].tolist() == [3, 7] * 3


def test_files_that_are_there_are_replaced_only_when_asked(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    args = ("sample", tiny_dit, *FEW, "-o", "s.npz", "--grid", "s.png")
    (tmp_path / "s.png").write_bytes(b"mine")
    ended = command(*args)
    assert ended.code == 4
    said_one_error(ended, "output.exists")
    assert names(tmp_path) == {"s.png"} and (tmp_path / "s.png").read_bytes() == b"mine"
    assert command(*args, "--overwrite").code == 0
    assert (tmp_path / "s.png").read_bytes() != b"mine"
    assert command(*args).code == 4
    (tmp_path / "s.npz").unlink()
    (tmp_path / "s.npz").symlink_to(tmp_path / "elsewhere.npz")
    assert command(*args, "--overwrite").code == 4  # a link is not ours to follow
    assert not (tmp_path / "elsewhere.npz").exists()


BAD_SAMPLES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "class out of range": (("--classes", "3,10"), 2, "usage.bad-class"),
    "negative class": (("--classes", "-1"), 2, "usage.bad-class"),
    "classes that are no numbers": (("--classes", "three"), 2, "usage.classes"),
    "no classes": (("--classes", ""), 2, "usage.classes"),
    "unknown sampler": (("--sampler", "euler"), 2, "usage.unknown-sampler"),
    "too many steps": (("--steps", "1001"), 2, "usage.bad-steps"),
    "no steps": (("--steps", "0"), 2, "usage.option"),
    "no images": (("--n", "0"), 2, "usage.option"),
    "guidance that is no number": (("--guidance", "nan"), 2, "usage.bad-guidance"),
    "guidance on two channels": (("--cfg-channels", "2"), 2, "usage.bad-cfg-channels"),
    "unknown device": (("--device", "gpu"), 2, "usage.device"),
    "device that is not there": (("--device", "xpu"), 5, "resource.no-device"),
    "grid of another kind": (("--grid", "s.jpg"), 2, "usage.out"),
    "output of another kind": (("-o", "s.png"), 2, "usage.out"),
    "output without a name": (("-o", "."), 2, "usage.out"),
    "output below a file": (("-o", "file/s.npz"), 4, "output.not-writable"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_a_bad_option_of_sample_is_one_line_and_a_hint(command: Run, tiny_dit: Path, tmp_path: Path, case: str) -> None:
    args, code, name = BAD_SAMPLES[case]
    (tmp_path / "file").write_text("")
    ended = command("sample", tiny_dit, "--n", "2", "--steps", "2", "-o", "s.npz", *args)
    assert ended.code == code, ended.stderr
    said_one_error(ended, name)
    assert names(tmp_path) == {"file"}


def test_models_that_cannot_be_sampled_are_refused_before_their_weights_are_read(
    command: Run, tiny_dit: Path, tmp_path: Path
) -> None:
    cases = {
        "usage.not-pixels": ({"in_channels": 4}, 2),
        "usage.text-model": ({"_class_name": "PixArtTransformer2DModel", "norm_type": "ada_norm_single"}, 2),
        "checkpoint.unknown-architecture": ({"_class_name": "UNet2DModel"}, 3),
        "checkpoint.no-scheduler": ({}, 3),
    }
    for name, (edit, code) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(tiny_dit / "diffusion_pytorch_model.safetensors", folder)
        config = json.loads((tiny_dit / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | edit))
        ended = command("sample", folder, *FEW, "-o", "s.npz")
        assert ended.code == code, ended.stderr
        said_one_error(ended, name)
    assert not (tmp_path / "s.npz").exists()


# --- eval images -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample files of real digits: `a` and `b` of one setting, `other` of another, `foreign` without settings."""
    from surgery.data.images import load_images

    folder = tmp_path_factory.mktemp("samples")
    images = load_images("digits")
    pixels = ((images.images[:400] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    labels = images.labels[:400].numpy()
    settings = {"sampler": "ddim", "steps": 20, "guidance": 1.0, "cfg_channels": "all", "spacing": "trailing"}
    rows = {"a": (0, settings), "b": (200, settings), "other": (200, settings | {"steps": 50}), "foreign": (0, None)}
    for name, (start, how) in rows.items():
        more = {} if how is None else {"settings": np.array(json.dumps(how | {"n": 200}))}
        part = slice(start, start + 200)
        np.savez(folder / f"{name}.npz", arr_0=pixels[part], labels=labels[part], **more)
    return folder


def test_an_evaluation_says_what_was_measured_and_how(command: Run, digits: Path) -> None:
    ended = command("eval", "images", digits / "a.npz", "--ref", "digits", "--json")
    assert ended.code == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert set(result) == {
        "frechet", "frechet_interval", "kid", "inception_score", "precision", "recall", "n", "n_ref", "reference",
        "reference_digest", "samples_digest", "extractor", "model", "seed", "sampler", "steps", "guidance",
        "cfg_channels", "spacing", "notes",
    }  # fmt: skip
    assert (result["n"], result["n_ref"], result["reference"]) == (200, 1500, "digits:train")
    assert (result["sampler"], result["steps"], result["guidance"]) == ("ddim", 20, 1.0)
    assert result["extractor"].startswith("classifier:")
    low, high = result["frechet_interval"]
    assert 0 < low <= result["frechet"] <= high < 60
    assert result["precision"] > 0.8 and 1 <= result["inception_score"] <= 10


def test_an_evaluation_for_people_names_every_setting(command: Run, digits: Path) -> None:
    shown = command("eval", "images", digits / "a.npz").stdout
    for words in ("Frechet distance", "95 %", "KID", "200 of", "1500 of digits:train", "classifier:", "ddim, 20 steps"):
        assert words in shown
    assert "sampling          not recorded" in command("eval", "images", digits / "foreign.npz").stdout


def test_two_sample_files_of_one_setting_are_compared(command: Run, digits: Path) -> None:
    args = ("eval", "images", digits / "a.npz", "--baseline")
    same = json.loads(command(*args, digits / "a.npz", "--json").stdout)["against"]
    assert all(same[k]["difference"] == 0 for k in ("frechet", "kid", "precision", "recall"))
    other = json.loads(command(*args, digits / "b.npz", "--json").stdout)["against"]
    assert other["frechet"]["difference"] == other["frechet"]["other"] - other["frechet"]["base"] != 0
    assert "against baseline" in command(*args, digits / "b.npz").stdout


def test_the_reference_can_be_held_out_images_or_another_file(command: Run, digits: Path) -> None:
    held_out = json.loads(command("eval", "images", digits / "a.npz", "--split", "val", "--json").stdout)
    assert (held_out["n_ref"], held_out["reference"]) == (297, "digits:val")
    file = command("eval", "images", digits / "a.npz", "--ref", digits / "a.npz", "--bootstrap", "0", "--json")
    itself = json.loads(file.stdout)
    assert itself["frechet"] == pytest.approx(0, abs=1e-6) and itself["frechet_interval"] is None
    assert (itself["precision"], itself["recall"]) == (1, 1)


def test_a_reference_that_was_sampled_in_another_way_is_refused_by_name(
    command: Run, digits: Path, tmp_path: Path
) -> None:
    with np.load(digits / "a.npz") as file:
        entries = {key: file[key] for key in file.files}
    how = json.loads(str(entries["settings"]))
    changes = {"sampler": "ddpm", "steps": 50, "guidance": 1.5, "cfg_channels": "3", "spacing": "leading", "n": 199}
    for key, value in changes.items():
        rows = {name: array[: value if key == "n" else 200] for name, array in entries.items() if name != "settings"}
        np.savez(tmp_path / "ref.npz", **rows, settings=np.array(json.dumps(how | {key: value})))
        ended = command("eval", "images", digits / "a.npz", "--ref", "ref.npz", "--bootstrap", "0")
        assert ended.code == 2, key
        said_one_error(ended, "usage.settings-differ")
        assert f"{key} {how[key]} against {value}" in ended.stderr
    for ref in (digits / "b.npz", digits / "foreign.npz"):  # the same settings; real images, which record none
        assert command("eval", "images", digits / "a.npz", "--ref", ref, "--bootstrap", "0").code == 0


BAD_EVALUATIONS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "other settings": (("a.npz", "--baseline", "other.npz"), 2, "usage.settings-differ"),
    "unknown settings": (("a.npz", "--baseline", "foreign.npz"), 2, "usage.settings-unknown"),
    "a file that is not there": (("gone.npz",), 3, "checkpoint.no-samples"),
    "a file that is no archive": (("broken.npz",), 3, "checkpoint.bad-samples"),
    "an archive without images": (("empty.npz",), 3, "checkpoint.bad-samples"),
    "a baseline that is not there": (("a.npz", "--baseline", "gone.npz"), 3, "checkpoint.no-samples"),
    "an unknown reference": (("a.npz", "--ref", "digit"), 2, "usage.bad-data"),
    "a reference that is not there": (("a.npz", "--ref", "gone.npz"), 3, "checkpoint.no-samples"),
    "an unknown split": (("a.npz", "--split", "test"), 2, "usage.bad-split"),
    "an unknown extractor": (("a.npz", "--features", "clip"), 2, "usage.unknown-extractor"),
    "inception without a file": (("a.npz", "--features", "inception"), 2, "usage.no-inception"),
    "a classifier that is not there": (("a.npz", "--features", "classifier:gone"), 3, "checkpoint.no-classifier"),
    "features that are not stored": (("a.npz", "--features", "npz", "--ref", "b.npz"), 2, "usage.no-features"),
    "images of another size": (("wide.npz",), 2, "usage.image-size"),
    "no neighbours": (("a.npz", "-k", "0"), 2, "usage.option"),
    "more neighbours than images": (("a.npz", "-k", "500"), 2, "usage.too-few-samples"),
}


@pytest.mark.parametrize("case", BAD_EVALUATIONS)
def test_a_bad_evaluation_is_one_line_and_a_hint(
    command: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    shutil.copytree(digits, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    Path("broken.npz").write_bytes(b"PK\x03\x04 no archive")
    np.savez("empty.npz", x=np.zeros(3))
    np.savez("wide.npz", arr_0=np.zeros((50, 16, 16, 1), np.uint8))
    args, code, name = BAD_EVALUATIONS[case]
    ended = command("eval", "images", *args)
    assert ended.code == code, ended.stderr
    said_one_error(ended, name)


# --- init, train -----------------------------------------------------------------------------------------------------


def test_init_draws_the_same_model_for_the_same_seed(command: Run, tmp_path: Path) -> None:
    for name, more in {"a": (), "b": ("--workers", "1"), "c": ("--seed", "1"), "d": ("--dtype", "bf16")}.items():
        ended = command("init", "dit-digits", "-o", name, *more)
        assert (ended.code, ended.stdout) == (0, f"{name}\n")
        assert "random weights" in ended.stderr
    found = {n: open_checkpoint(tmp_path / n) for n in "abcd"}
    assert found["a"].digest == found["b"].digest != found["c"].digest
    assert {r.dtype for r in found["d"].tensors.values()} == {"BF16"}
    assert command("verify", "a").code == 0
    assert command("sample", "a", *FEW, "-o", "a.npz").code == 0


def test_init_plans_without_writing_and_refuses_what_it_does_not_know(command: Run, tmp_path: Path) -> None:
    shown = json.loads(command("init", "dit-xl-2", "--dry-run", "--json").stdout)
    assert (shown["parameters"], shown["tensors"]) == (749_826_464, 538)
    assert names(tmp_path) == set()
    for args, name in (
        (("dit-huge",), "usage.unknown-architecture"),
        (("dit-digits", "--dtype", "int3"), "usage.dtype"),
    ):
        ended = command("init", *args, "-o", "x")
        assert ended.code == 2
        said_one_error(ended, name)
    assert names(tmp_path) == set()


def test_a_trained_classifier_measures_images(command: Run, digits: Path, tmp_path: Path) -> None:
    ended = command("train", "classifier", "digits", "--steps", "60", "-o", "c")
    assert (ended.code, ended.stdout) == (0, "c\n"), ended.stderr
    training = json.loads((tmp_path / "c" / "surgery.json").read_text())["steps"][-1]["training"]
    assert training["accuracy"] > 0.5 and training["images"] == 1500
    assert command("verify", "c").code == 0
    shown = command("eval", "images", digits / "a.npz", "--features", "classifier:c", "--json")
    assert json.loads(shown.stdout)["frechet"] > 0
    assert command("train", "classifier", "digits", "--steps", "0", "-o", "d").code == 2


def test_training_a_graft_keeps_its_operators(command: Run, tiny_dit: Path, digits: Path, tmp_path: Path) -> None:
    assert command("graft", "-r", "attn=hyena@1", tiny_dit, "-o", "g").code == 0
    few = f"npz:{digits / 'a.npz'}"
    ended = command("train", "diffusion", "g", "--data", few, "--steps", "4", "--batch", "8", "-o", "t")
    assert (ended.code, ended.stdout) == (0, "t\n"), ended.stderr
    step = json.loads((tmp_path / "t" / "surgery.json").read_text())["steps"][-1]
    assert step["op"] == "train-diffusion" and np.isfinite(step["training"]["val_loss"])
    assert (tmp_path / "t" / "config.json").read_bytes() == (tmp_path / "g" / "config.json").read_bytes()
    old, new = open_checkpoint(tmp_path / "g"), open_checkpoint(tmp_path / "t")
    assert old.tensors.keys() == new.tensors.keys()
    assert sum(old.tensor_digests[n] != new.tensor_digests[n] for n in new.tensors) > 100
    assert command("sample", "t", *FEW, "-o", "t.npz").code == 0


BAD_TRAINING: dict[str, tuple[tuple[str, ...], int]] = {
    "no steps": (("--data", "digits", "--steps", "0"), 2),
    "negative rate": (("--data", "digits", "--steps", "3", "--lr", "-1"), 2),
    "no batch": (("--data", "digits", "--steps", "3", "--batch", "0"), 2),
    "unknown schedule": (("--data", "digits", "--steps", "3", "--schedule", "linear"), 2),
    "average of 1": (("--data", "digits", "--steps", "3", "--ema", "1"), 2),
    "no data": (("--steps", "3"), 2),
    "unknown data": (("--data", "digit", "--steps", "3"), 2),
    "a rate that explodes": (("--data", "digits", "--steps", "2", "--batch", "8", "--lr", "1e30"), 9),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_training_is_one_line_and_a_hint(command: Run, tiny_dit: Path, tmp_path: Path, case: str) -> None:
    args, code = BAD_TRAINING[case]
    ended = command("train", "diffusion", tiny_dit, *args, "-o", "t")
    assert ended.code == code, ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error[") and lines[1].startswith("hint: ")
    assert not (tmp_path / "t").exists()
    if code == 2:
        assert names(tmp_path) == set()


# --- help ------------------------------------------------------------------------------------------------------------

COMMANDS = [
    ("graft",),
    ("sample",),
    ("init",),
    ("run",),
    ("demo",),
    ("eval", "images"),
    ("train", "diffusion"),
    ("train", "classifier"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_leads_with_an_example_on_one_line_that_names_real_options(
    command: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = command(*words, "--help")
    assert shown.code == 0 and shown.stderr == ""
    text, options = shown.stdout.split("\nOptions:\n")
    examples = [line for line in text.splitlines()[1:] if f"surgery {' '.join(words)} " in line]
    assert examples, text
    for line in examples:
        for flag in (word for word in line.split() if word.startswith("-") and len(word) > 1):
            assert f"{flag} " in options or f"{flag}," in options or f"{flag}\n" in options, (flag, line)
    assert "\b" not in shown.stdout and "``" not in shown.stdout and "None" not in shown.stdout
    described = [line for line in options.splitlines() if line.startswith("  -")]
    assert len(described) >= 7
