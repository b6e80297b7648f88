"""The device half of the router: the T best experts of each token and their weights, in one launch.

    route_kernel     topk_weights[token], topk_ids[token] = route(logits[token])

`moeplug/moe/router.py` defines the numbers; `router.py` is the host half. No atomics: a token's results have one writer
and depend on no other token, so they repeat bit for bit.
A choice and where it lies are one int64, `_ranked`, so that the T steps of "take the greatest, strike it out" need one
reduction each and ties need no thought. The chosen experts are written over the first T lanes of the row's own tile,
whose layout never changes, and their logits are read again (from L1), so that all rules share the last lines.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

# Below everything that _ranked returns: -inf has the upper half 0x807FFFFF.
STRUCK_OUT = tl.constexpr(-(2**63))


@triton.jit
def _ranked(x, lane, LANES: tl.constexpr):
    """Return int64 in the order of float32 x, NaN above all; among equals the lower lane is the greater."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    # Negative floats, read as integers, run backwards: flip all but their sign.
    key = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (key.to(tl.int64) << 32) | (LANES - 1 - lane).to(tl.int64)


@triton.jit
def _value(ranked):
    """Return the float32 that _ranked was given; 0x7FFFFFFF is a NaN."""
    key = (ranked >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


INTERPRETED = not isinstance(_value, JITFunction)


@triton.jit
def _expert(lane, N_GROUP: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the expert of a lane: groups begin at multiples of BLOCK_S, their experts follow each other."""
    if N_GROUP == 1 or GROUP_SIZE == BLOCK_S:
        expert = lane  # said outright, so that loads are seen to be contiguous
    else:
        expert = lane // BLOCK_S * GROUP_SIZE + lane % BLOCK_S
    return expert


@triton.jit
def _score(logits, row_max, row_sum, SCORE: tl.constexpr):
    tl.static_assert(SCORE == "softmax" or SCORE == "sigmoid" or SCORE == "softmax_of_chosen")
    if SCORE == "softmax":
        score = tl.exp(logits - row_max) / row_sum
    elif SCORE == "sigmoid":
        score = tl.sigmoid(logits)
    else:
        score = logits
    return score


@triton.jit
def _strike_out_groups(
    ranked,                                # (BLOCK_M, BLOCK_G * BLOCK_S) int64
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2_SUM: tl.constexpr,                # group score: the sum of the two greatest; else the greatest
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Return ranked with all experts struck out whose group is not among the TOPK_GROUP best."""
    grouped = tl.reshape(ranked, (BLOCK_M, BLOCK_G, BLOCK_S))
    best = tl.max(grouped, 2)
    group_score = _value(best)
    if TOP2_SUM:
        group_score += _value(tl.max(tl.where(grouped == best[:, :, None], STRUCK_OUT, grouped), 2))
    group = tl.arange(0, BLOCK_G)[None, :]
    groups = tl.where(group < N_GROUP, _ranked(group_score, group, BLOCK_G), STRUCK_OUT)
    for _ in range(TOPK_GROUP):
        groups = tl.where(groups == tl.max(groups, 1)[:, None], STRUCK_OUT, groups)
    # What is struck out in `groups` was taken, or is padding, whose experts are struck out already.
    kept = (groups == STRUCK_OUT)[:, :, None]
    return tl.reshape(tl.where(kept, grouped, STRUCK_OUT), (BLOCK_M, BLOCK_G * BLOCK_S))


@triton.jit(do_not_specialize=["M"])
def route_kernel(
    logits_ptr, stride_lm, stride_le,      # (M, E)  bfloat16, float16 or float32
    bias_ptr, stride_be,                   # (E,)    float, or None
    weights_ptr,                           # (M, T)  float32, contiguous, written
    ids_ptr,                               # (M, T)  int32, contiguous, written
    M,
    T: tl.constexpr,
    SCORE: tl.constexpr,
    BY_SCORE: tl.constexpr,                # choose by score plus bias; else by logits
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,              # E // N_GROUP
    RENORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    SCALING_FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,                 # N_GROUP and GROUP_SIZE, each rounded up to a power of two
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(M, BLOCK_M),): one program BLOCK_M tokens, each a row of BLOCK_G * BLOCK_S lanes."""
    LANES: tl.constexpr = BLOCK_G * BLOCK_S
    lane = tl.arange(0, LANES)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64: rows * stride_lm passes 2**31
    row_mask = (rows < M)[:, None]
    row_ptrs = logits_ptr + rows[:, None] * stride_lm
    expert = _expert(lane, N_GROUP, GROUP_SIZE, BLOCK_S)
    has_expert = (lane // BLOCK_S < N_GROUP) & (lane % BLOCK_S < GROUP_SIZE)
    mask = row_mask & has_expert[None, :]
    logits = tl.load(row_ptrs + expert[None, :] * stride_le, mask=mask, other=float("-inf")).to(tl.float32)

    row_max, row_sum = 0.0, 1.0
    if SCORE == "softmax":
        row_max = tl.max(logits, 1)[:, None]
        row_sum = tl.sum(tl.exp(logits - row_max), 1)[:, None]
    choice = logits
    if BY_SCORE:
        choice = _score(logits, row_max, row_sum, SCORE)
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + expert * stride_be, mask=has_expert, other=0.0).to(tl.float32)[None, :]
    ranked = tl.where(has_expert[None, :], _ranked(choice, lane[None, :], LANES), STRUCK_OUT)
    if TOPK_GROUP < N_GROUP:
        ranked = _strike_out_groups(ranked, N_GROUP, TOPK_GROUP, TOP2_SUM, BLOCK_M, BLOCK_G, BLOCK_S)

    chosen = tl.zeros((BLOCK_M, LANES), dtype=tl.int32)  # lanes, the t-th best in lane t
    for t in range(T):
        best = tl.max(ranked, 1)[:, None]
        ranked = tl.where(ranked == best, STRUCK_OUT, ranked)
        chosen = tl.where(lane[None, :] == t, LANES - 1 - best.to(tl.int32), chosen)

    ids = _expert(chosen, N_GROUP, GROUP_SIZE, BLOCK_S)
    mask = row_mask & (lane < T)[None, :]
    # Beyond T the score is that of -inf: 0, or NaN where the whole token's is.
    chosen_logits = tl.load(row_ptrs + ids * stride_le, mask=mask, other=float("-inf")).to(tl.float32)
    if SCORE == "softmax_of_chosen":
        weights = tl.exp(chosen_logits - tl.max(chosen_logits, 1)[:, None])
        weights /= tl.sum(weights, 1)[:, None]
    else:
        weights = _score(chosen_logits, row_max, row_sum, SCORE)
    if RENORMALIZE:
        weights /= tl.sum(weights, 1)[:, None] + EPSILON
    out = rows[:, None] * T + lane[None, :]
    tl.store(weights_ptr + out, weights * SCALING_FACTOR, mask=mask)
    tl.store(ids_ptr + out, ids, mask=mask)
