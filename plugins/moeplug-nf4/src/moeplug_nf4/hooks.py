"""Register nf4: 16 values, placed where normally distributed weights are; a code is an index into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moeplug
from moeplug.formats import Nibbles, count_below
from moeplug_nf4.codebook import VALUES

CODEBOOK = torch.tensor(VALUES)
MIDDLES = (CODEBOOK[1:] + CODEBOOK[:-1]) / 2


class Nf4(Nibbles):
    """NormalFloat4: two codes of four bits in a byte. No 16-bit float holds its values, so products are float32."""

    name = "nf4"
    max_value = 1.0  # so a scale is the amax of its group
    exact_in = (torch.float32,)

    def encode(self, scaled: Tensor, out: Tensor) -> None:
        self.pack(count_below(scaled, MIDDLES), out)

    def decode(self, stored: Tensor, out: Tensor) -> None:
        self.unpack(stored, CODEBOOK, out)

    def triton_decode(self) -> Any:
        from moeplug_nf4.decode import decode_nf4  # here, so that a CPU needs no triton

        return decode_nf4


@moeplug.hookimpl
def moeplug_register(registry: Any) -> None:
    registry.add_format(Nf4())
