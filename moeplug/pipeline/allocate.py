"""Stage 1: make a group's empty buffers, in the layout of the planned kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeplug.errors import PluginError
from moeplug.hookspecs import StageContext
from moeplug.registry import Registry


def allocate(registry: Registry, ctx: StageContext) -> dict[str, Tensor]:
    """Return the group's buffers by name, shapes and dtypes checked; their bytes are arbitrary."""
    buffers = registry.call("allocate", ctx, lambda: _empty(ctx))
    if not isinstance(buffers, Mapping):
        raise PluginError(
            f"plugin '{ctx.plugin}', stage allocate, layer {ctx.layer.index}: returned {type(buffers).__name__}; "
            "expected a mapping of w13 and w2"
        )
    _check(ctx, buffers)
    return dict(buffers)


def buffer_shapes(ctx: StageContext) -> dict[str, tuple[tuple[int, int, int], torch.dtype]]:
    """Return shape and storage dtype of w13 and w2 for this group."""
    layer, E = ctx.layer, len(ctx.experts)
    gate_up, down = ctx.format("gate"), ctx.format("down")
    H, I = layer.hidden_size, layer.intermediate_size
    return {
        "w13": ((E, layer.w13_rows, H // gate_up.values_per_element), gate_up.storage_dtype),
        "w2": ((E, H, I // down.values_per_element), down.storage_dtype),
    }


def _empty(ctx: StageContext) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=dtype, device=ctx.device) for name, (shape, dtype) in buffer_shapes(ctx).items()
    }


def _check(ctx: StageContext, buffers: Mapping[str, Tensor]) -> None:
    for name, (shape, dtype) in buffer_shapes(ctx).items():
        found = buffers.get(name)
        if found is None or tuple(found.shape) != shape or found.dtype != dtype:
            described = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise PluginError(
                f"plugin '{ctx.plugin}', stage allocate, layer {ctx.layer.index}: {name} is {described}; "
                f"expected {shape} {dtype}"
            )
