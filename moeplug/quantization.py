"""Turn float weights into stored values and final scales, for every format and granularity, in bounded memory.

All arithmetic is float32 with true division and ties to even, in row chunks, so the transient memory is a few MiB
whatever the weight's size, and CPU and GPU give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moeplug.errors import SchemeError
from moeplug.formats import NumberFormat
from moeplug.scratch import scratch
from moeplug.spec import WeightSpec

# Elements of float32 scratch per chunk: 2 MiB on CPU (near the cache), 8 MiB on a GPU (fewer launches).
CHUNK_ELEMENTS: Final = {"cpu": 1 << 19, "cuda": 1 << 21}
STRATEGIES: Final = ("tensor", "channel", "group")


@dataclass(frozen=True)
class Scales:
    """The scales of some expert weights (B, N, K), already rounded to their stored type; None: the format has none.

    scale: (B, R, C) of the spec's scale_dtype, R and C as `scale_shape` says. zero_point: the same shape, in the
    format's storage type, or None when symmetric.
    """

    scale: Tensor | None = None
    zero_point: Tensor | None = None

    def of_rows(self, b: int, rows: slice) -> Scales:
        """Return the scales that rows of expert weight b use."""

        def part(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[b : b + 1, rows if t.shape[1] > 1 else slice(None)]

        return Scales(part(self.scale), part(self.zero_point))


def scale_shape(spec: WeightSpec, N: int, K: int) -> tuple[int, int]:
    """Return (R, C): how many scales one expert weight (N, K) has along N and along K."""
    return (1 if spec.strategy == "tensor" else N), (K // spec.group_size if spec.group_size else 1)


def bytes_of_weight(spec: WeightSpec | None, fmt: NumberFormat, N: int, K: int) -> int:
    """Return the bytes of one stored expert weight (N, K), scales and zero points included, one a row or more."""
    stored = N * (K // fmt.values_per_element) * fmt.storage_dtype.itemsize
    if spec is None:
        return stored
    C = scale_shape(spec, N, K)[1]
    zero_point = 0 if spec.symmetric else fmt.storage_dtype.itemsize
    return stored + N * C * (scale_dtype(spec).itemsize + zero_point)


def scale_dtype(spec: WeightSpec) -> torch.dtype:
    """Return the torch dtype that a spec's scales are stored in."""
    dtype: torch.dtype = getattr(torch, spec.scale_dtype)
    return dtype


def check_spec(spec: WeightSpec, fmt: NumberFormat, N: int, K: int) -> None:
    """Raise SchemeError where a spec asks what its format, or a weight of (N, K), cannot give."""
    if spec.strategy not in STRATEGIES:
        raise SchemeError(f"strategy: {spec.strategy} is not one that the core quantizes: {', '.join(STRATEGIES)}")
    if not spec.symmetric and (fmt.asymmetric_range is None or spec.strategy == "tensor"):
        raise SchemeError(f"format {fmt.name}, strategy {spec.strategy}: no zero points; use symmetric: true")
    if spec.group_size and K % spec.group_size:
        divisors = [g for g in (256, 128, 64, 32, 16) if K % g == 0 and g < spec.group_size]
        hint = f"{divisors[0]} divides it, or use" if divisors else "use"
        raise SchemeError(f"K={K} is not a multiple of group_size={spec.group_size}; {hint} strategy: channel")
    if K % fmt.values_per_element:
        raise SchemeError(f"K={K}: format {fmt.name} packs {fmt.values_per_element} values into one element")


