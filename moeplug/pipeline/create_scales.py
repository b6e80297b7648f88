"""Stage 4: the tensors that the kernel reads, in its shape and order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeplug.errors import PluginError, SchemeError
from moeplug.hookspecs import StageContext
from moeplug.moe.layout import CONCATENATED, PROJECTIONS, Projection, buffer_name
from moeplug.quantization import E4M3, Scales, scale_dtype, scale_shape, scale_values, zero_point_dtype
from moeplug.registry import Registry

CHECKED_SCALES = 1 << 20  # at a time, in float32


class ScaleStore:
    """A group's scales, kept in the kernel's row order from the first one on, so that stage 4 copies nothing.

    w13_scale (E, 2I, C), w2_scale (E, H, C), and zero points of the same shapes. A tensor scale fills all its rows.
    Blocks of several rows have one row of scales each, gate's first, then up's, whatever the layout does with weights.
    w13_global_scale (E, 2I), w2_global_scale (E, H) float32 where a spec has them.
    """

    def __init__(self, ctx: StageContext) -> None:
        self._ctx = ctx
        self.tensors: dict[str, Tensor] = {}
        for projection in PROJECTIONS[1:]:  # up stands for all of w13
            spec = ctx.spec(projection)
            if spec is not None:
                self._allocate(buffer_name(projection), projection)

    def put(self, projection: Projection, slot: int, scales: Scales) -> None:
        """Keep the scales of expert weights in slots slot, slot + 1, …: (B, R, C) each."""
        for part in ("scale", "zero_point", "global_scale"):
            tensor = getattr(scales, part)
            if tensor is not None:
                view = self.view(projection, part)[slot : slot + tensor.shape[0]]
                view.copy_(tensor[..., 0] if part == "global_scale" else tensor)

    def require_finite(self) -> None:
        """Raise SchemeError where a scale is NaN or infinite. On a GPU the host waits here."""
        for name, tensor in self.tensors.items():
            spec = self._ctx.spec("down" if name.startswith("w2") else "gate")
            if spec is None or not name.endswith("_scale"):
                continue
            # Few experts at a time: a layer's scales in groups of 32 are 1/16 of its weights.
            parts = torch.split(tensor, max(1, CHECKED_SCALES // tensor[0].numel()))
            if not all(bool(torch.isfinite(scale_values(part)).all()) for part in parts):
                raise SchemeError(
                    f"layer {self._ctx.layer.index}: a scale of {name} is NaN or does not fit scale_dtype: "
                    f"{spec.scale_dtype}; use scale_dtype: float32"
                )

    def scales(self, projection: Projection) -> Scales:
        """Return the scales of all experts in slot order, (E, R, C): views."""
        spec = self._ctx.spec(projection)
        if spec is None:
            return Scales()
        rows = slice(0, 1) if spec.strategy == "tensor" else slice(None)
        zero_point = None if spec.symmetric else self.view(projection, "zero_point")[:, rows]
        global_scale = self.view(projection, "global_scale")[:, :1, None] if spec.scale_dtype == E4M3 else None
        return Scales(self.view(projection, "scale")[:, rows], zero_point, global_scale, spec.ragged_block)

    def _allocate(self, buffer: str, projection: Projection) -> None:
        ctx, spec = self._ctx, self._ctx.spec(projection)
        assert spec is not None
        N, K = ctx.layer.weight_shape(projection)
        E, parts = len(ctx.experts), 2 if projection == "up" and ctx.layer.gated else 1
        shape = (E, parts * -(-N // spec.scale_rows), scale_shape(spec, N, K)[1])
        self.tensors[f"{buffer}_scale"] = ctx.layout.empty_scales(shape, scale_dtype(spec), ctx.device)
        if not spec.symmetric:
            dtype = zero_point_dtype(ctx.format(projection))
            self.tensors[f"{buffer}_zero_point"] = torch.empty(shape, dtype=dtype, device=ctx.device)
        if spec.scale_dtype == E4M3:
            self.tensors[f"{buffer}_global_scale"] = torch.empty(E, parts * N, device=ctx.device)

    def view(self, projection: Projection, part: str) -> Tensor:
        """Return a view of a projection's scale, zero_point (E, R, C) or global_scale (E, N), in the kernel's order."""
        spec = self._ctx.spec(projection)
        in_blocks = part == "scale" and spec is not None and spec.scale_rows > 1 and self._ctx.layer.gated
        layout = CONCATENATED if in_blocks else self._ctx.layout
        return layout.view(self.tensors[f"{buffer_name(projection)}_{part}"], projection)


def create_scales(registry: Registry, ctx: StageContext, store: ScaleStore) -> dict[str, Tensor]:
    """Return the kernel's scale tensors by name."""
    given: Mapping[Projection, Scales] = {projection: store.scales(projection) for projection in ctx.layer.projections}
    tensors = registry.call("create_scales", ctx, lambda: store.tensors, scales=given)
    if not isinstance(tensors, Mapping):
        raise PluginError(
            f"plugin '{ctx.plugin}', stage create_scales, layer {ctx.layer.index}: returned {type(tensors).__name__}; "
            "expected a mapping of names to tensors"
        )
    wrong = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if wrong:
        raise PluginError(
            f"plugin '{ctx.plugin}', stage create_scales, layer {ctx.layer.index}: {wrong[0]} is no tensor"
        )
    return dict(tensors)
