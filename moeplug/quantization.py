"""Turn float weights into stored values and final scales, for every format and granularity, in bounded memory.

All arithmetic is float32 with true division and ties to even, in row chunks, so the transient memory is a few MiB
whatever the weight's size, and CPU and GPU give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from moeplug.errors import SchemeError
from moeplug.formats import NumberFormat
from moeplug.moe.layout import in_words
from moeplug.scratch import scratch
from moeplug.spec import WeightSpec

# Elements of float32 scratch per chunk: 2 MiB on CPU (near the cache), 4 MiB on a GPU (fewer launches).
CHUNK_ELEMENTS: Final = {"cpu": 1 << 19, "cuda": 1 << 20}
E8M0: Final = "float8_e8m0fnu"  # stored as bytes: torch compares, prints and saves torch.uint8 everywhere
E4M3: Final = "float8_e4m3fn"
LARGEST_E4M3: Final = 448.0
SMALLEST_E4M3: Final = 2.0**-9


@dataclass(frozen=True)
class Scales:
    """The scales of some expert weights (B, N, K), already rounded to their stored type; None: the format has none.

    scale: (B, R, C) of `scale_dtype(spec)`, R and C as `scale_shape` says. zero_point: the same shape, of
    `zero_point_dtype`, or None when symmetric. global_scale: (B, 1, 1) float32, which multiplies `scale`, with
    scale_dtype float8_e4m3fn only. block: the spec's ragged_block, with strategy block or `pad` only.
    """

    scale: Tensor | None = None
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None
    block: tuple[int, int] | None = None

    def of_rows(self, b: slice, rows: slice) -> Scales:
        """Return the scales that rows of expert weights b use. rows: (start, stop), start a multiple of a block's."""
        R = self.block[0] if self.block else 1
        of_scale = slice(rows.start // R, -(-rows.stop // R))

        def part(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[b, of_scale if t.shape[1] > 1 else slice(None)]

        return Scales(part(self.scale), part(self.zero_point), part(self.global_scale), self.block)

    def every(self, step: int, N: int) -> Scales:
        """Return the scales that rows 0, step, 2 * step, … of N use."""
        R = self.block[0] if self.block else 1
        scale = self.scale if self.scale is None or R == 1 else self.scale.repeat_interleave(R, 1)[:, :N]

        def part(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[:, :: step if t.shape[1] > 1 else 1]

        return Scales(part(scale), part(self.zero_point), self.global_scale, self.block and (1, self.block[1]))

    def values(self, N: int) -> Tensor:
        """Return (B, N or 1, C) float32: what each row's weights are multiplied by."""
        assert self.scale is not None
        values = scale_values(self.scale)
        if self.global_scale is not None:
            values = values * self.global_scale
        return values.repeat_interleave(self.block[0], 1)[:, :N] if self.block and self.block[0] > 1 else values


def scale_values(scale: Tensor) -> Tensor:
    """Return stored scales as float32; torch.uint8 holds exponents, byte e means 2**(e - 127)."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def scale_shape(spec: WeightSpec, N: int, K: int) -> tuple[int, int]:
    """Return (R, C): how many scales one expert weight (N, K) has along N and along K."""
    R = 1 if spec.strategy == "tensor" else -(-N // spec.scale_rows)
    return R, -(-K // max(spec.columns(K), 1))


def bytes_of_weight(spec: WeightSpec | None, fmt: NumberFormat, N: int, K: int) -> int:
    """Return the bytes of one stored expert weight (N, K) with its scales and zero points, as kernels hold them."""
    stored = N * (K // fmt.values_per_element) * fmt.storage_dtype.itemsize
    if spec is None:
        return stored
    R, C = -(-N // spec.scale_rows), scale_shape(spec, N, K)[1]  # a tensor scale fills all its rows
    zero_point = 0 if spec.symmetric else zero_point_dtype(fmt).itemsize
    global_scale = 4 * N if spec.scale_dtype == E4M3 else 0
    return stored + R * C * (scale_dtype(spec).itemsize + zero_point) + global_scale


def scale_dtype(spec: WeightSpec) -> torch.dtype:
    """Return the torch dtype that a spec's scales are stored in; torch.uint8, exponents, for float8_e8m0fnu."""
    dtype: torch.dtype = torch.uint8 if spec.scale_dtype == E8M0 else getattr(torch, spec.scale_dtype)
    return dtype


def zero_point_dtype(fmt: NumberFormat) -> torch.dtype:
    """Return the byte that holds a format's zero points: they lie in its asymmetric_range."""
    return torch.int8 if fmt.asymmetric_range is not None and fmt.asymmetric_range[0] < 0 else torch.uint8


def range_of(spec: WeightSpec, fmt: NumberFormat) -> tuple[float, float]:
    """Return (lowest, highest) stored value. A symmetric scale is amax over half of what lies between them."""
    if spec.symmetric and spec.range == "symmetric":
        return -fmt.max_value, fmt.max_value
    assert fmt.asymmetric_range is not None
    return fmt.asymmetric_range


def check_spec(spec: WeightSpec, fmt: NumberFormat, N: int, K: int) -> None:
    """Raise SchemeError where a spec asks what its format, or a weight of (N, K), cannot give."""
    if not spec.symmetric and (fmt.asymmetric_range is None or spec.strategy == "tensor"):
        raise SchemeError(f"format {fmt.name}, strategy {spec.strategy}: no zero points; use symmetric: true")
    if spec.range == "full" and (fmt.asymmetric_range is None or fmt.asymmetric_range[0] >= 0):
        raise SchemeError(f"format {fmt.name} has no values below its symmetric range; leave range: full out")
    if spec.group_size and K % spec.group_size and not spec.pad:
        raise SchemeError(f"{does_not_divide(K, spec.group_size)} pad: true, or strategy: channel")
    if K % fmt.values_per_element:
        raise SchemeError(f"K={K}: format {fmt.name} packs {fmt.values_per_element} values into one element")


def does_not_divide(K: int, group_size: int) -> str:
    """Return that a group size is refused, and the next smaller one that is not, up to "or use"."""
    divisors = [g for g in (256, 128, 64, 32, 16) if K % g == 0 and g < group_size]
    hint = f"{divisors[0]} divides it, or use" if divisors else "use"
    return f"K={K} is not a multiple of group_size={group_size}; {hint}"


def quantize(weight: Tensor, spec: WeightSpec, fmt: NumberFormat, out: Tensor, words: bool = False) -> Scales:
    """Write weight's stored values into out and return their scales, final, as the kernel will read them.

    weight: (B, N, K) float. out: (B, N, K / values_per_element) of fmt.storage_dtype, maybe a strided view.
    words: the layout's, for this projection: in which order values lie along K.
    Raises SchemeError if the spec does not fit the format or the shape, or a scale does not fit scale_dtype.
    """
    check_spec(spec, fmt, *weight.shape[1:])
    scales = _empty_scales(weight, spec, fmt)
    if weight.device.type == "cuda":
        from moeplug.kernels import weights

        if weights.serves(spec, fmt, out):
            assert scales.scale is not None
            weights.quantize(weight, spec, fmt, out, words, scales.scale)
            return scales
    _write_scales(weight, spec, fmt, scales)
    divisors, (low, high) = scales.values(weight.shape[1]), range_of(spec, fmt)
    G = spec.columns(weight.shape[2])
    for b, rows in row_chunks(weight):
        part = weight[b, rows]
        scaled = scratch("scaled", part.shape, part.device).copy_(part)
        of_rows = rows if divisors.shape[1] > 1 else slice(None)
        for values, columns in groups(scaled, G):
            values /= divisors[b, of_rows, columns, None]  # a reciprocal gives other bytes for 0.04 % of int8 values
            if scales.zero_point is not None:
                values += scales.zero_point[b, of_rows, columns, None].float()
        encode(scaled.clamp_(low, high), fmt, out[b, rows], words)
    return scales


def dequantize(
    stored: Tensor, scales: Scales, fmt: NumberFormat, out: Tensor | None = None, words: bool = False
) -> Tensor:
    """Return (B, N, K) float32 of stored values: (decode(stored) - zero_point) * scale. out: where to write it."""
    B, N, packed = stored.shape
    K = packed * fmt.values_per_element
    weight = torch.empty((B, N, K), dtype=torch.float32, device=stored.device) if out is None else out
    decode(stored, fmt, weight, words)
    if scales.scale is None:
        return weight
    return dequantized(weight, scales)


def dequantized(values: Tensor, scales: Scales) -> Tensor:
    """Return (values - zero_point) * scale of decoded values (B, N, K) float32, in place."""
    assert scales.scale is not None
    _, N, K = values.shape
    of_groups = scales.values(N)
    for part, columns in groups(values, scales.block[1] if scales.block else K // scales.scale.shape[2]):
        if scales.zero_point is not None:
            part -= scales.zero_point[..., columns, None].float()
        part *= of_groups[..., columns, None]
    return values


def in_scale_dtype(scales: Scales, spec: WeightSpec) -> Scales | None:
    """Return scales in a spec's own type; None where one of them is no number of that type."""
    assert scales.scale is not None
    dtype = scale_dtype(spec)
    if scales.scale.dtype == dtype:
        return scales
    scale = scales.scale.to(dtype)
    return replace(scales, scale=scale) if torch.equal(scale.float(), scales.scale.float()) else None


def encode(values: Tensor, fmt: NumberFormat, out: Tensor, words: bool = False) -> None:
    """Write values (B, N, K) float32, scaled and clamped to the range, into out; they may be overwritten.

    out, words: as in `quantize`.
    """
    if not words:
        fmt.encode(values, out)
        return
    for b, rows in row_chunks(values):
        natural = in_words(values[b, rows], fmt.values_per_word)
        ordered = scratch("ordered", natural.shape, values.device).copy_(natural)
        fmt.encode(ordered.flatten(2), out[b, rows])


def decode(stored: Tensor, fmt: NumberFormat, out: Tensor, words: bool = False) -> None:
    """Write what `encode` stored into out (B, N, K) float32: neither scales nor zero points are applied."""
    if not words:
        fmt.decode(stored, out)
        return
    for b, rows in row_chunks(out):
        natural = in_words(out[b, rows], fmt.values_per_word)
        ordered = scratch("ordered", natural.shape, out.device)
        fmt.decode(stored[b, rows], ordered.flatten(2))
        natural.copy_(ordered)


def reordered(stored: Tensor, fmt: NumberFormat, source: bool, target: bool) -> Tensor:
    """Return stored values (B, N, K / values_per_element) in another order along K: words is source, becomes target."""
    if source == target:
        return stored
    result = torch.empty_like(stored, memory_format=torch.contiguous_format)
    for b, rows in row_chunks(stored):
        codes = _codes(stored[b, rows].view(torch.uint8), fmt)
        ordered = scratch("reordered codes", codes.shape, codes.device, torch.uint8)
        if target:
            natural = in_words(codes, fmt.values_per_word)
            ordered.view(natural.shape).copy_(natural)
        else:
            natural = in_words(ordered, fmt.values_per_word)
            natural.copy_(codes.view(natural.shape))
        _pack(ordered, fmt, result[b, rows].view(torch.uint8))
    return result


def _codes(stored: Tensor, fmt: NumberFormat) -> Tensor:
    """Return (B, n, K) uint8, a code for each value of stored (B, n, K / values_per_element) uint8, contiguous."""
    if fmt.values_per_element == 1:
        return stored.contiguous()
    codes = scratch("codes", (*stored.shape[:2], 2 * stored.shape[2]), stored.device, torch.uint8)
    torch.bitwise_and(stored, 15, out=codes[..., 0::2])
    torch.bitwise_right_shift(stored, 4, out=codes[..., 1::2])
    return codes


def _pack(codes: Tensor, fmt: NumberFormat, out: Tensor) -> None:
    """Write codes (B, n, K) uint8 into out (B, n, K / values_per_element) uint8: the inverse of `_codes`."""
    out.copy_(codes if fmt.values_per_element == 1 else codes[..., 0::2] | codes[..., 1::2] << 4)


def squared_error(
    weight: Tensor, stored: Tensor, scales: Scales, fmt: NumberFormat, words: bool = False, step: int = 1
) -> Tensor:
    """Return (B, 2) float64: per expert weight the sum of (weight - decoded)**2 and of weight**2.

    step: look at rows 0, step, 2 * step, … alone.
    """
    scales = scales.every(step, weight.shape[1])
    weight, stored = weight[:, ::step], stored[:, ::step]
    sums = torch.zeros(weight.shape[0], 2, dtype=torch.float64, device=weight.device)
    for b, rows in row_chunks(weight):
        part = weight[b, rows]
        exact = scratch("exact", part.shape, part.device).copy_(part)
        decoded = scratch("decoded", part.shape, part.device)
        dequantize(stored[b, rows], scales.of_rows(b, rows), fmt, decoded, words)
        sums[b, 0] += _sum_of_squares(decoded.sub_(exact))
        sums[b, 1] += _sum_of_squares(exact)
    return sums


def groups(values: Tensor, group_size: int) -> Iterator[tuple[Tensor, slice]]:
    """Yield views (..., c, G) of values (..., K), each with its c columns of scales: whole groups, then the rest."""
    whole, rest = divmod(values.shape[-1], group_size)
    if whole:
        yield values[..., : whole * group_size].view(*values.shape[:-1], whole, group_size), slice(0, whole)
    if rest:
        yield values[..., whole * group_size :].unsqueeze(-2), slice(whole, whole + 1)


def absolute_maximum(weight: Tensor, dim: int) -> Tensor:
    """Return amax of |weight| along dim as float32; NaN or Inf in, not finite out.

    Integer amax over the bits without the sign: 8 GB/s on CPU where abs().amax() gives 4, and NaN sorts above Inf,
    which sorts above every number, so neither is lost.
    """
    bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    magnitude = scratch("bits", weight.shape, weight.device, bits)
    torch.bitwise_and(weight.view(bits), torch.iinfo(bits).max, out=magnitude)
    return magnitude.amax(dim).view(weight.dtype).float()


def peak_of(values: Tensor) -> Tensor:
    """Return () float32, the largest magnitude of a 1-D tensor, not finite where a number is not.

    0 for other dtypes than 16- and 32-bit floats, whose numbers are.
    """
    if not values.is_floating_point() or values.element_size() not in (2, 4):
        return torch.zeros((), device=values.device)
    parts = torch.split(values, CHUNK_ELEMENTS.get(values.device.type, 1 << 20))
    return torch.stack([absolute_maximum(part, -1) for part in parts]).amax()


def largest_magnitude(weight: Tensor) -> Tensor:
    """Return (B,) float32, the largest |weight| of each of B weights (B, N, K); not finite where one is not."""
    if weight.device.type == "cuda":
        from moeplug.kernels import weights

        return weights.largest_magnitude(weight)
    peaks = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    for b, rows in row_chunks(weight):
        peaks[b] = torch.maximum(peaks[b], absolute_maximum(weight[b, rows].flatten(1), -1))
    return peaks


def row_chunks(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (b, rows) over (B, N, K) so that float32 scratch of a chunk stays within CHUNK_ELEMENTS.

    Small weights are taken several at a time, of large ones some rows.
    """
    B, N, K = weight.shape
    rows = max(1, CHUNK_ELEMENTS.get(weight.device.type, 1 << 20) // max(K, 1))
    together = max(1, rows // max(N, 1))
    for b in range(0, B, together):
        yield from ((slice(b, min(b + together, B)), slice(n, min(n + rows, N))) for n in range(0, N, rows))


def _sum_of_squares(values: Tensor) -> Tensor:
    """Return (B,) float64, the sum of values**2 over (B, n, K)."""
    if values.device.type == "cpu":
        flat = values.flatten(1)
        # In float32: four times the speed, good to 1e-6 while no square over- or underflows. Which sum it is depends on
        # a weight's size alone, so that a weight's error does not depend on its batch.
        if flat.shape[1] > 1 << 16:
            totals = torch.stack([torch.dot(row, row) for row in flat])
        else:
            totals = torch.mul(flat, flat, out=scratch("squares", flat.shape, flat.device)).sum(1)
        if all(1e-30 < total < 1e30 for total in totals.tolist()):
            return totals.double()
    norm: Tensor = torch.linalg.vector_norm(values, dim=(1, 2), dtype=torch.float64)
    return norm.square()


def _empty_scales(weight: Tensor, spec: WeightSpec, fmt: NumberFormat) -> Scales:
    B, N, K = weight.shape
    shape, device = (B, *scale_shape(spec, N, K)), weight.device
    return Scales(
        torch.empty(shape, dtype=scale_dtype(spec), device=device),
        None if spec.symmetric else torch.empty(shape, dtype=zero_point_dtype(fmt), device=device),
        torch.empty(B, 1, 1, dtype=torch.float32, device=device) if spec.scale_dtype == E4M3 else None,
        spec.ragged_block,
    )


def _write_scales(weight: Tensor, spec: WeightSpec, fmt: NumberFormat, into: Scales) -> None:
    """Write the scales, and the zero points, of weight (B, N, K) into `into`, whose tensors are (B, R, C)."""
    assert into.scale is not None
    if into.zero_point is None:
        amax = _amax(weight, spec)
        if into.global_scale is not None:
            into.global_scale.copy_(_global_scale(amax.amax((1, 2), keepdim=True), fmt))
        into.scale.copy_(_final(amax, spec, fmt, into.global_scale))
        return
    low, high = range_of(spec, fmt)
    ends = [part.aminmax(dim=-1) for part, _ in groups(weight, spec.columns(weight.shape[2]))]
    smallest = torch.cat([end for end, _ in ends], dim=-1).float().clamp_(max=0)
    largest = torch.cat([end for _, end in ends], dim=-1).float().clamp_(min=0)
    # Both halved first: the span of two extreme values would overflow float32.
    into.scale.copy_(_rounded(_divided(largest / 2 - smallest / 2, (high - low) / 2), spec))
    into.zero_point.copy_((low - smallest / into.scale.float()).round_().clamp_(low, high))


def _amax(weight: Tensor, spec: WeightSpec) -> Tensor:
    """Return (B, R, C) float32, the absolute maximum of each group or block of weight (B, N, K)."""
    if spec.strategy == "tensor":
        return largest_magnitude(weight)[:, None, None]
    (B, N, K), R, G = weight.shape, spec.scale_rows, spec.columns(weight.shape[2])
    amax = torch.empty(B, N, -(-K // G), dtype=torch.float32, device=weight.device)
    for b, rows in row_chunks(weight):
        for part, columns in groups(weight[b, rows], G):
            amax[b, rows, columns] = absolute_maximum(part, -1)
    if R == 1:
        return amax
    padded = torch.nn.functional.pad(amax, (0, 0, 0, -N % R))  # rows of zeros change no maximum
    return padded.view(B, -1, R, amax.shape[2]).amax(2)


def _final(amax: Tensor, spec: WeightSpec, fmt: NumberFormat, global_scale: Tensor | None) -> Tensor:
    """Return symmetric scales, as they are stored, of groups with these absolute maxima; 1 for a group of zeros."""
    if spec.scale_dtype == E8M0:
        return _exponents(amax, fmt)
    low, high = range_of(spec, fmt)
    scale = _divided(amax, (high - low) / 2)
    if global_scale is None:
        return _rounded(scale, spec)
    # Floored: a scale of zero would lose the whole group, and divide by zero.
    scale = (scale / global_scale).clamp_(SMALLEST_E4M3, LARGEST_E4M3)
    return torch.where(amax == 0, 1.0, scale).to(torch.float8_e4m3fn)


def _exponents(amax: Tensor, fmt: NumberFormat) -> Tensor:
    """Return floor(log2(amax)) - floor(log2(max_value)), the rule of OCP MX v1.0, as bytes with a bias of 127."""
    biased = amax.view(torch.int32) >> 23  # from bits: log2 rounds up just below powers of two
    exponent = (biased - (math.frexp(fmt.max_value)[1] - 1)).clamp_(0, 254)
    return torch.where(amax == 0, 127, exponent).to(torch.uint8)


def _global_scale(amax: Tensor, fmt: NumberFormat) -> Tensor:
    """Return amax / (448 * max_value), so that the largest group's scale is the largest e4m3; 1 for zeros."""
    scale = _divided(amax, LARGEST_E4M3 * fmt.max_value)
    least = torch.finfo(torch.float32).tiny / SMALLEST_E4M3  # the smallest product is a normal number then
    return torch.where(amax == 0, 1.0, scale.clamp_(min=least))


def _divided(tensor: Tensor, number: float) -> Tensor:
    """Return tensor / number, rounded correctly. On CUDA torch multiplies by 1 / number where number is a Python float.

    That gave other scales than the CPU's, and with them other bytes, in 5 % of the rows.
    """
    return tensor / torch.full((), number, dtype=tensor.dtype, device=tensor.device)


def _rounded(scale: Tensor, spec: WeightSpec) -> Tensor:
    """Return scales rounded to scale_dtype: 1 for a block of zeros, floored so that 1 / scale is finite too."""
    dtype = scale_dtype(spec)
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=torch.finfo(dtype).tiny)).to(dtype)
    # Not on a GPU, where the host would wait for each weight here; the pipeline looks at a layer's scales at its end.
    if scale.device.type == "cpu" and not bool(torch.isfinite(scale).all()):
        raise SchemeError(f"a scale does not fit scale_dtype: {spec.scale_dtype}; use scale_dtype: float32")
    return scale
