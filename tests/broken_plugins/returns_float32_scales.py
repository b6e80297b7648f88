"""Returns float32 scales where the scheme says bfloat16.

fails: test_weights_come_back_as_well_as_they_can
says: expected torch.bfloat16
weights: {scale_dtype: bfloat16}
"""

from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import encode


class ReturnsFloat32Scales(Int8):
    name = "returns_float32_scales"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(ReturnsFloat32Scales())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    scale = (tensor.float().abs().amax(2, keepdim=True) / 127).clamp(min=1e-30)
    encode(tensor.float() / scale, ctx.format(projection), out, ctx.layout.words(projection))
    return moeplug.Scales(scale)
