"""Falls back, silently, to symmetric scales where a scheme asks for zero points.

fails: test_weights_come_back_as_well_as_they_can
says: moeplug's own scales give
weights: {symmetric: false}
"""

import torch
from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import encode


class IgnoresZeroPoints(Int8):
    name = "ignores_zero_points"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(IgnoresZeroPoints())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    scale = (tensor.float().abs().amax(2, keepdim=True) / 127).clamp(min=1e-30)
    encode(tensor.float() / scale, ctx.format(projection), out, ctx.layout.words(projection))
    return moeplug.Scales(scale, torch.zeros_like(scale, dtype=torch.int8))
