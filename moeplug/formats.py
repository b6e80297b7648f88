"""What a number format is: how a scaled weight becomes a stored one, and back.

A format knows nothing of granularity, symmetry or scale types: those are the core's (`moeplug.quantization`) and go
with every format. Plugins register formats; the core brings only the unquantized one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class NumberFormat(ABC):
    """One way to store numbers. Subclass it, register an instance in `moeplug_register`.

    name                what a scheme's `format:` says
    storage_dtype       dtype of the stored elements, torch.int8 or torch.uint8 for everything quantized
    bits                bits per weight, scales apart
    max_value           largest magnitude of the symmetric range; a symmetric scale is amax / max_value
    asymmetric_range    (lowest, highest) with zero points; None where the format has none
    values_per_element  weights packed into one stored element along K
    compressed_tensors  {"num_bits": ..., "type": ...}: what compressed-tensors calls it; None where it cannot say it
    """

    name: str
    storage_dtype: torch.dtype
    bits: float
    max_value: float
    asymmetric_range: tuple[float, float] | None = None
    values_per_element: int = 1
    scaled: bool = True
    compressed_tensors: Mapping[str, object] | None = None

    @abstractmethod
    def encode(self, scaled: Tensor, out: Tensor) -> None:
        """Write scaled (..., K) float32, already divided by its scale and clamped to the range, into out.

        out: (..., K / values_per_element) of storage_dtype, maybe a strided view. `scaled` may be overwritten.
        Rounding is to nearest, ties to even.
        """

    @abstractmethod
    def decode(self, stored: Tensor, out: Tensor) -> None:
        """Write the values of stored (..., K / values_per_element) into out (..., K) float32.

        Scale and zero point are not applied: the core does that. `stored` may be a strided view.
        """

    def triton_decode(self) -> Any:
        """Return the `@triton.jit` function that decodes a tile, or None: the format has no Triton path.

        Signature: decode(tile) -> values of a tile of stored elements, in any type that converts exactly to float32
        and to 16-bit floats. The core applies zero point and scale.
        """
        return None

    def __repr__(self) -> str:
        return f"<format {self.name}>"


class Unquantized(NumberFormat):
    """Weights kept as the checkpoint has them: what `weights: null` means."""

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

    def triton_decode(self) -> Any:
        from moeplug.kernels._fused_moe import decode_identity

        return decode_identity
