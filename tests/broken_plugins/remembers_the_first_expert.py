"""Works scales out once for each projection, and uses them for all experts.

fails: test_weights_come_back_as_well_as_they_can
says: moeplug's own scales give
"""

from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import encode

scales = {}


class RemembersTheFirstExpert(Int8):
    name = "remembers_the_first_expert"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(RemembersTheFirstExpert())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    scale = scales.setdefault(
        (projection, tensor.shape), (tensor.float().abs().amax(2, keepdim=True) / 127).clamp(min=1e-30)
    )
    scaled = (tensor.float() / scale).clamp(-127, 127)
    encode(scaled, ctx.format(projection), out, ctx.layout.words(projection))
    return moeplug.Scales(scale)
