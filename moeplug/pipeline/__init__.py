"""Run the five stages over a checkpoint: one pass, in file order, in bounded memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from moeplug.checkpoint.dummy import DummyCheckpoint
from moeplug.checkpoint.encoded import Collector, reading_order
from moeplug.checkpoint.locate import WeightSource, by_piece
from moeplug.checkpoint.memory import TORCH_DTYPES, MemoryCheckpoint
from moeplug.checkpoint.reader import Checkpoint, Piece, Span, TensorInfo, in_file_order
from moeplug.checkpoint.streaming import untold
from moeplug.errors import CheckpointError
from moeplug.hookspecs import LoadEvent
from moeplug.moe.experts import QuantizedExperts
from moeplug.moe.layout import Projection
from moeplug.pipeline.builder import LayerBuilder, LayerErrors, ModuleClass, StageSeconds
from moeplug.pipeline.flow import Advance, Timings, from_memory, read_buffers, through_gpu, through_threads
from moeplug.pipeline.memory import within_memory
from moeplug.pipeline.plan import STACKED_BYTES, LayerPlan, Plan, plan_layer, plan_model
from moeplug.pipeline.report import LayerReport, Report, peak_host_bytes, provenance
from moeplug.quantization import peak_of
from moeplug.registry import Registry

__all__ = ["STAGES", "LayerBuilder", "LayerPlan", "Plan", "Report", "Targets", "plan_layer", "plan_model", "run"]

STAGES = ("allocate", "load", "quantize", "create_scales", "setup_kernel")
Progress = Callable[[int, int], None]
LARGEST_STACKED = 1 << 20  # bytes of a weight: a larger one keeps a device busy for longer than Python takes


@dataclass(frozen=True)
class Targets:
    """Storage that a reload writes to: layers by decoder-layer index, dense tensors by disk name."""

    layers: Mapping[int, QuantizedExperts]
    dense: Mapping[str, Tensor]


@dataclass(frozen=True)
class Result:
    """What one run leaves: the layers by decoder-layer index, the dense tensors by disk name, and the report."""

    layers: dict[int, QuantizedExperts]
    dense: dict[str, Tensor]
    report: Report


@torch.inference_mode(False)  # a tensor that one thread makes in that mode no other thread could write to
def run(
    plan: Plan,
    registry: Registry,
    progress: Progress | None = None,
    module_class: ModuleClass = QuantizedExperts,
    job_class: type[Job] | None = None,
    *,
    exact_error: bool = False,
    into: Targets | None = None,
) -> Result:
    """Do what the plan says and return the result; on any error nothing is kept.

    progress: called with (bytes read, bytes to read) after each span. job_class: what feeds the layers. exact_error:
    errors of all rows, not a sample. into: what takes the weights instead of new storage.
    """
    started = time.perf_counter()
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    job = (job_class or Job)(plan, registry, module_class, exact_error, into)
    needed = plan.peak_bytes if into is None else plan.transient_bytes
    try:
        # A reload from tensors in memory has one worker, which may have all of torch's threads.
        alone = isinstance(plan.checkpoint, MemoryCheckpoint)
        threads = nullcontext() if alone else one_torch_thread(plan.device)
        with within_memory(needed, plan.device), threads, _unfinished_until_the_end(plan, into):
            timings = job.read_everything(progress or (lambda done, total: None))
    finally:
        registry.tell(LoadEvent("load", "", job.total_bytes, started, time.perf_counter()))
    layers = tuple(LayerReport(layer, job.errors[layer.layer.index]) for layer in plan.layers)
    report = Report(
        plan=plan,
        layers=layers,
        seconds=time.perf_counter() - started,
        bytes_read=job.total_bytes,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated(plan.device) if plan.device.type == "cuda" else None,
        provenance=provenance(plan, registry),
        timings=timings,
    )
    return Result(dict(sorted(job.finished.items())), job.dense, report)


@contextmanager
def _unfinished_until_the_end(plan: Plan, into: Targets | None) -> Iterator[None]:
    """Mark layers that take other weights; where the block raises, they stay marked."""
    layers = () if into is None else into.layers.values()
    for module in layers:
        module.unfinished = f"a reload from {plan.checkpoint.path} did not come to its end; reload again"
    yield
    for module in layers:
        module.unfinished = None


class Job:
    """One pass over the files: which piece feeds which layer, and which layers are open. Threads may share it.

    Here layers and dense tensors stay in memory; an export overrides where they go. in_order: pieces are used one at a
    time in the order in which they are read, by one thread.
    """

    in_order = False

    def __init__(
        self,
        plan: Plan,
        registry: Registry,
        module_class: ModuleClass,
        exact_error: bool = False,
        into: Targets | None = None,
    ) -> None:
        self._plan, self._registry, self._module_class = plan, registry, module_class
        self._exact_error, self._into = exact_error, into
        self._layer_plans = {layer.layer.index: layer for layer in plan.layers}
        self._lock = threading.Lock()
        self._open: dict[int, LayerBuilder] = {}
        self._peaks: dict[str, list[Tensor]] = {}  # of tensors kept as they are, on the device
        self.finished: dict[int, QuantizedExperts] = {}
        self.errors: dict[int, LayerErrors] = {}
        self.dense: dict[str, Tensor] = {}
        self._experts = by_piece(plan.sources)
        self._pieces = self._pieces_to_read()
        self._collector = None if plan.encoding is None else Collector(plan.encoding, plan.sources)
        if plan.encoding is not None:  # scales before weights, layer by layer: no layer's weights wait for scales
            order = reading_order(plan.sources)
            self._pieces.sort(key=lambda piece: order.get((piece.tensor.name, piece.start), (-1, False)))
        self.total_bytes = sum(piece.nbytes for piece in self._pieces)
        self._done = 0

    def read_everything(self, progress: Progress) -> Timings:
        """Read, quantize and finish all that the plan names."""
        started = time.perf_counter()
        plan = self._plan

        def advance(nbytes: int) -> None:
            with self._lock:
                self._done += nbytes
                progress(self._done, self.total_bytes)

        if isinstance(plan.checkpoint, MemoryCheckpoint):
            timings = from_memory(self._pieces, plan.checkpoint, self._use, advance, plan.device)
        else:
            timings = self._through_a_ring(plan.checkpoint, advance)
        self._refuse_not_finite()
        assert not self._open, "the plan covers every weight, so every layer finishes with its last tensor"
        return replace(timings, seconds=time.perf_counter() - started)

    def _through_a_ring(self, checkpoint: Checkpoint | DummyCheckpoint, advance: Advance) -> Timings:
        plan, observed = self._plan, bool(self._registry.observers)
        was_read, was_copied = (self._was_read, self._was_copied) if observed else (untold, None)
        nbytes = -(-min(plan.read_buffer_bytes, self.total_bytes + 1) // 64) * 64  # aligned for any dtype
        with ExitStack() as stack:
            views = stack.enter_context(read_buffers(plan.read_buffers, nbytes, plan.device))
            ring = stack.enter_context(closing(checkpoint.ring(self._pieces, views, plan.readers, was_read)))
            if plan.device.type == "cuda":
                timings = through_gpu(ring, self._use, advance, plan.device, nbytes, len(views), was_copied)
            else:
                timings = through_threads(ring, self._use, advance, 1 if self.in_order else plan.workers)
        return replace(timings, read=ring.read_seconds, readers=plan.readers)

    def _was_read(self, span: Span, nbytes: int, started: float, ended: float) -> None:
        self._registry.tell(LoadEvent("read", span.pieces[0].tensor.name, nbytes, started, ended))

    def _was_copied(self, span: Span, started: float, ended: float) -> None:
        self._registry.tell(LoadEvent("copy", span.pieces[0].tensor.name, span.nbytes, started, ended))

    def _use(self, pieces: Sequence[tuple[Piece, int]], content: Tensor, seconds: StageSeconds) -> None:
        """Give the expert weights in pieces to their layers, those of a projection together.

        pieces: each with the byte of content (n,) uint8 where it begins.
        """
        batches: dict[tuple[int, Projection], list[_Found]] = {}
        numbers: dict[torch.dtype, Tensor] = {}  # content as each dtype
        for piece, start in pieces:
            sources = self._experts.get(piece, ())
            if not sources or self.in_order or self._collector is not None or sources[0].of_bias:
                raw = content[start : start + piece.nbytes]
                (self._feed(piece, raw, seconds) if sources else self._keep(piece, raw))
                continue
            dtype = torch_dtype(piece.tensor)
            if dtype not in numbers:
                numbers[dtype] = content.view(dtype)
            for source in sources:
                first, strides = source.place
                at = start // dtype.itemsize + first
                found = _Found(source.expert, at, strides, source.shape, dtype, piece)
                batches.setdefault((source.layer, source.projection), []).append(found)
        for (layer, projection), batch in batches.items():
            builder = self._builder(layer)
            batch.sort(key=attrgetter("expert"))  # neighbours then lie side by side in the buffers
            for run, weights in _together(batch, numbers):
                experts, origins = [found.expert for found in run], [_origin(found.piece) for found in run]
                builder.feed(projection, experts, weights, origins, seconds)
            self._finish_if_complete(layer)

    def _feed(self, piece: Piece, raw: Tensor, seconds: StageSeconds) -> None:
        """Give what one piece holds of experts to their layers: weights, biases, or parts of quantized weights."""
        for source in self._experts[piece]:
            builder, origin = self._builder(source.layer), _origin(piece)
            weight = source.weight_of(raw.view(torch_dtype(piece.tensor)))
            if source.of_bias:
                builder.feed_bias(source.projection, (source.expert,), weight.T, origin)
            elif self._collector is not None:
                self._feed_encoded(self._collector, builder, source, weight, origin, seconds)
            else:
                builder.feed(source.projection, (source.expert,), weight.unsqueeze(0), origin, seconds)
            self._finish_if_complete(source.layer)

    def _feed_encoded(
        self, collector: Collector, builder: LayerBuilder, source: WeightSource, part: Tensor, origin: str,
        seconds: StageSeconds,
    ) -> None:  # fmt: skip
        """Take a part of a quantized weight; with the last one hand the weight on, as it is or dequantized."""
        encoding, layer = self._plan.encoding, self._layer_plans[source.layer].layer
        assert encoding is not None
        weight = collector.add(source, part, layer.weight_shape(source.projection)[1])
        if weight is not None:
            builder.feed_encoded(source.projection, source.expert, *weight, encoding.matches, origin, seconds)

    def _finish_if_complete(self, layer: int) -> None:
        with self._lock:  # of two threads that bring the last weights one finishes the layer
            builder = self._open.get(layer)
            if builder is None or not builder.complete:
                return
            del self._open[layer]
        self._finish(layer, *builder.finish(self._module_class))

    def _finish(self, layer: int, experts: QuantizedExperts, errors: LayerErrors) -> None:
        """Take a finished layer."""
        self.finished[layer], self.errors[layer] = experts, errors

    def _keep(self, piece: Piece, raw: Tensor) -> None:
        """Copy a part of a dense tensor to its place."""
        tensor = self.dense[piece.tensor.name]
        self._note_peak(piece, raw)
        tensor.view(-1).view(torch.uint8)[piece.start : piece.start + piece.nbytes].copy_(raw)

    def _note_peak(self, piece: Piece, raw: Tensor) -> None:
        peak = peak_of(raw.view(torch_dtype(piece.tensor)))
        with self._lock:
            self._peaks.setdefault(piece.tensor.name, []).append(peak)

    def _refuse_not_finite(self) -> None:
        """Ask once for all tensors that are kept as they are: on a GPU the host would wait for each piece."""
        if not self._peaks:
            return
        names = [name for name, peaks in self._peaks.items() for _ in peaks]
        finite = torch.isfinite(torch.stack([peak for peaks in self._peaks.values() for peak in peaks])).tolist()
        for name, fine in zip(names, finite, strict=True):
            if not fine:
                raise CheckpointError(
                    f"{self._plan.checkpoint.tensors[name].file.name}: {name}: holds NaN or an infinity; expected "
                    "finite weights. The file is damaged or the model diverged: get the file again"
                )

    def _builder(self, layer: int) -> LayerBuilder:
        with self._lock:
            if layer not in self._open:
                accept = self._plan.scheme.accept
                limit = None if accept is None else accept.relative_rms
                home = None if self._into is None else self._into.layers[layer]
                self._open[layer] = LayerBuilder(
                    self._layer_plans[layer], self._registry, limit, self._exact_error, home
                )
            return self._open[layer]

    def _pieces_to_read(self) -> list[Piece]:
        """Allocate the dense tensors, and return all pieces in file order."""
        if not self._plan.with_dense:
            return in_file_order(self._experts)
        for tensor in self._plan.kept:
            if self._into is None:
                made = torch.empty(tensor.shape, dtype=torch_dtype(tensor), device=self._plan.device)
            else:
                made = self._into.dense[tensor.name]
            self.dense[tensor.name] = made
        return in_file_order([*self._experts, *dense_pieces(self._plan)])


@dataclass(frozen=True)
class _Found:
    """An expert weight of `shape` in content that was read: its first number, and the steps to the next ones."""

    expert: int
    first: int
    strides: tuple[int, int]
    shape: tuple[int, int]
    dtype: torch.dtype
    piece: Piece


def _together(
    batch: Sequence[_Found], numbers: Mapping[torch.dtype, Tensor]
) -> Iterator[tuple[Sequence[_Found], Tensor]]:
    """Yield weights (B, N, K) with who they are: evenly spaced ones as a view of numbers, small ones as a copy."""
    runs = _evenly_spaced(batch)
    nbytes = batch[0].shape[0] * batch[0].shape[1] * batch[0].dtype.itemsize
    same = all(found.dtype == batch[0].dtype for found in batch)
    if len(runs) == 1 or nbytes > LARGEST_STACKED or not same:
        yield from ((run, _view(run, numbers)) for run in runs)
        return
    count = max(1, STACKED_BYTES // nbytes)
    for part in (batch[i : i + count] for i in range(0, len(batch), count)):
        yield part, torch.stack([_view([found], numbers)[0] for found in part])


def _evenly_spaced(batch: Sequence[_Found]) -> list[Sequence[_Found]]:
    """Split a batch into runs whose weights are equally far apart, and of one kind."""
    runs: list[list[_Found]] = []
    for found in batch:
        run = runs[-1] if runs else []
        if run and (found.strides, found.dtype) == (run[0].strides, run[0].dtype):
            spacing = found.first - run[-1].first
            if spacing > 0 and (len(run) == 1 or spacing == run[1].first - run[0].first):
                run.append(found)
                continue
        runs.append([found])
    return list(runs)


def _view(run: Sequence[_Found], numbers: Mapping[torch.dtype, Tensor]) -> Tensor:
    """Return evenly spaced weights as (B, N, K)."""
    found = run[0]
    spacing = run[1].first - found.first if len(run) > 1 else 0
    content = numbers[found.dtype]
    shape, strides = (len(run), *found.shape), (spacing, *found.strides)
    return content.as_strided(shape, strides, content.storage_offset() + found.first)


@contextmanager
def one_torch_thread(device: torch.device) -> Iterator[None]:
    """Give each Python thread one of torch's while they quantize on a CPU.

    A chunk's operations take tens of microseconds, as long as OpenMP takes to start and join its threads; measured on
    2 cores with another process on them: 1.8 to 2.5 GB/s on one thread, 0.5 to 1.0 on two.
    """
    if device.type != "cpu":
        yield
        return
    _cpu_loads.enter()
    try:
        yield
    finally:
        _cpu_loads.leave()


class _CpuLoads:
    """Counts the loads that want one torch thread: the number is the process's, so the last one out restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._threads = 1

    def enter(self) -> None:
        with self._lock:
            if self._running == 0:
                self._threads = torch.get_num_threads()
                torch.set_num_threads(1)
            self._running += 1

    def leave(self) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0:
                torch.set_num_threads(self._threads)


_cpu_loads = _CpuLoads()


def dense_pieces(plan: Plan) -> Iterator[Piece]:
    """Yield the pieces of the tensors outside the experts, none larger than a read buffer."""
    step = plan.read_buffer_bytes // 16 * 16  # no number of any dtype is cut in two
    for tensor in plan.kept:
        yield from (Piece(tensor, s, min(step, tensor.nbytes - s)) for s in range(0, tensor.nbytes, step))


def _origin(piece: Piece) -> str:
    return f"{piece.tensor.file.name}: {piece.tensor.name}"


def require_finite(piece: Piece, raw: Tensor) -> None:
    """Raise CheckpointError where the bytes of a piece hold NaN or an infinity."""
    if not bool(torch.isfinite(peak_of(raw.view(torch_dtype(piece.tensor))))):
        raise CheckpointError(
            f"{piece.tensor.file.name}: {piece.tensor.name}: holds NaN or an infinity; expected finite weights. "
            "The file is damaged or the model diverged: get the file again"
        )


def torch_dtype(tensor: TensorInfo) -> torch.dtype:
    """Return the torch dtype of a tensor in a file."""
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[tensor.dtype])
    return dtype
