"""Names of training data and the digests that stand for it in keys."""

import os
from pathlib import Path

import pytest

from surgery.data.identity import data_digest, picture_files, split_spec
from surgery.errors import CheckpointError, UsageError


def picture(path: Path, grey: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), grey).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two pictures."""
    for name in ("a", "b"):
        for number in (1, 2):
            picture(tmp_path / "set" / name / f"{number}.png", 10 * number)
    return tmp_path / "set"


def test_a_name_is_split_into_its_kind_and_path(folder: Path) -> None:
    assert split_spec("digits") == ("digits", None)
    assert split_spec(f"folder:{folder}") == ("folder", folder)
    file = folder / "x:y.npz"
    file.touch()
    assert split_spec(f"npz:{file}") == ("npz", file)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("digitz", "no image data is called 'digitz'"),
        ("", "no image data is called ''"),
        ("digits:x", "not a complete name"),
        ("npz", "not a complete name"),
        ("npz:", "not a complete name"),
        ("npz:/nowhere/x.npz", "/nowhere/x.npz does not exist"),
        ("npz:" + "x" * 5000, "does not exist"),
        ("folder:~nobody-of-this-name/x", "does not exist"),
        ("npz:.", "is not a file"),
        (f"folder:{__file__}", "is not a folder"),
    ],
)
def test_a_bad_name_is_a_usage_error_with_a_hint(spec: str, said: str) -> None:
    for call in (split_spec, data_digest):
        with pytest.raises(UsageError, match=said) as caught:
            call(spec)
        assert caught.value.hint


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(UsageError) as caught:
        split_spec("digit")
    assert "'digits'" in caught.value.hint


def test_loading_and_identifying_refuse_the_same_names() -> None:
    from surgery.data.images import load_images

    for spec in ("digitz", "digits:x", "npz", "npz:/nowhere", "npz:.", f"folder:{__file__}"):
        with pytest.raises(UsageError) as one:
            split_spec(spec)
        with pytest.raises(UsageError) as two:
            load_images(spec)
        assert str(one.value) == str(two.value)


def test_sets_that_never_change_have_different_fixed_digests() -> None:
    assert data_digest("digits") == data_digest("digits") != data_digest("fashion")


def test_a_file_is_known_by_its_bytes_and_not_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"1")
    (tmp_path / "b.npz").write_bytes(b"1")
    (tmp_path / "c.npz").write_bytes(b"2")
    one, two, three = (data_digest(f"npz:{tmp_path / n}.npz") for n in "abc")
    assert one == two != three


def test_a_folder_is_known_by_its_pictures_and_their_classes(folder: Path) -> None:
    before = data_digest(f"folder:{folder}")
    moved = folder.rename(folder.parent / "elsewhere")
    assert data_digest(f"folder:{moved}") == before
    (moved / "a" / "1.png").rename(moved / "b" / "3.png")
    assert data_digest(f"folder:{moved}") != before


@pytest.mark.parametrize("name", ["notes.txt", "a/notes.txt", ".git/a.png", "1.png"])
def test_what_is_not_read_does_not_change_the_digest(folder: Path, name: str) -> None:
    before = data_digest(f"folder:{folder}")
    picture(folder / "x.png", 3)
    (folder / "x.png").rename((folder / name).parent.mkdir(exist_ok=True) or folder / name)
    assert data_digest(f"folder:{folder}") == before


def test_the_digest_covers_exactly_what_is_loaded(folder: Path) -> None:
    from surgery.data.images import load_images

    found = picture_files(folder)
    loaded = load_images(f"folder:{folder}")
    assert [n for n, files in found.items() for _ in files] == ["ab"[label] for label in loaded.labels.tolist()]
    assert loaded.images[:, 0, 0, 0].tolist() == pytest.approx([v / 127.5 - 1 for v in (10, 20, 10, 20)])


def test_a_folder_without_classes_or_with_an_empty_one_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "c").mkdir()
    (tmp_path / "flat").mkdir()
    for where, said in ((folder, "holds no PNG or JPEG"), (tmp_path / "flat", "no sub-folders")):
        with pytest.raises(CheckpointError, match=said) as caught:
            data_digest(f"folder:{where}")
        assert caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_named(folder: Path) -> None:
    (folder / "a" / "1.png").chmod(0)
    with pytest.raises(CheckpointError, match=r"1\.png"):
        data_digest(f"folder:{folder}")
