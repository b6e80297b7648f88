"""Stage 3: write stored values into the buffer and take their final scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeplug import quantization
from moeplug.errors import PluginError, SchemeError
from moeplug.hookspecs import StageContext
from moeplug.moe.layout import Projection
from moeplug.quantization import Scales
from moeplug.registry import Registry


def quantize(
    registry: Registry, ctx: StageContext, projection: Projection, experts: Sequence[int], tensor: Tensor, out: Tensor
) -> Scales:
    """Fill out (B, N, K') from tensor (B, N, K) and return the scales of these B expert weights."""

    def default() -> Scales:
        spec, fmt = ctx.spec(projection), ctx.format(projection)
        if spec is None:
            fmt.encode(tensor, out)
            return Scales()
        return quantization.quantize(tensor, spec, fmt, out)

    try:
        scales = registry.call(
            "quantize", ctx, default, projection=projection, experts=tuple(experts), tensor=tensor, out=out
        )
    except SchemeError as error:
        raise SchemeError(f"layer {ctx.layer.index}, experts {list(experts)}, {projection}: {error}") from error
    _check(ctx, projection, scales, out)
    return scales  # type: ignore[no-any-return]


def _check(ctx: StageContext, projection: Projection, scales: object, out: Tensor) -> None:
    """Raise PluginError unless scales are what the spec says: type, shape, and finite."""
    spec = ctx.spec(projection)
    where = f"plugin '{ctx.plugin}', stage quantize, layer {ctx.layer.index}, {projection}"
    if not isinstance(scales, Scales):
        raise PluginError(f"{where}: returned {type(scales).__name__}; expected moeplug.Scales")
    if spec is None:
        return
    expected = (out.shape[0], *quantization.scale_shape(spec, *ctx.layer.weight_shape(projection)))
    wanted = {"scale": scales.scale} if spec.symmetric else {"scale": scales.scale, "zero_point": scales.zero_point}
    for name, tensor in wanted.items():
        if tensor is None or tuple(tensor.shape) != expected:
            found = "nothing" if tensor is None else str(tuple(tensor.shape))
            raise PluginError(f"{where}: {name} is {found}; expected {expected}")
    assert scales.scale is not None
    if scales.scale.dtype != quantization.scale_dtype(spec):
        raise PluginError(f"{where}: scale is {scales.scale.dtype}; expected {quantization.scale_dtype(spec)}")
    stored = ctx.format(projection).storage_dtype
    if scales.zero_point is not None and scales.zero_point.dtype != stored:
        raise PluginError(f"{where}: zero_point is {scales.zero_point.dtype}; expected {stored}")
    if not bool(torch.isfinite(scales.scale).all()):
        raise PluginError(f"{where}: a scale is NaN or infinite")
