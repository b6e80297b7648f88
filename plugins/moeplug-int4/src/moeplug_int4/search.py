"""Choose each group's scale by the error of its weights, without calibration data: `scale_search: mse`.

With the scale at amax / 7 one large weight makes the steps of all others coarse. A smaller scale clips it and is finer
for the rest; which one pays is tried out, on a fixed grid, group by group, by the squared error of the decoded weights.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

import moeplug
from moeplug.moe.layout import Projection
from moeplug.quantization import Scales, encode, groups, quantize, row_chunks

# Of amax / 7, largest first, exact in binary. A grid twice as fine, down to 0.5, lowers the error of Gaussian and of
# Student-t weights (5 degrees of freedom, groups of 128) by less than 0.3 % more.
RATIOS: Final = tuple(1 - i / 32 for i in range(11))


def quantize_with_search(ctx: moeplug.StageContext, projection: Projection, weight: Tensor, out: Tensor) -> Scales:
    """Write weight's stored values into out and return their scales: what stage quantize gives and returns.

    Zero points are those of the whole range: a smaller scale clips both ends in proportion.
    """
    spec, words = ctx.spec(projection), ctx.layout.words(projection)
    assert spec is not None
    if spec.scale_dtype.startswith("float8"):
        raise moeplug.SchemeError(
            f"options.scale_search: mse and scale_dtype: {spec.scale_dtype}; use float32, bfloat16 or float16"
        )
    scales = quantize(weight, spec, ctx.format(projection), out, words)
    for b, rows in row_chunks(weight):
        of_rows, part = scales.of_rows(b, rows), weight[b : b + 1, rows]
        assert of_rows.scale is not None
        codes = torch.empty(part.shape, dtype=torch.float32, device=part.device)
        G = spec.columns(part.shape[2])
        for (values, columns), (of_group, _) in zip(groups(part, G), groups(codes, G), strict=True):
            zero = 0 if of_rows.zero_point is None else of_rows.zero_point[..., columns, None].float()
            scale = _search(values, of_rows.scale[..., columns, None], zero)
            of_rows.scale[..., columns, None] = scale
            of_group.copy_(_rounded(values, scale, zero))
        encode(codes, ctx.format(projection), out[b : b + 1, rows], words)
    return scales


def _search(values: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
    """Return the scales (..., c, 1), of scale's dtype, with the least squared error of values (..., c, G).

    scale: the largest to try; of equals, the larger one is taken, so a group of zeros keeps its 1.
    """
    best, least = scale, _squared_error(values, scale, zero)
    for ratio in RATIOS[1:]:
        smaller = (scale.float() * ratio).clamp_(min=torch.finfo(scale.dtype).tiny).to(scale.dtype)
        error = _squared_error(values, smaller, zero)
        best = torch.where(error < least, smaller, best)
        least = torch.minimum(least, error)
    return best


def _squared_error(values: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
    """Return (..., c, 1) float64, the squared error of each group when it is decoded.

    Halves are added to each other, element by element: an order that no device and no instruction set changes, so the
    choice, and with it the stored bytes, are the same everywhere.
    """
    squares = _rounded(values, scale, zero).sub_(zero).mul_(scale.float()).sub_(values).double().square_()
    width = squares.shape[-1]
    while width > 1:
        half = -(-width // 2)
        squares[..., : width - half] += squares[..., half:width]
        width = half
    return squares[..., :1]


def _rounded(values: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
    """Return float32 codes; clipped ones use -8 too, which amax / 7 never reaches."""
    return (values / scale.float()).add_(zero).round_().clamp_(-8, 7)
