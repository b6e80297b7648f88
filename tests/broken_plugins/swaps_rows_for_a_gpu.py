"""Lays rows out for its CPU only: one half after the other, where a GPU's kernel has them in turn.

fails: test_the_gpus_kernel_gives_the_references_numbers_in_the_interpreter
says: off the reference
"""

import torch
from moeplug_int8.hooks import Int8

import moeplug


class SwapsRowsForAGpu(Int8):
    name = "swaps_rows_for_a_gpu"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(SwapsRowsForAGpu())


@moeplug.hookimpl
def moeplug_create_scales(ctx, scales):
    w13 = torch.cat([scales["gate"].scale, scales["up"].scale], 1)
    return {"w13_scale": w13, "w2_scale": scales["down"].scale.contiguous()}
