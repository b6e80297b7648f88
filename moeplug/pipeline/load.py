"""Stage 2: refuse weights that are not finite or not of their shape, and let the plugin prepare the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeplug.errors import CheckpointError, PluginError
from moeplug.hookspecs import StageContext
from moeplug.moe.layout import Projection
from moeplug.quantization import absolute_maximum, row_chunks
from moeplug.registry import Registry


def load(
    registry: Registry, ctx: StageContext, projection: Projection, experts: Sequence[int], tensor: Tensor, origin: str
) -> Tensor:
    """Return (B, N, K) ready to encode. origin: how errors name where the tensor came from."""
    check_weights(ctx, projection, experts, tensor, origin)
    given = tensor.shape
    ready = registry.call("load", ctx, lambda: tensor, projection=projection, experts=tuple(experts), tensor=tensor)
    where = f"plugin '{ctx.plugin}', stage load, layer {ctx.layer.index}"
    if not isinstance(ready, Tensor) or ready.shape != given or not _is_weight(ready):
        raise PluginError(f"{where}: returned {_describe(ready)}; expected 16- or 32-bit floats {tuple(given)}")
    if ready is not tensor and not _all_finite(ready):
        raise PluginError(f"{where}: returned NaN or an infinity for {projection} of experts {list(experts)}")
    return ready


def check_weights(
    ctx: StageContext, projection: Projection, experts: Sequence[int], tensor: Tensor, origin: str
) -> None:
    """Raise CheckpointError where the shape is wrong or a value is NaN or infinite."""
    expected = (len(experts), *ctx.layer.weight_shape(projection))
    if tuple(tensor.shape) != expected:
        raise CheckpointError(f"{origin}: {projection} weights are {tuple(tensor.shape)}; expected {expected}")
    if not _is_weight(tensor):
        raise CheckpointError(f"{origin}: {projection} weights are {tensor.dtype}; expected 16- or 32-bit floats")
    if _all_finite(tensor):
        return
    b, n, k = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
    raise CheckpointError(
        f"{origin}: layer {ctx.layer.index}, expert {experts[b]}, {projection}: {tensor[b, n, k].item()} at row {n}, "
        f"column {k}; expected finite weights. The file is damaged or the model diverged: get the file again"
    )


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() in (2, 4)


def _all_finite(tensor: Tensor) -> bool:
    """Return whether (B, N, K) is finite, with one host synchronisation."""
    peaks = torch.stack([absolute_maximum(tensor[b, rows], -1).amax() for b, rows in row_chunks(tensor)])
    return bool(torch.isfinite(peaks).all())


def _describe(thing: object) -> str:
    return f"{tuple(thing.shape)} {thing.dtype}" if isinstance(thing, Tensor) else type(thing).__name__
