"""Register int4, two weights in a byte, and search for scales where a scheme says `options: {scale_search: mse}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import moeplug
from moeplug.formats import Nibbles
from moeplug.moe.layout import Projection
from moeplug_int4.search import quantize_with_search


class Int4(Nibbles):
    """Integers of -8 to 7, stored as 0 to 15, rounded to nearest, ties to even; zero points lie in -8 to 7 too.

    A symmetric scale is amax / 7: amax / 8 would clip a largest weight that is positive by a whole step.
    """

    name = "int4"
    max_value = 7.0
    asymmetric_range = (-8.0, 7.0)
    exact_in = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8)
    compressed_tensors = {"num_bits": 4, "type": "int"}  # noqa: RUF012

    def encode(self, scaled: Tensor, out: Tensor) -> None:
        self.pack(scaled.round_().add_(8), out)

    def decode(self, stored: Tensor, out: Tensor) -> None:
        self.unpack(stored, torch.arange(-8.0, 8.0), out)

    def triton_encode(self) -> Any:
        from moeplug.kernels import encode_int4

        return encode_int4

    def triton_decode(self) -> Any:
        from moeplug.kernels import decode_int4

        return decode_int4


@moeplug.hookimpl
def moeplug_register(registry: Any) -> None:
    registry.add_format(Int4())


@moeplug.hookimpl
def moeplug_quantize(
    ctx: moeplug.StageContext, projection: Projection, experts: Sequence[int], tensor: Tensor, out: Tensor
) -> moeplug.Scales | None:
    if ctx.spec(projection) is None or ctx.options["scale_search"] == "amax":
        return None  # the core's own quantization
    return quantize_with_search(ctx, projection, tensor, out)
