"""Returns zero points with the other sign.

fails: test_weights_come_back_as_well_as_they_can
says: moeplug's own scales give
weights: {symmetric: false}
"""

from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import quantize


class TurnsZeroPointsAround(Int8):
    name = "turns_zero_points_around"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(TurnsZeroPointsAround())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    right = quantize(tensor, ctx.spec(projection), ctx.format(projection), out, ctx.layout.words(projection))
    return moeplug.Scales(right.scale, -right.zero_point)
