"""Weights, and the specs and formats that tests compare with other libraries: named here once.

weight = edge_weights((128, 256))
spec, fmt = case("int8")
"""

from __future__ import annotations

import torch
from formats import FORMATS, SPECS
from torch import Tensor

from moeplug.formats import NumberFormat
from moeplug.spec import WeightSpec


def case(name: str, **changes: object) -> tuple[WeightSpec, NumberFormat]:
    """Return the spec of this name, with fields changed, and its number format."""
    spec = WeightSpec.model_validate(SPECS[name].model_dump() | changes)
    return spec, FORMATS[spec.format]


def edge_weights(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return (N, K) float32, each exact in bfloat16, N >= 16: normal rows of many magnitudes, then rows of trouble."""
    N, K = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * torch.exp(torch.randn(N, 1, generator=generator)) * 0.02
    weight[-1] = 0  # no magnitude at all
    weight[-2] = torch.tensor([2.0**-127, -(2.0**-130), 2.0**-133, 0.0]).repeat(K // 4)  # subnormal in float32
    weight[-3, ::37] = 6 * weight[-3].std()  # outliers
    weight[-4] *= 1e7  # beyond the largest float16
    weight[-5, : K // 2] = 0  # groups of zeros beside others
    weight[-6] = -weight[-6].abs()  # one sign
    weight[-7] = 0.25 * torch.randint(-24, 25, (K,), generator=generator)  # ties: the middles of e2m1, to begin with
    weight[-8] = -0.0
    return weight.bfloat16().float()
