"""Compute the experts' part of a MoE layer in plain torch: the definition of the numbers that every kernel is held to.

The numbers, for one token x and the experts e its ids name (weights dequantized, activations not quantized):

    gate, up = x @ gate[e].T, x @ up[e].T          products and sums in the weights' dtype, float32 or float64
    h        = act(gate) * up                      the same
    h        = h rounded to hidden's dtype         the only rounding in between; none where hidden is 32-bit or wider
    y        = topk_weight * (h @ down[e].T)       products, sums and the router weight in the weights' dtype
    out      = 0 + y[0] + y[1] + ... + y[T - 1]    in the order of T, then one cast to the output's dtype

Scales and zero points are exact parts of the weights: nothing rounds a scaled weight to 16 bits. Kernels sum in other
orders, so they agree with this within float32 rounding (plus one unit of hidden's dtype where a sum lands on the
other side of a rounding boundary), not bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertWeights(NamedTuple):
    """One expert, dequantized: gate (I, H), up (I, H), down (H, I), all float32 or all float64."""

    gate: Tensor
    up: Tensor
    down: Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}


def experts_reference(
    hidden: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    activation: str = "silu",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return (M, H) of out_dtype (None: hidden's): the sum over T, in order, of topk_weight * expert(hidden).

    hidden: (M, H) float. topk_weights: (M, T) float32. topk_ids: (M, T) int32 or int64; an id below 0 or at least E
    contributes nothing, a repeated id counts twice.
    experts: E triples as ExpertWeights; each is asked for once, and only if it has tokens (experts[0] once more, for
    its dtype), so a lazy sequence keeps one expert in memory. On a GPU torch's TF32 must be off, which is its default.
    """
    exact = experts[0][0].dtype if len(experts) else torch.float32
    M, T = topk_ids.shape
    contributions = torch.zeros(M, T, hidden.shape[1], dtype=exact, device=hidden.device)
    for e in range(len(experts)):
        token, slot = torch.nonzero(topk_ids == e, as_tuple=True)
        if token.numel():
            y = expert_reference(hidden[token], ExpertWeights(*experts[e]), activation)
            contributions[token, slot] = y * topk_weights[token, slot].to(exact).unsqueeze(1)
    out = torch.zeros(M, hidden.shape[1], dtype=exact, device=hidden.device)
    for t in range(T):
        out += contributions[:, t]
    return out.to(out_dtype or hidden.dtype)


def expert_reference(hidden: Tensor, weights: ExpertWeights, activation: str = "silu") -> Tensor:
    """Return (n, H) in the weights' dtype: one expert applied to hidden (n, H), router weight not applied."""
    gate, up, down = weights
    x = hidden.to(gate.dtype)
    h = ACTIVATION_FUNCTIONS[activation](x @ gate.T) * (x @ up.T)
    return round_intermediate(h, hidden.dtype) @ down.T


def round_intermediate(h: Tensor, dtype: torch.dtype) -> Tensor:
    """Return h, in its own type, rounded to hidden's dtype if that has 16 bits: what is stored between the products."""
    return h.to(dtype).to(h.dtype) if dtype.itemsize < 4 else h
