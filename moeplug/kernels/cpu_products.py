"""Multiply tokens by one expert's stored weights on a CPU, each time by the fastest way that gives the numbers asked.

Four ways, for weights with a scale a row and no zero points (all other weights go by float32, groups decoded into it).
Times: microseconds for weights (1536, 2048) out of memory, 2 cores (AMD, AVX-512 BF16), torch 2.13, n tokens, without
the split of x into digits:

    way        what runs                                    n=1   4    8     32     128    512    rounds
    packed     torch._weight_int8pack_mm on stored bytes    180   240  450   1400                 2**-9, bfloat16
    digits     torch._int_mm, x as two int8 digits          460   430  480   780    2160   8000   2**-15 of x's largest
    bfloat16   decoded to bfloat16, torch.mm                480   470  545   880    2210   9000   2**-9, bfloat16
    float32    decoded to float32, torch.mm                 390   630  900   1600   5400   18900  as the reference
    (transformers: bfloat16 weights as they are             420   355  420   790    2110   7600)

Bytes are exact in bfloat16, and so is x, and sums are float32: what packed and bfloat16 lose is that torch rounds their
result to bfloat16, before the scale. One such rounding on the way, of gate and up, stays within the reference's
tolerance where weights are large; a second one, of down, left it in 8 of 1500 random layers, so down never takes them.
Digits are a power of two times integers of 15 bits: numbers near a row's largest are exact, and no output is rounded.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Final, Literal

import torch
from torch import Tensor

from moeplug.kernels.operands import Operand
from moeplug.quantization import groups
from moeplug.scratch import scratch

Way = Literal["packed", "digits", "bfloat16", "float32"]

# Bytes of weights decoded at once. (1536, 2048) to bfloat16: one chunk of 6 MiB 0.88 ms, six of 1 MiB 1.09 ms (a launch
# each, n=32). To float32, n=1: 4 MiB 0.42 ms, 256 KiB 2.0 ms, 16 MiB 0.60 ms; (2048, 768): 6 MiB 0.19, 3 MiB 0.21 ms.
CHUNK_BYTES: Final = {torch.bfloat16: 8 << 20, torch.float32: 8 << 20}
# Weights (N, K) whose product may be rounded before the scale: errors of single products average out in the next one.
# From 2**18 on no output of 1500 random layers left the reference's tolerance; with (256, 256), 1 of 230 did.
LEAST_ROUNDED: Final = 1 << 18
# The packed product reads the weights once for 4 tokens.
PACKED_TOKENS: Final = 6
# The integer product repacks the weights each time: for small ones float32 is ahead, with any number of tokens.
LEAST_DIGITS: Final = 1 << 18
# Weights gathered for a product of each pair with its own, in float32: 4 MiB.
MOST_GATHERED: Final = 1 << 20
# int32 sums of the two digits of all tokens, kept at once.
SUMS_BYTES: Final = 8 << 20
# Scratch of each name that a thread keeps.
MOST_KEPT: Final = 8 << 20
CPU: Final = torch.device("cpu")
# What the packed product's vector loads need of rows: a row that starts elsewhere ends the process (seen with AVX-512,
# which needs 16; other vectors are longer).
ALIGNMENT: Final = 64
# float32 with few tokens: weights first, x.T second is up to 6 times as fast as x first (MKL, AMD); not for small ones.
LEAST_WEIGHTS_FIRST: Final = 1 << 18


def working(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory with arbitrary contents, as `scratch` does; a fresh tensor where that would keep over 8 MiB."""
    if math.prod(shape) * dtype.itemsize > MOST_KEPT:
        return torch.empty(shape, dtype=dtype)
    return scratch(name, shape, CPU, dtype)


def has_packed_product() -> bool:
    """Return whether torch._weight_int8pack_mm is there and vectorized on this CPU."""
    return hasattr(torch, "_weight_int8pack_mm") and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def has_integer_product() -> bool:
    """Return whether this CPU has instructions for sums of int8 products."""
    return hasattr(torch, "_int_mm") and bool(torch.cpu._is_vnni_supported())


def has_bfloat16_product() -> bool:
    """Return whether this CPU multiplies bfloat16; elsewhere torch emulates it, slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


class Tokens:
    """The inputs of a batch of experts, x (n, K), in the forms that products ask for, each made once."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def float32(self) -> Tensor:
        """(n, K) float32."""
        return self.x.float()

    @cached_property
    def digits(self) -> tuple[Tensor, Tensor]:
        """(n, 2, K) int8 and (n, 1) float32 as `split_into_digits` gives them."""
        return split_into_digits(self.x)


