"""Returns a tensor of its own where it was given one to write.

fails: test_a_call_changes_nothing_but_its_output
says: another tensor came back
"""

from moeplug_int8.hooks import Int8

import moeplug


class IgnoresOut(Int8):
    name = "ignores_out"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(IgnoresOut())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    experts = ctx.kernel.bind(ctx.request, weights, scales)

    def forward(hidden, topk_weights, topk_ids, *, out=None):
        return experts(hidden, topk_weights, topk_ids)

    return forward
