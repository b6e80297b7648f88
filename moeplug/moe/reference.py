"""Compute the experts' part of a MoE layer in plain torch: the definition of the numbers that every kernel is held to.

The numbers, for one token x and the experts e its ids name (weights dequantized):

    x        = quantized(x)                        only where input activations are quantized
    gate, up = x @ gate[e].T, x @ up[e].T          products and sums in the weights' dtype, float32 or float64
    gate, up = gate + its bias, up + its bias      where the expert has biases
    h        = act(gate) * up                      the same; activation swiglu_clamped takes both (`gated`);
                                                   act(up) where the expert has no gate
    h        = h rounded to hidden's dtype         the only rounding in between; none where hidden is 32-bit or wider
    h        = quantized(h)                        only where the intermediate is quantized
    y        = topk_weight * (h @ down[e].T + bias)  products, sums and the router weight in the weights' dtype
    out      = 0 + y[0] + y[1] + ... + y[T - 1]    in the order of T, then one cast to the output's dtype

With router_weight_on_input the products gate and up are multiplied by topk_weight, before biases, and y is not.

quantized(v) is, in float32, for all values of a token (strategy token) or each group_size of them (group):

    scale    = amax(|v|) / max_value, 1 where that is 0
    q        = format.encode(v / scale)            to nearest, ties to even, saturating
    v        = format.decode(q) * scale            rounded to float32

Scales and zero points are exact parts of the weights: nothing rounds a scaled weight to 16 bits. Kernels sum in other
orders, so they agree with this within float32 rounding (plus one unit of hidden's dtype, or one step of the
intermediate's format, where a sum lands on the other side of a rounding boundary), not bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moeplug.moe.activations import ACTIVATION_FUNCTIONS, fake_quantized, gated
from moeplug.moe.layout import LayerSpec

if TYPE_CHECKING:
    from moeplug.kernels.select import KernelRequest


class ExpertWeights(NamedTuple):
    """One expert, dequantized: gate (I, H) or None, up (I, H), down (H, I), all float32 or all float64; biases."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def experts_reference(
    hidden: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: Sequence[tuple[Any, ...]],
    *,
    activation: str = "silu",
    request: KernelRequest | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return (M, H) of out_dtype (None: hidden's): the sum over T, in order, of topk_weight * expert(hidden).

    hidden: (M, H) float. topk_weights: (M, T) float32. topk_ids: (M, T) int32 or int64; an id below 0 or at least E
    contributes nothing, a repeated id counts twice.
    experts: E tuples as ExpertWeights; each is asked for once, and only if it has tokens (experts[0] once more, for
    its dtype), so a lazy sequence keeps one expert in memory. On a GPU torch's TF32 must be off, which is its default.
    request: the layer's activation, where its router weights go and how activations are quantized; None: `activation`
    and nothing else.
    """
    exact = ExpertWeights(*experts[0]).up.dtype if len(experts) else torch.float32
    on_input = request is not None and request.layer.router_weight_on_input
    M, T = topk_ids.shape
    contributions = torch.zeros(M, T, hidden.shape[1], dtype=exact, device=hidden.device)
    for e in range(len(experts)):
        token, slot = torch.nonzero(topk_ids == e, as_tuple=True)
        if token.numel():
            weight = topk_weights[token, slot].to(exact).unsqueeze(1)
            of_input = weight if on_input else None
            y = expert_reference(hidden[token], ExpertWeights(*experts[e]), activation, request, of_input)
            contributions[token, slot] = y if on_input else y * weight
    out = torch.zeros(M, hidden.shape[1], dtype=exact, device=hidden.device)
    for t in range(T):
        out += contributions[:, t]
    return out.to(out_dtype or hidden.dtype)


def expert_reference(
    hidden: Tensor,
    weights: ExpertWeights,
    activation: str = "silu",
    request: KernelRequest | None = None,
    weight_of_input: Tensor | None = None,
) -> Tensor:
    """Return (n, H) in the weights' dtype: one expert applied to hidden (n, H), router weight not applied to it.

    weight_of_input: (n, 1), what the first products are multiplied by.
    """
    exact = weights.up.dtype
    layer = request.layer if request else LayerSpec(0, "", 0, 0, 0, 0, activation)
    x = fake_quantized(hidden, request.input_activations, request.activation_format) if request else hidden
    x = x.to(exact)
    up = _biased(_weighted(x @ weights.up.T, weight_of_input), weights.up_bias)
    if weights.gate is None:
        h = ACTIVATION_FUNCTIONS[layer.activation](up)
    else:
        h = gated(_biased(_weighted(x @ weights.gate.T, weight_of_input), weights.gate_bias), up, layer)
    h = round_intermediate(h, hidden.dtype)
    h = fake_quantized(h, request.intermediate, request.intermediate_format) if request else h
    return _biased(h @ weights.down.T, weights.down_bias)


def _weighted(product: Tensor, weight: Tensor | None) -> Tensor:
    return product if weight is None else product * weight


def _biased(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.to(product.dtype)


def round_intermediate(h: Tensor, dtype: torch.dtype) -> Tensor:
    """Return h, in its own type, rounded to hidden's dtype if that has 16 bits: what is stored between the products."""
    return h.to(dtype).to(h.dtype) if dtype.itemsize < 4 else h
