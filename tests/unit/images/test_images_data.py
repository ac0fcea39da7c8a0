"""Image sets: every source loads to the documented form, and every bad input is refused by name."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from surgery.data.images import ImageSet, check_fits, load_images
from surgery.errors import CheckpointError, ResourceError, UsageError


def _png(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _fashion_folder(folder: Path, n_train: int = 6, n_test: int = 3) -> Path:
    rng = np.random.default_rng(0)
    for part, n in (("train", n_train), ("t10k", n_test)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as handle:
            handle.write(struct.pack(">IIII", 0x803, n, 28, 28) + pixels.tobytes())
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as handle:
            handle.write(struct.pack(">II", 0x801, n) + labels.tobytes())
    return folder


def test_digits_are_1797_images_between_minus_one_and_one_with_1500_to_train_on() -> None:
    digits = load_images("digits")
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.dtype == torch.float32
    assert digits.images.min() == -1 and digits.images.max() == 1
    assert digits.labels.dtype == torch.int64 and digits.n_classes == 10
    assert len(digits.train.images) == 1500 and len(digits.val.images) == 297


def test_the_split_partitions_the_rows_and_is_the_same_every_time() -> None:
    one, two = load_images("digits"), load_images("digits")
    assert one.digest == two.digest and torch.equal(one.val_rows, two.val_rows)
    assert len(set(one.val_rows.tolist())) == 297
    both = torch.cat([one.train.images, one.val.images]).flatten(1)
    assert torch.equal(both.sum(0), one.images.flatten(1).sum(0))


def test_fashion_is_padded_to_32_and_keeps_its_own_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_FASHION", str(_fashion_folder(tmp_path)))
    fashion = load_images("fashion")
    assert fashion.images.shape == (9, 1, 32, 32)
    assert (fashion.images[:, :, :2] == -1).all() and (fashion.images[..., -2:] == -1).all()
    assert fashion.val_rows.tolist() == [6, 7, 8]


def test_missing_fashion_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_FASHION", str(tmp_path))
    with pytest.raises(ResourceError, match="dataset-fashion-mnist"):
        load_images("fashion")


@pytest.mark.parametrize("damage", ["magic", "short", "not-gzip"])
def test_a_damaged_idx_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    path = _fashion_folder(tmp_path) / "train-images-idx3-ubyte.gz"
    raw = gzip.decompress(path.read_bytes())
    if damage == "not-gzip":
        path.write_bytes(raw)
    else:
        path.write_bytes(gzip.compress(b"\0\0\x0d\x03" + raw[4:] if damage == "magic" else raw[:-1]))
    monkeypatch.setenv("SURGERY_FASHION", str(tmp_path))
    with pytest.raises(CheckpointError, match="train-images"):
        load_images("fashion")


def test_a_folder_has_one_class_per_sub_folder_in_order_of_their_names(tmp_path: Path) -> None:
    for label, name in enumerate(["ant", "bee"]):
        for i in range(3):
            _png(tmp_path / name / f"{i}.png", np.full((6, 4), 255 * label, dtype=np.uint8))
    loaded = load_images(f"folder:{tmp_path}")
    assert loaded.images.shape == (6, 1, 4, 4) and loaded.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (loaded.images[:3] == -1).all() and (loaded.images[3:] == 1).all()


def test_a_folder_is_cropped_to_the_centre_and_resized(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 255
    _png(tmp_path / "a" / "wide.png", wide)
    _png(tmp_path / "a" / "small.jpg", np.zeros((3, 5, 3), dtype=np.uint8))
    loaded = load_images(f"folder:{tmp_path}", size=4)
    assert loaded.images.shape == (2, 3, 4, 4) and (loaded.images[1] == 1).all()
    assert load_images(f"folder:{tmp_path}", size=4, channels=1).images.shape == (2, 1, 4, 4)


def test_a_folder_of_mixed_sizes_needs_a_size(tmp_path: Path) -> None:
    for side in (4, 5):
        _png(tmp_path / "a" / f"{side}.png", np.zeros((side, side), dtype=np.uint8))
    with pytest.raises(CheckpointError, match="5.png"):
        load_images(f"folder:{tmp_path}")


def test_bad_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no sub-folders"):
        load_images(f"folder:{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        load_images(f"folder:{tmp_path}")
    (tmp_path / "empty" / "x.png").write_bytes(b"not a picture")
    with pytest.raises(CheckpointError, match=r"x\.png"):
        load_images(f"folder:{tmp_path}")


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_npz_takes_each_layout(tmp_path: Path, layout: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    stored = {"NHWC": pixels, "NCHW": pixels.transpose(0, 3, 1, 2), "NHW": pixels[..., 0]}[layout]
    np.savez(tmp_path / "a.npz", arr_0=stored, arr_1=np.arange(5))
    loaded = load_images(f"npz:{tmp_path / 'a.npz'}")
    want = torch.from_numpy(pixels[..., :1] if layout == "NHW" else pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(loaded.images, want) and loaded.n_classes == 5


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros((4, 8, 8, 3), np.uint8)}, "arr_0"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32), "labels": np.arange(4)}, "bytes"),
        ({"arr_0": np.zeros((4, 8, 8, 7), np.uint8), "labels": np.arange(4)}, "channels"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8)}, "no array labels"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.arange(3)}, "not 4 integers"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.arange(4) - 1}, "-1"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.arange(4.0)}, "not 4 integers"),
        ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8), "labels": np.arange(1)}, "at least 2"),
        ({"arr_0": np.array([{"a": 1}], dtype=object), "labels": np.arange(1)}, "plain arrays"),
    ],
)
def test_bad_npz_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CheckpointError, match=says):
        load_images(f"npz:{tmp_path / 'a.npz'}")


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nonsense")
    np.save(tmp_path / "b.npy", np.zeros(3))
    for name in ("a.npz", "b.npy"):
        with pytest.raises(CheckpointError, match=name):
            load_images(f"npz:{tmp_path / name}")


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_latents_load_from_both_formats(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    latents, labels = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    path = tmp_path / f"z.{suffix}"
    if suffix == "npz":
        np.savez(path, latents=latents.numpy(), labels=labels.numpy())
    else:
        save_file({"latents": latents, "labels": labels}, path)
    loaded = load_images(f"latents:{path}")
    assert torch.equal(loaded.images, latents) and loaded.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("bad", ["missing", "integers", "three-axes", "nan", "no-labels", "garbage"])
def test_bad_latents_are_refused(tmp_path: Path, bad: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "z.safetensors"
    tensors = {"latents": torch.zeros(4, 4, 2, 2), "labels": torch.arange(4)}
    if bad == "integers":
        tensors["latents"] = tensors["latents"].long()
    elif bad == "three-axes":
        tensors["latents"] = tensors["latents"][0]
    elif bad == "nan":
        tensors["latents"][0] = float("nan")
    elif bad in ("missing", "no-labels"):
        del tensors["latents" if bad == "missing" else "labels"]
    save_file(tensors, path)
    if bad == "garbage":
        path.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="latents|labels|values"):
        load_images(f"latents:{path}")


@pytest.mark.parametrize("spec", ["digit", "digits:x", "folder", "npz:/nowhere/a.npz", ""])
def test_bad_names_are_usage_errors(spec: str) -> None:
    with pytest.raises(UsageError):
        load_images(spec)


def test_a_size_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(UsageError, match="digits"):
        load_images("digits", size=16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"in_channels": 3}, "in_channels 3"),
        ({"sample_size": 16}, "sample_size 16"),
        ({"num_embeds_ada_norm": 9}, "9 classes"),
    ],
)
def test_images_that_do_not_fit_the_model_are_refused(change: dict[str, int], says: str) -> None:
    config = {"in_channels": 1, "sample_size": 8, "num_embeds_ada_norm": 10}
    digits = load_images("digits")
    check_fits(digits, config)
    with pytest.raises(UsageError, match=says):
        check_fits(digits, config | change)


def test_the_digest_depends_on_the_labels() -> None:
    x = torch.zeros(4, 1, 2, 2)
    sets = []
    for labels in ([0, 1, 0, 1], [0, 0, 1, 1]):
        from surgery.data.images import _build

        sets.append(_build("x", x, torch.tensor(labels), n_classes=2))
    assert all(isinstance(s, ImageSet) for s in sets) and sets[0].digest != sets[1].digest
