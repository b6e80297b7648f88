"""Claims GPUs, but its format cannot be decoded on one.

fails: test_a_kernel_serves_every_kind_of_device_that_is_claimed
says: has no triton_decode
"""

from moeplug_int8.hooks import Int8

import moeplug


class ClaimsAGpu(Int8):
    name = "claims_a_gpu"

    def triton_decode(self):
        return None


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(ClaimsAGpu())
