"""Quantize expert weights on a GPU in one launch, which measures their error and largest magnitude, too.

A format's `triton_encode()` returns one of the first functions here, or one of its own with the same signature:

    encode(values) -> codes, rounded

values is a tile of float32, divided by their scale and clamped to the format's range; codes are what the format stores,
uint8 or int8, one a value, nibbles in the low four bits; rounded is what they decode to, float32. Rounding is to
nearest, ties to even. What scales are, how codes are packed and in which order they lie is the core's.

The numbers are those of `moeplug.quantization` on a CPU, bit for bit. There is no atomic sum: results repeat.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from moeplug.kernels._fused_moe import _scale_value

# Adding 1.5 * 2**23 leaves no bits below 1, so the addition rounds to nearest even; the integer is in the low bits.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def encode_int8(values):
    """Return signed bytes of -128 to 127."""
    rounded = (values + ROUNDER) - ROUNDER
    return rounded.to(tl.int8), rounded


@triton.jit
def encode_int4(values):
    """Return nibbles, 0 to 15 for -8 to 7."""
    rounded = (values + ROUNDER) - ROUNDER
    return (rounded + 8.0).to(tl.uint8), rounded


@triton.jit
def encode_e4m3(values):
    """Return bytes: a sign, four bits of exponent, three of mantissa; on any GPU, not only those that convert to it."""
    bits = values.to(tl.int32, bitcast=True)
    sign, magnitude = bits & -0x80000000, bits & 0x7FFFFFFF
    normal = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    shifted = magnitude.to(tl.float32, bitcast=True) * 512.0 + ROUNDER
    is_small = magnitude < 0x3C800000  # 2**-6, the smallest normal number
    small = ((shifted - ROUNDER) * 0.001953125).to(tl.int32, bitcast=True)  # 2**-9, a subnormal's step
    # 127 - 7: the difference of the biases.
    code = tl.where(is_small, shifted.to(tl.int32, bitcast=True) & 0xF, (normal >> 20) - (120 << 3))
    rounded = (sign | tl.where(is_small, small, normal & -0x100000)).to(tl.float32, bitcast=True)
    return (code | ((sign >> 24) & 0x80)).to(tl.uint8), rounded


@triton.jit
def _largest(w_ptr, offsets, mask):
    """Return the bits of |w|, int32: as integers they order like the numbers, infinity above all, then NaN."""
    values = tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_magnitude_kernel(
    w_ptr, stride_wb, stride_wn, stride_wk,           # (B, N, K)   float
    peak_ptr,                                         # (B,)        float32 seen as int32, zeros before
    N, K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find the largest |w| of each of B weights. The maximum of integers is the same in any order."""
    b, row = tl.program_id(1).to(tl.int64), (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    start = w_ptr + b * stride_wb
    peak = tl.zeros((ROWS, COLUMNS), tl.int32)
    for k in range(0, K, COLUMNS):
        column = k + tl.arange(0, COLUMNS)[None, :]
        offsets = row.to(tl.int64) * stride_wn + column * stride_wk
        peak = tl.maximum(peak, _largest(start, offsets, (row < N) & (column < K)))
    tl.atomic_max(peak_ptr + b, tl.max(tl.max(peak, 1), 0))


@triton.jit
def quantize_weights_kernel(
    w_ptr, stride_wb, stride_wn, stride_wk,           # (B, N, K)   float
    q_ptr, stride_qb, stride_qn,                      # (B, N, K / PACK) bytes, one after another along K, written
    s_ptr, stride_sb, stride_sn, stride_sc,           # (B, R, C)   written; with TENSOR R may be N: the same in each
    peak_ptr,                                         # (B,)        float32 seen as int32; with TENSOR read, else zeros
    sums_ptr, stride_eb,                              # (B, parts, 2) float64: parts of the sums of (w - decoded)**2
    N, K, R, C,                                       #             and w**2, written; looked at with STEP alone
    low, high,                                        # range of the format
    half_range,                                       # a scale is amax / half_range
    least,                                            # the smallest scale that its type has as a normal number
    ENCODE: tl.constexpr,
    TENSOR: tl.constexpr,                             # one scale, from peak_ptr
    STEP: tl.constexpr,                               # rows 0, STEP, 2 * STEP, ... are in the sums; 0: there are none
    PEAKS: tl.constexpr,                              # find the largest magnitudes; without, peak_ptr is not looked at
    SCALE_ROWS: tl.constexpr,                         # rows that share a scale: 1 or ROWS
    GROUPED: tl.constexpr,                            # a scale for each GROUP columns; False: for all of a row
    EXPONENT: tl.constexpr,                           # scales are powers of two: that of the format's largest; or None
    PACK: tl.constexpr,                               # values in a byte
    PLACES: tl.constexpr,                             # values in 16 bits where they lie 16 apart; 0: as they come
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Write the scales of ROWS rows, or of blocks that they are, and the codes of their weights."""
    COLUMNS: tl.constexpr = GROUPS * GROUP
    b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    w_rows = w_ptr + b * stride_wb + (row.to(tl.int64) * stride_wn)[:, None, None]
    column = (group * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    begin, end = tl.program_id(1) * COLUMNS, tl.minimum(K, (tl.program_id(1) + 1) * COLUMNS) if GROUPED else K
    if TENSOR:
        bits = tl.load(peak_ptr + b) + tl.zeros((ROWS, GROUPS), tl.int32)
    else:
        bits = tl.zeros((ROWS, GROUPS), tl.int32)
        for k in range(0, end - begin, COLUMNS):
            at = k + column[None, :, :]
            mask = (row < N)[:, None, None] & (at < K)
            bits = tl.maximum(bits, tl.max(_largest(w_rows, at * stride_wk, mask), 2))
        if PEAKS:  # the maximum of integers is the same in any order
            tl.atomic_max(peak_ptr + b, tl.max(tl.max(bits, 1), 0))
        if SCALE_ROWS > 1:
            bits = tl.max(bits, 0)[None, :] + tl.zeros((ROWS, GROUPS), tl.int32)
    if EXPONENT is not None:
        scale = tl.where(bits == 0, 127, tl.minimum(tl.maximum((bits >> 23) - EXPONENT, 0), 254)).to(tl.uint8)
    else:
        exact = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.zeros((ROWS, GROUPS), tl.float32) + half_range)
        floored = tl.where(exact < least, least, exact)  # NaN stays
        scale = tl.where(exact == 0, 1.0, floored).to(s_ptr.dtype.element_ty)
    first = (row % SCALE_ROWS == 0) & (row // SCALE_ROWS < R)
    offsets = (row // SCALE_ROWS).to(tl.int64)[:, None] * stride_sn + group[None, :] * stride_sc
    tl.store(s_ptr + b * stride_sb + offsets, scale, mask=first[:, None] & (group < C)[None, :])
    divisor = _scale_value(scale, tl.float32, EXPONENT is not None)[:, :, None]
    first_row = tl.program_id(0) * ROWS
    # A program has one part of the sums: for each of its runs of rows, or for each row of theirs that is in the sums.
    part = tl.cdiv(first_row, STEP) if ROWS < STEP else tl.program_id(0)
    has_part = part * STEP < tl.minimum(first_row + ROWS, N) if ROWS < STEP else STEP > 0
    errors, squares = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    q_rows = q_ptr + b * stride_qb + (row.to(tl.int64) * stride_qn)[:, None]
    for k in range(0, end - begin, COLUMNS):
        at = k + column[None, :, :]
        mask = (row < N)[:, None, None] & (at < K)
        weights = tl.load(w_rows + at * stride_wk, mask=mask, other=0.0).to(tl.float32)
        scaled = tl.div_rn(weights, divisor + tl.zeros((ROWS, GROUPS, GROUP), tl.float32))
        codes, rounded = ENCODE(tl.minimum(tl.maximum(scaled, low), high))
        if has_part:
            seen = mask & (row % STEP == 0)[:, None, None]  # a format need not have 0, which fills a tile
            error = tl.where(seen, rounded * divisor - weights, 0.0).to(tl.float64)
            counted = tl.where(seen, weights, 0.0).to(tl.float64)
            errors += tl.sum(tl.sum(error * error, 2), 1)
            squares += tl.sum(tl.sum(counted * counted, 2), 1)
        codes = _packed(codes, PACK, PLACES, ROWS, COLUMNS)
        out = (begin + k) // PACK + tl.arange(0, COLUMNS // PACK)
        tl.store(q_rows + out[None, :], codes, mask=(row < N)[:, None] & (out < K // PACK)[None, :])
    if has_part:
        sums = sums_ptr + b * stride_eb + (part * tl.num_programs(1) + tl.program_id(1)) * 2
        tl.store(sums, tl.sum(errors, 0))
        tl.store(sums + 1, tl.sum(squares, 0))


@triton.jit
def _packed(codes, PACK: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return codes (ROWS, ...) as bytes (ROWS, COLUMNS / PACK), in the order in which a layout has them."""
    if PLACES > 0:
        codes = tl.reshape(codes, (ROWS, COLUMNS // (16 * PLACES), PLACES, 16))
        codes = tl.permute(codes, (0, 1, 3, 2))
    if PACK == 2:
        low, high = tl.split(tl.reshape(codes, (ROWS, COLUMNS // 2, 2)))
        codes = low | (high << 4)
    return tl.reshape(codes, (ROWS, COLUMNS // PACK))
