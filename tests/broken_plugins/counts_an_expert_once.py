"""Lets an expert work once for a token that names it twice.

fails: test_an_expert_named_twice_counts_twice
says: off the reference
"""

from moeplug_int8.hooks import Int8

import moeplug


class CountsAnExpertOnce(Int8):
    name = "counts_an_expert_once"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(CountsAnExpertOnce())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    experts = ctx.kernel.bind(ctx.request, weights, scales)

    def forward(hidden, topk_weights, topk_ids, *, out=None):
        topk_ids = topk_ids.clone()
        for t in range(1, topk_ids.shape[1]):
            topk_ids[(topk_ids[:, :t] == topk_ids[:, t : t + 1]).any(1), t] = -1
        return experts(hidden, topk_weights, topk_ids, out=out)

    return forward
