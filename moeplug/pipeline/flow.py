"""Bring what the ring reads to the code that quantizes it, and say what the load waited for.

On a CPU several threads take spans and quantize them. On a GPU one thread copies spans on a stream of their own and
queues the work, so reading, copying and quantizing overlap; the host waits for the GPU only to get a buffer back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moeplug.checkpoint.memory import MemoryCheckpoint
from moeplug.checkpoint.reader import Piece, Ring, Span
from moeplug.checkpoint.streaming import ALIGNMENT
from moeplug.pipeline.builder import StageSeconds
from moeplug.pipeline.plan import STAGED

Use = Callable[[Sequence[tuple[Piece, int]], Tensor, StageSeconds], None]  # (pieces with their first bytes, content)
Advance = Callable[[int], None]
Copied = Callable[[Span, float, float], None]  # (span, started, ended), seconds of time.perf_counter


@dataclass(frozen=True)
class Timings:
    """Where the seconds of one load went, each summed over the threads that spent them.

    read: in reads, by `readers` threads. waited_for_reads, waited_for_gpu: by `workers` threads. check, quantize,
    error: in looking for NaN, quantizing and measuring the error; on a GPU, the time to queue that work. other: what a
    worker did beside these. gpu_copy, gpu_quantize: how long the GPU was busy with either; None without one.
    """

    seconds: float
    weights: int
    readers: int
    workers: int
    read: float
    waited_for_reads: float
    waited_for_gpu: float
    check: float
    quantize: float
    error: float
    other: float
    gpu_copy: float | None = None
    gpu_quantize: float | None = None

    @classmethod
    def of(cls, workers: int, seconds: StageSeconds, waited_for_reads: float, busy: float, **gpu: float) -> Timings:
        """Return what workers spent; busy: everything but waiting, in all of them."""
        torch_seconds = seconds.check + seconds.quantize + seconds.error
        return cls(
            0.0, seconds.weights, 0, workers, 0.0, waited_for_reads, gpu.pop("waited_for_gpu", 0.0),
            seconds.check, seconds.quantize, seconds.error, max(0.0, busy - torch_seconds), **gpu,
        )  # fmt: skip

    @property
    def bounded_by(self) -> str:
        """Return what would have to be faster: disk, copy, quantize or Python."""
        queued = self.check + self.quantize + self.error
        if self.gpu_copy is None or self.gpu_quantize is None:
            costs = {"disk": self.waited_for_reads, "quantize": queued, "Python": self.other}
        else:
            of_gpu = "copy" if self.gpu_copy > self.gpu_quantize else "quantize"
            costs = {"disk": self.waited_for_reads, of_gpu: self.waited_for_gpu, "Python": queued + self.other}
        return max(costs, key=costs.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` and the report say of them."""
        return asdict(self) | {"bounded_by": self.bounded_by}


def from_memory(
    pieces: Sequence[Piece], checkpoint: MemoryCheckpoint, use: Use, advance: Advance, device: torch.device
) -> Timings:
    """Use every piece of tensors that are in memory, one at a time on the device."""
    seconds, began = StageSeconds(), time.perf_counter()
    for piece in pieces:
        use([(piece, 0)], checkpoint.content(piece).to(device), seconds)
        advance(piece.nbytes)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Timings.of(1, seconds, 0.0, time.perf_counter() - began)


def through_threads(ring: Ring, use: Use, advance: Advance, workers: int) -> Timings:
    """Use every piece, on this thread and workers - 1 more; raise the first error of any of them."""
    results: list[tuple[StageSeconds, float, float]] = []
    errors: list[BaseException] = []

    def work() -> None:
        seconds, waited, began = StageSeconds(), 0.0, time.perf_counter()
        while True:
            asked = time.perf_counter()
            taken = ring.take()
            waited += time.perf_counter() - asked
            if taken is None:
                break
            span, buffer = taken
            content = torch.frombuffer(buffer, dtype=torch.uint8)
            use([(piece, span.start_of(piece)) for piece in span.pieces], content, seconds)
            ring.release(buffer)
            advance(span.nbytes)
        results.append((seconds, waited, time.perf_counter() - began - waited))

    def work_beside() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
            ring.stop()  # the others then find no more spans

    beside = [threading.Thread(target=work_beside, name="moeplug-worker", daemon=True) for _ in range(workers - 1)]
    for thread in beside:
        thread.start()
    try:
        work()
    finally:
        ring.stop()
        for thread in beside:
            thread.join()
    if errors:
        raise errors[0]
    total = StageSeconds(*(sum(getattr(r[0], f) for r in results) for f in StageSeconds.__dataclass_fields__))
    return Timings.of(workers, total, sum(r[1] for r in results), sum(r[2] for r in results))


