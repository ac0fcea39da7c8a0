"""Which files make up a checkpoint, which indexes are refused, and that pickles run nothing."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgery.errors import CheckpointError, SurgeryError, UsageError
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.layout import find_layout, natural, safe_relative

INDEX = "model.safetensors.index.json"
A = "model-00001-of-00002.safetensors"
B = "model-00002-of-00002.safetensors"


def save(path: Path, *names: str, value: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.full((2, 2), value) for name in names}, path)
    return path


def index(folder: Path, weight_map: Any, name: str = INDEX) -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards: `a` in the first, `b` in the second."""
    save(tmp_path / A, "a")
    save(tmp_path / B, "b")
    return index(tmp_path, {"a": A, "b": B})


def refused(path: Path, code: str, *words: str, **choice: str) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint(path, **choice)
    assert caught.value.code == code
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint
    return caught.value


def test_an_index_and_its_shards_are_one_checkpoint(shards: Path) -> None:
    found = open_checkpoint(shards)
    assert found.layout == "hf" and list(found.tensors) == ["a", "b"] and found.part().base == "model"


def test_one_file_in_a_folder_is_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    (tmp_path / "config.json").write_text('{"x": 1}')
    found = open_checkpoint(tmp_path)
    assert found.layout == "hf" and list(found.tensors) == ["a"] and found.config == {"x": 1}


def test_a_lone_file_is_a_checkpoint_without_a_config(tmp_path: Path) -> None:
    found = open_checkpoint(save(tmp_path / "any.name.safetensors", "a"))
    assert found.layout == "file" and found.side_files == ()
    with pytest.raises(CheckpointError, match="no config.json"):
        _ = found.config


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "a/../../x.safetensors", "/x.safetensors", "C:x.safetensors", "C:\\x.safetensors",
     "\\\\host\\x.safetensors", "..\\x.safetensors", "\\x.safetensors", "", "."],
)  # fmt: skip
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, file: str) -> None:
    inside = tmp_path / "inside"
    save(tmp_path / "x.safetensors", "a")
    inside.mkdir()
    refused(index(inside, {"a": file}), "checkpoint.unsafe-path", "'a'", INDEX)


@pytest.mark.parametrize("file", [5, None, ["x"], {"x": "y"}])
def test_an_index_whose_file_is_no_name_is_refused(tmp_path: Path, file: Any) -> None:
    refused(index(tmp_path, {"a": file}), "checkpoint.unsafe-path", "'a'")


def test_an_index_that_names_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    refused(index(tmp_path, {"a": "weights.bin"}), "checkpoint.inconsistent", "'a'", "weights.bin")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    refused(index(tmp_path, weight_map), "checkpoint.malformed", INDEX, "weight_map")


def test_an_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{")
    refused(tmp_path, "checkpoint.malformed", INDEX, "not JSON")


def test_an_index_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / INDEX, "wb") as handle:
        handle.truncate(100_000_001)
    refused(tmp_path, "checkpoint.malformed", INDEX, "larger than")


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / B).unlink()
    refused(shards, "checkpoint.missing-shard", B)


def test_a_shard_name_too_long_for_the_disk_is_an_error_and_no_fault_of_ours(tmp_path: Path) -> None:
    refused(index(tmp_path, {"a": "x" * 300 + ".safetensors"}), "checkpoint.unreadable", "too long")


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    save(shards / B, "a", "b")
    refused(shards, "checkpoint.inconsistent", "'a'", A, B)


def test_a_tensor_that_no_shard_holds_is_refused(shards: Path) -> None:
    refused(index(shards, {"a": A, "b": B, "c": B}), "checkpoint.inconsistent", "'c'", "in no file")


def test_a_tensor_that_the_index_leaves_out_is_refused(shards: Path) -> None:
    save(shards / B, "b", "c")
    refused(shards, "checkpoint.inconsistent", "'c'", "not in the index")


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(shards: Path) -> None:
    refused(index(shards, {"a": B, "b": A}), "checkpoint.inconsistent", f"should be in {B} and is in {A}")


def test_of_many_faults_the_first_ten_are_listed(shards: Path) -> None:
    error = refused(index(shards, {f"t{i}": A for i in range(30)}), "checkpoint.inconsistent", "t9", "and 21 more")
    assert "t10" not in error.message


