"""Says that its largest value is 64, and uses half of the bytes.

fails: test_the_numbers_of_a_format_are_what_it_says
says: larger values can be stored
"""

from moeplug_int8.hooks import Int8

import moeplug


class WastesTheRange(Int8):
    name = "wastes_the_range"

    max_value = 64.0


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(WastesTheRange())
