"""Pictures: the right pixels in the right place, whole files, clear refusals."""

import builtins
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from surgery.errors import OutputError, ResourceError, UsageError
from surgery.evals import pictures

Image = pytest.importorskip("PIL.Image")


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def flat(*values: int) -> np.ndarray:
    """8x8 images of one grey level each."""
    return np.stack([np.full((8, 8, 1), v, np.uint8) for v in values])


def test_a_grid_shows_every_image_enlarged_in_reading_order(tmp_path: Path) -> None:
    path = pictures.grid(flat(10, 60, 110, 160), tmp_path / "a.png", columns=2, scale=5)
    page = read(path)
    assert page.shape == (2 * 40 + 4 + 32, 2 * 40 + 4 + 32, 3)
    corners = [page[16 + 44 * r : 56 + 44 * r, 16 + 44 * c : 56 + 44 * c] for r in (0, 1) for c in (0, 1)]
    assert [(int(c.min()), int(c.max())) for c in corners] == [(10, 10), (60, 60), (110, 110), (160, 160)]


def test_small_images_are_enlarged_by_default_without_smoothing(tmp_path: Path) -> None:
    checker = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)[None, :, :, None]
    page = read(pictures.grid(checker, tmp_path / "a.png"))
    cell = page[16:64, 16:64, 0]
    assert set(np.unique(cell)) == {0, 255}
    assert np.array_equal(cell[::6, ::6], checker[0, :, :, 0])
    assert read(pictures.grid(np.zeros((1, 256, 256, 3), np.uint8), tmp_path / "b.png")).shape == (288, 288, 3)


def test_labels_make_one_row_per_class(tmp_path: Path) -> None:
    images, labels = flat(0, 100, 1, 101, 2), [3, 7, 3, 7, 3]
    page = read(pictures.grid(images, tmp_path / "a.png", labels=labels, columns=2, scale=2, names={3: "three"}))
    assert page.shape[0] == 2 * 16 + 4 + 32
    left = page.shape[1] - 16 - (2 * 16 + 4)
    assert page[16:32, left : left + 16].max() == 0
    assert (page[16:32, left + 20 : left + 36] == 1).all()
    assert (page[36:52, left : left + 16] == 100).all()
    assert page[:, :left].min() < 100  # the class names


def test_float_images_and_colours(tmp_path: Path) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    page = read(pictures.grid(x, tmp_path / "a.png"))
    assert page[20, 20].tolist() == [0, 128, 255]


def test_side_by_side_titles_columns_and_keeps_places(tmp_path: Path) -> None:
    labels = [0, 1, 0, 1]
    columns = {"original": flat(0, 50, 1, 51), "grafted, not trained\nFrechet 76": flat(100, 150, 101, 151)}
    page = read(pictures.side_by_side(columns, tmp_path / "a.png", labels=labels, per_class=2, scale=2))
    for value in (0, 1, 50, 51, 100, 101, 150, 151):
        rows, cols = np.nonzero((page == value).all(axis=2))
        assert len(rows) >= 256
    first, second = (np.nonzero((page == v).all(axis=2))[1].min() for v in (50, 150))
    assert first < second


def test_curves_are_drawn_for_what_a_log_axis_can_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    series = {f"block {i}": [(s, 0.5**i / (s + 1)) for s in range(50)] for i in range(9)}
    series["broken"] = [(0, float("nan")), (1, 0.0)]
    path = pictures.curves(series, tmp_path / "a.png", title="stage 1", y_label="relative error")
    assert min(read(path).shape[:2]) > 300
    assert (
        path.read_bytes()
        == pictures.curves(series, tmp_path / "b.png", title="stage 1", y_label="relative error").read_bytes()
    )
    with pytest.raises(UsageError, match="none of the 1 series"):
        pictures.curves({"broken": series["broken"]}, tmp_path / "c.png")


def test_drawing_curves_leaves_pyplot_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures.curves({"a": [(0, 1), (1, 2)]}, tmp_path / "a.png")
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8)), np.zeros((0, 8, 8, 1), np.uint8), np.zeros((1, 8, 8, 4), np.uint8)]
)
def test_what_is_no_image_is_refused(bad: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        pictures.grid(bad, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_labels_must_match_and_columns_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="labels"):
        pictures.grid(flat(1, 2), tmp_path / "a.png", labels=[1])
    with pytest.raises(UsageError, match="no columns"):
        pictures.side_by_side({}, tmp_path / "a.png", labels=[])


def test_an_existing_picture_is_replaced_whole_and_failures_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.png"
    pictures.grid(flat(1), path)
    pictures.grid(flat(2), path)
    assert (read(path)[20, 20] == 2).all()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(OutputError):
        pictures.grid(flat(1), path.parent)
    assert [p.name for p in tmp_path.rglob("*")] == ["sub", "a.png"]


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] in ("PIL", "matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def refuse(name: str, *args, **kwargs):
        if name.split(".")[0] in ("PIL", "matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: pictures.grid(flat(1), tmp_path / "a.png"),
        lambda: pictures.curves({"a": [(0, 1)]}, tmp_path / "a.png"),
    ):
        with pytest.raises(ResourceError, match="not installed") as caught:
            draw()
        assert "images" in caught.value.hint
