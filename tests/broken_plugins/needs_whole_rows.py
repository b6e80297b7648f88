"""Encodes 32 values at a time, and fails where K is no multiple of 32.

fails: test_weights_come_back_as_well_as_they_can
says: is invalid for input of size
"""

from moeplug_int8.hooks import Int8

import moeplug


class NeedsWholeRows(Int8):
    name = "needs_whole_rows"

    def encode(self, scaled, out):
        out.copy_(scaled.reshape(-1, 32).round().reshape(scaled.shape))


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(NeedsWholeRows())
