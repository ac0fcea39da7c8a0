"""No altered bit of an output or its record escapes `verify`."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from graft_runs import WEIGHTS, faults, flip, record_of
from safetensors.torch import load_file, save_file

from surgery.errors import CheckpointError, UsageError
from surgery.graph.lineage import record_digest, verify
from surgery.store.checkpoint import open_checkpoint


def test_an_untouched_output_holds(child: Path, pipeline_child: Path) -> None:
    assert faults(child) == [] and faults(pipeline_child) == []


def test_a_moved_output_holds(copy: Path) -> None:
    assert faults(copy) == []


def test_one_flipped_bit_of_a_tensor_is_found_and_named(copy: Path) -> None:
    ref = open_checkpoint(copy).tensors["transformer_blocks.3.ff.net.0.proj.weight"]
    flip(copy / WEIGHTS, ref.offset + 5)
    assert faults(copy) == ["tensor transformer_blocks.3.ff.net.0.proj.weight: altered"]


def test_a_flipped_bit_is_found_even_if_size_and_time_are_as_before(copy: Path) -> None:
    stat = (copy / WEIGHTS).stat()
    assert open_checkpoint(copy).digest
    with open(copy / WEIGHTS, "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([byte ^ 1]))
    os.utime(copy / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(faults(copy)) == 1


def test_a_change_of_the_header_that_changes_no_tensor_is_found(copy: Path) -> None:
    raw = (copy / WEIGHTS).read_bytes()
    assert raw.count(b'"format":"pt"') == 1
    (copy / WEIGHTS).write_bytes(raw.replace(b'"format":"pt"', b'"format":"pu"'))
    assert faults(copy) == [f"{WEIGHTS}: its header was altered"]


def test_one_flipped_bit_of_a_side_file_is_found(copy: Path) -> None:
    flip(copy / "scheduler_config.json", -1)
    assert faults(copy) == ["scheduler_config.json: altered"]


def test_a_longer_side_file_is_found(copy: Path) -> None:
    with open(copy / "config.json", "a") as handle:
        handle.write(" ")
    assert len(faults(copy)) == 1 and "bytes, recorded" in faults(copy)[0]


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", "pytorch_model.bin", "a\nb"])
def test_an_extra_file_is_found(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("x")
    (fault,) = faults(copy)
    assert fault.endswith(": not in the record") and "\n" not in fault


def test_a_missing_side_file_is_found(copy: Path) -> None:
    (copy / "scheduler_config.json").unlink()
    assert faults(copy) == ["scheduler_config.json: missing"]


def test_a_side_file_behind_a_link_is_found(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "scheduler_config.json", tmp_path / "elsewhere.json")
    (copy / "scheduler_config.json").symlink_to(tmp_path / "elsewhere.json")
    assert faults(copy) == ["scheduler_config.json: missing"]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["steps"][0].update(seed=5),
        lambda r: r["parents"]["tiny"].update(digest="sha256:" + "0" * 64),
        lambda r: r["ancestors"].clear(),
        lambda r: r.update(record="sha256:" + "0" * 64),
    ],
    ids=["a seed", "a parent", "the ancestors", "its digest"],
)
def test_an_altered_record_is_found(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = record_of(copy)
    change(record)
    (copy / "surgery.json").write_text(json.dumps(record))
    assert faults(copy) == ["surgery.json: the record was altered"]


def test_another_digest_of_the_content_is_found_even_in_a_forged_record(copy: Path) -> None:
    record = record_of(copy) | {"digest": "sha256:" + "0" * 64}
    record["record"] = record_digest(record)
    (copy / "surgery.json").write_text(json.dumps(record))
    assert faults(copy) == ["surgery.json: the record was altered"]


def test_tensors_that_changed_shape_came_or_went_are_named(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    tensors["new"] = tensors.pop("proj_out_2.bias")
    tensors["proj_out_1.bias"] = tensors["proj_out_1.bias"].reshape(2, -1)
    save_file(tensors, copy / WEIGHTS)
    found = "\n".join(faults(copy))
    for fault in (
        "tensor new: not in the record",
        "tensor proj_out_2.bias: missing",
        "tensor proj_out_1.bias: F32[2, 64], recorded F32[128]",
    ):
        assert fault in found


def test_a_change_of_another_part_of_a_pipeline_is_found(pipeline_child: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pipeline_child, tmp_path / "copy")
    flip(copy / "vae" / WEIGHTS, -1)
    assert faults(copy) == ["tensor vae/decoder.2.weight: altered"]


def test_a_checkpoint_without_a_record_cannot_be_verified(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no surgery\.json"):
        faults(sharded)


def test_one_part_of_a_pipeline_is_not_verified_alone(pipeline_child: Path) -> None:
    with pytest.raises(UsageError, match="whole pipeline"):
        verify(open_checkpoint(pipeline_child, part="vae"))


DAMAGE: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda r: r.update(surgery=2),
    "no steps": lambda r: r.update(steps=[]),
    "a step without a key": lambda r: r["steps"][0].pop("key"),
    "no files": lambda r: r["output"].clear(),
    "a file outside": lambda r: r["output"]["files"][0].update(path="../../etc/passwd"),
    "a tensor without digest": lambda r: next(iter(r["tensors"].values())).pop("sha256"),
    "parents as a list": lambda r: r.update(parents=[]),
    "a parent without digest": lambda r: r["parents"]["tiny"].clear(),
    "a parent that does not say what made it": lambda r: r["parents"]["tiny"].pop("lineage"),
    "changes of another kind": lambda r: r.update(changes=[3]),
    "no ancestors": lambda r: r.pop("ancestors"),
    "an empty ancestor": lambda r: r["ancestors"].update(x={}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_an_error_that_names_the_file(copy: Path, name: str) -> None:
    record = record_of(copy)
    DAMAGE[name](record)
    (copy / "surgery.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"surgery\.json: ") as caught:
        _ = open_checkpoint(copy).lineage
    assert caught.value.code == "checkpoint.bad-lineage"
