"""Returns float32 whatever hidden is.

fails: test_the_kernel_gives_the_references_numbers
says: the result torch.float32
"""

import torch
from moeplug_int8.hooks import Int8

import moeplug


class AnswersInFloat32(Int8):
    name = "answers_in_float32"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(AnswersInFloat32())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    experts = ctx.kernel.bind(ctx.request, weights, scales)

    def forward(hidden, topk_weights, topk_ids, *, out=None):
        return experts(hidden, topk_weights, topk_ids, out=out if out is not None else torch.empty(hidden.shape))

    return forward