def test_a_single_file_beside_an_index_is_ambiguous(shards: Path) -> None:
    save(shards / "model.safetensors", "a", "b")
    refused(shards, "checkpoint.ambiguous", INDEX, "model.safetensors")


def test_two_models_in_one_folder_are_ambiguous(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    save(tmp_path / "adapter_model.safetensors", "a")
    refused(tmp_path, "checkpoint.ambiguous", "adapter_model.safetensors", "model.safetensors")


def test_a_plain_file_goes_before_its_variants(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    save(tmp_path / "model.fp16.safetensors", "b")
    found = open_checkpoint(tmp_path)
    assert list(found.tensors) == ["a"] and found.ignored == ("model.fp16.safetensors",)


def test_a_variant_alone_is_opened(tmp_path: Path) -> None:
    save(tmp_path / "diffusion_pytorch_model.fp16.safetensors", "a")
    found = open_checkpoint(tmp_path)
    assert list(found.tensors) == ["a"] and found.part().base == "diffusion_pytorch_model"


def test_two_variants_without_a_plain_file_are_ambiguous(tmp_path: Path) -> None:
    save(tmp_path / "model.fp16.safetensors", "a")
    save(tmp_path / "model.fp8.safetensors", "a")
    refused(tmp_path, "checkpoint.ambiguous", "model.fp16.safetensors", "model.fp8.safetensors")


def test_an_index_of_a_variant_is_opened(tmp_path: Path) -> None:
    save(tmp_path / "model.fp16-00001-of-00001.safetensors", "a")
    index(tmp_path, {"a": "model.fp16-00001-of-00001.safetensors"}, "model.safetensors.index.fp16.json")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_shards_below_the_folder_are_allowed(tmp_path: Path) -> None:
    save(tmp_path / "shards" / "x.safetensors", "a")
    assert list(open_checkpoint(index(tmp_path, {"a": "shards/x.safetensors"})).tensors) == ["a"]


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, "checkpoint.no-weights", str(tmp_path))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    refused(tmp_path / "model.onnx", "checkpoint.unknown-layout", "model.onnx")


def test_an_index_given_itself_names_its_folder(shards: Path) -> None:
    assert str(shards) in refused(shards / INDEX, "checkpoint.not-weights", INDEX).hint


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "checkpoint.unknown-layout", "neither a file nor a folder")


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "checkpoint.malformed", "config.json")


def test_files_behind_links_are_opened_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    save(blobs / "abc", "a")
    (blobs / "def").write_text('{"x": 1}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "config.json").symlink_to("../../blobs/def")
    found = open_checkpoint(snapshot)
    assert found.read("a").shape == (2, 2) and found.config == {"x": 1} and found.side_files == ("config.json",)


def test_side_files_are_listed_and_hidden_ones_are_not(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    for name in ("README.md", "sub/tokenizer.json", ".git/HEAD", "optimizer.pt", "surgery.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_layout(tmp_path)
    assert found.side_files == ("README.md", "sub/tokenizer.json") and found.ignored == ("optimizer.pt",)


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["layers.10.w", "layers.2.w", "layers.2", "layers.٣.w", "layers.²", "x" + "1" * 5000]
    assert sorted(names, key=natural)[:3] == ["layers.2", "layers.2.w", "layers.10.w"]


def test_names_that_differ_in_zeros_have_one_order() -> None:
    names = ["a.1", "a.01", "a.001"]
    assert sorted(names, key=natural) == sorted(names[::-1], key=natural)


@pytest.mark.parametrize("name", ["a", "a/b", "a..b", "..a"])
def test_harmless_names_are_safe(name: str) -> None:
    assert safe_relative(name)


# Pipelines


def test_a_pipeline_has_one_part_for_each_folder_with_weights(tiny_pipeline: Path) -> None:
    found = open_checkpoint(tiny_pipeline)
    assert found.layout == "pipeline" and list(found.parts) == ["transformer", "vae"]
    assert "vae/decoder.0.weight" in found.tensors and "transformer/proj_out_1.bias" in found.tensors


def test_a_part_alone_is_a_plain_model(tiny_pipeline: Path, tiny_dit: Path) -> None:
    found = open_checkpoint(tiny_pipeline, part="transformer")
    assert found.config["_class_name"] == "DiTTransformer2DModel" and found.selected == "transformer"
    assert found.digest == open_checkpoint(tiny_dit).digest and found.side_files == ("config.json",)


def test_an_unknown_part_names_those_that_there_are(tiny_pipeline: Path) -> None:
    assert "transformer, vae" in refused(tiny_pipeline, "usage.part", "'unet'", part="unet").hint


def test_which_part_is_meant_must_be_said(tiny_pipeline: Path) -> None:
    with pytest.raises(UsageError, match="a part must be named"):
        _ = open_checkpoint(tiny_pipeline).config


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\b", "", "."])
def test_a_pipeline_part_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({name: ["diffusers", "X"]}))
    refused(tmp_path, "checkpoint.unsafe-path", "model_index.json")


def test_a_pipeline_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "X"], "_class_name": "P"}))
    refused(tmp_path, "checkpoint.no-weights", "pipeline")


