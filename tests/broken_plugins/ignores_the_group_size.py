"""Falls back, silently, to one scale a row where a scheme asks for groups.

fails: test_weights_come_back_as_well_as_they_can
says: moeplug's own scales give
weights: {strategy: group, group_size: 32}
"""

from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import encode


class IgnoresTheGroupSize(Int8):
    name = "ignores_the_group_size"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(IgnoresTheGroupSize())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    scale = (tensor.float().abs().amax(2, keepdim=True) / 127).clamp(min=1e-30)
    encode(tensor.float() / scale, ctx.format(projection), out, ctx.layout.words(projection))
    return moeplug.Scales(scale.expand(-1, -1, tensor.shape[2] // 32).contiguous())
