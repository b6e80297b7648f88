"""Register int8: round to nearest, ties to even, one byte a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moeplug
from moeplug.formats import NumberFormat


class Int8(NumberFormat):
    """Signed bytes: [-127, 127] when symmetric, so that +x and -x store alike; [-128, 127] with zero points."""

    name = "int8"
    storage_dtype = torch.int8
    bits = 8
    max_value = 127.0
    asymmetric_range = (-128.0, 127.0)
    native = torch.int8
    compressed_tensors = {"num_bits": 8, "type": "int"}  # noqa: RUF012

    def encode(self, scaled: Tensor, out: Tensor) -> None:
        out.copy_(scaled.round_())

    def decode(self, stored: Tensor, out: Tensor) -> None:
        out.copy_(stored)

    def triton_encode(self) -> Any:
        from moeplug.kernels import encode_int8

        return encode_int8

    def triton_decode(self) -> Any:
        from moeplug.kernels import decode_int8

        return decode_int8


@moeplug.hookimpl
def moeplug_register(registry: Any) -> None:
    registry.add_format(Int8())
