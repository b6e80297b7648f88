"""The device half of the fused MoE kernel: two gathered products and a sum in fixed order.

    gate_up_kernel   intermediate[row] = act(x @ gate.T) * (x @ up.T)      rows: pairs sorted by expert
    down_kernel      partial[pair]     = topk_weight * (h @ down.T)
    sum_kernel       out[token]        = partial[token, 0] + ... + partial[token, T - 1]

No atomics: every element has one writer, so results repeat bit for bit. `fused_moe.py` is the host half.
Scales of K-groups multiply the float32 partial sum of their group, not the weight tile: a scaled weight rounded to 16
bits would add a relative error of 2**-9 per weight, and stored values minus zero points are exact in 16 bits as they
are. The price is BLOCK_M * BLOCK_N multiplications per step of K.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@triton.jit
def decode_identity(tile):
    """Return the tile as it is: stored elements that convert to floats by themselves."""
    return tile


# Which of the two triton.jit made of the functions here; it decides when a function is decorated, not when it runs.
INTERPRETED = not isinstance(decode_identity, JITFunction)


@triton.jit
def _tile_of_program(num_blocks, N: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return (block, column tile) of this program: GROUP_M blocks share each column tile while it is in L2."""
    pid = tl.program_id(0)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(num_blocks - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def _rows_of_block(block, expert, offsets_ptr, blocks_through_ptr, BLOCK_M: tl.constexpr):
    """Return (rows (BLOCK_M,) int64, mask): where this block's pairs lie in the sorted order."""
    first_block = tl.load(blocks_through_ptr + expert - 1, mask=expert > 0, other=0)
    start = tl.load(offsets_ptr + expert) + (block - first_block) * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    # int64: rows * stride passes 2**31 once P * I does (M=131072, T=8, I=2048).
    return rows.to(tl.int64), rows < tl.load(offsets_ptr + expert + 1)


@triton.jit
def _product(
    x_rows, row_mask, stride_xk,           # (BLOCK_M,) pointers to rows of x, their mask
    w_rows, column_mask,                   # (BLOCK_N,) pointers to rows of stored weights, contiguous along K
    scale_rows, stride_sc,                 # (BLOCK_N,) pointers to the rows' scales, or None
    zero_rows, stride_zc,                  # (BLOCK_N,) pointers to the rows' zero points, or None
    K: tl.constexpr,
    GROUP: tl.constexpr,                   # weights along K that share a scale; K for one scale per row
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,               # what tl.dot multiplies
    decode: tl.constexpr,
):  # fmt: skip
    """Return (BLOCK_M, BLOCK_N) float32, x @ w.T with scales and zero points applied."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    STEPS: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K  # per group; a step never leaves its group
    for step in range(STEPS * (K // GROUP)):
        group = step // STEPS
        if GROUP % BLOCK_K == 0:
            k = step * BLOCK_K + offs_k
            x = tl.load(x_rows[:, None] + k[None, :] * stride_xk, mask=row_mask[:, None], other=0.0)
            tile = tl.load(w_rows[None, :] + k[:, None], mask=column_mask[None, :], other=0)
        else:
            in_group = step % STEPS * BLOCK_K + offs_k
            k = group * GROUP + in_group
            k_mask = in_group < GROUP
            x = tl.load(x_rows[:, None] + k[None, :] * stride_xk, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            tile = tl.load(w_rows[None, :] + k[:, None], mask=column_mask[None, :] & k_mask[:, None], other=0)
        w = decode(tile)
        if zero_rows is not None:
            # Beyond a K tail this is -zero_point, not 0; x is 0 there, so the product still is.
            zero_point = tl.load(zero_rows + group * stride_zc, mask=column_mask, other=0)
            w = w.to(tl.float32) - zero_point.to(tl.float32)[None, :]
        w = w.to(DOT_DTYPE)
        if GROUP < K:
            scale = tl.load(scale_rows + group * stride_sc, mask=column_mask, other=0.0).to(tl.float32)
            acc += tl.dot(x.to(DOT_DTYPE), w, input_precision="ieee") * scale[None, :]
        else:
            acc = tl.dot(x.to(DOT_DTYPE), w, acc, input_precision="ieee")
    if GROUP == K and scale_rows is not None:
        acc *= tl.load(scale_rows, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """Return act(x) of a float32 tile; NaN stays NaN."""
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh" or ACTIVATION == "relu")
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u), so no tanh is needed; 1.595... is 2 * sqrt(2 / pi).
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    else:
        y = tl.where(x < 0, 0.0, x)
    return y


@triton.jit(do_not_specialize=["num_blocks"])
def gate_up_kernel(
    x_ptr, stride_xm, stride_xk,                      # (M, H)      hidden's dtype
    w_ptr, stride_we, stride_wn,                      # (E, 2I, H)  stored elements, row 2i gate i, row 2i + 1 up i
    scale_ptr, stride_se, stride_sn, stride_sc,       # (E, 2I, C)  float, or None
    zero_ptr, stride_ze, stride_zn, stride_zc,        # (E, 2I, C)  stored type, or None
    pairs_ptr,                                        # (P,)        int64, pairs sorted by expert
    offsets_ptr,                                      # (E + 1,)    int32, where each expert's pairs begin
    block_expert_ptr,                                 # (num_blocks,) int32, E for a block without work
    blocks_through_ptr,                               # (E,)        int32, blocks of experts 0..e together
    out_ptr, stride_om,                               # (P, I)      hidden's dtype, written in sorted order
    num_blocks,
    E: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    decode: tl.constexpr,
):  # fmt: skip
    """Grid (num_blocks * cdiv(2I, BLOCK_N),): one program a block of pairs of one expert and BLOCK_N / 2 of its I.

    Gate and up of one column are neighbours in the tile, so the activation needs no second launch.
    """
    block, tile_n = _tile_of_program(num_blocks, N, BLOCK_N, GROUP_M)
    expert = tl.load(block_expert_ptr + block)
    if expert >= E:
        return
    rows, row_mask = _rows_of_block(block, expert, offsets_ptr, blocks_through_ptr, BLOCK_M)
    token = tl.load(pairs_ptr + rows, mask=row_mask, other=0) // T
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = offs_n < N
    expert = expert.to(tl.int64)  # expert * stride_we passes 2**31 once E * N * K does (E=256, N=4096, K=7168)
    scale_rows, zero_rows = None, None
    if scale_ptr is not None:
        scale_rows = scale_ptr + expert * stride_se + offs_n * stride_sn
    if zero_ptr is not None:
        zero_rows = zero_ptr + expert * stride_ze + offs_n * stride_zn
    acc = _product(
        x_ptr + token * stride_xm, row_mask, stride_xk,
        w_ptr + expert * stride_we + offs_n.to(tl.int64) * stride_wn, column_mask,
        scale_rows, stride_sc, zero_rows, stride_zc,
        K, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, DOT_DTYPE, decode,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
    h = _activate(gate, ACTIVATION) * up
    offs_i = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    out_ptrs = out_ptr + rows[:, None] * stride_om + offs_i[None, :]
    tl.store(out_ptrs, h.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (offs_i[None, :] < N // 2))


@triton.jit(do_not_specialize=["num_blocks"])
def down_kernel(
    x_ptr, stride_xm,                                 # (P, I)      hidden's dtype, in sorted order
    w_ptr, stride_we, stride_wn,                      # (E, H, I)   stored elements
    scale_ptr, stride_se, stride_sn, stride_sc,       # (E, H, C)   float, or None
    zero_ptr, stride_ze, stride_zn, stride_zc,        # (E, H, C)   stored type, or None
    topk_weight_ptr, stride_tm, stride_tt,            # (M, T)      float32
    pairs_ptr,                                        # (P,)        int64, pairs sorted by expert
    offsets_ptr,                                      # (E + 1,)    int32, where each expert's pairs begin
    block_expert_ptr,                                 # (num_blocks,) int32, E for a block without work
    blocks_through_ptr,                               # (E,)        int32, blocks of experts 0..e together
    out_ptr, stride_om,                               # (P, H)      float32, written where a pair has an expert
    num_blocks,
    E: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    decode: tl.constexpr,
):  # fmt: skip
    """Grid (num_blocks * cdiv(H, BLOCK_N),): one program a block of pairs of one expert and BLOCK_N of H."""
    block, tile_n = _tile_of_program(num_blocks, N, BLOCK_N, GROUP_M)
    expert = tl.load(block_expert_ptr + block)
    if expert >= E:
        return
    rows, row_mask = _rows_of_block(block, expert, offsets_ptr, blocks_through_ptr, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = offs_n < N
    expert = expert.to(tl.int64)  # as in gate_up_kernel
    scale_rows, zero_rows = None, None
    if scale_ptr is not None:
        scale_rows = scale_ptr + expert * stride_se + offs_n * stride_sn
    if zero_ptr is not None:
        zero_rows = zero_ptr + expert * stride_ze + offs_n * stride_zn
    acc = _product(
        x_ptr + rows * stride_xm, row_mask, 1,
        w_ptr + expert * stride_we + offs_n.to(tl.int64) * stride_wn, column_mask,
        scale_rows, stride_sc, zero_rows, stride_zc,
        K, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, DOT_DTYPE, decode,
    )  # fmt: skip
    pair = tl.load(pairs_ptr + rows, mask=row_mask, other=0)
    topk_weight = tl.load(
        topk_weight_ptr + pair // T * stride_tm + pair % T * stride_tt, mask=row_mask, other=0.0
    ).to(tl.float32)  # fmt: skip
    out_ptrs = out_ptr + pair[:, None] * stride_om + offs_n[None, :]
    tl.store(out_ptrs, acc * topk_weight[:, None], mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def sum_kernel(
    partial_ptr, stride_pp,                           # (P, H)      float32, unwritten where an id is out of range
    ids_ptr, stride_im, stride_it,                    # (M, T)      int32 or int64
    out_ptr, stride_om, stride_on,                    # (M, H)      out dtype, written
    E: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (M, cdiv(H, BLOCK_N)): the sum over T in order, of the pairs that have an expert."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for t in range(T):
        expert = tl.load(ids_ptr + token * stride_im + t * stride_it)
        columns = tl.where((expert >= 0) & (expert < E), N, 0)
        acc += tl.load(partial_ptr + (token * T + t) * stride_pp + offs_n, mask=offs_n < columns, other=0.0)
    tl.store(out_ptr + token * stride_om + offs_n * stride_on, acc.to(out_ptr.dtype.element_ty), mask=offs_n < N)
