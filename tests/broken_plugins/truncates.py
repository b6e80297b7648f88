"""Cuts the fraction off instead of rounding.

fails: test_encoding_gives_the_nearest_value_and_writes_nothing_else
says: is stored as
"""

from moeplug_int8.hooks import Int8

import moeplug


class Truncates(Int8):
    name = "truncates"

    def encode(self, scaled, out):
        out.copy_(scaled.trunc_())


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(Truncates())
