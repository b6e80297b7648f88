"""Quantize expert weights on a GPU in one launch, and take their largest magnitude and their error in one each.

A format's `triton_encode()` returns one of the first functions here, or one of its own with the same signature:

    encode(values) -> tile of codes

values is a tile of float32, divided by their scale and clamped to the format's range; the codes are what the format
stores, uint8 or int8, one a value, nibbles in the low four bits. Rounding is to nearest, ties to even. What scales are,
how codes are packed and in which order they lie is the core's.

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
    return ((values + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def encode_int4(values):
    """Return nibbles, 0 to 15 for -8 to 7."""
    return ((values + ROUNDER) - ROUNDER + 8.0).to(tl.uint8)


@triton.jit
def encode_e4m3(values):
    """Return bytes: a sign, four bits of exponent, three of mantissa; on any GPU, not only those that convert to it."""
    bits = values.to(tl.int32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)  # 127 - 7: the biases' difference
    small = (magnitude.to(tl.float32, bitcast=True) * 512.0 + ROUNDER).to(tl.int32, bitcast=True) & 0xF
    return (sign | tl.where(magnitude < 0x3C800000, small, normal)).to(tl.uint8)  # 2**-6, the smallest normal number


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
    peak_ptr,                                         # (B,)        float32 seen as int32, or None; with TENSOR read,
    N, K, R, C,                                       #             else zeros before, written
    low, high,                                        # range of the format
    half_range,                                       # a scale is amax / half_range
    least,                                            # the smallest scale that its type has as a normal number
    ENCODE: tl.constexpr,
    TENSOR: tl.constexpr,                             # one scale, from peak_ptr
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
        if peak_ptr is not None:  # the maximum of integers is the same in any order
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
    q_rows = q_ptr + b * stride_qb + (row.to(tl.int64) * stride_qn)[:, None]
    for k in range(0, end - begin, COLUMNS):
        at = k + column[None, :, :]
        mask = (row < N)[:, None, None] & (at < K)
        values = tl.load(w_rows + at * stride_wk, mask=mask, other=0.0).to(tl.float32)
        values = tl.div_rn(values, divisor + tl.zeros((ROWS, GROUPS, GROUP), tl.float32))
        codes = ENCODE(tl.minimum(tl.maximum(values, low), high))
        codes = _packed(codes, PACK, PLACES, ROWS, COLUMNS)
        out = (begin + k) // PACK + tl.arange(0, COLUMNS // PACK)
        tl.store(q_rows + out[None, :], codes, mask=(row < N)[:, None] & (out < K // PACK)[None, :])


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


@triton.jit
def squared_error_kernel(
    w_ptr, stride_wb, stride_wn, stride_wk,           # (B, N, K)   float
    q_ptr, stride_qb, stride_qn,                      # (B, N, ...)  bytes, one after another along K
    s_ptr, stride_sb, stride_sn, stride_sc,           # (B, R, C)
    sums_ptr,                                         # (B, programs, 2) float64, contiguous, written
    N, K, STEP,                                       # every STEP-th of N rows is looked at
    DECODE: tl.constexpr,
    PLACES: tl.constexpr,                             # values in 16 bits
    IN_WORDS: tl.constexpr,                           # they lie 16 apart
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,                              # columns that share a scale
    E8M0: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Sum (w - decoded)**2 and w**2 over every num_programs-th run of ROWS of these rows."""
    b = tl.program_id(1).to(tl.int64)
    errors, squares = tl.zeros((ROWS, WORDS), tl.float64), tl.zeros((ROWS, WORDS), tl.float64)
    for first in range(tl.program_id(0) * ROWS * STEP, N, tl.num_programs(0) * ROWS * STEP):
        row = (first + tl.arange(0, ROWS) * STEP)[:, None]
        w_rows = w_ptr + b * stride_wb + row.to(tl.int64) * stride_wn
        q_rows = (q_ptr + b * stride_qb + row.to(tl.int64) * stride_qn).to(tl.pointer_type(tl.uint16))
        s_rows = s_ptr + b * stride_sb + (row // SCALE_ROWS).to(tl.int64) * stride_sn
        for start in range(0, K // PLACES, WORDS):
            word = start + tl.arange(0, WORDS)[None, :]
            mask = (row < N) & (word < K // PLACES)
            decoded = DECODE(tl.load(q_rows + word, mask=mask, other=0), tl.bfloat16)
            for place in tl.static_range(PLACES):
                column = word // 16 * (16 * PLACES) + word % 16 + 16 * place if IN_WORDS else word * PLACES + place
                scale = _scale_value(
                    tl.load(s_rows + column // GROUP * stride_sc, mask=mask, other=0), tl.float32, E8M0
                )
                w = tl.load(w_rows + column * stride_wk, mask=mask, other=0.0).to(tl.float32)
                error = tl.where(mask, decoded[place].to(tl.float32) * scale - w, 0.0)
                errors += error.to(tl.float64) * error
                squares += w.to(tl.float64) * w
    sums = sums_ptr + (b * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(sums, tl.sum(tl.sum(errors, 1), 0))
    tl.store(sums + 1, tl.sum(tl.sum(squares, 1), 0))
