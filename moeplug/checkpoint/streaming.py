"""Read pieces of tensors in file order, ahead of whoever uses them, with several threads.

Neighbouring pieces are read together, as a span, into a small ring of buffers that the caller owns, so that transfers
and quantization run while the next bytes arrive, and memory stays what the caller gave. Files are read with pread, not
mmap: a file that is cut under an mmap kills the process with SIGBUS, and one that is overwritten changes weights that
were already loaded.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moeplug.checkpoint.files import SourceFile, Stamp, read_into
from moeplug.checkpoint.safetensors_header import TensorInfo

# One thread's share of a span: small enough that several threads have one where the ring has few spans, and large
# enough that they seldom run Python, which keeps the thread that feeds a GPU waiting (5.5 GB/s with 1 MiB, 10 with 4).
# A stop is noticed between two reads, so that Ctrl-C takes a fraction of a second on a slow disk, too.
READ_BYTES = 4 * 2**20
ALIGNMENT = 16  # of pieces in a span, so that their bytes can be viewed as numbers of any dtype


@dataclass(frozen=True)
class Piece:
    """A run of bytes of one tensor. start: the first byte, counted from the tensor's own begin."""

    tensor: TensorInfo
    start: int
    nbytes: int

    def __hash__(self) -> int:  # of all fields, Path's included, it took 13 µs: more than to quantize a small weight
        return hash((self.tensor.name, self.start))


Stream = Generator[tuple[Piece, memoryview], None, None]


def in_file_order(pieces: Iterable[Piece]) -> list[Piece]:
    """Return pieces sorted by file and offset, the order in which a disk gives them fastest."""
    return sorted(pieces, key=lambda piece: (piece.tensor.file, piece.tensor.offset + piece.start))


@dataclass(frozen=True)
class Span:
    """Neighbouring pieces of one file that are read together."""

    file: Path
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]

    def start_of(self, piece: Piece) -> int:
        """Return where in the span a piece begins."""
        return piece.tensor.offset + piece.start - self.offset


Told = Callable[[Span, int, float, float], None]  # (span, bytes of it, started, ended), seconds of time.perf_counter


def untold(span: Span, nbytes: int, started: float, ended: float) -> None:
    """Tell nobody of a read."""


def spans_of(pieces: Iterable[Piece], limit: int) -> list[Span]:
    """Return the spans of pieces, in the pieces' order: as many as lie side by side in at most `limit` bytes.

    A piece that is larger is a span of its own. One that would lie unaligned begins another.
    """
    spans: list[Span] = []
    run: list[Piece] = []
    begin = end = 0

    def finish() -> None:
        if run:
            spans.append(Span(run[0].tensor.file, begin, end - begin, tuple(run)))

    for piece in pieces:
        offset = piece.tensor.offset + piece.start
        fits = offset + piece.nbytes - begin <= limit and (offset - begin) % ALIGNMENT == 0
        if not run or piece.tensor.file != run[0].tensor.file or offset != end or not fits:
            finish()
            run, begin = [], offset
        run.append(piece)
        end = offset + piece.nbytes
    finish()
    return spans


def require_fit(pieces: Sequence[Piece], buffers: Sequence[memoryview]) -> list[memoryview]:
    """Return the buffers as bytes, or raise ValueError where a piece cannot be read into them."""
    largest = max((piece.nbytes for piece in pieces), default=0)
    if len(buffers) < 2:
        raise ValueError(f"stream needs at least 2 buffers, one to use and one to read into; found {len(buffers)}")
    for buffer in buffers:
        if buffer.readonly or not buffer.c_contiguous or buffer.nbytes < largest:
            raise ValueError(f"each buffer has to be writable, contiguous and at least {largest:,} bytes: {buffer!r}")
    for piece in pieces:
        if not 0 <= piece.start <= piece.start + piece.nbytes <= piece.tensor.nbytes:
            raise ValueError(f"a piece lies outside its tensor: {piece}")
    return [buffer.cast("B") for buffer in buffers]


class Source(Protocol):
    """Where one thread gets bytes from."""

    def read(self, span: Span, start: int, view: memoryview) -> None:
        """Fill view with the span's bytes from its byte `start` on."""

    def finish(self) -> None:
        """Check that what was read can be trusted."""

    def close(self) -> None:
        """Give back what is open, without checking it."""


class FileReader:
    """Reads with one open file at a time, and refuses a file that is no longer the one that was validated."""

    def __init__(self, files: Mapping[Path, tuple[SourceFile, Stamp]]) -> None:
        self._files = files
        self._current: Path | None = None
        self._descriptor = -1

    def read(self, span: Span, start: int, view: memoryview) -> None:
        """Fill view with the span's bytes from its byte `start` on."""
        self._switch_to(span.file)
        read_into(self._descriptor, view, span.offset + start, span.file)

    def finish(self) -> None:
        """Check the last file once more, after all of its bytes were read."""
        if self._current is not None:
            self._require_unchanged()

    def close(self) -> None:
        """Close what is open, without checking it."""
        if self._current is not None:
            os.close(self._descriptor)
            self._current = None

    def _switch_to(self, path: Path) -> None:
        if path == self._current:
            return
        self.finish()
        self.close()
        self._descriptor = self._files[path][0].open()
        self._current = path
        self._require_unchanged()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def _require_unchanged(self) -> None:
        assert self._current is not None
        self._files[self._current][1].require(self._descriptor, self._current)


