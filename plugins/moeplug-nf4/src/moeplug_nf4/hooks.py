"""Register nf4: 16 values, placed where normally distributed weights are; a code is an index into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moeplug
from moeplug.formats import NumberFormat
from moeplug_nf4.codebook import VALUES

CODEBOOK = torch.tensor(VALUES)
MIDDLES = (CODEBOOK[1:] + CODEBOOK[:-1]) / 2


class Nf4(NumberFormat):
    """NormalFloat4: two codes of four bits in a byte. No 16-bit float holds its values, so products are float32."""

    name = "nf4"
    storage_dtype = torch.uint8
    bits = 4
    values_per_element = 2
    max_value = 1.0  # so a scale is the amax of its group
    exact_in = (torch.float32,)

    def encode(self, scaled: Tensor, out: Tensor) -> None:
        codes = torch.bucketize(scaled.contiguous(), MIDDLES.to(scaled.device)).to(torch.uint8)
        out.copy_(codes[..., 0::2] | codes[..., 1::2] << 4)

    def decode(self, stored: Tensor, out: Tensor) -> None:
        codebook = CODEBOOK.to(out.device)
        out[..., 0::2] = codebook[(stored & 15).int()]
        out[..., 1::2] = codebook[(stored >> 4).int()]

    def triton_decode(self) -> Any:
        from moeplug_nf4.decode import decode_nf4  # here, so that a CPU needs no triton

        return decode_nf4


@moeplug.hookimpl
def moeplug_register(registry: Any) -> None:
    registry.add_format(Nf4())
