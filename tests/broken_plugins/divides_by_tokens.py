"""Divides by the tokens of each expert: 0 / 0 where it has none.

fails: test_experts_without_tokens_change_nothing
says: nan of the largest value off
"""

import torch
from moeplug_int8.hooks import Int8

import moeplug


class DividesByTokens(Int8):
    name = "divides_by_tokens"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(DividesByTokens())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    experts = ctx.kernel.bind(ctx.request, weights, scales)

    def forward(hidden, topk_weights, topk_ids, *, out=None):
        tokens = torch.bincount(topk_ids[topk_ids >= 0].flatten().long(), minlength=len(ctx.experts))[
            : len(ctx.experts)
        ]
        return experts(hidden, topk_weights, topk_ids, out=out).mul_((tokens / tokens).mean())

    return forward
