"""Sort tokens by expert without ever asking the device for a number.

A *pair* is one (token, choice): pair p is token p // T and choice p % T, and there are P = M * T of them. All sizes
here follow from M, T and E alone, so the work can be captured in a CUDA graph and launched without waiting.
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


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> Routing:
    """Return the pairs of topk_ids (M, T) int32 or int64, any strides, grouped by expert."""
    # One clamp instead of masks: ids below 0 sort before expert 0 as -1, ids of E and more sort last as E.
    ids = topk_ids.reshape(-1).clamp(-1, num_experts)
    sorted_ids, pairs = torch.sort(ids, stable=True)
    experts = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    return Routing(pairs, torch.searchsorted(sorted_ids, experts, out_int32=True))
