"""Scales the tokens in place on their way in.

fails: test_a_call_changes_nothing_but_its_output
says: a call changed what it was given
"""

from moeplug_int8.hooks import Int8

import moeplug


class ScalesHiddenInPlace(Int8):
    name = "scales_hidden_in_place"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(ScalesHiddenInPlace())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    experts = ctx.kernel.bind(ctx.request, weights, scales)

    def forward(hidden, topk_weights, topk_ids, *, out=None):
        return experts(hidden.mul_(2).div_(2).clamp_(-1, 1), topk_weights, topk_ids, out=out)

    return forward
