"""Read pieces of tensors in file order, one step ahead of whoever uses them.

One thread reads into a small ring of buffers that the caller owns, so that a transfer or a quantization runs while the
next bytes arrive, and memory stays what the caller gave. Files are read with pread, not mmap: a file that is cut under
an mmap kills the process with SIGBUS, and one that is overwritten changes weights that were already loaded.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeplug.checkpoint.files import SourceFile, Stamp, read_into
from moeplug.checkpoint.safetensors_header import TensorInfo
from moeplug.errors import CheckpointError

# A stop is noticed between two reads, so that Ctrl-C takes a fraction of a second on a slow disk, too.
READ_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Piece:
    """A run of bytes of one tensor. start: the first byte, counted from the tensor's own begin."""

    tensor: TensorInfo
    start: int
    nbytes: int


Told = Callable[[Piece, float, float], None]  # (piece, started, ended), seconds of time.perf_counter
Stream = Generator[tuple[Piece, memoryview], None, None]


def in_file_order(pieces: Iterable[Piece]) -> list[Piece]:
    """Return pieces sorted by file and offset, the order in which a disk gives them fastest."""
    return sorted(pieces, key=lambda piece: (piece.tensor.file, piece.tensor.offset + piece.start))


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


class PieceReader:
    """Reads pieces with one open file at a time, and refuses a file that is no longer the one that was validated."""

    def __init__(self, files: Mapping[Path, tuple[SourceFile, Stamp]], stopped: Callable[[], bool]) -> None:
        self._files = files
        self._stopped = stopped
        self._current: Path | None = None
        self._descriptor = -1

    def read(self, piece: Piece, view: memoryview) -> None:
        """Fill view with the piece's bytes; returns early, with the view unfinished, once asked to stop."""
        self._switch_to(piece.tensor.file)
        position = piece.tensor.offset + piece.start
        while view.nbytes and not self._stopped():
            part = view[:READ_BYTES]
            read_into(self._descriptor, part, position, piece.tensor.file)
            view, position = view[part.nbytes :], position + part.nbytes

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
        validated = self._files[self._current][1]
        found = Stamp.of(self._descriptor)
        if found != validated:
            differing = [name for name in vars(found) if getattr(found, name) != getattr(validated, name)]
            raise CheckpointError(
                f"{self._current}: was changed while it was being read ({', '.join(differing)} differ); "
                "what was loaded cannot be trusted: start again when nobody writes to it"
            )


def prefetched(
    pieces: Sequence[Piece], buffers: Sequence[memoryview], files: Mapping[Path, tuple[SourceFile, Stamp]], told: Told
) -> Stream:
    """Yield (piece, its bytes) in the given order; the bytes are valid until the next step.

    told: called in the reading thread after each piece.
    An error in the reading thread is raised here. Closing the generator stops the thread and closes its file.
    """
    stop = threading.Event()
    free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    filled: queue.SimpleQueue[tuple[Piece, memoryview] | BaseException | None] = queue.SimpleQueue()
    for buffer in buffers:
        free.put(buffer)

    def read_all() -> None:
        reader = PieceReader(files, stop.is_set)
        try:
            for piece in pieces:
                buffer = free.get()
                if stop.is_set():
                    return
                started = time.perf_counter()
                reader.read(piece, buffer[: piece.nbytes])
                told(piece, started, time.perf_counter())
                filled.put((piece, buffer))
            reader.finish()
            filled.put(None)
        except BaseException as error:
            filled.put(error)
        finally:
            reader.close()

    thread = threading.Thread(target=read_all, name="moeplug-reader", daemon=True)
    thread.start()
    try:
        while (item := filled.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            piece, buffer = item
            yield piece, buffer[: piece.nbytes]
            free.put(buffer)
    finally:
        stop.set()
        free.put(memoryview(b""))  # wakes a thread that waits for a buffer
        thread.join()
