"""Claims zero points, but its only format has none.

fails: test_a_claimed_capability_works
says: zero_points is claimed
capabilities: [per_channel, zero_points]
"""

from moeplug_int8.hooks import Int8

import moeplug


class ClaimsZeroPoints(Int8):
    name = "claims_zero_points"

    asymmetric_range = None


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(ClaimsZeroPoints())
