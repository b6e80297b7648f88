"""Binds the first weights of a layer for good, whatever is loaded into it later.

fails: test_a_state_dict_comes_back
says: other weights give the same result
"""

from moeplug_int8.hooks import Int8

import moeplug

bound = {}


class BindsOnce(Int8):
    name = "binds_once"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(BindsOnce())


@moeplug.hookimpl
def moeplug_setup_kernel(ctx, weights, scales):
    return bound.setdefault(ctx.layer.weight_shape("gate"), ctx.kernel.bind(ctx.request, weights, scales))
