"""Takes one scale for all weights that come in one call.

fails: test_bytes_do_not_depend_on_how_many_weights_come_at_once_or_in_which_order
says: differs
"""

from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import encode


class SharesScalesInABatch(Int8):
    name = "shares_scales_in_a_batch"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(SharesScalesInABatch())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    scale = (tensor.float().abs().amax((0, 2), keepdim=True) / 127).clamp(min=1e-30).expand(len(tensor), -1, 1)
    encode(tensor.float() / scale, ctx.format(projection), out, ctx.layout.words(projection))
    return moeplug.Scales(scale.contiguous())
