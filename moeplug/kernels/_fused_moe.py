"""The device half of the fused MoE kernel: prepare, two gathered products, and a sum in fixed order.

    prepare_kernel   pairs grouped by expert, a table of blocks     and, where a scheme says so, hidden quantized
    experts_kernel   h[row] = act(x @ gate.T) * (x @ up.T)          a block of one expert's pairs, BLOCK_N rows of w13
    quantize_kernel  h quantized                                    where a scheme says so and the first could not
    experts_kernel   partial[pair] = topk_weight * (h @ down.T)     the same blocks
    sum_kernel       out[token] = partial[token, 0] + ... + partial[token, T - 1]

With few pairs nothing is sorted: a program reads all ids and finds the pairs of its expert by itself (PAIRS > 0), and
h is kept by pair; otherwise it is kept in sorted order. No atomics: every element has one writer, so results repeat bit
for bit. `fused_moe.py` is the host half.

Every kernel that is launched with PDL (programmatic dependent launch) waits for the one before it, then lets the next
one start: whatever a kernel does before its own wait (read ids and tables that an earlier kernel than the last made,
fetch weights into L2) hides behind the last kernel's tail, and nothing is written before the wait.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from moeplug.kernels.decode import INTERPRETED as INTERPRETED
from moeplug.kernels.decode import SMALL as SMALL

if not INTERPRETED.value:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait until the kernels before this one are done and their writes are seen, then let the next one start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _fetch(ptr, num_bytes):
    """Fetch contiguous bytes into L2, asked for by one thread. ptr: 16-byte aligned; num_bytes: a multiple of 16."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred p;
            .reg .b32 t;
            mov.u32 t, %tid.x;
            setp.eq.u32 p, t, 0;
            @p cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [ptr, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _ids(ids_ptr, stride_im, stride_it, pairs, T, P, E, DENSE: tl.constexpr):
    """Return the experts of pairs, int32, -1 where there is no such pair or the id is out of range."""
    offsets = pairs if DENSE else (pairs // T).to(tl.int64) * stride_im + pairs % T * stride_it
    ids = tl.load(ids_ptr + offsets, mask=pairs < P, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit
def _quantize_rows(
    x_ptr, stride_xm, stride_xk,                      # (rows, K)   float
    q_ptr,                                            # (rows, K)   int8 or fp8, contiguous, written
    scale_ptr,                                        # (rows, C)   float32, contiguous, C = K / GROUP, written
    first, rows, K,
    GROUP: tl.constexpr,                              # values that share a scale; 0: all of a row
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,                            # a power of two, at least K
    MAX_VALUE: tl.constexpr,
):  # fmt: skip
    """Quantize BLOCK_R rows by amax: scale = amax / MAX_VALUE (1 where amax is 0), to nearest, ties to even.

    Values are multiplied by 1 / scale: a division costs ten times as much, and only a value within one unit in the
    last place of a rounding boundary comes out otherwise.
    """
    row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
    offs = tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (offs < K)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_xm + offs[None, :] * stride_xk, mask=mask, other=0.0).to(tl.float32)
    WIDTH: tl.constexpr = GROUP if GROUP > 0 else BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // WIDTH
    x = tl.reshape(x, (BLOCK_R, GROUPS, WIDTH))
    scale = _scale_of(x, MAX_VALUE)
    q = _encode(tl.reshape(x * (1.0 / scale)[:, :, None], (BLOCK_R, BLOCK_K)), q_ptr.dtype.element_ty, MAX_VALUE)
    tl.store(q_ptr + row[:, None] * K + offs[None, :], q, mask=mask)
    group, C = tl.arange(0, GROUPS), tl.cdiv(K, WIDTH) if GROUP > 0 else 1
    tl.store(scale_ptr + row[:, None] * C + group[None, :], scale, mask=(row < rows)[:, None] & (group < C)[None, :])


@triton.jit
def _scale_of(x, MAX_VALUE: tl.constexpr):
    """Return amax / MAX_VALUE along the last of three axes: 1 where amax is 0, NaN where a value is (max drops it)."""
    amax = tl.max(tl.abs(x), 2)
    scale = tl.where(amax == 0, 1.0, amax * (1.0 / MAX_VALUE))
    return tl.where(tl.max((x != x).to(tl.int32), 2) > 0, float("nan"), scale)


@triton.jit
def _encode(x, dtype: tl.constexpr, MAX_VALUE: tl.constexpr):
    """Return float32 x as int8 or fp8, saturated, to nearest, ties to even."""
    x = tl.minimum(tl.maximum(x, -MAX_VALUE), MAX_VALUE)
    if dtype == tl.int8:
        # Adding 1.5 * 2**23 leaves no bits below 1, so the addition rounds to nearest even.
        x = (x + 12582912.0) - 12582912.0
    return x.to(dtype)


@triton.jit(do_not_specialize=["M", "P", "E", "num_blocks"])
def prepare_kernel(
    ids_ptr, stride_im, stride_it,                    # (M, T)      int32 or int64
    pairs_ptr,                                        # (P,)        int32, pairs grouped by expert, written
    table_ptr,                                        # (num_blocks, 4) int32: expert or -1, first row, end; written
    x_ptr, stride_xm, stride_xk,                      # (M, K)      hidden, or None
    q_ptr,                                            # (M, K)      int8 or fp8, written, or None
    q_scale_ptr,                                      # (M, K / X_GROUP) float32, written, or None
    M, T, P, E, num_blocks, K,
    DENSE: tl.constexpr,                              # ids lie one after another
    LANES: tl.constexpr,                              # pairs looked at together
    BLOCK_M: tl.constexpr,
    X_GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (E + cdiv(M, BLOCK_R) where hidden is quantized, else E,): find an expert's pairs, or quantize tokens.

    An expert's pairs are ordered by pair % LANES, then by pair: a fixed order that needs one scan. Pairs out of range
    are nowhere in `pairs`, and the rest of it is not written. Expert e's blocks begin at slot start // BLOCK_M + e,
    which no other expert's reach whatever their sizes, so no program has to know how many blocks the others have.
    """
    _wait(PDL)
    pid = tl.program_id(0)
    if pid < E:
        lanes = tl.arange(0, LANES)
        before, mine = tl.zeros((LANES,), dtype=tl.int32), tl.zeros((LANES,), dtype=tl.int32)
        for p in tl.range(0, P, LANES, loop_unroll_factor=4):
            ids = _ids(ids_ptr, stride_im, stride_it, p + lanes, T, P, E, DENSE)
            before += ((ids >= 0) & (ids < pid)).to(tl.int32)
            mine += (ids == pid).to(tl.int32)
        start, count = tl.sum(before, 0), tl.sum(mine, 0)
        row = start + tl.cumsum(mine, 0) - mine
        for p in tl.range(0, P, LANES, loop_unroll_factor=4):
            hit = _ids(ids_ptr, stride_im, stride_it, p + lanes, T, P, E, DENSE) == pid
            tl.store(pairs_ptr + row, p + lanes, mask=hit)
            row += hit.to(tl.int32)
        slot = start // BLOCK_M + pid
        end_slot = num_blocks if pid == E - 1 else (start + count) // BLOCK_M + pid + 1
        for b in range(slot, end_slot, 128):
            slots = b + tl.arange(0, 128)
            first = start + (slots - slot) * BLOCK_M
            inside = slots < end_slot
            tl.store(table_ptr + slots * 4, tl.where(first < start + count, pid, -1), mask=inside)
            tl.store(table_ptr + slots * 4 + 1, first, mask=inside)
            tl.store(table_ptr + slots * 4 + 2, tl.minimum(first + BLOCK_M, start + count), mask=inside)
    elif q_ptr is not None:
        _quantize_rows(
            x_ptr, stride_xm, stride_xk, q_ptr, q_scale_ptr, (pid - E) * BLOCK_R, M, K, X_GROUP, BLOCK_R, BLOCK_K,
            MAX_VALUE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x_ptr, stride_xm, stride_xk,                      # (rows, K)   float
    q_ptr,                                            # (rows, K)   int8 or fp8, contiguous, written
    scale_ptr,                                        # (rows, K / GROUP) float32, contiguous, written
    rows, K,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(rows, BLOCK_R),): quantize BLOCK_R rows."""
    _wait(PDL)
    first = tl.program_id(0) * BLOCK_R
    _quantize_rows(x_ptr, stride_xm, stride_xk, q_ptr, scale_ptr, first, rows, K, GROUP, BLOCK_R, BLOCK_K, MAX_VALUE)


@triton.jit
def _matching(ids, leader, E, PAIRS: tl.constexpr):
    """Return (expert, count) of the pair `leader`, count 0 unless it is the first pair of its expert."""
    offs = tl.arange(0, PAIRS)
    expert = tl.max(tl.where(offs == leader, ids, -1), 0)
    same = (ids == expert) & (expert >= 0)
    first = tl.min(tl.where(same, offs, PAIRS), 0)
    return expert, tl.where(first == leader, tl.sum(same.to(tl.int32), 0), 0)


@triton.jit
def _pairs_of(ids, expert, base, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr):
    """Return (pairs (BLOCK_M,) int32, mask): the expert's pairs from its base-th on."""
    offs = tl.arange(0, PAIRS)
    same = ids == expert
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    wanted = base + tl.arange(0, BLOCK_M)
    hit = same[None, :] & (rank[None, :] == wanted[:, None])
    return tl.sum(tl.where(hit, offs[None, :], 0), 1), tl.sum(hit.to(tl.int32), 1) > 0


@triton.jit
def _dot(x, w, acc, SWAP: tl.constexpr):
    """Return acc + x @ w.T as (BLOCK_M, BLOCK_N), or transposed if SWAP."""
    if SWAP:
        acc = tl.dot(w, x, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def _drain():
    """Wait until all of Hopper's asynchronous products are done.

    Decoded weights are read from registers while a product runs. Triton 3.6 leaves products running at the end of a
    step, and the next step's loads then write into their registers: seen as errors of 0.2 on an H100 (128 x 128 x 64
    tiles of int8, 4 warps), and as rare NaN elsewhere.
    """
    tl.inline_asm_elementwise(
        "{ wgmma.wait_group.sync.aligned 0; mov.u32 $0, 0; }", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _along_m(v, SWAP: tl.constexpr):
    """Return (BLOCK_M,) values to be broadcast over a tile's columns N."""
    return v[None, :] if SWAP else v[:, None]


@triton.jit
def _along_n(v, SWAP: tl.constexpr):
    """Return (BLOCK_N,) values to be broadcast over a tile's rows M."""
    return v[:, None] if SWAP else v[None, :]


@triton.jit
def _to(values, DTYPE: tl.constexpr):
    """Return decoded values as what is multiplied; integers go through float32 to 8-bit floats."""
    if DTYPE == tl.float8e4nv and values.dtype != tl.float8e4nv:  # noqa: SIM300
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def _spread(scale, WIDTH: tl.constexpr, SWAP: tl.constexpr):
    """Return (BLOCK_N, GROUPS) values, each repeated WIDTH times along K, in the orientation of a weight tile."""
    N: tl.constexpr = scale.shape[0]
    GROUPS: tl.constexpr = scale.shape[1]
    wide = tl.reshape(tl.broadcast_to(scale[:, :, None], (N, GROUPS, WIDTH)), (N, GROUPS * WIDTH))
    return wide if SWAP else tl.trans(wide)


@triton.jit
def _side_by_side(values, PLACES: tl.constexpr, SWAP: tl.constexpr):
    """Return the tile along K that words hold: 16 values of place 0, 16 of place 1, and so on.

    Tensor core operands keep 16 values along K in the same registers, so this only renames registers.
    """
    even = tl.join(_upright(values[0], SWAP), _upright(values[1], SWAP))
    if PLACES == 2:
        w = tl.permute(tl.reshape(even, (even.shape[0], even.shape[1] // 16, 16, 2)), (0, 1, 3, 2))
    else:
        both = tl.join(even, tl.join(_upright(values[2], SWAP), _upright(values[3], SWAP)))
        w = tl.permute(tl.reshape(both, (both.shape[0], both.shape[1] // 16, 16, 2, 2)), (0, 1, 4, 3, 2))
    return _upright(tl.reshape(w, (even.shape[0], even.shape[1] * PLACES)), SWAP)


@triton.jit
def _upright(tile, SWAP: tl.constexpr):
    """Return a weight tile as (BLOCK_N, K), or from that: it is loaded transposed unless SWAP."""
    return tile if SWAP else tl.trans(tile)


@triton.jit
def _scale_value(stored, DTYPE: tl.constexpr, E8M0: tl.constexpr, EXPONENT: tl.constexpr = 0):
    """Return scales as stored in DTYPE: floats, or exponent bytes e that mean 2**(e - 127)."""
    if EXPONENT > 0:  # 2**(e - 127 + EXPONENT): the exponent's place in a bfloat16
        value = ((stored.to(tl.int32) + EXPONENT) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif E8M0:
        value = tl.maximum(stored.to(tl.int32) << 23, 0x400000).to(tl.float32, bitcast=True)  # 2**-127 is subnormal
    else:
        value = stored.to(tl.float32)
    return value.to(DTYPE)


@triton.jit
def _product(
    x_ptr, x_rows, x_mask, stride_xk,                 # base; (BLOCK_M,) int64 offsets of rows; their mask
    xs_rows,                                          # (BLOCK_M,) pointers to rows of activation scales, or None
    w_ptr, w_rows, w_mask,                            # base; (BLOCK_N,) int64 offsets of rows; their mask
    w_desc, w_first,                                  # TMA descriptor (E * N, K'), first row; or None
    s_rows, stride_sc,                                # (BLOCK_N or TILE_SCALES,) pointers to rows of scales, or None
    z_rows, stride_zc,                                # (BLOCK_N,) pointers to the rows' zero points, or None
    k_first, k_end,
    GROUP: tl.constexpr,                              # weights along K that share a scale; 0: one scale a row
    X_GROUP: tl.constexpr,                            # activations along K that share a scale; 0: one a row, or none
    TILE_SCALES: tl.constexpr,                        # scales a tile has along N: 1; 2 for gate and up; 0: one a row
    SCALE_WEIGHTS: tl.constexpr,                      # multiply the weight tile, not the sum, by group scales
    SCALE_DTYPE: tl.constexpr,                        # in which weights are multiplied by scales
    E8M0: tl.constexpr,
    PLACES: tl.constexpr,                             # weights in an element of w; value k + 16 i in place i
    EXPONENT: tl.constexpr,                           # decode returns weights times 2**-EXPONENT: scales correct it
    BYTES: tl.constexpr,                              # elements are bytes to be decoded, not words
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,                               # weights as the left operand
    TMA: tl.constexpr,
    DRAIN: tl.constexpr,                              # wait for asynchronous products at the end of a step
    DOT_DTYPE: tl.constexpr,                          # what tl.dot multiplies
    decode: tl.constexpr,
):  # fmt: skip
    """Return the sum over K in [k_first, k_end) of x @ w.T, group scales and zero points applied, scales of rows not.

    (BLOCK_M, BLOCK_N) float32, or int32 of an int8 product; transposed if SWAP. A step over K lies in one group, or,
    with SCALE_WEIGHTS, holds whole groups.
    """
    # Steps in a group; the last one is masked where GROUP is no multiple of BLOCK_K.
    STEPS: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K if GROUP > 0 and not SCALE_WEIGHTS else 1
    RAGGED: tl.constexpr = GROUP > 0 and not SCALE_WEIGHTS and GROUP % BLOCK_K != 0
    PER_STEP: tl.constexpr = BLOCK_K // GROUP if GROUP > 0 and SCALE_WEIGHTS and GROUP < BLOCK_K else 1
    SCALE_SUM: tl.constexpr = X_GROUP > 0 or (GROUP > 0 and not SCALE_WEIGHTS)
    DOT_ACC: tl.constexpr = tl.int32 if DOT_DTYPE == tl.int8 else tl.float32  # noqa: SIM300
    shape: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N)
    acc = tl.zeros(shape, dtype=tl.float32 if SCALE_SUM else DOT_ACC)
    offs_w = tl.arange(0, BLOCK_K // PLACES)
    offs_k = tl.arange(0, BLOCK_K)
    if SWAP:
        x_ptrs = x_ptr + x_rows[None, :] + offs_k[:, None] * stride_xk
        w_ptrs = w_ptr + w_rows[:, None] + offs_w[None, :]
    else:
        x_ptrs = x_ptr + x_rows[:, None] + offs_k[None, :] * stride_xk
        w_ptrs = w_ptr + w_rows[None, :] + offs_w[:, None]
    if RAGGED:
        steps = tl.cdiv(k_end - k_first, GROUP) * STEPS
    else:
        steps = tl.cdiv(k_end - k_first, BLOCK_K)
    # Scales are loaded a step ahead: they are too small for the asynchronous copies of triton's pipeline.
    if GROUP > 0:
        s_mask = w_mask if TILE_SCALES == 0 else tl.full((TILE_SCALES,), True, tl.int1)
        next_scale = _group_scales(s_rows, stride_sc, s_mask, k_first, k_end, GROUP, PER_STEP)
    if z_rows is not None:
        if GROUP > 0:
            next_zero = _group_scales(z_rows, stride_zc, w_mask, k_first, k_end, GROUP, PER_STEP)
        else:
            next_zero = tl.load(z_rows, mask=w_mask, other=0)
    if X_GROUP > 0:
        next_x_scale = tl.load(xs_rows + k_first // X_GROUP, mask=x_mask, other=0.0)
    for step in range(steps):
        x_ok, w_ok = _along_m(x_mask, SWAP), _along_n(w_mask, SWAP)
        if RAGGED:
            within = step % STEPS * BLOCK_K
            k = k_first + step // STEPS * GROUP + within
            k_next = k_first + (step + 1) // STEPS * GROUP
            inside = (within + offs_k < GROUP) & (k + offs_k < k_end)
        else:
            k = k_first + step * BLOCK_K
            k_next = k + BLOCK_K
            inside = k + offs_k < k_end
        if RAGGED or not EVEN_K:
            x_ok = x_ok & (inside[:, None] if SWAP else inside[None, :])
            words = inside if PLACES == 1 else k // PLACES + offs_w < k_end // PLACES
            w_ok = w_ok & (words[None, :] if SWAP else words[:, None])
        if TMA:
            tile = w_desc.load([w_first, k // PLACES])
            tile = tile if SWAP else tile.T
        else:
            tile = tl.load(w_ptrs + k // PLACES, mask=w_ok, other=0.0)
        k_next = tl.minimum(k_next, k_end - 1)
        if GROUP > 0:
            scale = next_scale
            next_scale = _group_scales(s_rows, stride_sc, s_mask, k_next, k_end, GROUP, PER_STEP)
        if z_rows is not None:
            zero = next_zero.to(DOT_DTYPE)
            zero = _along_n(zero, SWAP) if PER_STEP == 1 else _spread(zero, GROUP, SWAP)
            if GROUP > 0:
                next_zero = _group_scales(z_rows, stride_zc, w_mask, k_next, k_end, GROUP, PER_STEP)
        if SCALE_SUM:
            part = tl.zeros(shape, dtype=DOT_ACC)
        else:
            part = acc
        x = tl.load(x_ptrs + k * stride_xk, mask=x_ok, other=0.0)
        if BYTES:
            w = decode(tile.to(tl.uint8, bitcast=True).to(tl.uint16), DOT_DTYPE)[0]
        elif PLACES > 1:
            w = _side_by_side(decode(tile, DOT_DTYPE), PLACES, SWAP)
        else:
            w = tile
        w = _to(w, DOT_DTYPE)
        if BYTES:  # A select, so that triton's prefetch pass (Ampere, Ada) does not try to slice the decoding.
            w = tl.where(w_ok, w, 0.0)
        if z_rows is not None:
            w = w - zero
        if SCALE_WEIGHTS:
            value = _scale_value(scale, SCALE_DTYPE, E8M0, EXPONENT)
            factor = _along_n(value, SWAP) if PER_STEP == 1 else _spread(value, GROUP, SWAP)
            w = (w.to(SCALE_DTYPE) * factor).to(DOT_DTYPE)
        part = _dot(x.to(DOT_DTYPE), w, part, SWAP)
        if DRAIN:
            _drain()
        if SCALE_SUM:
            term = part.to(tl.float32)
            if X_GROUP > 0:
                x_scale = next_x_scale
                next_x_scale = tl.load(xs_rows + k_next // X_GROUP, mask=x_mask, other=0.0)
            if TILE_SCALES == 0:
                if X_GROUP > 0:
                    term *= _along_m(x_scale, SWAP)
                if GROUP > 0 and not SCALE_WEIGHTS:
                    term *= _along_n(_scale_value(scale, tl.float32, E8M0), SWAP)
                acc += term
            else:  # one multiplication and addition for each number of the tile, not two
                factor = _along_n(_scale_value(scale, tl.float32, E8M0), SWAP)  # (1, TILE_SCALES) or transposed
                if X_GROUP > 0:
                    factor = factor * _along_m(x_scale, SWAP)
                if SWAP:
                    term = tl.reshape(term, (BLOCK_N // TILE_SCALES, TILE_SCALES, BLOCK_M)) * factor[None, :, :]
                else:
                    term = tl.reshape(term, (BLOCK_M, BLOCK_N // TILE_SCALES, TILE_SCALES)) * factor[:, None, :]
                acc += tl.reshape(term, shape)
        else:
            acc = part
    return acc


@triton.jit
def _product_in_halves(
    x_ptr, x_rows, x_mask, stride_xk, xs_rows, w_desc, w_first, s_rows, stride_sc, k_first, k_end,
    GROUP: tl.constexpr, X_GROUP: tl.constexpr, TILE_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return what `_product` does where sums of whole tiles are scaled, half the columns at a time.

    A step's sum needs registers beside the accumulator's: 128 of each spill, 64 and 128 do not. So four warps do
    a 128 x 128 tile, and two programs share a multiprocessor: one multiplies while the other scales.
    """
    acc0 = tl.zeros((BLOCK_M, BLOCK_N // 2), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_N // 2), dtype=tl.float32)
    x_ptrs = x_ptr + x_rows[:, None] + tl.arange(0, BLOCK_K)[None, :] * stride_xk
    next_scale = tl.load(s_rows + k_first // GROUP * stride_sc)
    next_x_scale = tl.load(xs_rows + k_first // X_GROUP, mask=x_mask, other=0.0)
    for k in range(k_first, k_end, BLOCK_K):
        scale, x_scale = next_scale, next_x_scale
        w0, w1 = w_desc.load([w_first, k]), w_desc.load([w_first + BLOCK_N // 2, k])
        x = tl.load(x_ptrs + k * stride_xk, mask=x_mask[:, None], other=0.0)
        k_next = tl.minimum(k + BLOCK_K, k_end - 1)
        next_scale = tl.load(s_rows + k_next // GROUP * stride_sc)
        next_x_scale = tl.load(xs_rows + k_next // X_GROUP, mask=x_mask, other=0.0)
        factor = scale.to(tl.float32)[None, :] * x_scale[:, None]
        acc0 = _plus_scaled(acc0, tl.dot(x, w0.T), factor, TILE_SCALES)
        acc1 = _plus_scaled(acc1, tl.dot(x, w1.T), factor, TILE_SCALES)
    return tl.reshape(tl.permute(tl.join(acc0, acc1), (0, 2, 1)), (BLOCK_M, BLOCK_N))


@triton.constexpr_function
def _in_halves(w_desc, BLOCK_N):
    """Return whether weights are copied half a tile at a time."""
    return w_desc is not None and w_desc.block_shape[0] != BLOCK_N


@triton.jit
def _plus_scaled(acc, part, factor, TILE_SCALES: tl.constexpr):
    """Return acc + part * factor; factor (BLOCK_M, TILE_SCALES) repeats along the columns."""
    term = tl.reshape(part, (part.shape[0], part.shape[1] // TILE_SCALES, TILE_SCALES)) * factor[:, None, :]
    return acc + tl.reshape(term, part.shape)


@triton.jit
def _group_scales(s_rows, stride_sc, w_mask, k, k_end, GROUP: tl.constexpr, PER_STEP: tl.constexpr):
    """Return the stored scales of the step at k: (BLOCK_N,), or (BLOCK_N, PER_STEP) where it holds several groups."""
    if PER_STEP == 1:
        stored = tl.load(s_rows + k // GROUP * stride_sc, mask=w_mask, other=0.0)
    else:
        offs = k // GROUP + tl.arange(0, PER_STEP)
        stored = tl.load(
            s_rows[:, None] + offs[None, :] * stride_sc,
            mask=w_mask[:, None] & (offs * GROUP < k_end)[None, :],
            other=0.0,
        )
    return stored


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr, alpha, limit, offset):
    """Return act(gate) * up of float32 tiles; NaN stays NaN."""
    if ACTIVATION == "silu":
        y = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u), so no tanh is needed; 1.595... is 2 * sqrt(2 / pi).
        y = gate * tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)) * up
    elif ACTIVATION == "relu":
        y = tl.where(gate < 0, 0.0, gate) * up
    elif ACTIVATION == "relu2":
        y = tl.where(gate < 0, 0.0, gate * gate) * up
    elif ACTIVATION == "swiglu_clamped":
        # where, not minimum: a NaN stays.
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        y = gate * tl.sigmoid(alpha * gate) * (up + offset)
    else:
        tl.static_assert(ACTIVATION == "none")
        y = gate * up
    return y


@triton.jit
def _tile_of_program(num_blocks, tiles_n, GROUP_M):
    """Return (block, column tile) of this program: GROUP_M blocks share each column tile while it is in L2."""
    pid = tl.program_id(0)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(num_blocks - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit(do_not_specialize=["P", "num_blocks", "tiles_n", "GROUP_M", "alpha", "limit", "offset"])
def experts_kernel(
    x_ptr, stride_xm, stride_xk,                      # (M, K) hidden, or (P, K) h: float, int8 or fp8
    x_scale_ptr,                                      # (M or P, K / X_GROUP) float32, contiguous, or None
    w_ptr, stride_we, stride_wn,                      # (E, N, K')  stored elements; w13: row 2i gate i, row 2i + 1 up i
    w_desc,                                           # the same as a TMA descriptor (E * N, K'), or None
    scale_ptr, stride_se, stride_sn, stride_sc,       # (E, N, C)   float, or exponent bytes, or None
    zero_ptr, stride_ze, stride_zn, stride_zc,        # (E, N, C)   stored type, or None
    global_ptr,                                       # (E, N)      float32, contiguous, or None
    bias_ptr,                                         # (E, N)      float, contiguous, or None
    topk_weight_ptr, stride_tm, stride_tt,            # (M, T)      float32
    ids_ptr, stride_im, stride_it,                    # (M, T)      int32 or int64; read if PAIRS
    pairs_ptr,                                        # (P,)        int32, pairs sorted by expert; read unless PAIRS
    table_ptr,                                        # (num_blocks, 4) int32: expert, first row, end; unless PAIRS
    out_ptr, stride_om,                               # (P, N / 2) h, ungated (P, N), or (SPLIT_K, P, N) partial
    out_scale_ptr,                                    # (P, N / 2 / OUT_GROUP) float32, or None: h is not quantized here
    alpha, limit, offset,                             # of the activation
    T, P, E, N, K, num_blocks, tiles_n, GROUP_M,
    GATE_UP: tl.constexpr,                            # the first product; else the second
    GATED: tl.constexpr,                              # w13 has rows of gate; else of up alone, N is I and h (P, N)
    ACTIVATION: tl.constexpr,
    ROUTER_WEIGHT: tl.constexpr,                      # this product's result is multiplied by topk_weight
    GROUP: tl.constexpr,                              # weights along K that share a scale; 0: one a row, or none
    SCALE_ROWS: tl.constexpr,                         # rows that share a scale (128 x 128 blocks); 1: each has its own
    X_GROUP: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    E8M0: tl.constexpr,
    PLACES: tl.constexpr,
    EXPONENT: tl.constexpr,
    BYTES: tl.constexpr,
    OUT_GROUP: tl.constexpr,                          # values of h that share a scale; 0: h is stored as it is
    HIDDEN_DTYPE: tl.constexpr,                       # what h is rounded to before it is quantized
    MAX_VALUE: tl.constexpr,
    PAIRS: tl.constexpr,                              # a power of two, at least P; 0: pairs are sorted
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    DRAIN: tl.constexpr,
    HALF: tl.constexpr,                               # blocks of at most BLOCK_M / 2 pairs take half the work
    FETCH: tl.constexpr,                              # fetch the program's weights into L2 while it waits
    PDL: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    decode: tl.constexpr,
):  # fmt: skip
    """Grid (num_blocks * tiles_n, SPLIT_K): one program a block of pairs of one expert and BLOCK_N rows of its weights.

    Gate and up of one column are neighbours in the tile, so the activation needs no second launch.
    """
    if GATE_UP:  # the second product reads nothing before its wait but what was there before the first one started
        _wait(PDL)
    block, tile_n = _tile_of_program(num_blocks, tiles_n, GROUP_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if PAIRS > 0:
        ids = _ids(ids_ptr, stride_im, stride_it, tl.arange(0, PAIRS), T, P, E, False)
        expert, count = _matching(ids, block, E, PAIRS)
        if count == 0:
            return
    else:
        expert = tl.load(table_ptr + block * 4)
        if expert < 0:
            return
        first_row = tl.load(table_ptr + block * 4 + 1)
        count = tl.load(table_ptr + block * 4 + 2) - first_row
    e = expert.to(tl.int64)  # expert * stride_we passes 2**31 once E * N * K does (E=256, N=4096, K=7168)
    if not GATE_UP:
        if FETCH:
            num_bytes = tl.minimum(N - tile_n * BLOCK_N, BLOCK_N) * (K // PLACES)
            num_bytes *= w_ptr.dtype.element_ty.primitive_bitwidth // 8
            _fetch(w_ptr + e * stride_we + (tile_n * BLOCK_N).to(tl.int64) * stride_wn, num_bytes)
        _wait(PDL)
    if PAIRS > 0:
        for base in range(0, count, BLOCK_M):  # once, unless a hostile caller repeats an id
            pair, row_mask = _pairs_of(ids, expert, base, BLOCK_M, PAIRS)
            _block_of_pairs(
                x_ptr, stride_xm, stride_xk, x_scale_ptr, w_ptr, stride_we, stride_wn, w_desc,
                scale_ptr, stride_se, stride_sn, stride_sc, zero_ptr, stride_ze, stride_zn, stride_zc,
                global_ptr, bias_ptr,
                topk_weight_ptr, stride_tm, stride_tt, out_ptr, stride_om, out_scale_ptr, alpha, limit, offset,
                T, P, N, K, e, pairs_ptr, 0, 0, pair, row_mask, offs_n, tile_n,
                GATE_UP, GATED, ACTIVATION, ROUTER_WEIGHT, GROUP, SCALE_ROWS, X_GROUP, SCALE_WEIGHTS, SCALE_DTYPE, E8M0,
                PLACES, EXPONENT, BYTES, OUT_GROUP, HIDDEN_DTYPE, MAX_VALUE, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_K,
                EVEN_K, SWAP, TMA, DRAIN, DOT_DTYPE, decode,
            )  # fmt: skip
    elif HALF and count <= BLOCK_M // 2:  # an expert's last block is half empty half of the time
        _block_of_pairs(
            x_ptr, stride_xm, stride_xk, x_scale_ptr, w_ptr, stride_we, stride_wn, w_desc,
            scale_ptr, stride_se, stride_sn, stride_sc, zero_ptr, stride_ze, stride_zn, stride_zc, global_ptr, bias_ptr,
            topk_weight_ptr, stride_tm, stride_tt, out_ptr, stride_om, out_scale_ptr, alpha, limit, offset,
            T, P, N, K, e, pairs_ptr, first_row, count, None, None, offs_n, tile_n,
            GATE_UP, GATED, ACTIVATION, ROUTER_WEIGHT, GROUP, SCALE_ROWS, X_GROUP, SCALE_WEIGHTS, SCALE_DTYPE,
            E8M0, PLACES, EXPONENT, BYTES, OUT_GROUP, HIDDEN_DTYPE, MAX_VALUE, SPLIT_K, BLOCK_M // 2, BLOCK_N, BLOCK_K,
            EVEN_K, SWAP, TMA, DRAIN, DOT_DTYPE, decode,
        )  # fmt: skip
    else:
        _block_of_pairs(
            x_ptr, stride_xm, stride_xk, x_scale_ptr, w_ptr, stride_we, stride_wn, w_desc,
            scale_ptr, stride_se, stride_sn, stride_sc, zero_ptr, stride_ze, stride_zn, stride_zc, global_ptr, bias_ptr,
            topk_weight_ptr, stride_tm, stride_tt, out_ptr, stride_om, out_scale_ptr, alpha, limit, offset,
            T, P, N, K, e, pairs_ptr, first_row, count, None, None, offs_n, tile_n,
            GATE_UP, GATED, ACTIVATION, ROUTER_WEIGHT, GROUP, SCALE_ROWS, X_GROUP, SCALE_WEIGHTS, SCALE_DTYPE,
            E8M0, PLACES, EXPONENT, BYTES, OUT_GROUP, HIDDEN_DTYPE, MAX_VALUE, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_K,
            EVEN_K, SWAP, TMA, DRAIN, DOT_DTYPE, decode,
        )  # fmt: skip


@triton.jit
def _block_of_pairs(
    x_ptr, stride_xm, stride_xk, x_scale_ptr, w_ptr, stride_we, stride_wn, w_desc,
    scale_ptr, stride_se, stride_sn, stride_sc, zero_ptr, stride_ze, stride_zn, stride_zc, global_ptr, bias_ptr,
    topk_weight_ptr, stride_tm, stride_tt, out_ptr, stride_om, out_scale_ptr, alpha, limit, offset,
    T, P, N, K, e, pairs_ptr, first_row, count, pair, row_mask, offs_n, tile_n,
    GATE_UP: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, ROUTER_WEIGHT: tl.constexpr,
    GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, X_GROUP: tl.constexpr, SCALE_WEIGHTS: tl.constexpr,
    SCALE_DTYPE: tl.constexpr, E8M0: tl.constexpr, PLACES: tl.constexpr, EXPONENT: tl.constexpr,
    BYTES: tl.constexpr, OUT_GROUP: tl.constexpr,
    HIDDEN_DTYPE: tl.constexpr, MAX_VALUE: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    DRAIN: tl.constexpr, DOT_DTYPE: tl.constexpr, decode: tl.constexpr,
):  # fmt: skip
    """Multiply, finish and store one tile. Parameters as in experts_kernel; pair (BLOCK_M,): None where sorted."""
    column_mask = offs_n < N
    if pair is None:
        row, row_mask = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_M) < count
        pair = tl.load(pairs_ptr + row, mask=row_mask, other=0)
    else:
        row = pair
    token = pair // T
    x_row = (token if GATE_UP else row).to(tl.int64)
    s_rows, z_rows, xs_rows = None, None, None
    PARTS: tl.constexpr = 2 if GATE_UP and GATED else 1
    COLUMNS: tl.constexpr = BLOCK_N // PARTS  # of gate, of up, or of down
    WHOLE: tl.constexpr = SCALE_ROWS > 1 and SCALE_ROWS % COLUMNS == 0 and not SCALE_WEIGHTS
    TILE_SCALES: tl.constexpr = PARTS if WHOLE else 0
    if scale_ptr is not None and GROUP > 0:
        scale_n = offs_n if TILE_SCALES == 0 else tile_n * BLOCK_N + tl.arange(0, TILE_SCALES)
        s_rows = scale_ptr + e * stride_se + _scale_row(scale_n, N, PARTS, SCALE_ROWS) * stride_sn
    if zero_ptr is not None:
        z_rows = zero_ptr + e * stride_ze + offs_n * stride_zn
    if X_GROUP > 0:
        xs_rows = x_scale_ptr + x_row * tl.cdiv(K, X_GROUP)
    split = tl.program_id(1)
    # The host splits K at whole steps. Said outright, because copies of nibbles are 8 bytes wide where it is not known.
    k_first = 0 if SPLIT_K == 1 else tl.multiple_of(split * (K // SPLIT_K), BLOCK_K)
    w_first, k_end = (e * N).to(tl.int32) + tile_n * BLOCK_N, k_first + K // SPLIT_K
    if _in_halves(w_desc, BLOCK_N):
        acc = _product_in_halves(
            x_ptr, x_row * stride_xm, row_mask, stride_xk, xs_rows, w_desc, w_first, s_rows, stride_sc, k_first, k_end,
            GROUP, X_GROUP, TILE_SCALES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        acc = _product(
            x_ptr, x_row * stride_xm, row_mask, stride_xk, xs_rows,
            w_ptr + e * stride_we, offs_n.to(tl.int64) * stride_wn, column_mask,
            w_desc, w_first, s_rows, stride_sc, z_rows, stride_zc, k_first, k_end,
            GROUP, X_GROUP, TILE_SCALES, SCALE_WEIGHTS, SCALE_DTYPE, E8M0, PLACES, EXPONENT, BYTES, BLOCK_M, BLOCK_N,
            BLOCK_K, EVEN_K, SWAP, TMA, DRAIN, DOT_DTYPE, decode,
        ).to(tl.float32)  # fmt: skip
    if scale_ptr is not None and GROUP == 0:
        scale = tl.load(scale_ptr + e * stride_se + offs_n * stride_sn, mask=column_mask, other=0.0)
        acc *= _along_n(_scale_value(scale, tl.float32, E8M0), SWAP)
    if global_ptr is not None:
        acc *= _along_n(tl.load(global_ptr + e * N + offs_n, mask=column_mask, other=0.0), SWAP)
    if x_scale_ptr is not None and X_GROUP == 0:
        acc *= _along_m(tl.load(x_scale_ptr + x_row, mask=row_mask, other=0.0), SWAP)
    if ROUTER_WEIGHT:
        weight_ptrs = topk_weight_ptr + token.to(tl.int64) * stride_tm + pair % T * stride_tt
        topk_weight = tl.load(weight_ptrs, mask=row_mask, other=0.0).to(tl.float32)
    if ROUTER_WEIGHT and GATE_UP:
        acc *= _along_m(topk_weight, SWAP)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + e * N + offs_n, mask=column_mask, other=0.0).to(tl.float32)
        acc += _along_n(tl.where(split == 0, bias, 0.0), SWAP)
    if GATE_UP:
        if not GATED:
            gate, up = acc, 1.0
        elif SWAP:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (COLUMNS, 2, BLOCK_M)), (0, 2, 1)))
        else:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, COLUMNS, 2)))
        h = _activate(gate, up, ACTIVATION, alpha, limit, offset)
        out_row, width = row.to(tl.int64), N // PARTS
        offs_o = tile_n * COLUMNS + tl.arange(0, COLUMNS)
        if OUT_GROUP > 0:
            tl.static_assert(not SWAP)
            GROUPS: tl.constexpr = COLUMNS // OUT_GROUP
            h = tl.reshape(h.to(HIDDEN_DTYPE).to(tl.float32), (BLOCK_M, GROUPS, OUT_GROUP))
            h_scale = _scale_of(h, MAX_VALUE)
            h = tl.reshape(h * (1.0 / h_scale)[:, :, None], (BLOCK_M, COLUMNS))
            h = _encode(h, out_ptr.dtype.element_ty, MAX_VALUE)
            groups = tile_n * GROUPS + tl.arange(0, GROUPS)
            scale_ptrs = out_scale_ptr + out_row[:, None] * tl.cdiv(width, OUT_GROUP) + groups[None, :]
            tl.store(scale_ptrs, h_scale, mask=row_mask[:, None] & (groups * OUT_GROUP < width)[None, :])
    else:
        h = acc
        if ROUTER_WEIGHT:
            h *= _along_m(topk_weight, SWAP)
        out_row, width, offs_o = pair.to(tl.int64) + split.to(tl.int64) * P, N, offs_n
    out_ptrs = out_ptr + _along_m(out_row, SWAP) * stride_om + _along_n(offs_o, SWAP)
    tl.store(out_ptrs, h.to(out_ptr.dtype.element_ty), mask=_along_m(row_mask, SWAP) & _along_n(offs_o < width, SWAP))


@triton.jit
def _scale_row(offs_n, N, PARTS: tl.constexpr, SCALE_ROWS: tl.constexpr):
    """Return which row of scales a row of weights uses: its own, or its block's (those of gate before those of up)."""
    if SCALE_ROWS == 1:
        row = offs_n
    elif PARTS == 2:
        row = offs_n % 2 * tl.cdiv(N // 2, SCALE_ROWS) + offs_n // 2 // SCALE_ROWS
    else:
        row = offs_n // SCALE_ROWS
    return row


@triton.jit(do_not_specialize=["P"])
def sum_kernel(
    partial_ptr,                                      # (SPLIT_K, P, N) float, unwritten where an id is out of range
    ids_ptr, stride_im, stride_it,                    # (M, T)      int32 or int64
    out_ptr, stride_om, stride_on,                    # (M, N)      out dtype, written
    P, E, N,
    T: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (M, cdiv(N, BLOCK_N)): the sum over T in order, of the pairs that have an expert."""
    _wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for t in tl.static_range(T):
        expert = tl.load(ids_ptr + token * stride_im + t * stride_it)
        for split in tl.static_range(SPLIT_K):
            row = token * T + t + split * P.to(tl.int64)
            # Loaded whatever the id says, so that nothing waits for ids; unwritten memory is not used.
            part = tl.load(partial_ptr + row * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
            acc += tl.where((expert >= 0) & (expert < E), part, 0.0)
    tl.store(out_ptr + token * stride_om + offs_n * stride_on, acc.to(out_ptr.dtype.element_ty), mask=offs_n < N)
