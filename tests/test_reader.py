"""A checkpoint that is not exactly what it says is refused before a weight is read; a good one streams its bytes."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from safetensors import safe_open

from moeplug.checkpoint import streaming
from moeplug.checkpoint.family import find_family
from moeplug.checkpoint.reader import Checkpoint, DummyCheckpoint, Piece, in_file_order, read_config
from moeplug.errors import CheckpointError, InputOutputError, UsageError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def damaged(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint in one file."""
    return helpers.copy_of(tiny_checkpoint("olmoe"), tmp_path)


@pytest.fixture
def damaged_shards(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint in several files with an index."""
    return helpers.copy_of(tiny_checkpoint("olmoe", shards=3), tmp_path)


def refusal(folder: Path, **options: Any) -> str:
    """Return the text of the CheckpointError that opening a folder raises."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, **options)
    return str(caught.value)


def buffers_for(pieces: list[Piece], count: int = 2) -> list[memoryview]:
    return [memoryview(bytearray(max(piece.nbytes for piece in pieces))) for _ in range(count)]


def whole_tensors(checkpoint: Checkpoint) -> list[Piece]:
    return in_file_order(Piece(tensor, 0, tensor.nbytes) for tensor in checkpoint.tensors.values())


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "moeplug-reader"]


# What a good checkpoint gives


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_those_that_safetensors_finds(tiny_checkpoint: Callable[..., Path], shards: int) -> None:
    folder = tiny_checkpoint("qwen3_moe", shards=shards)
    checkpoint = Checkpoint.open(folder)
    found: dict[str, tuple[int, ...]] = {}
    for file in helpers.shard_files(folder):
        with safe_open(file, "np") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == found
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert list(checkpoint.files) == helpers.shard_files(folder)
    assert checkpoint.notes == ()
    assert (len(checkpoint.files) > 1) == (shards > 1)


