"""Stage 4: the tensors that the kernel reads, in its shape and order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeplug.errors import PluginError
from moeplug.hookspecs import StageContext
from moeplug.moe.layout import PROJECTIONS, Projection, buffer_name
from moeplug.quantization import Scales, scale_dtype, scale_shape
from moeplug.registry import Registry


class ScaleStore:
    """A group's scales, kept in the kernel's row order from the first one on, so that stage 4 copies nothing.

    w13_scale (E, 2I, C), w2_scale (E, H, C), and zero points of the same shapes. A tensor scale fills all its rows.
    """

    def __init__(self, ctx: StageContext) -> None:
        self._ctx = ctx
        self.tensors: dict[str, Tensor] = {}
        for projection in PROJECTIONS[1:]:
            spec = ctx.spec(projection)
            if spec is not None:
                self._allocate(buffer_name(projection), projection)

    def put(self, projection: Projection, slot: int, scales: Scales) -> None:
        """Keep the scales of expert weights in slots slot, slot + 1, …: (B, R, C) each."""
        for part, tensor in (("scale", scales.scale), ("zero_point", scales.zero_point)):
            if tensor is not None:
                self._view(projection, part)[slot : slot + tensor.shape[0]].copy_(tensor)

    def scales(self, projection: Projection) -> Scales:
        """Return the scales of all experts in slot order, (E, R, C): views."""
        spec = self._ctx.spec(projection)
        if spec is None:
            return Scales()
        rows = slice(0, 1) if spec.strategy == "tensor" else slice(None)
        zero_point = None if spec.symmetric else self._view(projection, "zero_point")[:, rows]
        return Scales(self._view(projection, "scale")[:, rows], zero_point)

    def _allocate(self, buffer: str, projection: Projection) -> None:
        ctx, spec = self._ctx, self._ctx.spec(projection)
        assert spec is not None
        N, K = ctx.layer.weight_shape(projection)
        shape = (len(ctx.experts), N if projection == "down" else 2 * N, scale_shape(spec, N, K)[1])
        self.tensors[f"{buffer}_scale"] = torch.empty(shape, dtype=scale_dtype(spec), device=ctx.device)
        if not spec.symmetric:
            dtype = ctx.format(projection).storage_dtype
            self.tensors[f"{buffer}_zero_point"] = torch.empty(shape, dtype=dtype, device=ctx.device)

    def _view(self, projection: Projection, part: str) -> Tensor:
        return self._ctx.layout.view(self.tensors[f"{buffer_name(projection)}_{part}"], projection)


def create_scales(registry: Registry, ctx: StageContext, store: ScaleStore) -> dict[str, Tensor]:
    """Return the kernel's scale tensors by name."""
    given: Mapping[Projection, Scales] = {projection: store.scales(projection) for projection in PROJECTIONS}
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
