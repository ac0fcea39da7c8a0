"""The strict header reader: one small file for each way to be wrong, and the few oddities it lets pass."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from surgery.errors import CheckpointError
from surgery.store.checkpoint import open_checkpoint
from surgery.store.header import DTYPE_BITS, MAX_HEADER, Header, nbytes_of, plan_header, read_header

FLOAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def wrote(
    folder: Path, header: bytes | str | Mapping[str, Any], data: bytes = b"", *, length: int | None = None
) -> Path:
    """A file with this header, and the length that it claims to have."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def refused(path: Path, code: str, *names: str) -> CheckpointError:
    """The error of reading `path`: of that code, naming the file and each of `names`."""
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.code == f"checkpoint.{code}"
    for name in (str(path), *names):
        assert name in caught.value.message
    return caught.value


def test_a_file_of_seven_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"1234567")
    refused(path, "too-small", "7 bytes")


def test_a_header_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    refused(wrote(tmp_path, b"{}", length=MAX_HEADER + 1), "header-too-large", str(MAX_HEADER + 1))


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, b"{}", length=3), "truncated", "3 bytes")


def test_a_header_of_length_zero_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, b""), "malformed", "not JSON")


def test_a_header_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, b'{"a\xff": {}}'), "malformed", "not UTF-8")


def test_a_header_that_is_a_list_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, "[]"), "malformed", "not a JSON object")


def test_a_row_that_is_a_list_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, {"a.weight": []}), "malformed", "'a.weight'")


def test_a_name_that_stands_twice_is_refused_where_the_library_keeps_the_last(tmp_path: Path) -> None:
    row = json.dumps(FLOAT)
    path = wrote(tmp_path, f'{{"a.weight": {row}, "a.weight": {row}}}', b"1234")
    with safe_open(path, "pt") as lax:
        assert list(lax.keys()) == ["a.weight"]
    refused(path, "duplicate-tensor", "'a.weight' appears twice")


def test_a_key_that_stands_twice_inside_a_row_is_refused(tmp_path: Path) -> None:
    row = '{"dtype": "F32", "dtype": "I32", "shape": [1], "data_offsets": [0, 4]}'
    refused(wrote(tmp_path, f'{{"a.weight": {row}}}', b"1234"), "duplicate-tensor", "'a.weight'", "'dtype'")


def test_a_key_that_stands_twice_deeper_is_refused(tmp_path: Path) -> None:
    row = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "extra": {"deep": 1, "deep": 2}}'
    refused(wrote(tmp_path, f'{{"a.weight": {row}}}', b"1234"), "duplicate-tensor", "'deep'")


def test_metadata_that_stands_twice_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, '{"__metadata__": {}, "__metadata__": {}}'), "duplicate-tensor", "'__metadata__'")


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, {"a.weight": FLOAT | {"dtype": "F31"}}, b"1234"), "unknown-dtype", "'a.weight'", "F31")


@pytest.mark.parametrize("size", ["-1", "true", "1.0", '"1"', "null", "1e0"])
def test_a_size_that_is_no_count_is_refused(tmp_path: Path, size: str) -> None:
    row = f'{{"dtype": "F32", "shape": [{size}], "data_offsets": [0, 4]}}'
    refused(wrote(tmp_path, f'{{"a.weight": {row}}}', b"1234"), "malformed", "'a.weight'", "shape")


@pytest.mark.parametrize("offsets", ["[-4, 0]", "[false, 4]", "[0.0, 4]", "[4]", "[0, 4, 8]", "4", f"[0, {1 << 70}]"])
def test_offsets_that_are_no_positions_are_refused(tmp_path: Path, offsets: str) -> None:
    row = f'{{"dtype": "F32", "shape": [1], "data_offsets": {offsets}}}'
    refused(wrote(tmp_path, f'{{"a.weight": {row}}}', b"1234"), "malformed", "'a.weight'", "data_offsets")


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_a_row_that_lacks_a_field_is_refused(tmp_path: Path, field: str) -> None:
    row = {k: v for k, v in FLOAT.items() if k != field}
    refused(wrote(tmp_path, {"a.weight": row}, b"1234"), "malformed", "'a.weight'", field)


def test_a_product_of_sizes_that_overflows_is_refused(tmp_path: Path) -> None:
    row = {"dtype": "F32", "shape": [1 << 40, 1 << 40, 0], "data_offsets": [0, 0]}
    refused(wrote(tmp_path, {"a.weight": row}), "bad-size", "'a.weight'", "overflows")


def test_sizes_whose_product_would_take_minutes_are_refused_at_once(tmp_path: Path) -> None:
    shape = ", ".join(["9" * 4000] * 2000)
    row = f'{{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 4]}}'
    assert len(refused(wrote(tmp_path, f'{{"a.weight": {row}}}', b"1234"), "bad-size", "overflows").message) < 1000


def test_offsets_that_do_not_span_the_size_are_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, {"a.weight": FLOAT | {"shape": [2]}}, b"1234"), "bad-size", "'a.weight'", "8 bytes")


def test_a_hole_between_tensors_is_refused(tmp_path: Path) -> None:
    path = wrote(tmp_path, {"a": FLOAT, "b": FLOAT | {"data_offsets": [8, 12]}}, b"123412341234")
    refused(path, "bad-offsets", "'b'", "hole of 4 bytes")