class _Staging:
    """A buffer on the GPU that spans are copied into, one beside the other, to be used together."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.content = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.pieces: list[tuple[Piece, int]] = []
        self.nbytes = 0  # of the spans
        self.end = 0
        self.used = _event()  # when the GPU last used it
        self.used.record()

    def place(self, span: Span) -> Tensor:
        """Return where to copy a span to."""
        start = self.end
        self.pieces += [(piece, start + span.start_of(piece)) for piece in span.pieces]
        self.nbytes += span.nbytes
        self.end = -(-(start + span.nbytes) // ALIGNMENT) * ALIGNMENT
        return self.content[start : start + span.nbytes]

    def clear(self) -> None:
        """Begin anew."""
        self.pieces, self.nbytes, self.end = [], 0, 0


def through_gpu(
    ring: Ring, use: Use, advance: Advance, device: torch.device, staged_bytes: int, buffers: int, told: Copied
) -> Timings:
    """Use every piece on the GPU: copies on a side stream into STAGED buffers, work on the current one.

    staged_bytes: of each of these, at least a span's. told: called with each copy at the end, when the GPU can say when
    it ran.
    """
    with torch.cuda.device(device):
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        staged = deque(_Staging(staged_bytes, device) for _ in range(STAGED))
        side.wait_stream(main)  # the allocator may have taken this memory from work that main still does
        copied: deque[tuple[torch.cuda.Event, memoryview]] = deque()
        copies: list[tuple[Span, torch.cuda.Event, torch.cuda.Event]] = []
        works: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        base = _event()
        base.record(side)
        base.synchronize()
        based = time.perf_counter()
        seconds, waited, waited_for_gpu, began = StageSeconds(), 0.0, 0.0, time.perf_counter()

        def use_staged() -> None:
            """Queue the work on what the first buffer holds, and go on with the next."""
            full = staged[0]
            if not full.pieces:
                return
            begin, full.used = _event(), _event()
            main.wait_event(copies[-1][2])
            begin.record(main)
            use(full.pieces, full.content, seconds)
            full.used.record(main)
            works.append((begin, full.used))
            advance(full.nbytes)
            full.clear()
            staged.rotate(-1)
            side.wait_event(staged[0].used)

        while True:
            asked = time.perf_counter()
            taken = ring.take()
            waited += time.perf_counter() - asked
            if taken is None:
                break
            span, buffer = taken
            if staged[0].end + span.nbytes > staged_bytes:
                use_staged()
            copy_begin, copy_end = _event(), _event()
            copy_begin.record(side)
            with torch.cuda.stream(side):
                staged[0].place(span).copy_(
                    torch.frombuffer(buffer, dtype=torch.uint8, count=span.nbytes), non_blocking=True
                )
            copy_end.record(side)
            copies.append((span, copy_begin, copy_end))
            copied.append((copy_end, buffer))
            asked = time.perf_counter()
            # The ring keeps half of the buffers to read into; a copy that is still under way keeps the other half.
            while copied and (len(copied) > buffers // 2 or copied[0][0].query()):  # type: ignore[no-untyped-call]
                copied[0][0].synchronize()
                ring.release(copied.popleft()[1])
            waited_for_gpu += time.perf_counter() - asked
        use_staged()
        asked = time.perf_counter()
        torch.cuda.synchronize(device)
        waited_for_gpu += time.perf_counter() - asked
    busy = time.perf_counter() - began - waited - waited_for_gpu
    for span, begin, end in copies:
        told(span, based + base.elapsed_time(begin) / 1e3, based + base.elapsed_time(end) / 1e3)
    copying = sum(begin.elapsed_time(end) for _, begin, end in copies) / 1e3
    quantizing = sum(begin.elapsed_time(end) for begin, end in works) / 1e3
    return Timings.of(
        1, seconds, waited, busy, waited_for_gpu=waited_for_gpu, gpu_copy=copying, gpu_quantize=quantizing
    )


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
