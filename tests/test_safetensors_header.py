"""A file whose header does not describe it to the byte is refused, and always when safetensors refuses it."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
from safetensors import safe_open

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


# Never laxer than the safetensors library


SMALL_FILE = {
    "__metadata__": {"format": "pt", "é": 'quote " and \\'},
    "a.weight": entry(0, 16, "BF16", [2, 4]),
    "b": entry(16, 20, "F32", []),
    "empty": entry(20, 20, "I64", [0, 7]),
    "c": entry(20, 26, "F4", [3, 4]),
}


def mutant_of(content: bytes, chance: random.Random) -> bytes:
    """Return the file with one to three small changes, most of them in the header's JSON."""
    length = int.from_bytes(content[:8], "little")
    header, data = bytearray(content[8 : 8 + length]), bytearray(content[8 + length :])
    stated = length
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(header) + 1)
        kind = chance.randrange(9)
        if kind == 0:
            header[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            header[at : at + chance.randint(1, 8)] = b""
        elif kind == 2:
            header[at:at] = chance.choice([b" ", b"0", b"-", b"9", b'"', b",", b"{", b"}", b"[", b"1e1", b"\t", b"\0"])
        elif kind == 3:
            begin = chance.randrange(len(header))
            header[at:at] = header[begin : begin + chance.randint(1, 60)]
        elif kind == 4:
            data = data[: chance.randrange(len(data) + 1)] if chance.random() < 0.5 else data + b"\0"
        elif kind == 5:
            old, new = chance.choice([(b"BF16", b"F32"), (b"0", b"-0"), (b"[", b"[0,"), (b"16", b"15"), (b"F4", b"F5")])
            header = header.replace(old, new, 1)
        elif kind == 6:
            header += chance.choice([b" ", b"\n", b"\0", b"x"])
        elif kind == 7:
            stated = chance.choice([length + 1, length - 1, 2**63, 2**64 - 1, 0])
        else:
            digits = [i for i, byte in enumerate(header) if chr(byte).isdigit()]
            if digits:
                header[chance.choice(digits)] = ord(chance.choice("0123456789"))
    if stated == length:
        stated = len(header)
    return stated.to_bytes(8, "little") + bytes(header) + bytes(data)


def accepted_by_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "np") as opened:
            list(opened.keys())
    except Exception:
        return False
    return True


def accepted_by_moeplug(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except CheckpointError:
        return False
    return True


def compare_mutants(folder: Path, content: bytes, count: int, seed: int) -> None:
    chance = random.Random(seed)
    path = folder / "model.safetensors"
    refused = accepted = 0
    for number in range(count):
        mutant = mutant_of(content, chance)
        path.write_bytes(mutant)
        theirs, ours = accepted_by_safetensors(path), accepted_by_moeplug(folder)
        assert theirs or not ours, f"mutant {number}: safetensors refuses it, moeplug does not: {mutant[:400]!r}"
        refused += not theirs
        accepted += ours
    assert refused > count // 2
    assert accepted > 0


@pytest.fixture
def small_file(tmp_path: Path) -> bytes:
    (tmp_path / "config.json").write_text("{}")
    helpers.write_raw(tmp_path / "model.safetensors", SMALL_FILE, bytes(range(26)))
    assert accepted_by_safetensors(tmp_path / "model.safetensors")
    assert accepted_by_moeplug(tmp_path)
    return (tmp_path / "model.safetensors").read_bytes()


def test_every_mutant_that_safetensors_refuses_is_refused(
    small_file: bytes, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    compare_mutants(tmp_path, small_file, 250, seed=1)
    shard = helpers.shard_files(tiny_checkpoint("olmoe", shards=3))[-1]
    compare_mutants(tmp_path, shard.read_bytes(), 50, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_every_one_of_many_mutants_that_safetensors_refuses_is_refused(
    small_file: bytes, tmp_path: Path, seed: int
) -> None:
    compare_mutants(tmp_path, small_file, 10_000, seed=100 + seed)
