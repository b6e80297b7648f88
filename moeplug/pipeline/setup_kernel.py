"""Stage 5: bind the planned kernel to the finished buffers, or another one when a module moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moeplug.errors import PluginError
from moeplug.hookspecs import StageContext
from moeplug.kernels.select import Device, ExpertsForward, select_kernel
from moeplug.registry import Registry


def setup_kernel(
    registry: Registry, ctx: StageContext, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> ExpertsForward:
    """Return the callable over these buffers."""
    forward = registry.call(
        "setup_kernel", ctx, lambda: ctx.kernel.bind(ctx.request, weights, scales), weights=weights, scales=scales
    )
    if not callable(forward):
        raise PluginError(
            f"plugin '{ctx.plugin}', stage setup_kernel, layer {ctx.layer.index}: returned "
            f"{type(forward).__name__}; expected a callable"
        )
    return forward  # type: ignore[no-any-return]


def device_of(device: torch.device) -> Device:
    """Return what kernels have to know of a device."""
    if device.type != "cuda":
        return Device(device.type)
    index = torch.cuda.current_device() if device.index is None else device.index
    return Device("cuda", index, torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index))


class PipelineBinder:
    """Plans and binds kernels for modules that outlive the pipeline."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def replan(self, ctx: StageContext, device: torch.device) -> StageContext:
        """Return ctx with the kernel that serves the group on device; raise SchemeError where none does."""
        request = replace(ctx.request, device=device_of(device))
        return replace(ctx, request=request, kernel=select_kernel(request, self._registry.kernels(ctx.plugin)).kernel)

    def bind(self, ctx: StageContext, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> ExpertsForward:
        """Run stage 5."""
        return setup_kernel(self._registry, ctx, weights, scales)

    def __deepcopy__(self, memo: dict[int, object]) -> PipelineBinder:
        return self  # plugins are modules: they are shared, never copied
