"""Gives each group the scale of the group before it.

fails: test_weights_come_back_as_well_as_they_can
says: moeplug's own scales give
weights: {strategy: group, group_size: 32}
"""

from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import encode


class ScalesOfTheGroupBefore(Int8):
    name = "scales_of_the_group_before"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(ScalesOfTheGroupBefore())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    groups = tensor.float().unflatten(2, (-1, 32))
    scale = (groups.abs().amax(3).roll(1, 2) / 127).clamp(min=1e-30)
    scaled = (groups / scale.unsqueeze(3)).clamp(-127, 127).flatten(2)
    encode(scaled, ctx.format(projection), out, ctx.layout.words(projection))
    return moeplug.Scales(scale)
