"""Stage 3: write stored values into the buffer and take their final scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    def core() -> Scales:
        spec, fmt = ctx.spec(projection), ctx.format(projection)
        if spec is None:
            fmt.encode(tensor, out)
            return Scales()
        return quantization.quantize(tensor, spec, fmt, out, ctx.layout.words(projection))

    scales = _ask(registry, ctx, projection, experts, tensor, out, core)
    assert scales is not None
    return scales


def quantize_by_plugin(
    registry: Registry, ctx: StageContext, projection: Projection, experts: Sequence[int], tensor: Tensor, out: Tensor
) -> Scales | None:
    """Do what `quantize` does, if the plugin's hook does it; None: it leaves these weights to the core."""
    return _ask(registry, ctx, projection, experts, tensor, out, lambda: None)


def _ask(
    registry: Registry, ctx: StageContext, projection: Projection, experts: Sequence[int], tensor: Tensor, out: Tensor,
    core: Callable[[], Scales | None],
) -> Scales | None:  # fmt: skip
    """Return the plugin's scales, checked, or what the core returns."""
    try:
        scales = registry.call(
            "quantize", ctx, core, projection=projection, experts=tuple(experts), tensor=tensor, out=out
        )
    except SchemeError as error:
        raise SchemeError(f"layer {ctx.layer.index}, experts {list(experts)}, {projection}: {error}") from error
    if scales is not None:
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
    B, shape = out.shape[0], quantization.scale_shape(spec, *ctx.layer.weight_shape(projection))
    wanted = {"scale": ((B, *shape), quantization.scale_dtype(spec))}
    if not spec.symmetric:
        wanted["zero_point"] = ((B, *shape), quantization.zero_point_dtype(ctx.format(projection)))
    if spec.scale_dtype == quantization.E4M3:
        wanted["global_scale"] = ((B, 1, 1), torch.float32)
    for name in ("scale", "zero_point", "global_scale"):
        tensor = getattr(scales, name)
        if name not in wanted:
            if tensor is not None:
                raise PluginError(f"{where}: {name} is given; the spec has none")
            continue
        expected, dtype = wanted[name]
        if tensor is None or tuple(tensor.shape) != expected:
            found = "nothing" if tensor is None else str(tuple(tensor.shape))
            raise PluginError(f"{where}: {name} is {found}; expected {expected}")
        if tensor.dtype != dtype:
            raise PluginError(f"{where}: {name} is {tensor.dtype}; expected {dtype}")
    if scales.block != spec.ragged_block:
        raise PluginError(f"{where}: block is {scales.block}; expected {spec.ragged_block}")
    # On a GPU the host would wait here for each weight: `ScaleStore.require_finite` asks once a layer.
    if out.device.type == "cpu" and not bool(torch.isfinite(scales.values(shape[0])).all()):
        raise PluginError(f"{where}: a scale is NaN or infinite")