def start_all(threads: Sequence[threading.Thread], stop: Callable[[], None]) -> None:
    """Start threads; where the system has none to give, stop and join those that run already."""
    for number, thread in enumerate(threads):
        try:
            thread.start()
        except BaseException:
            stop()
            for started in threads[:number]:
                started.join()
            raise


class Ring:
    """Spans in order, read ahead by threads of its own; any number of threads may take them.

    A thread gets its part of the next span under one lock, and a span its buffer with its first part, so buffers go to
    spans in order and the oldest can always be finished.
    """

    def __init__(
        self, spans: Sequence[Span], buffers: Sequence[memoryview], source: Callable[[], Source], threads: int,
        told: Told = untold,
    ) -> None:  # fmt: skip
        self.read_seconds = 0.0  # of all reading threads
        self._spans = spans
        self._source = source
        self._told = told
        self._lock = threading.Lock()
        self._can_read = threading.Condition(self._lock)  # readers wait for a buffer, one is woken for each part
        self._can_take = threading.Condition(self._lock)
        self._free = deque(buffers)
        self._buffers: dict[int, memoryview] = {}  # of spans that are being read, or read and not taken
        self._unread: dict[int, int] = {}  # span → bytes that have not arrived
        self._next_part = (0, 0)  # span, byte
        self._next_taken = 0
        self._running = threads
        self._error: BaseException | None = None
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._read, name="moeplug-reader", daemon=True) for _ in range(threads)
        ]
        start_all(self._threads, self.stop)

    def take(self) -> tuple[Span, memoryview] | None:
        """Return the next span and the buffer that begins with its bytes; None when all were taken, or after `close`.

        The buffer is the caller's until `release`.
        Raises what a reading thread raised. The last span is given when every file has passed its last check.
        """
        with self._lock:
            while True:
                if self._error is not None:
                    raise self._error
                index = self._next_taken
                if self._stopped or index == len(self._spans):
                    return None
                last = index == len(self._spans) - 1
                if self._unread.get(index) == 0 and not (last and self._running):
                    break
                self._can_take.wait()
            self._next_taken += 1
            del self._unread[index]
            return self._spans[index], self._buffers.pop(index)

    def release(self, buffer: memoryview) -> None:
        """Give a buffer back, to be read into."""
        with self._lock:
            self._free.append(buffer)
            self._can_read.notify()

    def stop(self) -> None:
        """Stop reading; `take` returns None from now on."""
        with self._lock:
            self._stopped = True
            self._wake_all()

    def close(self) -> None:
        """Stop reading, wait for the threads, and close every file."""
        self.stop()
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        seconds = 0.0
        try:
            with closing(self._source()) as source:
                while (part := self._part()) is not None:
                    index, start, view = part
                    started = time.perf_counter()
                    source.read(self._spans[index], start, view)
                    ended = time.perf_counter()
                    seconds += ended - started
                    self._told(self._spans[index], view.nbytes, started, ended)
                    self._arrived(index, view.nbytes)
                if not self._stopped:
                    source.finish()
        except BaseException as error:
            self._error = self._error or error
        finally:
            with self._lock:
                self.read_seconds += seconds
                self._running -= 1
                self._wake_all()

    def _part(self) -> tuple[int, int, memoryview] | None:
        """Return the next part to read, (span, first byte, where to), once there is a buffer; None at the end."""
        with self._lock:
            while True:
                index, start = self._next_part
                if self._stopped or self._error is not None or index == len(self._spans):
                    return None
                if start or self._free:
                    break
                self._can_read.wait()
            nbytes = self._spans[index].nbytes
            if start == 0:
                self._buffers[index], self._unread[index] = self._free.popleft(), nbytes
            stop = min(start + READ_BYTES, nbytes)
            self._next_part = (index, stop) if stop < nbytes else (index + 1, 0)
            if stop < nbytes or self._free:
                self._can_read.notify()
            return index, start, self._buffers[index][start:stop]

    def _arrived(self, index: int, nbytes: int) -> None:
        with self._lock:
            self._unread[index] -= nbytes
            if self._unread[index] == 0:
                self._can_take.notify_all()

    def _wake_all(self) -> None:
        self._can_read.notify_all()
        self._can_take.notify_all()


def in_turn(ring: Ring) -> Stream:
    """Yield each piece with its bytes, in order; they are valid until the next step.

    An error in a reading thread is raised here. Closing the generator stops the threads and closes their files.
    """
    with closing(ring):
        while (taken := ring.take()) is not None:
            span, buffer = taken
            for piece in span.pieces:
                start = span.start_of(piece)
                yield piece, buffer[start : start + piece.nbytes]
            ring.release(buffer)
