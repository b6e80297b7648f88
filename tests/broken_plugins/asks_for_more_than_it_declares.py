"""Ships a scheme with groups, and does not declare that it has them.

fails: test_a_scheme_asks_only_for_what_is_declared
says: "does not do strategy: group"
weights: {strategy: group, group_size: 32}
capabilities: [per_channel]
"""

from moeplug_int8.hooks import Int8

import moeplug


class AsksForMoreThanItDeclares(Int8):
    name = "asks_for_more_than_it_declares"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(AsksForMoreThanItDeclares())
