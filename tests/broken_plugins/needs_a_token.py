"""Divides tokens among experts, and fails where there are none.

fails: test_no_tokens_give_no_rows
says: "max(): Expected reduction dim"
"""

from moeplug_int8.hooks import Int8

import moeplug


class NeedsAToken(Int8):
    name = "needs_a_token"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(NeedsAToken())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    experts = ctx.kernel.bind(ctx.request, weights, scales)

    def forward(hidden, topk_weights, topk_ids, *, out=None):
        assert topk_ids.max() < len(ctx.experts)
        return experts(hidden, topk_weights, topk_ids, out=out)

    return forward