@pytest.mark.parametrize("limit", [1 << 20, 1000, 1], ids=["whole_tensors", "pieces_of_1000_bytes", "single_bytes"])
@pytest.mark.parametrize("ring", [2, 5])
def test_a_stream_gives_the_bytes_of_the_files(tiny_checkpoint: Callable[..., Path], limit: int, ring: int) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe", shards=3))
    tensors = [t for t in checkpoint.tensors.values() if limit > 1 or t.nbytes < 200]
    pieces = in_file_order(
        Piece(tensor, start, min(limit, tensor.nbytes - start))
        for tensor in tensors
        for start in range(0, tensor.nbytes, limit)
    )
    got: dict[str, bytearray] = {tensor.name: bytearray() for tensor in tensors}
    for piece, content in checkpoint.stream(pieces, buffers_for(pieces, ring)):
        got[piece.tensor.name] += content
    for tensor in tensors:
        assert got[tensor.name] == tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def test_pieces_in_any_order_are_read_in_that_order(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe", shards=3))
    pieces = whole_tensors(checkpoint)
    random.Random(0).shuffle(pieces)
    content = {file: file.read_bytes() for file in checkpoint.files}
    stream = checkpoint.stream(pieces, buffers_for(pieces))
    for wanted, (piece, got) in zip(pieces, stream, strict=True):
        tensor = wanted.tensor
        assert piece is wanted
        assert bytes(got) == content[tensor.file][tensor.offset : tensor.offset + tensor.nbytes]


def test_a_system_that_reads_seven_bytes_at_a_time_gives_the_same_bytes(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    pieces = [piece for piece in whole_tensors(checkpoint) if piece.nbytes < 5000][:4]
    expected = [bytes(content) for _, content in checkpoint.stream(pieces, buffers_for(pieces))]
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    assert [bytes(content) for _, content in checkpoint.stream(pieces, buffers_for(pieces))] == expected


def test_the_fingerprint_is_of_config_index_headers_and_sizes(damaged_shards: Path) -> None:
    before = Checkpoint.open(damaged_shards).fingerprint()
    assert Checkpoint.open(damaged_shards).fingerprint() == before
    shard = helpers.shard_files(damaged_shards)[0]
    helpers.edit_header(shard, lambda header: header["__metadata__"].update(note="x"))
    with_other_header = Checkpoint.open(damaged_shards).fingerprint()
    helpers.edit_json(damaged_shards / "config.json", lambda config: config.update(note="x"))
    with_other_config = Checkpoint.open(damaged_shards).fingerprint()
    assert len({before, with_other_header, with_other_config}) == 3


def test_reading_headers_and_listing_families_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from moeplug.checkpoint.family import known_families; import moeplug.checkpoint.reader; "
        "known_families(); print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Rows 1 to 7: one file


def test_a_truncated_shard_is_refused_at_open_with_the_missing_bytes(damaged_shards: Path) -> None:
    shard = helpers.shard_files(damaged_shards)[1]
    os.truncate(shard, shard.stat().st_size - 100)
    message = refusal(damaged_shards)
    assert shard.name in message
    assert "truncated" in message
    assert "100 are missing" in message


def test_all_damaged_shards_are_named_at_once(damaged_shards: Path) -> None:
    shards = helpers.shard_files(damaged_shards)
    for shard in shards:
        os.truncate(shard, shard.stat().st_size - 1)
    message = refusal(damaged_shards)
    assert all(shard.name in message for shard in shards)


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
    "unknown_dtype": ({"a": entry(0, 4, "F3")}, 4, "dtype 'F3' is unknown; known: BOOL, "),
    "dtype_is_no_text": ({"a": entry(0, 4) | {"dtype": 8}}, 4, "dtype 8 is unknown"),
    "unknown_key": ({"a": entry(0, 4) | {"stride": [1]}}, 4, "expected dtype, shape and data_offsets"),
    "missing_key": ({"a": {"dtype": "U8", "shape": [4]}}, 4, "expected dtype, shape and data_offsets"),
    "metadata_is_a_list": ({"__metadata__": []}, 0, "__metadata__"),
    "metadata_of_numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "name_with_nul": ({"a\0b": entry(0, 4)}, 4, "printable"),
    "name_with_escape": ({"\x1b[2J": entry(0, 4)}, 4, "printable"),
    "empty_name": ({"": entry(0, 4)}, 4, "printable"),
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


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_alone_are_refused_with_the_way_to_convert_them(damaged: Path, name: str) -> None:
    (damaged / "model.safetensors").rename(damaged / name)
    message = refusal(damaged)
    assert name in message
    assert "save_pretrained" in message


# Rows 8 to 14: the folder


BAD_FILE_NAMES = {
    "parent": "../model.safetensors",
    "absolute": "/etc/model.safetensors",
    "windows_drive": "C:\\model.safetensors",
    "drive_relative": "C:model.safetensors",
    "backslash": "..\\model.safetensors",
    "empty": "",
    "dots": "..",
    "nul": "model\0.safetensors",
    "not_text": 7,
    "nothing": None,
    "suffix": "model.bin",
    "only_suffix": ".safetensors",
    "folder": "sub/model.safetensors",
}


@pytest.mark.parametrize("case", BAD_FILE_NAMES)
def test_an_index_cannot_name_a_path_outside_its_folder(damaged_shards: Path, case: str) -> None:
    name = "lm_head.weight"
    helpers.edit_json(damaged_shards / INDEX, lambda index: index["weight_map"].update({name: BAD_FILE_NAMES[case]}))
    message = refusal(damaged_shards)
    assert name in message
    assert INDEX in message


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "{", "<html>", ""])
def test_an_index_without_a_map_is_refused(damaged_shards: Path, content: str) -> None:
    (damaged_shards / INDEX).write_text(content)
    assert INDEX in refusal(damaged_shards)