# Pickles


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    bomb = tmp_path / "exploded"
    torch.save({"a": torch.zeros(1), "b": Bomb(bomb)}, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    error = refused(tmp_path / "model.bin", "checkpoint.unsafe-pickle", "model.bin")
    assert not bomb.exists() and "run code" in error.hint


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(tmp_path / "model.pt", "checkpoint.unsafe-pickle")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_tensors_opens(tmp_path: Path, zipped: bool) -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    torch.save({"a": tensor}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = open_checkpoint(tmp_path)
    assert found.layout == "pickle" and found.tensors["a"].dtype == "BF16"
    assert torch.equal(found.read("a"), tensor) and torch.equal(found.read("a", rows=slice(1, 2)), tensor[1:])


def test_a_pickle_and_a_safetensors_file_of_the_same_tensors_have_one_digest(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "t": torch.arange(6.0).reshape(2, 3).T, "s": torch.tensor(1)}
    torch.save(tensors, tmp_path / "x.pt")
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    assert open_checkpoint(tmp_path / "x.pt").digest == open_checkpoint(tmp_path / "x.safetensors").digest


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """A training checkpoint with a model and its average."""
    torch.save({"model": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(2)}, "step": 7}, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def test_nested_tensors_need_a_key(nested: Path) -> None:
    assert "--key: model, ema" in refused(nested, "usage.key", "nested").hint


def test_a_key_chooses_the_nested_dictionary(nested: Path) -> None:
    assert open_checkpoint(nested, key="ema").read("a").tolist() == [1.0, 1.0]


def test_an_unknown_key_names_the_nearest(nested: Path) -> None:
    assert "'model'" in refused(nested, "usage.key", "'modle'", key="modle").hint


def test_two_keys_of_one_pickle_have_two_digests(nested: Path) -> None:
    def opened(key: str) -> Checkpoint:
        return open_checkpoint(nested, key=key)

    first = opened("model").digest
    assert opened("ema").digest != first == opened("model").digest


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.zeros(2), "n": 3},
        [torch.zeros(1)],
        {"a": torch.zeros(2, 2).to_sparse()},
        {"": torch.ones(1)},
        {"\ud800": torch.ones(1)},
    ],
)
def test_a_pickle_of_anything_but_plain_named_tensors_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "checkpoint.malformed", "x.pt")


def test_a_dtype_that_the_format_lacks_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "checkpoint.unknown-dtype", "'a'", "complex128")


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"PK\x03\x04" + raw[:40], lambda raw: b""]
)
def test_a_damaged_pickle_is_an_error_of_the_checkpoint(nested: Path, damage: Any) -> None:
    nested.write_bytes(damage(nested.read_bytes()))
    with pytest.raises(CheckpointError):
        open_checkpoint(nested)


def test_sharded_pickles_open_by_their_index(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for i, name in enumerate(names):
        torch.save({f"t{i}": torch.full((2,), float(i))}, tmp_path / name)
    index(tmp_path, {"t0": names[0], "t1": names[1]}, "pytorch_model.bin.index.json")
    found = open_checkpoint(tmp_path)
    assert found.read("t1").tolist() == [1.0, 1.0] and found.part().base == "model"


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    torch.save({"b": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    found = open_checkpoint(tmp_path)
    assert list(found.tensors) == ["a"] and found.ignored == ("pytorch_model.bin",)


def test_a_copy_of_a_checkpoint_has_its_digest(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = shutil.copytree(shards, tmp_path_factory.mktemp("copy") / "x")
    assert open_checkpoint(copy).digest == open_checkpoint(shards).digest
