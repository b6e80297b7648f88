"""Claims activations with one scale for all tokens, which no kernel serves.

fails: test_a_claimed_capability_works
says: activation_per_tensor is claimed
capabilities: [per_channel, activation_per_tensor]
"""

from moeplug_int8.hooks import Int8

import moeplug


class ClaimsAScaleForAllTokens(Int8):
    name = "claims_a_scale_for_all_tokens"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(ClaimsAScaleForAllTokens())
