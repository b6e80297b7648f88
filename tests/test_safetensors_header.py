"""A file whose header does not describe it to the byte is refused; test_fuzz.py has what safetensors refuses."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest

from moeplug.checkpoint.reader import Checkpoint
from moeplug.errors import CheckpointError


@pytest.fixture
def damaged(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint in one file."""
    return helpers.copy_of(tiny_checkpoint("olmoe"), tmp_path)


def refusal(folder: Path, **options: Any) -> str:
    """Return the text of the CheckpointError that opening a folder raises."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, **options)
    return str(caught.value)


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


BAD_HEADERS: dict[str, tuple[Any, int, str]] = {
    "hole": ({"a": entry(0, 4), "b": entry(6, 10)}, 10, "leaves a hole"),
    "first_not_at_zero": ({"a": entry(2, 4)}, 4, "leaves a hole"),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "overlaps"),
    "same_bytes_twice": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "overlaps"),
    "trailing_bytes": ({"a": entry(0, 4)}, 9, "5 bytes after its last tensor"),
    "bytes_without_tensors": ({}, 3, "3 bytes after"),
    "end_before_begin": ({"a": entry(4, 0, shape=[4])}, 4, "begin <= end"),
    "negative_offset": ({"a": entry(-4, 0, shape=[4])}, 4, "data_offsets"),
    "three_offsets": ({"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, 4, "data_offsets"),
    "fractional_offset": ({"a": entry(0, 4) | {"data_offsets": [0, 4.0]}}, 4, "data_offsets"),
    "true_as_size": ({"a": entry(0, 1) | {"shape": [True]}}, 1, "shape"),
    "shape_too_small": ({"a": entry(0, 4, "F32", [2])}, 4, "needs 8 bytes"),
    "shape_overflows": ({"a": entry(0, 0, "F32", [2**40, 2**40, 0])}, 0, "too large"),
    "half_a_byte": ({"a": entry(0, 1, "F4", [3])}, 1, "12 bits, which do not fill whole bytes"),
    "dtype_of_tomorrow": ({"a": entry(0, 4, "F8_E3M4")}, 4, "dtype 'F8_E3M4' is unknown; known: BOOL, "),
    "unknown_dtype": ({"a": entry(0, 4, "F3")}, 4, "dtype 'F3' is unknown; known: BOOL, "),
    "dtype_is_no_text": ({"a": entry(0, 4) | {"dtype": 8}}, 4, "dtype 8 is unknown"),
    "unknown_key": ({"a": entry(0, 4) | {"stride": [1]}}, 4, "expected dtype, shape and data_offsets"),
    "missing_key": ({"a": {"dtype": "U8", "shape": [4]}}, 4, "expected dtype, shape and data_offsets"),
    "metadata_is_a_list": ({"__metadata__": []}, 0, "__metadata__"),
    "metadata_of_numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "name_with_nul": ({"a\0b": entry(0, 4)}, 4, "printable"),
    "name_with_escape": ({"\x1b[2J": entry(0, 4)}, 4, "printable"),
    "empty_name": ({"": entry(0, 4)}, 4, "printable"),
    "name_of_1001": ({"a" * 1001: entry(0, 4)}, 4, "printable text of 1 to 1000 characters"),
    "tensor_called_metadata": ({"__metadata__": entry(0, 4)}, 4, "__metadata__"),
    "sizes_without_end": (b'{"a":{"dtype":"U8","shape":[' + b"1," * 3_000_000, 4, "has over 3,000,000 values"),
    "half_a_surrogate": ({"__metadata__": {"a": "\ud800"}}, 0, "Unicode"),
    "duplicate_name": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{}}', 4, "'a' is there twice"),
    "duplicate_key": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', 4, "there twice"),
    "minus_zero": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}', 4, "'-0' is not a number"),
    "5000_digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', 4, "not a number"),
    "nan": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', 4, "NaN is not JSON"),
    "nested": (b'{"a":' + b"[" * 100_000, 0, "nested too deeply"),
    "leading_space": (b' {"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4, "does not start with '{'"),
    "not_utf8": (b'{"\xff":1}', 0, "not UTF-8"),
    "not_json": (b"{nonsense}", 0, "is not JSON"),
    "a_list": (b"[]", 0, "does not start with '{'"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_does_not_describe_its_file_to_the_byte_is_refused(damaged: Path, case: str) -> None:
    header, data_bytes, expected = BAD_HEADERS[case]
    helpers.write_raw(damaged / "model.safetensors", header, bytes(data_bytes))
    message = refusal(damaged)
    assert expected in message
    assert "model.safetensors" in message
    assert "\x1b" not in message
    assert "\0" not in message


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10_000], ids=str)
def test_a_header_length_that_lies_is_refused_before_anything_is_allocated(damaged: Path, length: int) -> None:
    file = damaged / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    if length == 100_000_001:  # the file is large enough, without taking disk
        os.truncate(file, 200_000_000)
    assert f"announces a header of {length:,} bytes" in refusal(damaged)


NOT_SAFETENSORS = {
    "zero_bytes": (b"", "empty (0 bytes)"),
    "five_bytes": (b"12345", "too few"),
    "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n", "Git LFS pointer"),
    "web_page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "zip": (b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00archive/data.pkl", "pickle"),
    "pickle": (b"\x80\x02}q\x00(X\x06\x00\x00\x00weightq\x01", "pickle"),
    "gguf": (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "GGUF"),
}


@pytest.mark.parametrize("case", NOT_SAFETENSORS)
def test_what_is_no_safetensors_file_is_recognised_and_said(damaged: Path, case: str) -> None:
    content, expected = NOT_SAFETENSORS[case]
    (damaged / "model.safetensors").write_bytes(content)
    assert expected in refusal(damaged)
