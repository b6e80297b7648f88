"""Has a shortcut for one token, and forgets the router weights there.

fails: test_one_token_is_served
says: off the reference
"""

from moeplug_int8.hooks import Int8

import moeplug


class TreatsOneTokenApart(Int8):
    name = "treats_one_token_apart"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(TreatsOneTokenApart())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    experts = ctx.kernel.bind(ctx.request, weights, scales)

    def forward(hidden, topk_weights, topk_ids, *, out=None):
        topk_weights = topk_weights.sign() if len(hidden) == 1 else topk_weights
        return experts(hidden, topk_weights, topk_ids, out=out)

    return forward
