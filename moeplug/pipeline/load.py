"""Stage 2: refuse weights that are not finite or not of their shape, and let the plugin prepare the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from moeplug.errors import CheckpointError, PluginError
from moeplug.hookspecs import StageContext
from moeplug.moe.layout import Projection
from moeplug.quantization import largest_magnitude
from moeplug.registry import Registry


def load(
    registry: Registry,
    ctx: StageContext,
    projection: Projection,
    experts: Sequence[int],
    tensor: Tensor,
    origins: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Return (B, N, K) ready to encode, and (B, 2) float32: the largest magnitudes as read, and as returned.

    On a CPU both are finite. On a GPU the host would have to wait for each weight: the caller asks later, with
    `refuse_not_finite`. origins: how errors name where each weight came from.
    """
    check_weights(ctx, projection, experts, tensor, origins[0])
    peaks = largest_magnitude(tensor)
    if tensor.device.type == "cpu" and not all(map(math.isfinite, peaks.tolist())):
        b, n, k = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        found = f"{tensor[b, n, k].item()} at row {n}, column {k}"
        refuse_not_finite(ctx, projection, experts[b], found, origins[b])
    given = tensor.shape
    ready = registry.call("load", ctx, lambda: tensor, projection=projection, experts=tuple(experts), tensor=tensor)
    if ready is tensor:
        return tensor, peaks[:, None].expand(-1, 2)
    where = f"plugin '{ctx.plugin}', stage load, layer {ctx.layer.index}"
    if not isinstance(ready, Tensor) or ready.shape != given or not _is_weight(ready):
        raise PluginError(f"{where}: returned {_describe(ready)}; expected 16- or 32-bit floats {tuple(given)}")
    own_peaks = largest_magnitude(ready)
    if ready.device.type == "cpu" and not all(map(math.isfinite, own_peaks.tolist())):
        refuse_plugins_not_finite(ctx, projection, experts)
    return ready, torch.stack([peaks, own_peaks], dim=1)


def refuse_not_finite(ctx: StageContext, projection: Projection, expert: int, found: str, origin: str) -> NoReturn:
    """Raise CheckpointError about a weight that is NaN or infinite."""
    raise CheckpointError(
        f"{origin}: layer {ctx.layer.index}, expert {expert}, {projection}: {found}; "
        "expected finite weights. The file is damaged or the model diverged: get the file again"
    )


def refuse_plugins_not_finite(ctx: StageContext, projection: Projection, experts: Sequence[int]) -> NoReturn:
    """Raise PluginError about what a plugin's stage returned."""
    raise PluginError(
        f"plugin '{ctx.plugin}', stage load, layer {ctx.layer.index}: returned NaN or an infinity for {projection} of "
        f"experts {list(experts)}"
    )


def check_weights(
    ctx: StageContext, projection: Projection, experts: Sequence[int], tensor: Tensor, origin: str
) -> None:
    """Raise CheckpointError where shape or dtype are wrong."""
    expected = (len(experts), *ctx.layer.weight_shape(projection))
    if tuple(tensor.shape) != expected:
        raise CheckpointError(f"{origin}: {projection} weights are {tuple(tensor.shape)}; expected {expected}")
    if not _is_weight(tensor):
        raise CheckpointError(f"{origin}: {projection} weights are {tensor.dtype}; expected 16- or 32-bit floats")


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() in (2, 4)


def _describe(thing: object) -> str:
    return f"{tuple(thing.shape)} {thing.dtype}" if isinstance(thing, Tensor) else type(thing).__name__
