"""Kernels compiled ahead of time for GPUs that are not here. Compiled, not run: that says nothing about speed."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from surgery.kernels.moe import aot, tiles

SOURCES = Path(__file__).resolve().parents[3] / "kernels" / "src" / "moe"
HOST = ("plan", "launch", "function", "chain", "chain_kernels", "tiles")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton comes for Linux only")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def compiled(_own_cache: None) -> list[aot.Compiled]:
    """The two heaviest products and the sum, for Hopper."""
    return aot.check([90], kernels=["up_swiglu", "expert_weight_grad", "combine"])


def test_the_gate_holds_for_the_heaviest_kernels(compiled: list[aot.Compiled]) -> None:
    assert len(compiled) >= 6
    assert {r.kernel: r.faults() for r in compiled if r.faults()} == {}
    for row in compiled:
        assert row.registers > 0 and row.shared <= 232448
        if row.kernel == "up_swiglu" and row.size in ("large", "medium"):
            assert row.instructions["HGMMA"] >= 4


def test_addresses_are_64_bit_and_no_float_is_added_atomically(compiled: list[aot.Compiled]) -> None:
    for row in compiled:
        assert not re.search(r"\b(atom|red)\.\S*\.(f|bf|b)(16|32|64)", row.ptx), row.kernel
        # A row or expert number meets its stride in a multiplication whose result has 64 bits.
        assert re.search(r"\b(mul\.wide\.[su]32|mad\.wide\.[su]32|mul\.lo\.s64|mad\.lo\.s64)", row.ptx), row.kernel


def test_the_gate_can_fail() -> None:
    row = aot.Compiled("up_swiglu", 90, "bf16", "large", "", 255, 856, 10**6, dict.fromkeys(aot.INSTRUCTIONS, 0))
    assert [f.split()[0] for f in row.faults()] == ["stack", "shared", "no"]
    assert aot.Compiled("combine", 90, "bf16", "any", "", 9, 0, 0, row.instructions).faults() == []


def test_a_kernel_that_does_not_compile_is_a_row() -> None:
    name, dtype, size, launch = next(r for r in aot.launches(90) if r[0] == "combine")
    broken = type(launch)(launch.kernel, launch.grid, launch.args, {**launch.meta, "BH": 3})
    assert aot._measure(90, name, dtype, size, broken).faults()[0]


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(aot.ARCHITECTURES))
def test_everything_shipped_passes_the_gate(arch: int) -> None:
    rows = aot.check([arch], everything=True, workers=2)
    assert len(rows) > 80
    assert {f"{r.kernel} {r.dtype} {r.tile}": r.faults() for r in rows if r.faults()} == {}
    assert not [r.kernel for r in rows if re.search(r"\b(atom|red)\.\S*\.(f|bf|b)(16|32|64)", r.ptx)]


def test_the_hosts_code_reads_nothing_from_the_device() -> None:
    """It runs on tensors without memory, forward and backward, chain and all: any value asked for would raise."""
    found = [row[0] for row in aot.launches(90, everything=True)]
    assert {"up_swiglu", "expert_weight_grad", "combine_route", "decode_up", "step_backward"} <= set(found)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(1, device="meta").item()


def test_no_word_of_a_wait_in_the_hosts_code() -> None:
    waits = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "bincount", "unique"}
    for name in HOST:
        tree = ast.parse((SOURCES / f"{name}.py").read_text())
        called = {n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
        assert called & waits == set(), name


def test_no_atomic_in_any_kernel() -> None:
    assert [f.name for f in (SOURCES / "device").glob("*.py") if "atomic_" in f.read_text()] == []


def test_every_architecture_has_every_size() -> None:
    wanted = {"up_swiglu", "up_swiglu_interleaved", "rows_times_expert", "rows_times_expert_two", "down_backward"}
    anywhere = {
        "expert_weight_grad", "expert_weight_grad_two", "expert_bias_grad", "combine", "combine_route", "step_backward",
        "decode_up", "decode_down",
    }  # fmt: skip
    assert {"sm80", "sm90", "sm100", "sm120", "interpreter"} == set(tiles.table())
    for arch in tiles.table():
        for dtype in (torch.float32, torch.bfloat16):
            for pairs in (10_000, 2_000, 10):
                chosen = tiles.tiles(arch, dtype, pairs, 64)
                assert set(chosen.kernels) == wanted | anywhere and chosen.block_m >= 16
    assert [tiles.tiles("sm90", torch.bfloat16, p, 64).size for p in (6144, 6143, 1536, 0)] == [
        "large", "medium", "medium", "small",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "entry"),
    [((8, 0), "sm80"), ((8, 6), "sm120"), ((8, 9), "sm120"), ((9, 0), "sm90"), ((10, 3), "sm100"), ((12, 1), "sm120")],
)
def test_which_entry_serves_a_device(capability: tuple[int, int], entry: str) -> None:
    assert tiles.architecture(capability) == entry
    with pytest.raises(ValueError, match="need sm80"):
        tiles.architecture((7, 5))


def test_another_table_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = json.loads(tiles.SHIPPED.read_text())
    other["archs"]["sm90"]["16"]["large"]["block_m"] = 64
    (tmp_path / "mine.json").write_text(json.dumps(other))
    monkeypatch.setenv("SURGERY_KERNEL_TILES", str(tmp_path / "mine.json"))
    assert tiles.tiles("sm90", torch.bfloat16, 10_000, 64).block_m == 64
    (tmp_path / "broken.json").write_text('{"format": 2}')
    monkeypatch.setenv("SURGERY_KERNEL_TILES", str(tmp_path / "broken.json"))
    with pytest.raises(ValueError, match="broken.json: no table of tiles: format 2"):
        tiles.tiles("sm90", torch.bfloat16, 10_000, 64)


@pytest.mark.slow
def test_the_wheel_carries_the_table(tmp_path: Path) -> None:
    """Built as a user would get it."""
    import zipfile

    root = SOURCES.parents[2]
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r}, {{}})"
    copy = tmp_path / "copy"
    import shutil

    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "build", "*.egg-info", "tests"))
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {"surgery/kernels/moe/tiles.json", "surgery/kernels/moe/device/forward.py"} <= set(names)
    assert not [n for n in names if n.startswith("kernels/")]
