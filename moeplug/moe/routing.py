"""Sort tokens by expert, and cut every expert's tokens into blocks, without ever asking the device for a number.

A *pair* is one (token, choice): pair p is token p // T and choice p % T, and there are P = M * T of them. All sizes
here follow from M, T, E and BLOCK_M alone, so the work can be captured in a CUDA graph and launched without waiting.
Nothing is cached between calls: a tensor first made while a graph is captured holds nothing until the graph runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Pairs grouped by expert, in ascending expert order; within an expert in ascending pair order.

    pairs: (P,) int64, a permutation of all pairs. Those of expert e are pairs[offsets[e]:offsets[e + 1]]; pairs whose
    id is out of range lie before offsets[0] or after offsets[E].
    offsets: (E + 1,) int32.
    """

    pairs: Tensor
    offsets: Tensor


class BlockTable(NamedTuple):
    """Which expert each block of up to BLOCK_M pairs works for.

    expert: (max_blocks,) int32, ascending; E where there is no such block.
    blocks_through: (E,) int32, blocks of experts 0..e together: expert e's own start at blocks_through[e - 1].
    """

    expert: Tensor
    blocks_through: Tensor


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> Routing:
    """Return the pairs of topk_ids (M, T) int32 or int64, any strides, grouped by expert."""
    # One clamp instead of masks: ids below 0 sort before expert 0 as -1, ids of E and more sort last as E.
    ids = topk_ids.reshape(-1).clamp(-1, num_experts)
    sorted_ids, pairs = torch.sort(ids, stable=True)
    experts = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    return Routing(pairs, torch.searchsorted(sorted_ids, experts, out_int32=True))


def block_table(routing: Routing, BLOCK_M: int) -> BlockTable:
    """Return the table of `max_blocks(P, E, BLOCK_M)` blocks."""
    P, E = routing.pairs.shape[0], routing.offsets.shape[0] - 1
    tokens_per_expert = routing.offsets[1:] - routing.offsets[:-1]
    blocks_through = ((tokens_per_expert + (BLOCK_M - 1)) // BLOCK_M).cumsum(0, dtype=torch.int32)
    blocks = torch.arange(max_blocks(P, E, BLOCK_M), dtype=torch.int32, device=routing.pairs.device)
    return BlockTable(torch.searchsorted(blocks_through, blocks, right=True, out_int32=True), blocks_through)


def max_blocks(P: int, E: int, BLOCK_M: int) -> int:
    """Return the most blocks that P pairs over E experts can need.

    Worst case: as many experts as possible have a token, each spills one pair into a last block of its own.
    """
    experts_with_tokens = min(P, E)
    return experts_with_tokens + (P - experts_with_tokens) // BLOCK_M
