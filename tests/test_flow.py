"""Spans through the GPU's path, on a CPU with streams and events that only keep count: order, bytes and buffers."""

from __future__ import annotations

import contextlib

import helpers
import pytest
import torch

from moeplug.checkpoint.reader import Checkpoint
from moeplug.pipeline import flow


class Event:
    """Done when asked for the third time, or waited for."""

    def __init__(self, **_):
        self.asked = 0

    def record(self, stream=None):
        pass

    def query(self):
        self.asked += 1
        return self.asked > 2

    def synchronize(self):
        self.asked = 9

    def elapsed_time(self, _):
        return 1.0


class Stream:
    def wait_stream(self, _):
        pass

    def wait_event(self, event):
        assert isinstance(event, Event)


@pytest.fixture
def cuda_of_the_cpu(monkeypatch):
    fakes = {"Stream": Stream, "Event": Event, "current_stream": Stream, "synchronize": lambda _: None}
    fakes |= dict.fromkeys(("device", "stream"), lambda _: contextlib.nullcontext())
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("buffers", [2, 4, 7])
def test_the_path_of_a_gpu_gives_every_piece_once_and_in_order(tiny_checkpoint, cuda_of_the_cpu, buffers):
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe", shards=3))
    pieces = helpers.whole_tensors(checkpoint)
    nbytes = max(piece.nbytes for piece in pieces)
    ring = checkpoint.ring(pieces, [memoryview(bytearray(nbytes)) for _ in range(buffers)], 3)
    came, done, copied = [], [], []

    def use(given, content, seconds):
        assert content.numel() == nbytes
        for piece, start in given:
            file = piece.tensor.file.read_bytes()
            found = bytes(content[start : start + piece.nbytes].numpy())
            assert found == file[piece.tensor.offset : piece.tensor.offset + piece.nbytes]
            came.append(piece)

    with contextlib.closing(ring):
        timings = flow.through_gpu(
            ring, use, done.append, torch.device("cpu"), nbytes, buffers, lambda span, *_: copied.append(span.nbytes)
        )
    assert came == pieces
    assert copied == done
    assert sum(done) == sum(piece.nbytes for piece in pieces)
    assert timings.gpu_copy == timings.gpu_quantize == pytest.approx(len(done) * 1e-3)


def timings(**changed):
    values = dict.fromkeys(("read", "waited_for_reads", "waited_for_gpu", "check", "quantize", "error", "other"), 0.1)
    return flow.Timings(1.0, 100, 1, 1, **(values | changed))


@pytest.mark.parametrize(
    ("changed", "bound"),
    [
        ({"waited_for_reads": 0.9}, "disk"),
        ({"quantize": 0.8}, "quantize"),
        ({"other": 0.8}, "Python"),
        ({"waited_for_gpu": 0.8, "gpu_copy": 0.7, "gpu_quantize": 0.2}, "copy"),
        ({"waited_for_gpu": 0.8, "gpu_copy": 0.2, "gpu_quantize": 0.7}, "quantize"),
        ({"quantize": 0.8, "gpu_copy": 0.2, "gpu_quantize": 0.1}, "Python"),
        ({"waited_for_reads": 0.8, "gpu_copy": 0.2, "gpu_quantize": 0.1}, "disk"),
    ],
)
def test_what_bounded_a_load_is_what_it_waited_for_longest(changed, bound):
    assert timings(**changed).bounded_by == bound
