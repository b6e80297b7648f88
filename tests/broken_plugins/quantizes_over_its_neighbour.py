"""Writes the last row of its buffer, whichever rows it was given.

fails: test_a_stage_writes_only_what_it_is_given
says: wrote w13 outside
"""

from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import quantize


class QuantizesOverItsNeighbour(Int8):
    name = "quantizes_over_its_neighbour"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(QuantizesOverItsNeighbour())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    scales = quantize(tensor, ctx.spec(projection), ctx.format(projection), out, ctx.layout.words(projection))
    if projection == "gate":
        out._base[-1, -1] = 0
    return scales
