"""Run the five stages over a checkpoint: one pass, in file order, in bounded memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moeplug.checkpoint.encoded import Collector, reading_order
from moeplug.checkpoint.locate import WeightSource, by_piece
from moeplug.checkpoint.reader import Piece, TensorInfo, in_file_order
from moeplug.errors import CheckpointError
from moeplug.hookspecs import LoadEvent
from moeplug.moe.experts import QuantizedExperts
from moeplug.pipeline.builder import LayerBuilder, LayerErrors, ModuleClass
from moeplug.pipeline.plan import READ_BUFFERS, TORCH_DTYPES, LayerPlan, Plan, plan_layer, plan_model
from moeplug.pipeline.report import LayerReport, Report, peak_host_bytes, provenance
from moeplug.quantization import is_finite
from moeplug.registry import Registry

__all__ = ["STAGES", "LayerBuilder", "LayerPlan", "Plan", "Report", "plan_layer", "plan_model", "run"]

STAGES = ("allocate", "load", "quantize", "create_scales", "setup_kernel")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """What one run leaves: the layers by decoder-layer index, the dense tensors by disk name, and the report."""

    layers: dict[int, QuantizedExperts]
    dense: dict[str, Tensor]
    report: Report


def run(
    plan: Plan,
    registry: Registry,
    progress: Progress | None = None,
    module_class: ModuleClass = QuantizedExperts,
    job_class: type[Job] | None = None,
) -> Result:
    """Do what the plan says and return the result; on any error nothing is kept.

    progress: called with (bytes read, bytes to read) after each piece. job_class: what feeds the layers.
    """
    started = time.perf_counter()
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    job = (job_class or Job)(plan, registry, module_class)
    try:
        with one_torch_thread(plan.device):
            job.read_everything(progress or (lambda done, total: None))
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)
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
    )
    return Result(dict(sorted(job.finished.items())), job.dense, report)


class Job:
    """One pass over the files: which piece feeds which layer, and which layers are open.

    Here layers and dense tensors stay in memory; an export overrides where they go.
    """

    def __init__(self, plan: Plan, registry: Registry, module_class: ModuleClass) -> None:
        self._plan, self._registry, self._module_class = plan, registry, module_class
        self._layer_plans = {layer.layer.index: layer for layer in plan.layers}
        self._open: dict[int, LayerBuilder] = {}
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

    def read_everything(self, progress: Progress) -> None:
        buffers = self._read_buffers()
        done = 0
        views = [memoryview(buffer.numpy()) for buffer in buffers]  # type: ignore[arg-type]  # numpy gives a buffer
        with closing(self._plan.checkpoint.stream(self._pieces, views, self._was_read)) as stream:
            for piece, data in stream:
                raw = self._copied(piece, data)
                if piece in self._experts:
                    self._feed(piece, raw)
                else:
                    self._keep(piece, raw)
                del raw  # before the next piece is copied: the plan counts one on the device
                done += piece.nbytes
                progress(done, self.total_bytes)
        assert not self._open, "the plan covers every weight, so every layer finishes with its last tensor"

    def _was_read(self, piece: Piece, started: float, ended: float) -> None:
        self._registry.tell(LoadEvent("read", piece.tensor.name, piece.nbytes, started, ended))

    def _copied(self, piece: Piece, data: memoryview) -> Tensor:
        """Return a piece's bytes on the device; a CPU takes them where they were read to."""
        raw = torch.frombuffer(data, dtype=torch.uint8)
        if self._plan.device.type == "cpu":
            return raw
        started = time.perf_counter()
        raw = raw.to(self._plan.device)
        self._registry.tell(LoadEvent("copy", piece.tensor.name, piece.nbytes, started, time.perf_counter()))
        return raw

    def _feed(self, piece: Piece, raw: Tensor) -> None:
        """Give the expert weights in one piece to their layers, and finish those that are complete."""
        dtype = torch_dtype(piece.tensor)
        for source in self._experts[piece]:
            builder = self._builder(source.layer)
            origin = f"{piece.tensor.file.name}: {piece.tensor.name}"
            weight = source.weight_of(raw.view(dtype))
            if source.of_bias:
                builder.feed_bias(source.projection, (source.expert,), weight.T, origin)
            elif self._collector is not None:
                self._feed_encoded(self._collector, builder, source, weight, origin)
            else:
                builder.feed(source.projection, (source.expert,), weight.unsqueeze(0), origin)
            if builder.complete:
                del self._open[source.layer]
                self._finish(source.layer, *builder.finish(self._module_class))

    def _finish(self, layer: int, experts: QuantizedExperts, errors: LayerErrors) -> None:
        """Take a finished layer."""
        self.finished[layer], self.errors[layer] = experts, errors

    def _feed_encoded(
        self, collector: Collector, builder: LayerBuilder, source: WeightSource, part: Tensor, origin: str
    ) -> None:
        """Take a part of a quantized weight; with the last one hand the weight on, as it is or dequantized."""
        encoding, layer = self._plan.encoding, self._layer_plans[source.layer].layer
        assert encoding is not None
        weight = collector.add(source, part, layer.weight_shape(source.projection)[1])
        if weight is not None:
            builder.feed_encoded(source.projection, source.expert, *weight, encoding.matches, origin)

    def _keep(self, piece: Piece, raw: Tensor) -> None:
        """Copy a part of a dense tensor to its place."""
        require_finite(piece, raw)
        self.dense[piece.tensor.name].view(-1).view(torch.uint8)[piece.start : piece.start + piece.nbytes].copy_(raw)

    def _builder(self, layer: int) -> LayerBuilder:
        if layer not in self._open:
            accept = self._plan.scheme.accept
            limit = None if accept is None else accept.relative_rms
            self._open[layer] = LayerBuilder(self._layer_plans[layer], self._registry, limit)
        return self._open[layer]

    def _pieces_to_read(self) -> list[Piece]:
        """Allocate the dense tensors, and return all pieces in file order."""
        if not self._plan.with_dense:
            return list(self._experts)
        for tensor in self._plan.kept:
            self.dense[tensor.name] = torch.empty(tensor.shape, dtype=torch_dtype(tensor), device=self._plan.device)
        return in_file_order([*self._experts, *dense_pieces(self._plan)])

    def _read_buffers(self) -> list[Tensor]:
        pinned = self._plan.device.type == "cuda"
        largest = max((piece.nbytes for piece in self._pieces), default=1)
        return [torch.empty(largest, dtype=torch.uint8, pin_memory=pinned) for _ in range(READ_BUFFERS)]


@contextmanager
def one_torch_thread(device: torch.device) -> Iterator[None]:
    """Quantize on one CPU thread while the reader has another.

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


def require_finite(piece: Piece, raw: Tensor) -> None:
    """Raise CheckpointError where the bytes of a piece hold NaN or an infinity."""
    if not is_finite(raw.view(torch_dtype(piece.tensor))):
        raise CheckpointError(
            f"{piece.tensor.file.name}: {piece.tensor.name}: holds NaN or an infinity; expected finite weights. "
            "The file is damaged or the model diverged: get the file again"
        )


def torch_dtype(tensor: TensorInfo) -> torch.dtype:
    """Return the torch dtype of a tensor in a file."""
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[tensor.dtype])
    return dtype
