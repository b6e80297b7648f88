"""Widens a scale where another expert needed a wider one.

fails: test_an_expert_does_not_depend_on_the_others
says: "expert 0, gate: changed"
"""

from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import encode

widest = {}


class LearnsFromOtherExperts(Int8):
    name = "learns_from_other_experts"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(LearnsFromOtherExperts())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    scale = (tensor.float().abs().amax(2, keepdim=True) / 127).clamp(min=1e-30)
    widest[projection] = max(widest.get(projection, 0), float(scale.max()) / 8)
    scale = scale.clamp(min=widest[projection])
    encode(tensor.float() / scale, ctx.format(projection), out, ctx.layout.words(projection))
    return moeplug.Scales(scale)
