"""Decodes its integers as e4m3 inside the Triton kernel.

fails: test_every_stored_byte_decodes_in_the_kernel_as_the_format_says
says: decode says
"""

from moeplug_int8.hooks import Int8

import moeplug


class DecodesOtherwiseOnAGpu(Int8):
    name = "decodes_otherwise_on_a_gpu"

    def triton_decode(self):
        from moeplug.kernels import decode_e4m3

        return decode_e4m3


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(DecodesOtherwiseOnAGpu())
