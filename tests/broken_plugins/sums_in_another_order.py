"""Adds the parts of a sum in an order that chance decides, as atomic additions do.

fails: test_a_call_repeats_bit_for_bit
says: the same call gave other bits
"""

import torch
from moeplug_int8.hooks import Int8

import moeplug


class SumsInAnotherOrder(Int8):
    name = "sums_in_another_order"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(SumsInAnotherOrder())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    experts = ctx.kernel.bind(ctx.request, weights, scales)

    def forward(hidden, topk_weights, topk_ids, *, out=None):
        part = torch.rand(())
        first = experts(hidden, topk_weights * part, topk_ids, out=out)
        return first.add_(experts(hidden, topk_weights * (1 - part), topk_ids))

    return forward
