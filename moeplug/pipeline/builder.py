"""LayerBuilder: weights of one layer go in, in any order; QuantizedExperts comes out.

The streaming load, `moeplug.quantize_experts` and every integration drive this one object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from moeplug.pipeline.load import load
from moeplug.pipeline.quantize import quantize
from moeplug.pipeline.setup_kernel import PipelineBinder
from moeplug.quantization import Scales, decode, dequantized, encode, in_scale_dtype, squared_error
from moeplug.registry import Registry
from moeplug.spec import WeightSpec

if TYPE_CHECKING:
    from moeplug.pipeline.plan import LayerPlan

ModuleClass = Callable[[LayerSpec, Sequence[ExpertGroup]], QuantizedExperts]


@dataclass(frozen=True)
class LayerErrors:
    """Relative RMS error of each expert weight: ||weight - decoded|| / ||weight||, over one layer.

    worst_where: the worst one, for example "expert 5, down". sum_of_squares: of the relative errors.
    """

    worst: float
    mean: float
    worst_where: str
    sum_of_squares: float


class LayerBuilder:
    """Feeds one layer's expert weights through stages 1 to 3, and finishes it with stages 4 and 5."""

    def __init__(self, plan: LayerPlan, registry: Registry, accept_relative_rms: float | None = None) -> None:
        self._layer = plan.layer
        self._registry = registry
        self._accept = accept_relative_rms
        self._groups = [_GroupBuilder(group.ctx, registry) for group in plan.groups]
        self._place = {e: (g, s) for g, group in enumerate(plan.groups) for s, e in enumerate(group.ctx.experts)}
        self._came: set[tuple[int, str]] = set()
        self._expected = [*plan.layer.projections, *(f"{p} bias" for p in plan.layer.projections if plan.layer.bias)]
        # (E, projections, 2): squares of the error and of the weight, kept on the device until the layer is finished.
        shape = (plan.layer.num_experts, len(plan.layer.projections), 2)
        self._squares = torch.zeros(shape, dtype=torch.float64, device=plan.groups[0].ctx.device)

    @torch.no_grad()
    def feed(self, projection: Projection, experts: Sequence[int], tensor: Tensor, origin: str = "memory") -> None:
        """Quantize B expert weights of one projection.

        experts: B layer-wide ids, each once over the layer's life. tensor: (B, N, K) float on the layer's device; it
        is not kept. origin: how errors name its source.
        """
        self._require_expected(projection, experts, origin)
        for start, stop in self._runs(experts):
            group, slot = self._place[experts[start]]
            squares = self._groups[group].feed(projection, slot, experts[start:stop], tensor[start:stop], origin)
            for expert, sums in zip(experts[start:stop], squares, strict=True):
                self._squares[expert, self._layer.projections.index(projection)] = sums
                self._came.add((expert, projection))

    @torch.no_grad()
    def feed_bias(self, projection: Projection, experts: Sequence[int], tensor: Tensor, origin: str = "memory") -> None:
        """Keep the biases of B experts of one projection as they are, tensor (B, N): no scheme quantizes a bias."""
        what = f"{projection} bias"
        self._require_expected(what, experts, origin)
        expected = (len(experts), self._layer.weight_shape(projection)[0])
        if tuple(tensor.shape) != expected or not bool(torch.isfinite(tensor).all()):
            found = "NaN or an infinity" if tuple(tensor.shape) == expected else str(tuple(tensor.shape))
            raise CheckpointError(f"{origin}: {what} of experts {list(experts)}: {found}; expected finite {expected}")
        for expert, bias in zip(experts, tensor, strict=True):
            group, slot = self._place[expert]
            self._groups[group].feed_bias(projection, slot, bias)
            self._came.add((expert, what))

    @torch.no_grad()
    def feed_encoded(
        self,
        projection: Projection,
        expert: int,
        values: Tensor,
        scales: Scales,
        as_stored: Callable[[WeightSpec | None], bool],
        origin: str = "memory",
    ) -> None:
        """Take one already quantized weight: values (1, N, K) float32, and the scales that they are multiplied by.

        as_stored: whether a spec asks for just these numbers; then they are kept, with no error of their own. For any
        other spec the weight is dequantized and quantized anew.
        """
        group, slot = self._place[expert]
        if not as_stored(self._groups[group].spec(projection)):
            self.feed(projection, (expert,), dequantized(values, scales), origin)
            return
        self._require_expected(projection, (expert,), origin)
        self._groups[group].keep(projection, slot, values, scales, origin)
        exact = torch.tensor([0.0, 1.0], dtype=torch.float64, device=self._squares.device)
        self._squares[expert, self._layer.projections.index(projection)] = exact
        self._came.add((expert, projection))

    def _require_expected(self, what: str, experts: Sequence[int], origin: str) -> None:
        for expert in experts:
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
        errors = self._errors()
        if self._accept is not None and not errors.worst <= self._accept:
            raise RefusedError(
                f"layer {self._layer.index}, {errors.worst_where}: relative error {errors.worst:.4g} is above the "
                f"scheme's accept: relative_rms: {self._accept}; nothing was kept. Keep this layer in more bits with "
                "an override, or raise the limit"
            )
        return module_class(self._layer, [group.finish() for group in self._groups]), errors

    def _errors(self) -> LayerErrors:
        squares = self._squares.cpu().flatten(0, 1)
        relative = (squares[:, 0] / squares[:, 1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        worst = int(relative.argmax())
        expert, projection = divmod(worst, len(self._layer.projections))
        where = f"expert {expert}, {self._layer.projections[projection]}"
        return LayerErrors(float(relative[worst]), float(relative.mean()), where, float(relative.square().sum()))

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


class _GroupBuilder:
    """One expert group on its way through the stages. Buffers are made when its first weight comes."""

    def __init__(self, ctx: StageContext, registry: Registry) -> None:
        self._ctx = ctx
        self._registry = registry
        self._buffers: dict[str, Tensor] | None = None
        self._store: ScaleStore | None = None
        self._biases: dict[str, Tensor] = {}

    def feed(self, projection: Projection, slot: int, experts: Sequence[int], tensor: Tensor, origin: str) -> Tensor:
        """Run stages 2 and 3 for slots slot, slot + 1, …; return (B, 2) float64 sums of squares."""
        ctx, registry = self._ctx, self._registry
        buffers, store = self._open()
        ready = load(registry, ctx, projection, experts, tensor, origin)
        view = ctx.layout.view(buffers[buffer_name(projection)], projection)
        out = view[slot : slot + len(experts)]
        scales = quantize(registry, ctx, projection, experts, ready, out)
        store.put(projection, slot, scales)
        return squared_error(ready, out, scales, ctx.format(projection), ctx.layout.words(projection))

    def spec(self, projection: Projection) -> WeightSpec | None:
        """Return how the group stores a projection."""
        return self._ctx.spec(projection)

    def keep(self, projection: Projection, slot: int, values: Tensor, scales: Scales, origin: str) -> None:
        """Write values (1, N, K) that the group's format has, and their scales, as they are."""
        ctx, spec = self._ctx, self._ctx.spec(projection)
        assert spec is not None
        buffers, store = self._open()
        fmt, words = ctx.format(projection), ctx.layout.words(projection)
        out = ctx.layout.view(buffers[buffer_name(projection)], projection)[slot : slot + 1]
        encode(values.clone(), fmt, out, words)
        again = torch.empty_like(values)
        decode(out, fmt, again, words)
        kept = in_scale_dtype(scales, spec)
        if not torch.equal(again, values) or kept is None:
            what = "a scale" if kept is None else "a stored value"
            raise CheckpointError(
                f"{origin}: layer {ctx.layer.index}, {projection}: {what} is none that {spec.describe()} with "
                f"scale_dtype: {spec.scale_dtype} has; use scale_dtype: float32, or requantize: true"
            )
        if not bool(torch.isfinite(kept.values(values.shape[1])).all()):
            raise CheckpointError(
                f"{origin}: layer {ctx.layer.index}, {projection}: a stored scale is NaN or infinite; "
                "the file is damaged: get it again"
            )
        store.put(projection, slot, kept)

    def _open(self) -> tuple[dict[str, Tensor], ScaleStore]:
        """Return the group's buffers, made when they are first asked for."""
        if self._buffers is None or self._store is None:
            self._buffers, self._store = allocate(self._registry, self._ctx), ScaleStore(self._ctx)
        return self._buffers, self._store

    def feed_bias(self, projection: Projection, slot: int, bias: Tensor) -> None:
        """Keep one expert's bias (N,) in the row order of the weights; w13_bias (E, rows), w2_bias (E, H)."""
        ctx, name = self._ctx, f"{buffer_name(projection)}_bias"
        if name not in self._biases:
            rows = ctx.layer.hidden_size if projection == "down" else ctx.layer.w13_rows
            self._biases[name] = torch.empty(len(ctx.experts), rows, dtype=bias.dtype, device=ctx.device)
        ctx.layout.view(self._biases[name], projection)[slot].copy_(bias)

    def finish(self) -> ExpertGroup:
        """Run stages 4 and 5."""
        assert self._buffers is not None
        assert self._store is not None
        scales = create_scales(self._registry, self._ctx, self._store)
        return ExpertGroup(self._ctx, self._buffers | self._biases, scales, PipelineBinder(self._registry))