def quantize(weight: Tensor, spec: WeightSpec, fmt: NumberFormat, out: Tensor) -> Scales:
    """Write weight's stored values into out and return their scales, final, as the kernel will read them.

    weight: (B, N, K) float. out: (B, N, K / values_per_element) of fmt.storage_dtype, maybe a strided view.
    Raises SchemeError if the spec does not fit the format or the shape, or a scale does not fit scale_dtype.
    """
    B, N, K = weight.shape
    check_spec(spec, fmt, N, K)
    R, C = scale_shape(spec, N, K)
    scale = torch.empty(B, R, C, dtype=scale_dtype(spec), device=weight.device)
    zero_point = None if spec.symmetric else torch.empty(B, R, C, dtype=fmt.storage_dtype, device=weight.device)
    scales = Scales(scale, zero_point)
    if spec.strategy == "tensor":
        scale.copy_(_rounded(_divided(_tensor_amax(weight), fmt.max_value), spec))
    for b, rows in row_chunks(weight):
        part = scales.of_rows(b, rows)
        grouped = weight[b : b + 1, rows].reshape(1, -1, C, K // C)
        if spec.strategy != "tensor":
            _write_scales(grouped, spec, fmt, part)
        _encode(grouped, spec, fmt, part, out[b : b + 1, rows])
    return scales


def dequantize(stored: Tensor, scales: Scales, fmt: NumberFormat, out: Tensor | None = None) -> Tensor:
    """Return (B, N, K) float32 of stored values: (decode(stored) - zero_point) * scale. out: where to write it."""
    B, N, packed = stored.shape
    shape = (B, N, packed * fmt.values_per_element)
    weight = torch.empty(shape, dtype=torch.float32, device=stored.device) if out is None else out
    fmt.decode(stored, weight)
    if scales.scale is None:
        return weight
    grouped = weight.view(*weight.shape[:2], scales.scale.shape[2], -1)
    if scales.zero_point is not None:
        grouped -= scales.zero_point.float().unsqueeze(-1)
    grouped *= scales.scale.float().unsqueeze(-1)
    return weight


def squared_error(weight: Tensor, stored: Tensor, scales: Scales, fmt: NumberFormat) -> Tensor:
    """Return (B, 2) float64: per expert weight the sum of (weight - decoded)**2 and of weight**2."""
    sums = torch.zeros(weight.shape[0], 2, dtype=torch.float64, device=weight.device)
    for b, rows in row_chunks(weight):
        part = weight[b : b + 1, rows]
        exact = scratch("exact", part.shape, part.device).copy_(part)
        decoded = scratch("decoded", part.shape, part.device)
        dequantize(stored[b : b + 1, rows], scales.of_rows(b, rows), fmt, decoded)
        sums[b, 0] += _sum_of_squares(decoded.sub_(exact))
        sums[b, 1] += _sum_of_squares(exact)
    return sums


def absolute_maximum(weight: Tensor, dim: int) -> Tensor:
    """Return amax of |weight| along dim as float32; NaN or Inf in, not finite out.

    Integer amax over the bits without the sign: 8 GB/s on CPU where abs().amax() gives 4, and NaN sorts above Inf,
    which sorts above every number, so neither is lost.
    """
    bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    magnitude = scratch("bits", weight.shape, weight.device, bits)
    torch.bitwise_and(weight.view(bits), torch.iinfo(bits).max, out=magnitude)
    return magnitude.amax(dim).view(weight.dtype).float()


def is_finite(values: Tensor) -> bool:
    """Return whether no number of a 1-D tensor is NaN or infinite; other dtypes than 16- and 32-bit floats are."""
    if not values.is_floating_point() or values.element_size() not in (2, 4):
        return True
    parts = torch.split(values, CHUNK_ELEMENTS.get(values.device.type, 1 << 20))
    return all(bool(torch.isfinite(absolute_maximum(part, -1))) for part in parts)


def row_chunks(weight: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (b, rows) over (B, N, K) so that float32 scratch of a chunk stays within CHUNK_ELEMENTS."""
    B, N, K = weight.shape
    step = max(1, CHUNK_ELEMENTS.get(weight.device.type, 1 << 20) // max(K, 1))
    for b in range(B):
        yield from ((b, slice(n, min(n + step, N))) for n in range(0, N, step))


def _sum_of_squares(values: Tensor) -> Tensor:
    """Return the sum of values**2, () float64."""
    if values.device.type == "cpu":
        flat = values.reshape(-1)
        total = torch.dot(flat, flat)  # float32: four times the speed, good to 1e-6 while no square over- or underflows
        if 1e-30 < float(total) < 1e30:
            return total.double()
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _tensor_amax(weight: Tensor) -> Tensor:
    amax = torch.zeros(weight.shape[0], 1, 1, dtype=torch.float32, device=weight.device)
    for b, rows in row_chunks(weight):
        amax[b] = torch.maximum(amax[b], absolute_maximum(weight[b, rows], -1).amax())
    return amax


def _write_scales(grouped: Tensor, spec: WeightSpec, fmt: NumberFormat, into: Scales) -> None:
    """Write the scales, and the zero points, of grouped (1, n, C, G) into `into`, whose tensors are (1, n, C)."""
    assert into.scale is not None
    if into.zero_point is None:
        into.scale.copy_(_rounded(_divided(absolute_maximum(grouped, -1), fmt.max_value), spec))
        return
    assert fmt.asymmetric_range is not None
    low, high = fmt.asymmetric_range
    smallest, largest = grouped.aminmax(dim=-1)
    smallest, largest = smallest.float().clamp_(max=0), largest.float().clamp_(min=0)
    # Both halved first: the span of two extreme values would overflow float32.
    into.scale.copy_(_rounded(_divided(largest / 2 - smallest / 2, (high - low) / 2), spec))
    into.zero_point.copy_((low - smallest / into.scale.float()).round_().clamp_(low, high))


def _encode(grouped: Tensor, spec: WeightSpec, fmt: NumberFormat, scales: Scales, out: Tensor) -> None:
    """Write the stored values of grouped (1, n, C, G) into out (1, n, K / values_per_element)."""
    assert scales.scale is not None
    scaled = scratch("scaled", grouped.shape, grouped.device).copy_(grouped)
    scaled /= scales.scale.float().unsqueeze(-1)  # a reciprocal gives other bytes for 0.04 % of int8 values
    low, high = -fmt.max_value, fmt.max_value
    if scales.zero_point is not None:
        assert fmt.asymmetric_range is not None
        low, high = fmt.asymmetric_range
        scaled += scales.zero_point.float().unsqueeze(-1)
    fmt.encode(scaled.clamp_(low, high).flatten(2), out)


def _divided(tensor: Tensor, number: float) -> Tensor:
    """Return tensor / number, rounded correctly. On CUDA torch multiplies by 1 / number where number is a Python float.

    That gave other scales than the CPU's, and with them other bytes, in 5 % of the rows.
    """
    return tensor / torch.full((), number, dtype=tensor.dtype, device=tensor.device)


def _rounded(scale: Tensor, spec: WeightSpec) -> Tensor:
    """Return scales rounded to scale_dtype: 1 for a block of zeros, floored so that 1 / scale is finite too."""
    dtype = scale_dtype(spec)
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=torch.finfo(dtype).tiny)).to(dtype)
    if not bool(torch.isfinite(scale).all()):
        raise SchemeError(f"a scale does not fit scale_dtype: {spec.scale_dtype}; use scale_dtype: float32")
    return scale
