"""Falls back, silently, to a dense copy of the weights and plain products.

fails: test_a_layer_holds_the_memory_that_its_plan_says
says: the plan says
"""

from moeplug_int8.hooks import Int8

import moeplug
from moeplug.moe.reference import experts_reference


class UnpacksEverything(Int8):
    name = "unpacks_everything"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(UnpacksEverything())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    w13, w2 = (weights[name].float() * scales[f"{name}_scale"] for name in ("w13", "w2"))

    def forward(hidden, topk_weights, topk_ids, *, out=None):
        experts = [(*w13[e].chunk(2), w2[e]) for e in range(len(w2))]
        result = experts_reference(hidden, topk_weights, topk_ids, experts)
        return result if out is None else out.copy_(result)

    return forward