class Product:
    """The weights of one product of a layer, bound: a callable that multiplies by one expert's at a time."""

    def __init__(self, weights: Operand, *, may_round: bool) -> None:
        """may_round: results may be rounded to bfloat16 before the scale where x is bfloat16."""
        self._weights = weights
        self._of_expert = weights.weight.unbind(0)  # views, made once: a select costs 1 us
        fmt = weights.format
        scale_per_row = weights.scale is None or weights.group_size >= weights.K
        exact = torch.bfloat16 in fmt.exact_in if fmt.scaled else fmt.storage_dtype == torch.bfloat16
        plain_rows = scale_per_row and exact and weights.zero_point is None
        integers = plain_rows and fmt.native == weights.weight.dtype == torch.int8
        self._row_scaled = scale_per_row and weights.scale is not None
        self._row_scales = self._row_scale_views() if self._row_scaled else None
        may_round = may_round and weights.N * weights.K >= LEAST_ROUNDED
        self.packed = may_round and integers and has_packed_product() and _fits_packed(weights.weight)
        self.digits = integers and has_integer_product() and (LEAST_DIGITS or 1) <= weights.N * weights.K
        self.bfloat16 = may_round and plain_rows and has_bfloat16_product() and not self.digits
        # Small weights that torch converts by itself: one operation instead of six, of 2 us each.
        small = plain_rows and weights.N * weights.K < LEAST_WEIGHTS_FIRST
        self._small_numbers = (fmt.native or (None if fmt.scaled else fmt.storage_dtype)) if small else None
        self._chunks = {dtype: self._row_chunks(dtype) for dtype in CHUNK_BYTES}
        self._ones = torch.ones(weights.N if self.packed else 0, dtype=torch.bfloat16)

    def __call__(self, tokens: Tokens, rows: slice, e: int, out: Tensor, factor: Tensor | None = None) -> None:
        """Write some rows of tokens times expert e's weights into out (n, N) float32, times factor (n, 1), plus bias.

        A 16-bit x says that a result good to its precision will do, float32 that it has to be float32's.
        """
        unscaled = self._unscaled(tokens, rows, e)
        if not self._row_scaled:
            out.copy_(unscaled)
        elif self._row_scales is not None:
            torch.mul(unscaled, self._row_scales[e], out=out)
        else:
            torch.mul(unscaled, self._weights.scales_of(e, slice(0, self._weights.N))[:, 0], out=out)
        if factor is not None:
            out *= factor
        if self._weights.bias is not None:
            out += self._weights.bias[e]

    def takes_pairs(self, pairs: int) -> bool:
        """Return whether `of_pairs` serves so many at once: small weights that torch converts by itself."""
        weights = self._weights
        plain = self._small_numbers is not None and weights.bias is None
        plain = plain and (weights.scale is None or self._row_scales is not None)
        return plain and pairs * weights.N * weights.K <= MOST_GATHERED

    def of_pairs(self, x: Tensor, ids: Tensor) -> Tensor:
        """Return (P, N) float32: each row of x (P, K) float32 times the weights of its expert, ids (P,) int64."""
        weights = self._weights
        assert self._small_numbers is not None
        shape = (len(ids), weights.N, weights.K)
        stored = torch.index_select(weights.weight, 0, ids, out=scratch("gathered", shape, CPU, weights.weight.dtype))
        w = scratch("decoded", shape, CPU).copy_(stored.view(self._small_numbers))
        y = torch.bmm(x.unsqueeze(1), w.transpose(1, 2)).squeeze(1)  # weights first: 5 times as slow (MKL, AMD)
        return y if weights.scale is None else y.mul_(weights.scale[:, :, 0].index_select(0, ids))

    def way(self, dtype: torch.dtype, n: int) -> Way:
        """Return which way n tokens of a dtype go."""
        if dtype == torch.bfloat16 and self.packed and n <= PACKED_TOKENS:
            return "packed"
        if dtype.itemsize == 2 and self.digits:
            return "digits"
        return "bfloat16" if dtype == torch.bfloat16 and self.bfloat16 else "float32"

    def _unscaled(self, tokens: Tokens, rows: slice, e: int) -> Tensor:
        """Return (n, N), bfloat16 or float32: the product before what belongs to a whole row of weights."""
        way = self.way(tokens.x.dtype, rows.stop - rows.start)
        if way == "packed":
            return torch._weight_int8pack_mm(_aligned(tokens.x[rows]), self._of_expert[e], self._ones)
        if way == "digits":
            digits, unit = tokens.digits
            return self._by_digits(digits[rows], unit[rows], e)
        return self._in_bfloat16(tokens.x[rows], e) if way == "bfloat16" else self._in_float32(tokens.float32[rows], e)

    def _by_digits(self, digits: Tensor, unit: Tensor, e: int) -> Tensor:
        """Return (n, N) float32: sums of integers, exact, of both digits; then put together."""
        n, N = digits.shape[0], self._weights.N
        out = torch.empty(n, N)
        step = max(1, SUMS_BYTES // (8 * n))
        for first in range(0, N, step):
            rows = slice(first, min(first + step, N))
            high, low = torch._int_mm(digits.view(2 * n, -1), self._of_expert[e][rows].T).view(n, 2, -1).unbind(1)
            torch.add(low, high.float(), alpha=128, out=out[:, rows])
        return out.mul_(unit)

    def _in_bfloat16(self, x: Tensor, e: int) -> Tensor:
        if self._weights.weight.dtype == torch.bfloat16:
            return torch.mm(x, self._of_expert[e].T)
        out = torch.empty(x.shape[0], self._weights.N, dtype=torch.bfloat16)
        for rows in self._chunks[torch.bfloat16]:
            torch.mm(x, self._decoded_to_bfloat16(e, rows).T, out=out[:, rows])
        return out

    def _in_float32(self, x: Tensor, e: int) -> Tensor:
        if self._small_numbers is not None:
            return torch.mm(x, self._of_expert[e].view(self._small_numbers).float().T)
        chunks = self._chunks[torch.float32]
        if len(chunks) == 1:
            return _weights_first(self._decoded(e, chunks[0]), x)
        out = torch.empty(x.shape[0], self._weights.N)
        for rows in chunks:
            out[:, rows] = _weights_first(self._decoded(e, rows), x)
        return out

    def _row_chunks(self, dtype: torch.dtype) -> tuple[slice, ...]:
        """Return equal runs of rows that fit CHUNK_BYTES once they are decoded."""
        N, K = self._weights.N, self._weights.K
        chunks = max(1, -(-N * K * dtype.itemsize // CHUNK_BYTES[dtype]))
        step = max(1, -(-N // chunks))
        return tuple(slice(n, min(n + step, N)) for n in range(0, N, step))

    def _decoded_to_bfloat16(self, e: int, rows: slice) -> Tensor:
        """Return (n, K) bfloat16 scratch of some rows of expert e: exact, scales not applied."""
        w = scratch("decoded bfloat16", (rows.stop - rows.start, self._weights.K), CPU, torch.bfloat16)
        native = self._weights.format.native
        return w.copy_(self._decoded(e, rows) if native is None else self._of_expert[e][rows].view(native))

    def _decoded(self, e: int, rows: slice) -> Tensor:
        """Return (n, K) float32 scratch of some rows of expert e: zero points off, scales of groups along K applied."""
        weights, stored = self._weights, self._of_expert[e][rows]
        w = scratch("decoded", (rows.stop - rows.start, weights.K), CPU)
        weights.format.decode(stored, w)
        if weights.zero_point is None and (self._row_scaled or weights.scale is None):
            return w
        scales = None if self._row_scaled or weights.scale is None else weights.scales_of(e, rows)
        for part, columns in groups(w, weights.group_size):
            if weights.zero_point is not None:
                part -= weights.zero_point[e, rows, columns, None].float()
            if scales is not None:
                part *= scales[:, columns, None]
        return w

    def _row_scale_views(self) -> tuple[Tensor, ...] | None:
        """Return each expert's (N,) float32 scales as views; None where they are computed from what is stored."""
        weights = self._weights
        assert weights.scale is not None
        plain = weights.scale.dtype == torch.float32 and weights.scale_rows == 1 and weights.global_scale is None
        return weights.scale[:, :, 0].unbind(0) if plain else None


def _fits_packed(weight: Tensor) -> bool:
    """Return whether the packed product takes weight (E, N, K) where it lies: dense rows, each of them aligned."""
    dense = weight.stride(1) == weight.shape[2] and weight.stride(2) == 1 and weight.numel() > 0
    strides = (weight.shape[2], weight.stride(0), weight.data_ptr())
    return dense and all(stride % ALIGNMENT == 0 for stride in strides)


def _weights_first(w: Tensor, x: Tensor) -> Tensor:
    """Return (n, N) float32: x (n, K) times w (N, K), by the faster order of factors."""
    return torch.mm(w, x.T).T if w.numel() >= LEAST_WEIGHTS_FIRST else torch.mm(x, w.T)


def _aligned(x: Tensor) -> Tensor:
    return x if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def split_into_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (digits, unit) with unit * (128 * digits[:, 0] + digits[:, 1]) close to x (n, K), a 16-bit float.

    digits: (n, 2, K) int8. unit: (n, 1) float32, a power of two; NaN for a row that is not finite. Numbers of at least
    2**-6 (bfloat16; float16: 2**-3) of their row's largest are exact, smaller ones within unit / 2, 2**-14 of it.
    """
    n, K = x.shape
    largest = x.abs().amax(1, keepdim=True).float()
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 14)
    q = torch.div(x, unit, out=working("q", (n, K))).round_()
    high = torch.mul(q, 1 / 128, out=working("high", (n, K))).round_().clamp_(max=127)
    digits = torch.empty(n, 2, K, dtype=torch.int8)
    digits[:, 0] = high
    digits[:, 1] = q.sub_(high, alpha=128)
    return digits, unit + (largest - largest)