def test_an_index_that_names_a_tensor_twice_is_refused(damaged_shards: Path) -> None:
    (damaged_shards / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    assert "'a' is there twice" in refusal(damaged_shards)


def hub_cache(checkpoint: Path, cache: Path) -> Path:
    """Lay a checkpoint out as Hugging Face's cache does: snapshots/<revision>/ of links into ../../blobs/."""
    snapshot = cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        blob = cache / "blobs" / f"{number:064x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_the_links_of_a_hugging_face_cache_are_followed(damaged_shards: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(hub_cache(damaged_shards, tmp_path / "cache"))
    pieces = whole_tensors(checkpoint)
    total = sum(len(content) for _, content in checkpoint.stream(pieces, buffers_for(pieces)))
    assert total == checkpoint.total_bytes
    assert checkpoint.fingerprint() == Checkpoint.open(damaged_shards).fingerprint()


def test_a_link_to_another_file_of_the_folder_is_followed(damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "weights.data")
    (damaged / "model.safetensors").symlink_to("weights.data")
    assert Checkpoint.open(damaged).tensors


def test_a_link_out_of_the_folder_is_refused_unless_links_are_allowed(damaged: Path, tmp_path: Path) -> None:
    outside = (damaged / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (damaged / "model.safetensors").symlink_to(outside)
    message = refusal(damaged)
    assert str(outside) in message
    assert "symlink" in message
    assert Checkpoint.open(damaged, allow_symlinks=True).tensors


def test_a_cache_whose_blobs_folder_is_itself_a_link_is_refused(damaged: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(damaged, tmp_path / "cache")
    (tmp_path / "cache" / "blobs").rename(tmp_path / "elsewhere")
    (tmp_path / "cache" / "blobs").symlink_to(tmp_path / "elsewhere")
    assert "symlink" in refusal(snapshot)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_to_nothing_is_refused(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    (damaged / name).symlink_to("gone")
    assert "does not exist" in refusal(damaged)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "character device"])
def test_only_a_regular_file_is_read(damaged: Path, name: str, kind: str) -> None:
    path = damaged / name
    path.unlink()
    {"FIFO": os.mkfifo, "folder": os.mkdir, "character device": lambda p: p.symlink_to("/dev/zero")}[kind](path)
    assert f"is a {kind}" in refusal(damaged, allow_symlinks=True)


def test_all_missing_shards_are_named_at_once(damaged_shards: Path) -> None:
    shards = helpers.shard_files(damaged_shards)
    for shard in shards[1:]:
        shard.unlink()
    message = refusal(damaged_shards)
    assert f"{len(shards) - 1} of {len(shards)} shards are missing" in message
    assert all(shard.name in message for shard in shards[1:])


def test_a_tensor_that_only_the_index_knows_is_refused(damaged_shards: Path) -> None:
    file = helpers.shard_files(damaged_shards)[0].name
    helpers.edit_json(damaged_shards / INDEX, lambda index: index["weight_map"].update({"ghost.weight": file}))
    message = refusal(damaged_shards)
    assert "'ghost.weight'" in message
    assert file in message


def test_tensors_that_the_index_does_not_know_are_ignored_with_one_note(damaged_shards: Path) -> None:
    whole = Checkpoint.open(damaged_shards)
    names = list(whole.tensors)[:2]
    helpers.edit_json(damaged_shards / INDEX, lambda index: [index["weight_map"].pop(name) for name in names])
    checkpoint = Checkpoint.open(damaged_shards)
    assert set(whole.tensors) - set(checkpoint.tensors) == set(names)
    assert len(checkpoint.notes) == 1
    assert checkpoint.notes[0].startswith("ignored: 2 tensors that ")


def test_of_a_tensor_in_two_shards_the_one_that_the_index_names_counts(damaged_shards: Path) -> None:
    first, second = helpers.shard_files(damaged_shards)[:2]
    name = next(iter(helpers.load_file(first)))
    twin = helpers.load_file(first)[name]
    helpers.edit_tensors(second, lambda tensors: tensors.update({name: twin + 1}))
    checkpoint = Checkpoint.open(damaged_shards)
    assert checkpoint.tensors[name].file == first
    assert "ignored: 1 tensor that" in checkpoint.notes[0]
    (damaged_shards / INDEX).unlink()
    assert "download the index" in refusal(damaged_shards)


def test_stale_shards_beside_the_index_are_not_read(damaged_shards: Path) -> None:
    before = Checkpoint.open(damaged_shards)
    (damaged_shards / "consolidated.safetensors").write_bytes(b"rubbish")
    after = Checkpoint.open(damaged_shards)
    assert after.tensors == before.tensors
    assert after.fingerprint() == before.fingerprint()


def test_without_an_index_model_safetensors_counts_and_the_rest_is_noted(damaged: Path) -> None:
    (damaged / "consolidated.safetensors").write_bytes(b"rubbish")
    assert "consolidated.safetensors" in Checkpoint.open(damaged).notes[0]


def test_without_an_index_a_single_file_of_any_name_is_read(damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "weights.safetensors")
    assert [file.name for file in Checkpoint.open(damaged).files] == ["weights.safetensors"]


# MODEL and config.json


def test_a_hub_id_is_told_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputOutputError, match="hf download allenai/OLMoE-1B-7B --local-dir OLMoE-1B-7B"):
        Checkpoint.open("allenai/OLMoE-1B-7B")
    with pytest.raises(InputOutputError, match=r"no such folder$"):
        Checkpoint.open(tmp_path / "gone")


def test_a_file_in_place_of_a_folder_is_said(damaged: Path) -> None:
    with pytest.raises(UsageError, match="is a file; give the checkpoint's folder"):
        Checkpoint.open(damaged / "model.safetensors")


def test_what_the_system_refuses_is_an_input_output_error_with_path_and_reason(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # the superuser, as whom tests may run, is never refused
    with pytest.raises(InputOutputError, match=r"config\.json: Permission denied"):
        Checkpoint.open(damaged)


def test_a_folder_without_weights_or_config_says_which(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no .safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "a": 2}', "\ufeff{}", "<html>"])
def test_a_config_that_is_no_strict_json_object_is_refused(damaged: Path, content: str) -> None:
    (damaged / "config.json").write_text(content)
    assert "config.json" in refusal(damaged)


def test_a_config_may_hold_infinity_as_some_published_ones_do(damaged: Path) -> None:
    helpers.edit_json(damaged / "config.json", lambda config: config.update(time_step_limit=[0.0, float("inf")]))
    assert Checkpoint.open(damaged).config["time_step_limit"][1] == float("inf")


def test_read_config_needs_no_weights(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    assert read_config(damaged) == read_config(damaged / "config.json")
    assert read_config(damaged)["model_type"] == "olmoe"


# Row 15, and how a stream ends


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.rename(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "overwritten": overwrite,
    "replaced": replace,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 1),
}


@pytest.mark.parametrize("how", [*CHANGES, "removed"])
def test_a_file_that_changed_after_its_header_was_checked_is_refused(damaged: Path, how: str) -> None:
    checkpoint = Checkpoint.open(damaged)
    pieces = whole_tensors(checkpoint)
    file = checkpoint.files[0]
    CHANGES.get(how, Path.unlink)(file)
    error = InputOutputError if how == "removed" else CheckpointError
    with pytest.raises(error, match=r"model\.safetensors"):
        next(checkpoint.stream(pieces, buffers_for(pieces)))
    assert reading_threads() == []


@pytest.mark.parametrize("how", ["overwritten", "truncated", "grown"])
def test_a_file_that_changes_while_it_is_read_is_refused_at_the_end_of_the_file(damaged: Path, how: str) -> None:
    checkpoint = Checkpoint.open(damaged)
    pieces = whole_tensors(checkpoint)
    descriptors = open_descriptors()
    stream = checkpoint.stream(pieces, buffers_for(pieces))
    next(stream)
    CHANGES[how](checkpoint.files[0])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.* changed"):
        list(stream)
    assert reading_threads() == []
    assert open_descriptors() == descriptors


@pytest.mark.parametrize("how", ["close", "consumer_error", "interrupt", "exhausted"])
def test_a_stream_that_ends_leaves_no_thread_and_no_open_file(tiny_checkpoint: Callable[..., Path], how: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    pieces = whole_tensors(checkpoint)
    descriptors = open_descriptors()
    stream = checkpoint.stream(pieces, buffers_for(pieces))
    next(stream)
    if how == "close":
        stream.close()
    elif how == "exhausted":
        list(stream)
    else:
        error = KeyboardInterrupt if how == "interrupt" else RuntimeError
        with pytest.raises(error):
            stream.throw(error())
    assert reading_threads() == []
    assert open_descriptors() == descriptors


def test_an_error_in_the_reading_thread_is_raised_in_the_consumer(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    pieces = whole_tensors(checkpoint)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(InputOutputError, match=r"model\.safetensors: Input/output error"):
        list(checkpoint.stream(pieces, buffers_for(pieces)))
    assert reading_threads() == []


def test_a_stream_reads_at_most_its_buffers_ahead(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    pieces = whole_tensors(checkpoint)
    read: list[Piece] = []
    original = streaming.PieceReader.read

    def counting(self: streaming.PieceReader, piece: Piece, view: memoryview) -> None:
        original(self, piece, view)
        read.append(piece)

    monkeypatch.setattr(streaming.PieceReader, "read", counting)
    for used, _ in enumerate(checkpoint.stream(pieces, buffers_for(pieces, 3)), start=1):
        assert len(read) <= used + 2


def test_buffers_that_cannot_hold_the_pieces_are_refused_at_once(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    pieces = whole_tensors(checkpoint)
    good = buffers_for(pieces, 1)[0]
    for wrong in [[good], [good, good[:-1]], [good, good.toreadonly()], [good, good[::-1]]]:
        with pytest.raises(ValueError, match="buffer"):
            checkpoint.stream(pieces, wrong)
    tensor = pieces[0].tensor
    with pytest.raises(ValueError, match="outside"):
        checkpoint.stream([Piece(tensor, 1, tensor.nbytes)], [good, good])


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


# Generated weights


@pytest.fixture
def dummy(tiny_checkpoint: Callable[..., Path]) -> DummyCheckpoint:
    config = json.loads((tiny_checkpoint("qwen3_moe") / "config.json").read_text())
    return DummyCheckpoint.from_config(config, find_family(config))


def generated(checkpoint: DummyCheckpoint, pieces: list[Piece]) -> bytes:
    return b"".join(bytes(content) for _, content in checkpoint.stream(pieces, buffers_for(pieces)))


def test_a_dummy_checkpoint_has_the_expert_tensors_of_the_real_one(
    dummy: DummyCheckpoint, tiny_checkpoint: Callable[..., Path]
) -> None:
    real = Checkpoint.open(tiny_checkpoint("qwen3_moe")).tensors
    experts = {name: (t.dtype, t.shape, t.nbytes) for name, t in real.items() if ".experts." in name}
    assert {name: (t.dtype, t.shape, t.nbytes) for name, t in dummy.tensors.items()} == experts
    assert dummy.total_bytes == sum(nbytes for _, _, nbytes in experts.values())


def test_generated_bytes_depend_on_tensor_and_place_and_not_on_the_piece(dummy: DummyCheckpoint) -> None:
    first, second = list(dummy.tensors.values())[:2]
    whole = generated(dummy, [Piece(first, 0, first.nbytes)])
    parts = [Piece(first, start, min(100, first.nbytes - start)) for start in range(0, first.nbytes, 100)]
    assert generated(dummy, parts) == whole
    assert generated(dummy, [Piece(second, 0, second.nbytes)]) != whole


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_generated_weights_are_finite_with_a_standard_deviation_of_0_02(
    tiny_checkpoint: Callable[..., Path], dtype: str
) -> None:
    config = json.loads((tiny_checkpoint("mixtral") / "config.json").read_text()) | {"dtype": dtype}
    dummy = DummyCheckpoint.from_config(config, find_family(config))
    tensor = next(iter(dummy.tensors.values()))
    raw = generated(dummy, [Piece(tensor, 0, tensor.nbytes)])
    if dtype == "bfloat16":
        values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, dtype).astype(np.float32)
    assert values.size == np.prod(tensor.shape)
    assert np.isfinite(values).all()
    assert 0.019 < values.std() < 0.021  # 6144 samples: the standard error is 0.0002
    assert len({row.tobytes() for row in values.reshape(tensor.shape)}) == tensor.shape[0]
