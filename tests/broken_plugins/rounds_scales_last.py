"""Encodes with a float32 scale, and rounds it to bfloat16 afterwards.

fails: test_every_value_is_the_nearest_under_its_final_scale
says: another stored value is nearer
weights: {scale_dtype: bfloat16}
"""

from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import encode


class RoundsScalesLast(Int8):
    name = "rounds_scales_last"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(RoundsScalesLast())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    scale = (tensor.float().abs().amax(2, keepdim=True) / 127).clamp(min=1e-30)
    encode(tensor.float() / scale, ctx.format(projection), out, ctx.layout.words(projection))
    return moeplug.Scales(scale.bfloat16())
