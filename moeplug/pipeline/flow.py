"""Bring what the ring reads to the code that quantizes it, and say what the load waited for.

On a CPU several threads take spans and quantize them. On a GPU one thread copies spans on a stream of their own and
queues the work, so reading, copying and quantizing overlap; the host waits for the GPU only to get a buffer back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moeplug.checkpoint.memory import MemoryCheckpoint
from moeplug.checkpoint.reader import Piece, Ring, Span
from moeplug.checkpoint.streaming import start_all
from moeplug.pipeline.builder import StageSeconds
from moeplug.pipeline.plan import STAGED

TIMED = 16

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
    start_all(beside, ring.stop)
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


def through_gpu(
    ring: Ring, use: Use, advance: Advance, device: torch.device, span_bytes: int, buffers: int, told: Copied | None
) -> Timings:
    """Use every piece on the GPU: copies on a side stream into STAGED buffers, work on the current one.

    told: called with each copy at the end, when the GPU can say when it ran; None: nobody asks, and only every
    TIMED-th span is timed.
    """
    with torch.cuda.device(device):
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        staged = [torch.empty(span_bytes, dtype=torch.uint8, device=device) for _ in range(STAGED)]
        side.wait_stream(main)  # the allocator may have taken this memory from work that main still does
        copied: deque[tuple[torch.cuda.Event, memoryview]] = deque()
        used: deque[torch.cuda.Event] = deque(maxlen=STAGED)  # when the work on the last spans has ended
        timed: list[tuple[Span, torch.cuda.Event, torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]] = []
        base = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        base.record(side)
        base.synchronize()
        based = time.perf_counter()
        seconds, waited, waited_for_gpu, began, number = StageSeconds(), 0.0, 0.0, time.perf_counter(), 0
        nbytes = 0
        while True:
            asked = time.perf_counter()
            taken = ring.take()
            waited += time.perf_counter() - asked
            if taken is None:
                break
            span, buffer = taken
            content = staged[number % STAGED]
            times = told is not None or number % TIMED == 0
            copy_begin, copy_end, work_begin, work_end = (
                torch.cuda.Event(enable_timing=times)  # type: ignore[no-untyped-call]
                for _ in range(4)
            )
            if len(used) == STAGED:
                side.wait_event(used[0])  # who used this staging buffer last
            if times:
                copy_begin.record(side)
            with torch.cuda.stream(side):
                read = torch.frombuffer(buffer, dtype=torch.uint8, count=span.nbytes)
                content[: span.nbytes].copy_(read, non_blocking=True)
            copy_end.record(side)
            main.wait_event(copy_end)
            if times:
                work_begin.record(main)
                timed.append((span, copy_begin, copy_end, work_begin, work_end))
            use([(piece, span.start_of(piece)) for piece in span.pieces], content, seconds)
            work_end.record(main)
            used.append(work_end)
            copied.append((copy_end, buffer))
            asked = time.perf_counter()
            # The ring keeps half of the buffers to read into; a copy that is still under way keeps the other half.
            while copied and (len(copied) > buffers // 2 or copied[0][0].query()):  # type: ignore[no-untyped-call]
                copied[0][0].synchronize()
                ring.release(copied.popleft()[1])
            waited_for_gpu += time.perf_counter() - asked
            advance(span.nbytes)
            number += 1
            nbytes += span.nbytes
        asked = time.perf_counter()
        torch.cuda.synchronize(device)
        waited_for_gpu += time.perf_counter() - asked
    busy = time.perf_counter() - began - waited - waited_for_gpu
    if told is not None:
        for span, begin, end, _, _ in timed:
            told(span, based + base.elapsed_time(begin) / 1e3, based + base.elapsed_time(end) / 1e3)
    share = nbytes / max(1, sum(span.nbytes for span, *_ in timed))  # of those that were timed
    copying = share * sum(begin.elapsed_time(end) for _, begin, end, _, _ in timed) / 1e3
    quantizing = share * sum(begin.elapsed_time(end) for _, _, _, begin, end in timed) / 1e3
    return Timings.of(
        1, seconds, waited, busy, waited_for_gpu=waited_for_gpu, gpu_copy=copying, gpu_quantize=quantizing
    )


@contextmanager
def read_buffers(count: int, nbytes: int, device: torch.device) -> Iterator[list[memoryview]]:
    """Give count host buffers of nbytes, from which a GPU copies by itself: page-locked until the end."""
    block = torch.empty(count * nbytes, dtype=torch.uint8)
    views = [memoryview(part.numpy()) for part in block.chunk(count)]  # type: ignore[arg-type]  # numpy gives a buffer
    if device.type != "cuda":
        yield views
        return
    # Not torch's own pinned memory, which is rounded up to a power of two and stays with the process.
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cudart.cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    try:
        yield views
    finally:
        try:
            torch.cuda.synchronize(device)  # where an error ended the load, a copy may be under way
        finally:
            cudart.cudaHostUnregister(block.data_ptr())
