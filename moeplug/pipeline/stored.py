"""Read an export of moeplug's own form: layers as a kernel reads them, so nothing is quantized."""

from __future__ import annotations

from typing import Final

import torch

from moeplug.moe.experts import ExpertGroup, QuantizedExperts
from moeplug.pipeline.allocate import buffer_shapes
from moeplug.pipeline.builder import ModuleClass
from moeplug.pipeline.create_scales import ScaleStore
from moeplug.pipeline.plan import LayerPlan
from moeplug.pipeline.setup_kernel import PipelineBinder
from moeplug.registry import Registry

QUANT_METHOD: Final = "moeplug"  # in config.json's quantization_config


def empty_layer(plan: LayerPlan, registry: Registry, module_class: ModuleClass = QuantizedExperts) -> QuantizedExperts:
    """Return a planned layer whose buffers hold arbitrary bytes."""
    groups = []
    for group in plan.groups:
        ctx = group.ctx
        weights = {
            name: torch.empty(shape, dtype=dtype, device=ctx.device)
            for name, (shape, dtype) in buffer_shapes(ctx).items()
        }
        groups.append(ExpertGroup(ctx, weights, ScaleStore(ctx).tensors, PipelineBinder(registry)))
    return module_class(plan.layer, groups)
