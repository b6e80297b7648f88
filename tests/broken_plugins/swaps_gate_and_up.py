"""Lays the scales of up where the kernel looks for those of gate.

fails: test_the_kernel_gives_the_references_numbers
says: off the reference
"""

import torch
from moeplug_int8.hooks import Int8

import moeplug


class SwapsGateAndUp(Int8):
    name = "swaps_gate_and_up"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(SwapsGateAndUp())


@moeplug.hookimpl
def moeplug_create_scales(ctx, scales):
    w13 = torch.cat([scales["up"].scale, scales["gate"].scale], 1)
    return {"w13_scale": w13, "w2_scale": scales["down"].scale.contiguous()}
