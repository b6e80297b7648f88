"""Quantizes all tokens with one scale, so that a loud token drowns the others.

fails: test_a_token_does_not_depend_on_its_batch
says: depends on the others
"""

from moeplug_int8.hooks import Int8

import moeplug


class QuantizesAWholeBatch(Int8):
    name = "quantizes_a_whole_batch"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(QuantizesAWholeBatch())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    experts = ctx.kernel.bind(ctx.request, weights, scales)

    def forward(hidden, topk_weights, topk_ids, *, out=None):
        scale = hidden.abs().max() / 127
        return experts((hidden / scale).round() * scale, topk_weights, topk_ids, out=out)

    return forward
