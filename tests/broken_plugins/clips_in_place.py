"""Clips outliers in the tensor that it was given, which is the caller's own.

fails: test_the_callers_weights_stay_as_they_were
says: wrote into the weights
"""

from moeplug_int8.hooks import Int8

import moeplug


class ClipsInPlace(Int8):
    name = "clips_in_place"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(ClipsInPlace())


@moeplug.hookimpl
def moeplug_load(ctx, projection, experts, tensor):
    return tensor.clamp_(-0.05, 0.05)
