"""A stream gives the bytes of unchanged files, ends cleanly however it ends, and can be made up (--dummy)."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import helpers
import numpy as np
import pytest

from moeplug.checkpoint import streaming
from moeplug.checkpoint.dummy import DummyCheckpoint
from moeplug.checkpoint.family import find_family
from moeplug.checkpoint.reader import Checkpoint, Piece, in_file_order
from moeplug.errors import CheckpointError, InputOutputError


@pytest.fixture
def damaged(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint in one file."""
    return helpers.copy_of(tiny_checkpoint("olmoe"), tmp_path)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "moeplug-reader"]


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
    for piece, content in checkpoint.stream(pieces, helpers.buffers_for(pieces, ring)):
        got[piece.tensor.name] += content
    for tensor in tensors:
        assert got[tensor.name] == tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def test_pieces_in_any_order_are_read_in_that_order(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe", shards=3))
    pieces = helpers.whole_tensors(checkpoint)
    random.Random(0).shuffle(pieces)
    content = {file: file.read_bytes() for file in checkpoint.files}
    stream = checkpoint.stream(pieces, helpers.buffers_for(pieces))
    for wanted, (piece, got) in zip(pieces, stream, strict=True):
        tensor = wanted.tensor
        assert piece is wanted
        assert bytes(got) == content[tensor.file][tensor.offset : tensor.offset + tensor.nbytes]


def test_a_system_that_reads_seven_bytes_at_a_time_gives_the_same_bytes(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    pieces = [piece for piece in helpers.whole_tensors(checkpoint) if piece.nbytes < 5000][:4]
    expected = [bytes(content) for _, content in checkpoint.stream(pieces, helpers.buffers_for(pieces))]
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    assert [bytes(content) for _, content in checkpoint.stream(pieces, helpers.buffers_for(pieces))] == expected


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
    pieces = helpers.whole_tensors(checkpoint)
    file = checkpoint.files[0]
    CHANGES.get(how, Path.unlink)(file)
    error = InputOutputError if how == "removed" else CheckpointError
    with pytest.raises(error, match=r"model\.safetensors"):
        next(checkpoint.stream(pieces, helpers.buffers_for(pieces)))
    assert reading_threads() == []


@pytest.mark.parametrize("how", ["overwritten", "truncated", "grown"])
def test_a_file_that_changes_while_it_is_read_is_refused_at_the_end_of_the_file(damaged: Path, how: str) -> None:
    checkpoint = Checkpoint.open(damaged)
    pieces = helpers.whole_tensors(checkpoint)
    descriptors = open_descriptors()
    stream = checkpoint.stream(pieces, helpers.buffers_for(pieces))
    next(stream)
    CHANGES[how](checkpoint.files[0])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.* changed"):
        list(stream)
    assert reading_threads() == []
    assert open_descriptors() == descriptors


@pytest.mark.parametrize("how", ["close", "consumer_error", "interrupt", "exhausted"])
def test_a_stream_that_ends_leaves_no_thread_and_no_open_file(tiny_checkpoint: Callable[..., Path], how: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    pieces = helpers.whole_tensors(checkpoint)
    descriptors = open_descriptors()
    stream = checkpoint.stream(pieces, helpers.buffers_for(pieces))
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
    pieces = helpers.whole_tensors(checkpoint)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(InputOutputError, match=r"model\.safetensors: Input/output error"):
        list(checkpoint.stream(pieces, helpers.buffers_for(pieces)))
    assert reading_threads() == []


def test_a_file_that_cannot_be_closed_is_an_error_and_not_a_wait_without_end(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    pieces = helpers.whole_tensors(checkpoint)
    original = streaming.FileReader.close

    def fail(self: streaming.FileReader) -> None:
        original(self)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(streaming.FileReader, "close", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(checkpoint.stream(pieces, helpers.buffers_for(pieces)))
    assert reading_threads() == []


def test_a_stream_reads_at_most_its_buffers_ahead(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    pieces = helpers.whole_tensors(checkpoint)
    buffers = helpers.buffers_for(pieces, 3)
    read, used = [0], 0
    original = streaming.FileReader.read

    def counting(self: streaming.FileReader, span: streaming.Span, start: int, view: memoryview) -> None:
        original(self, span, start, view)
        read[0] += view.nbytes

    monkeypatch.setattr(streaming.FileReader, "read", counting)
    for piece, _ in checkpoint.stream(pieces, buffers):
        assert read[0] <= used + sum(buffer.nbytes for buffer in buffers)
        used += piece.nbytes
    assert read[0] == used


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("part", [1000, 1 << 20], ids=["parts_of_1000_bytes", "whole_spans"])
def test_any_number_of_threads_reads_the_bytes_of_the_files_in_order(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, threads: int, part: int
) -> None:
    monkeypatch.setattr(streaming, "READ_BYTES", part)
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe", shards=3))
    pieces = helpers.whole_tensors(checkpoint)
    ring = checkpoint.ring(pieces, [memoryview(bytearray(1 << 17)) for _ in range(3)], threads)
    taken: list[Piece] = []
    with closing(ring):
        while (item := ring.take()) is not None:
            span, buffer = item
            for piece in span.pieces:
                tensor = piece.tensor
                stored = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
                assert bytes(buffer[span.start_of(piece) :][: piece.nbytes]) == stored
            taken += span.pieces
            ring.release(buffer)
    assert taken == pieces
    assert reading_threads() == []


def test_small_neighbours_are_read_together_and_a_gap_is_not(tiny_checkpoint: Callable[..., Path]) -> None:
    pieces = helpers.whole_tensors(Checkpoint.open(tiny_checkpoint("olmoe", shards=3)))
    spans = streaming.spans_of(pieces, 1 << 17)
    assert [piece for span in spans for piece in span.pieces] == pieces
    assert len(spans) < len(pieces) / 2
    assert all(span.nbytes <= 1 << 17 or len(span.pieces) == 1 for span in spans)
    assert len(streaming.spans_of(pieces[::2], 1 << 17)) == len(pieces[::2])


def test_buffers_that_cannot_hold_the_pieces_are_refused_at_once(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    pieces = helpers.whole_tensors(checkpoint)
    good = helpers.buffers_for(pieces, 1)[0]
    for wrong in [[good], [good, good[:-1]], [good, good.toreadonly()], [good, good[::-1]]]:
        with pytest.raises(ValueError, match="buffer"):
            checkpoint.stream(pieces, wrong)
    tensor = pieces[0].tensor
    with pytest.raises(ValueError, match="outside"):
        checkpoint.stream([Piece(tensor, 1, tensor.nbytes)], [good, good])


# Generated weights


@pytest.fixture
def dummy(tiny_checkpoint: Callable[..., Path]) -> DummyCheckpoint:
    config = json.loads((tiny_checkpoint("qwen3_moe") / "config.json").read_text())
    return DummyCheckpoint.from_config(config, find_family(config))


def generated(checkpoint: DummyCheckpoint, pieces: list[Piece]) -> bytes:
    return b"".join(bytes(content) for _, content in checkpoint.stream(pieces, helpers.buffers_for(pieces)))


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
