"""What a number format is: how a scaled weight becomes a stored one, and back.

A format knows nothing of granularity, symmetry or scale types: those are the core's (`moeplug.quantization`) and go
with every format. Plugins register formats; the core brings only the unquantized one, and base classes for what several
plugins share: two codes in a byte, and the small floats that the industry agreed on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from moeplug.scratch import scratch


class NumberFormat(ABC):
    """One way to store numbers. Subclass it, register an instance in `moeplug_register`.

    name                what a scheme's `format:` says
    storage_dtype       dtype of the stored elements, torch.int8 or torch.uint8 for everything quantized
    bits                bits per weight, scales apart
    max_value           largest magnitude of the symmetric range; a symmetric scale is amax / max_value
    asymmetric_range    (lowest, highest) with zero points; None where the format has none
    values_per_element  weights packed into one stored element along K: 1, or 2 in the nibbles of a torch.uint8
    native              the tensor-core type that stored elements are, such as torch.int8 or torch.float8_e4m3fn; None
                        where no tensor core takes them as they lie
    exact_in            types that hold every decoded value exactly
    compressed_tensors  {"num_bits": ..., "type": ...}: what compressed-tensors calls it; None where it cannot say it
    """

    name: str
    storage_dtype: torch.dtype
    bits: float
    max_value: float
    asymmetric_range: tuple[float, float] | None = None
    values_per_element: int = 1
    native: torch.dtype | None = None
    exact_in: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    scaled: bool = True
    compressed_tensors: Mapping[str, object] | None = None

    @property
    def values_per_word(self) -> int:
        """Return how many stored values 16 bits hold: 4 nibbles, 2 bytes; 0 where one value has more."""
        return 2 * self.values_per_element // self.storage_dtype.itemsize

    @abstractmethod
    def encode(self, scaled: Tensor, out: Tensor) -> None:
        """Write scaled (..., K) float32, already divided by its scale and clamped to the range, into out.

        out: (..., K / values_per_element) of storage_dtype, maybe a strided view, as `scaled` may be, which may be
        overwritten. Rounding is to nearest, ties to even. Where two values share a byte they are neighbours: value 2j
        in the low nibble of byte j, value 2j + 1 in the high one; where a layout orders values otherwise, the core
        permutes them before (`moeplug.quantization.encode`).
        """

    @abstractmethod
    def decode(self, stored: Tensor, out: Tensor) -> None:
        """Write the values of stored (..., K / values_per_element) into out (..., K) float32, neighbours as in encode.

        Scale and zero point are not applied: the core does that. Both tensors may be strided views.
        """

    def triton_decode(self) -> Any:
        """Return the `@triton.jit` function that decodes a tile, or None: the format has no Triton path.

        Signature: decode(words, DTYPE: tl.constexpr) -> tuple of tiles. words is a tile of 16 bits each, uint16, that
        hold 2 bytes or 4 nibbles of stored values, lowest bits first; the tuple has one tile of the same shape for each
        place in a word. DTYPE is the triton type that will be multiplied; values may be of any type that converts to
        it exactly, the core casts them. Where rows are no whole words, the core gives single bytes as words and takes
        the first tile. It applies zero point and scale itself. `moeplug.kernels` has decode_int8, decode_int4,
        decode_e4m3 and decode_e2m1.
        """
        return None

    def triton_encode(self) -> Any:
        """Return the `@triton.jit` function that encodes a tile, or None: a GPU then uses `encode`, launch by launch.

        Signature: encode(values) -> codes, rounded. values is a tile of float32 as `encode` gets them; codes are what
        it stores of each, uint8 or int8, nibbles in the low four bits, bit for bit the same; rounded is what they
        decode to, float32.
        `moeplug.kernels` has encode_int8, encode_int4 and encode_e4m3.
        """
        return None

    def __repr__(self) -> str:
        return f"<format {self.name}>"


def count_below(values: Tensor, limits: Tensor) -> Tensor:
    """Return, for each of values (float32), how many of the sorted limits (n,) float32 lie below it: its code.

    A comparison for each limit, which a CPU does in 0.2 ns a value; searching with `torch.bucketize` takes 11.
    """
    if values.device.type != "cpu":
        return torch.bucketize(values.contiguous(), limits.to(values.device), out_int32=True)
    count = scratch("count", values.shape, values.device).zero_()
    above = scratch("above", values.shape, values.device)
    for limit in limits.tolist():
        count += torch.gt(values, limit, out=above)
    return count


class Nibbles(NumberFormat):
    """Two codes of four bits in a byte: neighbours, the first in the low nibble. Subclasses say what codes mean."""

    storage_dtype = torch.uint8
    bits = 4
    values_per_element = 2

    def pack(self, codes: Tensor, out: Tensor) -> None:
        """Write codes (..., K) of 0 to 15 into out (..., K / 2)."""
        # As int8, then pairs as 16-bit words: CPUs have vector instructions for neither float → uint8 nor every second
        # byte, and it took 1.1 ns a weight instead of 0.2 (one core with AVX-512).
        pairs = scratch("codes", codes.shape, codes.device, torch.int8).copy_(codes).view(torch.int16)
        joined = scratch("pairs", pairs.shape, codes.device, torch.int16)
        out.copy_(torch.bitwise_right_shift(pairs, 4, out=joined).bitwise_or_(pairs))

    def unpack(self, stored: Tensor, values: Tensor, out: Tensor) -> None:
        """Write values (16,) of the codes in stored (..., K / 2) into out (..., K)."""
        values = values.to(out.device)
        out[..., 0::2] = values[(stored & 15).int()]
        out[..., 1::2] = values[(stored >> 4).int()]


class E4m3(NumberFormat):
    """Floats of 8 bits with 4 of exponent and 3 of mantissa, no infinities; the largest is 448 (OCP OFP8)."""

    storage_dtype = torch.uint8
    bits = 8
    max_value = 448.0
    native = torch.float8_e4m3fn
    exact_in = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
    compressed_tensors = {"num_bits": 8, "type": "float"}  # noqa: RUF012

    def encode(self, scaled: Tensor, out: Tensor) -> None:
        out.view(torch.float8_e4m3fn).copy_(scaled)

    def decode(self, stored: Tensor, out: Tensor) -> None:
        out.copy_(stored.view(torch.float8_e4m3fn))

    def triton_encode(self) -> Any:
        from moeplug.kernels import encode_e4m3

        return encode_e4m3

    def triton_decode(self) -> Any:
        from moeplug.kernels import decode_e4m3

        return decode_e4m3


E2M1_VALUES: Final = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # by code
_MIDDLES: Final = (E2M1_VALUES[1:8] + E2M1_VALUES[:7]) / 2
# A value in the middle goes to the even code: up from codes 1, 3 and 5, so those limits lie just below the middle.
_E2M1_LIMITS: Final = torch.where(torch.arange(7) % 2 == 1, torch.nextafter(_MIDDLES, torch.zeros(7)), _MIDDLES)


class E2m1(Nibbles):
    """Floats of 4 bits: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties to the even code (OCP MX v1.0)."""

    max_value = 6.0
    exact_in = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
    compressed_tensors = {"num_bits": 4, "type": "float"}  # noqa: RUF012

    def encode(self, scaled: Tensor, out: Tensor) -> None:
        bits = scratch("bits", scaled.shape, scaled.device, torch.int32)
        torch.bitwise_right_shift(scaled.view(torch.int32), 28, out=bits).bitwise_and_(8)
        signs = scratch("signs", scaled.shape, scaled.device, torch.int8).copy_(bits)
        codes = scratch("magnitudes", scaled.shape, scaled.device, torch.int8)
        self.pack(codes.copy_(count_below(scaled.abs_(), _E2M1_LIMITS)).bitwise_or_(signs), out)

    def decode(self, stored: Tensor, out: Tensor) -> None:
        self.unpack(stored, E2M1_VALUES, out)

    def triton_decode(self) -> Any:
        from moeplug.kernels import decode_e2m1

        return decode_e2m1


class Unquantized(NumberFormat):
    """Weights kept as the checkpoint has them: what `weights: null` means. No kernel decodes them."""

    scaled = False
    max_value = float("inf")

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self.storage_dtype = dtype
        self.bits = 8 * dtype.itemsize

    def encode(self, scaled: Tensor, out: Tensor) -> None:
        out.copy_(scaled)

    def decode(self, stored: Tensor, out: Tensor) -> None:
        out.copy_(stored)
