"""LayerBuilder: weights of one layer go in, in any order; QuantizedExperts comes out.

The streaming load, `moeplug.reload`, `moeplug.quantize_experts` and every integration drive this one object.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeplug.errors import CheckpointError, RefusedError
from moeplug.hookspecs import StageContext
from moeplug.moe.experts import ExpertGroup, QuantizedExperts
from moeplug.moe.layout import LayerSpec, Projection, buffer_name
from moeplug.pipeline.allocate import allocate
from moeplug.pipeline.create_scales import ScaleStore, create_scales
from moeplug.pipeline.load import check_weights, load, refuse_not_finite, refuse_plugins_not_finite
from moeplug.pipeline.quantize import quantize, quantize_by_plugin
from moeplug.pipeline.setup_kernel import PipelineBinder
from moeplug.quantization import (
    Scales,
    decode,
    dequantized,
    encode,
    in_scale_dtype,
    largest_magnitude,
    squared_error,
)
from moeplug.registry import Registry
from moeplug.spec import WeightSpec

if TYPE_CHECKING:
    from moeplug.kernels.weights import DirectWeights
    from moeplug.pipeline.plan import LayerPlan

ModuleClass = Callable[[LayerSpec, Sequence[ExpertGroup]], QuantizedExperts]

# The error of a large weight is taken from every 16th row: of 768 rows, 48, whose error is within 1 % of all rows'.
SAMPLED_ROWS = 16
LEAST_ROWS = 48
# Parts of a projection's errors that a GPU keeps until its layer is finished: 16 bytes each, together a part of the
# float32 scratch that weights quantized in place do not need.
MOST_SUMS = 1 << 19


@dataclass(frozen=True)
class LayerErrors:
    """Relative RMS error of each expert weight: ||weight - decoded|| / ||weight||, over one layer.

    worst_where: the worst one, for example "expert 5, down". sum_of_squares: of the relative errors. exact: all rows
    were looked at, not a sample of them.
    """

    worst: float
    mean: float
    worst_where: str
    sum_of_squares: float
    exact: bool = True


@dataclass
class StageSeconds:
    """What one thread spent in `LayerBuilder.feed`: looking for NaN, quantizing, taking errors, and in all."""

    check: float = 0.0
    quantize: float = 0.0
    error: float = 0.0
    total: float = 0.0
    weights: int = 0


class LayerBuilder:
    """Feeds one layer's expert weights through stages 1 to 3, and finishes it with stages 4 and 5.

    Threads may feed different weights at the same time; `finish` comes after all of them.
    """

    def __init__(
        self,
        plan: LayerPlan,
        registry: Registry,
        accept_relative_rms: float | None = None,
        exact_error: bool = False,
        into: QuantizedExperts | None = None,
    ) -> None:
        """Prepare a layer.

        accept_relative_rms: the largest error that `finish` takes; errors are exact then. exact_error: of all rows,
        not a sample. into: the module whose storage takes the weights, which `finish` then returns.
        """
        self._layer = plan.layer
        self._accept = accept_relative_rms
        self._exact = exact_error or accept_relative_rms is not None
        self._into = into
        homes = [None] * len(plan.groups) if into is None else into.expert_groups()
        self._groups = [_GroupBuilder(g.ctx, registry, home) for g, home in zip(plan.groups, homes, strict=True)]
        self._place = {e: (g, s) for g, group in enumerate(plan.groups) for s, e in enumerate(group.ctx.experts)}
        self._came: dict[tuple[int, str], str] = {}  # → origin
        self._expected = [*plan.layer.projections, *(f"{p} bias" for p in plan.layer.projections if plan.layer.bias)]
        # (projection, B experts, squares (B, 2) of the error and of the weight, peaks (B, 2): largest magnitudes as
        # read and as the plugin's stage load made them). On the device until the layer is finished: the host waits for
        # a GPU once a layer.
        self._measured: list[tuple[Projection, Sequence[int], Tensor, Tensor]] = []

    @torch.no_grad()
    def feed(
        self,
        projection: Projection,
        experts: Sequence[int],
        tensor: Tensor,
        origin: str | Sequence[str] = "memory",
        seconds: StageSeconds | None = None,
    ) -> None:
        """Quantize B expert weights of one projection.

        experts: B layer-wide ids, each once over the layer's life. tensor: (B, N, K) float on the layer's device; it
        is not kept. origin: how errors name its source, or each weight's. seconds: where to add the time it took.
        """
        started = time.perf_counter()
        seconds = StageSeconds() if seconds is None else seconds
        origins = [origin] * len(experts) if isinstance(origin, str) else origin
        self._require_expected(projection, experts, origins)
        step = 1 if self._exact else sampled_step(self._layer.weight_shape(projection)[0])
        for start, stop in self._runs(experts):
            group, slot = self._place[experts[start]]
            run, of_run = experts[start:stop], origins[start:stop]
            given = tensor if len(run) == len(experts) else tensor[start:stop]
            measured = self._groups[group].feed(projection, slot, run, given, of_run, step, seconds)
            if measured is not None:
                self._measured.append((projection, run, *measured))
            self._came.update(((expert, projection), where) for expert, where in zip(run, of_run, strict=True))
        seconds.weights += len(experts)
        seconds.total += time.perf_counter() - started

    @torch.no_grad()
    def feed_bias(self, projection: Projection, experts: Sequence[int], tensor: Tensor, origin: str = "memory") -> None:
        """Keep the biases of B experts of one projection as they are, tensor (B, N): no scheme quantizes a bias."""
        what = f"{projection} bias"
        self._require_expected(what, experts, [origin] * len(experts))
        expected = (len(experts), self._layer.weight_shape(projection)[0])
        if tuple(tensor.shape) != expected or not bool(torch.isfinite(tensor).all()):
            found = "NaN or an infinity" if tuple(tensor.shape) == expected else str(tuple(tensor.shape))
            raise CheckpointError(f"{origin}: {what} of experts {list(experts)}: {found}; expected finite {expected}")
        for expert, bias in zip(experts, tensor, strict=True):
            group, slot = self._place[expert]
            self._groups[group].feed_bias(projection, slot, bias)
            self._came[expert, what] = origin

    @torch.no_grad()
    def feed_encoded(
        self,
        projection: Projection,
        expert: int,
        values: Tensor,
        scales: Scales,
        as_stored: Callable[[WeightSpec | None], bool],
        origin: str = "memory",
        seconds: StageSeconds | None = None,
    ) -> None:
        """Take one already quantized weight: values (1, N, K) float32, and the scales that they are multiplied by.

        as_stored: whether a spec asks for just these numbers; then they are kept, with no error of their own. For any
        other spec the weight is dequantized and quantized anew.
        """
        group, slot = self._place[expert]
        if not as_stored(self._groups[group].ctx.spec(projection)):
            self.feed(projection, (expert,), dequantized(values, scales), origin, seconds)
            return
        self._require_expected(projection, (expert,), (origin,))
        self._groups[group].keep(projection, slot, values, scales, origin)
        exact = torch.tensor([[0.0, 1.0]], dtype=torch.float64, device=values.device)
        self._measured.append((projection, (expert,), exact, torch.zeros_like(exact)))
        self._came[expert, projection] = origin

    def _require_expected(self, what: str, experts: Sequence[int], origins: Sequence[str]) -> None:
        for expert, origin in zip(experts, origins, strict=True):
            if expert not in self._place:
                raise CheckpointError(f"{origin}: layer {self._layer.index} has no expert {expert}")
            if what not in self._expected:
                raise CheckpointError(f"{origin}: the experts of layer {self._layer.index} have no {what}")
            if (expert, what) in self._came:
                raise CheckpointError(f"{origin}: layer {self._layer.index}, expert {expert}: {what} came twice")

    @property
    def complete(self) -> bool:
        """Whether every expert weight has come."""
        return len(self._came) == self._layer.num_experts * len(self._expected)

    def finish(self, module_class: ModuleClass = QuantizedExperts) -> tuple[QuantizedExperts, LayerErrors]:
        """Return the finished module and its errors; raise if a weight is missing or `accept:` says no."""
        missing = [
            f"expert {e}, {p}"
            for e in range(self._layer.num_experts)
            for p in self._expected
            if (e, p) not in self._came
        ]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CheckpointError(f"layer {self._layer.index}: never came: {'; '.join(missing[:5])}{more}")
        squares, peaks = self._measurements()
        self._refuse_not_finite(peaks)
        errors = self._errors(squares)
        if self._accept is not None and not errors.worst <= self._accept:
            raise RefusedError(
                f"layer {self._layer.index}, {errors.worst_where}: relative error {errors.worst:.4g} is above the "
                f"scheme's accept: relative_rms: {self._accept}; nothing was kept. Keep this layer in more bits with "
                "an override, or raise the limit"
            )
        groups = [group.finish() for group in self._groups]
        return module_class(self._layer, groups) if self._into is None else self._into, errors

    def _measurements(self) -> tuple[Tensor, Tensor]:
        """Return squares and peaks on the host, (E * projections, 2) float64 each, by expert, then projection."""
        for group in self._groups:
            self._measured += group.measured_directly()
        measured = torch.cat([torch.cat([s, p.double()], dim=1) for _, _, s, p in self._measured]).cpu()
        projections = self._layer.projections
        at = [e * len(projections) + projections.index(p) for p, experts, _, _ in self._measured for e in experts]
        assert sorted(at) == list(range(self._layer.num_experts * len(projections))), "each weight is measured once"
        ordered = torch.empty_like(measured)
        ordered[at] = measured
        return ordered[:, :2], ordered[:, 2:]

    def _refuse_not_finite(self, peaks: Tensor) -> None:
        """Raise what stage 2 did not wait to see on a GPU."""
        for (expert, which), (read, made) in zip(
            ((e, p) for e in range(self._layer.num_experts) for p in self._layer.projections),
            peaks.tolist(),
            strict=True,
        ):
            ctx = self._groups[self._place[expert][0]].ctx
            if not math.isfinite(read):
                refuse_not_finite(ctx, which, expert, "holds NaN or an infinity", self._came[expert, which])
            if not math.isfinite(made):
                refuse_plugins_not_finite(ctx, which, (expert,))

    def _errors(self, squares: Tensor) -> LayerErrors:
        relative = (squares[:, 0] / squares[:, 1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        worst = int(relative.argmax())
        expert, projection = divmod(worst, len(self._layer.projections))
        where = f"expert {expert}, {self._layer.projections[projection]}"
        exact = self._exact or all(sampled_step(self._layer.weight_shape(p)[0]) == 1 for p in self._layer.projections)
        squares_of_errors = float(relative.square().sum())
        return LayerErrors(float(relative[worst]), float(relative.mean()), where, squares_of_errors, exact)

    def _runs(self, experts: Sequence[int]) -> list[tuple[int, int]]:
        """Split a batch where slots stop being neighbours, so that each run is one slice of a buffer."""
        runs, start = [], 0
        for b in range(1, len(experts) + 1):
            if b < len(experts):
                (group, slot), (next_group, next_slot) = self._place[experts[b - 1]], self._place[experts[b]]
                if (next_group, next_slot) == (group, slot + 1):
                    continue
            runs.append((start, b))
            start = b
        return runs


def sampled_step(N: int) -> int:
    """Return n where every n-th of N rows is a sample large enough to take the error from."""
    return max(1, min(SAMPLED_ROWS, N // LEAST_ROWS))


class _GroupBuilder:
    """One expert group on its way through the stages. Buffers are made when its first weight comes."""

    def __init__(self, ctx: StageContext, registry: Registry, home: ExpertGroup | None) -> None:
        self.ctx = ctx
        self._registry = registry
        self._home = home
        self._lock = threading.Lock()
        self._buffers: dict[str, Tensor] | None = None
        self._views: dict[Projection, Tensor] = {}
        self._store: ScaleStore | None = None
        self._biases: dict[str, Tensor] = {}
        self._direct: dict[Projection, DirectWeights | None] = {}
        self._plugin_quantizes = registry.answers(ctx.plugin, "quantize")

    def feed(
        self, projection: Projection, slot: int, experts: Sequence[int], tensor: Tensor, origins: Sequence[str],
        step: int, seconds: StageSeconds,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Run stages 2 and 3 for slots slot, slot + 1, …; return (B, 2) float64 sums of squares, (B, 2) peaks.

        None: `measured_directly` has them at the end.
        """
        ctx, registry = self.ctx, self._registry
        store = self._prepared()
        begin = time.perf_counter()
        direct = self._directly(projection, store, step)
        if direct is not None and not self._plugin_quantizes:
            check_weights(ctx, projection, experts, tensor, origins[0])
            direct.quantize(slot, tensor)
            seconds.quantize += time.perf_counter() - begin
            return None
        out = self._views[projection][slot : slot + len(experts)]
        if direct is None:
            ready, peaks = load(registry, ctx, projection, experts, tensor, origins)
            checked = time.perf_counter()
            scales = quantize(registry, ctx, projection, experts, ready, out)
        else:
            check_weights(ctx, projection, experts, tensor, origins[0])
            by_plugin = quantize_by_plugin(registry, ctx, projection, experts, tensor, out)
            if by_plugin is None:
                direct.quantize(slot, tensor)
                seconds.quantize += time.perf_counter() - begin
                return None
            ready, peaks, scales = tensor, largest_magnitude(tensor)[:, None].expand(-1, 2), by_plugin
            checked = begin
        store.put(projection, slot, scales)
        quantized = time.perf_counter()
        squares = squared_error(ready, out, scales, ctx.format(projection), ctx.layout.words(projection), step)
        seconds.check += checked - begin
        seconds.quantize += quantized - checked
        seconds.error += time.perf_counter() - quantized
        return squares, peaks

    def measured_directly(self) -> Iterator[tuple[Projection, Sequence[int], Tensor, Tensor]]:
        """Yield what was measured of weights that a GPU quantized directly."""
        for projection, direct in self._direct.items():
            if direct is not None:
                yield projection, [self.ctx.experts[slot] for slot in direct.slots], *direct.measured()

    def _directly(self, projection: Projection, store: ScaleStore, step: int) -> DirectWeights | None:
        """Return what quantizes on a GPU in place what is left to the core; None where others have to see more of it.

        Observers see every stage, and what a plugin's stage load returns is looked at.
        """
        with self._lock:  # what a second one made is measured nowhere
            if projection not in self._direct:
                ctx, spec, out = self.ctx, self.ctx.spec(projection), self._views[projection]
                asked = self._registry.watched or self._registry.answers(ctx.plugin, "load")
                made = None
                if out.device.type == "cuda" and spec is not None and not asked:
                    from moeplug.kernels import weights

                    fmt, words = ctx.format(projection), ctx.layout.words(projection)
                    parts = weights.parts_of_sums(out.shape[1], out.shape[2] * fmt.values_per_element, spec, step)
                    if out.shape[0] * parts <= MOST_SUMS and weights.serves(spec, fmt, out):
                        made = weights.DirectWeights(out, store.view(projection, "scale"), spec, fmt, words, step)
                self._direct[projection] = made
            return self._direct[projection]

    def keep(self, projection: Projection, slot: int, values: Tensor, scales: Scales, origin: str) -> None:
        """Write values (1, N, K) that the group's format has, and their scales, as they are."""
        ctx, spec = self.ctx, self.ctx.spec(projection)
        assert spec is not None
        store = self._prepared()
        fmt, words = ctx.format(projection), ctx.layout.words(projection)
        out = self._views[projection][slot : slot + 1]
        encode(values.clone(), fmt, out, words)
        again = torch.empty_like(values)
        decode(out, fmt, again, words)
        kept, same = in_scale_dtype(scales, spec), torch.equal(again, values)
        where = f"{origin}: layer {ctx.layer.index}, expert {ctx.experts[slot]}, {projection}"
        if not bool(torch.isfinite(dequantized(again, scales)).all()):
            raise CheckpointError(
                f"{where}: a stored value or a scale is NaN or infinite, or both together are; the file is damaged: "
                "get it again"
            )
        if not same or kept is None:
            what = "a scale" if kept is None else "a stored value"
            raise CheckpointError(
                f"{where}: {what} is none that {spec.describe()} with scale_dtype: {spec.scale_dtype} has; "
                "use scale_dtype: float32, or requantize: true"
            )
        store.put(projection, slot, kept)

    def feed_bias(self, projection: Projection, slot: int, bias: Tensor) -> None:
        """Keep one expert's bias (N,) in the row order of the weights; w13_bias (E, rows), w2_bias (E, H)."""
        ctx, name = self.ctx, f"{buffer_name(projection)}_bias"
        with self._lock:
            if name not in self._biases and self._home is not None:
                self._biases[name] = self._home.get_buffer(name)
            if name not in self._biases:
                rows = ctx.layer.hidden_size if projection == "down" else ctx.layer.w13_rows
                self._biases[name] = torch.empty(len(ctx.experts), rows, dtype=bias.dtype, device=ctx.device)
        ctx.layout.view(self._biases[name], projection)[slot].copy_(bias)

    def finish(self) -> ExpertGroup:
        """Run stages 4 and 5."""
        assert self._buffers is not None
        assert self._store is not None
        if self.ctx.device != "cpu":  # there each weight's were looked at when they came
            self._store.require_finite()
        scales = create_scales(self._registry, self.ctx, self._store)
        if self._home is None:
            return ExpertGroup(self.ctx, self._buffers | self._biases, scales, PipelineBinder(self._registry))
        for name, tensor in scales.items():
            self._home.get_buffer(name).copy_(tensor)
        return self._home

    def _prepared(self) -> ScaleStore:
        """Run stage 1, once, whichever thread comes first."""
        with self._lock:
            if self._buffers is None or self._store is None:
                home = self._home
                made = allocate(self._registry, self.ctx) if home is None else home.weights()
                self._views = {p: self.ctx.layout.view(made[buffer_name(p)], p) for p in self.ctx.layer.projections}
                self._buffers, self._store = made, ScaleStore(self.ctx)
            return self._store