def test_a_hole_at_the_start_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, {"a": FLOAT | {"data_offsets": [4, 8]}}, b"12341234"), "bad-offsets", "'a'", "hole")


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, {"a": FLOAT, "b": FLOAT}, b"1234"), "bad-offsets", "'b'", "overlaps")


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, {"a": FLOAT}, b"12345"), "trailing-bytes", "4 bytes")


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    error = refused(wrote(tmp_path, {"a": FLOAT}, b"123"), "truncated", "holds 3")
    assert "fetch the file again" in error.hint


@pytest.mark.parametrize("metadata", ['{"a": 1}', "[]", "null", '{"a": {"b": "c"}}'])
def test_metadata_that_is_not_all_strings_is_refused(tmp_path: Path, metadata: str) -> None:
    refused(wrote(tmp_path, f'{{"__metadata__": {metadata}}}'), "malformed", "__metadata__")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_only_python_knows_are_refused(tmp_path: Path, constant: str) -> None:
    refused(wrote(tmp_path, f'{{"a": {{"dtype": "F32", "shape": [{constant}]}}}}'), "malformed", constant)


def test_nesting_that_overflows_the_parser_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, '{"a":' * 50_000 + "1" + "}" * 50_000), "malformed", "nested too deeply")


def test_an_integer_of_ten_thousand_digits_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, f'{{"a": {"1" * 10_000}}}'), "malformed", "not JSON")


def test_an_empty_name_is_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, {"": FLOAT}, b"1234"), "malformed", "empty name")


def test_a_lone_surrogate_in_a_name_is_refused_as_by_the_library(tmp_path: Path) -> None:
    path = wrote(tmp_path, f'{{"a\\ud800": {json.dumps(FLOAT)}}}', b"1234")
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    refused(path, "malformed", r"a\ud800", "surrogate")


def test_bytes_behind_the_object_are_refused(tmp_path: Path) -> None:
    refused(wrote(tmp_path, json.dumps({"a": FLOAT}) + "{}", b"1234"), "malformed", "not JSON")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "model.safetensors", "unreadable", "No such file")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "unreadable", "directory")


def test_control_characters_of_a_name_are_escaped_in_the_message(tmp_path: Path) -> None:
    error = refused(wrote(tmp_path, {"\x1b[2Ja": FLOAT | {"dtype": "F31"}}, b"1234"), "unknown-dtype", r"\x1b[2Ja")
    assert "\x1b" not in str(error)


def test_a_leading_space_is_an_oddity_and_no_error(tmp_path: Path) -> None:
    header = read_header(wrote(tmp_path, " " + json.dumps({"a": FLOAT}), b"1234"))
    assert header.oddities == ("the header does not start with '{'",)


def test_extra_fields_are_an_oddity_and_no_error(tmp_path: Path) -> None:
    header = read_header(wrote(tmp_path, {"a": FLOAT | {"note": 1}}, b"1234"))
    assert header.oddities == ("'a' has extra fields: note",)


def test_trailing_spaces_are_the_usual_padding(tmp_path: Path) -> None:
    assert read_header(wrote(tmp_path, json.dumps({"a": FLOAT}) + "   ", b"1234")).oddities == ()


def test_a_file_without_tensors_is_whole(tmp_path: Path) -> None:
    path = wrote(tmp_path, "{}")
    assert read_header(path) == Header({}, {}, 10, 10)


def test_tensors_come_in_file_order_and_not_in_that_of_the_header(tmp_path: Path) -> None:
    path = wrote(tmp_path, {"b": FLOAT | {"data_offsets": [4, 8]}, "a": FLOAT}, b"12341234")
    assert list(read_header(path).tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("F4", [2, 3], 3), ("F6_E2M3", [4], 3), ("F6_E3M2", [2, 2], 3), ("F4", [0, 3], 0)]
)
def test_dtypes_below_a_byte_are_read_as_raw_bytes(tmp_path: Path, dtype: str, shape: list[int], size: int) -> None:
    data = bytes(range(size))
    path = wrote(tmp_path, {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, data)
    found = open_checkpoint(path).read("a")
    assert found.dtype is torch.uint8 and bytes(found.tolist()) == data


@pytest.mark.parametrize(("dtype", "shape"), [("F4", [3]), ("F6_E2M3", [3]), ("F6_E3M2", [1])])
def test_dtypes_below_a_byte_must_fill_whole_bytes(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    path = wrote(tmp_path, {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 2]}}, b"12")
    refused(path, "bad-size", "'a'", "whole bytes")


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_the_library_accepts_a_planned_header_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    shape = (4, 2)
    header, places = plan_header([("a", dtype, shape)], metadata={"format": "pt"})
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + bytes(nbytes_of(dtype, shape)))
    with safe_open(path, "pt") as found:
        assert list(found.keys()) == ["a"] and found.metadata() == {"format": "pt"}
    assert read_header(path).data_start == places["a"][0] == len(header)


def test_planned_data_starts_at_a_multiple_of_eight() -> None:
    for count in range(1, 17):
        header, _ = plan_header([("x" * count, "F32", (1,))], metadata={})
        assert len(header) % 8 == 0


@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"], [""]])
def test_a_plan_with_a_repeated_reserved_or_empty_name_is_a_fault(names: list[str]) -> None:
    with pytest.raises(ValueError, match="twice"):
        plan_header([(name, "F32", (1,)) for name in names], metadata={})


def test_reading_a_header_leaves_no_descriptor_open(tmp_path: Path) -> None:
    path = wrote(tmp_path, {"a": FLOAT}, b"123")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(CheckpointError):
            read_header(path)
    assert len(os.listdir("/proc/self/fd")) == before
