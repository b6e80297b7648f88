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
from moeplug.moe.layout import PROJECTIONS, LayerSpec, Projection, buffer_name
from moeplug.pipeline.allocate import allocate
from moeplug.pipeline.create_scales import ScaleStore, create_scales
from moeplug.pipeline.load import load
from moeplug.pipeline.quantize import quantize
from moeplug.pipeline.setup_kernel import PipelineBinder
from moeplug.quantization import squared_error
from moeplug.registry import Registry

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
        self._came: set[tuple[int, Projection]] = set()
        # (E, 3, 2): squares of the error and of the weight, kept on the device until the layer is finished.
        shape = (plan.layer.num_experts, len(PROJECTIONS), 2)
        self._squares = torch.zeros(shape, dtype=torch.float64, device=plan.groups[0].ctx.device)

    @torch.no_grad()
    def feed(self, projection: Projection, experts: Sequence[int], tensor: Tensor, origin: str = "memory") -> None:
        """Quantize B expert weights of one projection.

        experts: B layer-wide ids, each once over the layer's life. tensor: (B, N, K) float on the layer's device; it
        is not kept. origin: how errors name its source.
        """
        for expert in experts:
            if expert not in self._place:
                raise CheckpointError(f"{origin}: layer {self._layer.index} has no expert {expert}")
            if (expert, projection) in self._came:
                raise CheckpointError(f"{origin}: layer {self._layer.index}, expert {expert}: {projection} came twice")
        for start, stop in self._runs(experts):
            group, slot = self._place[experts[start]]
            squares = self._groups[group].feed(projection, slot, experts[start:stop], tensor[start:stop], origin)
            for expert, sums in zip(experts[start:stop], squares, strict=True):
                self._squares[expert, PROJECTIONS.index(projection)] = sums
                self._came.add((expert, projection))

    @property
    def complete(self) -> bool:
        """Whether every expert weight has come."""
        return len(self._came) == self._layer.num_experts * len(PROJECTIONS)

    def finish(self, module_class: ModuleClass = QuantizedExperts) -> tuple[QuantizedExperts, LayerErrors]:
        """Return the finished module and its errors; raise if a weight is missing or `accept:` says no."""
        missing = [
            f"expert {e}, {p}" for e in range(self._layer.num_experts) for p in PROJECTIONS if (e, p) not in self._came
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
        expert, projection = divmod(worst, len(PROJECTIONS))
        where = f"expert {expert}, {PROJECTIONS[projection]}"
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

    def feed(self, projection: Projection, slot: int, experts: Sequence[int], tensor: Tensor, origin: str) -> Tensor:
        """Run stages 2 and 3 for slots slot, slot + 1, …; return (B, 2) float64 sums of squares."""
        ctx, registry = self._ctx, self._registry
        if self._buffers is None or self._store is None:
            self._buffers, self._store = allocate(registry, ctx), ScaleStore(ctx)
        ready = load(registry, ctx, projection, experts, tensor, origin)
        view = ctx.layout.view(self._buffers[buffer_name(projection)], projection)
        out = view[slot : slot + len(experts)]
        scales = quantize(registry, ctx, projection, experts, ready, out)
        self._store.put(projection, slot, scales)
        return squared_error(ready, out, scales, ctx.format(projection), ctx.layout.words(projection))

    def finish(self) -> ExpertGroup:
        """Run stages 4 and 5."""
        assert self._buffers is not None
        assert self._store is not None
        scales = create_scales(self._registry, self._ctx, self._store)
        return ExpertGroup(self._ctx, self._buffers, scales, PipelineBinder(self._registry))
