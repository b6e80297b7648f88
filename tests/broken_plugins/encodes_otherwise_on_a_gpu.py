"""Encodes its integers as e4m3 where a GPU quantizes weights.

fails: test_the_gpus_kernel_gives_the_references_numbers_in_the_interpreter
says: triton_encode stores other bytes than encode
"""

from moeplug_int8.hooks import Int8

import moeplug


class EncodesOtherwiseOnAGpu(Int8):
    name = "encodes_otherwise_on_a_gpu"

    def triton_encode(self):
        from moeplug.kernels import encode_e4m3

        return encode_e4m3


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(EncodesOtherwiseOnAGpu())
