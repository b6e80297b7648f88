"""What happens to activations on their way through an expert: they are quantized, and gate and up become one value.

These are the definitions: the reference and the CPU kernel call them, the Triton kernels are held to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplug.moe.layout import LayerSpec
from moeplug.spec import ActivationSpec

if TYPE_CHECKING:
    from moeplug.formats import NumberFormat


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _none(x: Tensor) -> Tensor:
    return x


# The activations of gate alone; "swiglu_clamped" changes up too, see `gated`.
ACTIVATION_FUNCTIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
    "none": _none,
}


def gated(gate: Tensor, up: Tensor, layer: LayerSpec) -> Tensor:
    """Return (n, I) in gate's dtype: act(gate) * up, or what layer.activation makes of both. gate, up: (n, I) float."""
    if layer.activation != "swiglu_clamped":
        return ACTIVATION_FUNCTIONS[layer.activation](gate) * up
    if layer.activation_limit is not None:
        gate = gate.clamp(max=layer.activation_limit)
        up = up.clamp(-layer.activation_limit, layer.activation_limit)
    return gate * torch.sigmoid(layer.activation_alpha * gate) * (up + layer.activation_offset)


def activated(product: Tensor, layer: LayerSpec) -> Tensor:
    """Return (n, I) of the first product as w13's rows lie: (n, 2I), gate's columns first, or (n, I) without a gate."""
    if layer.gated:
        gate, up = product.chunk(2, dim=1)
        return gated(gate, up, layer)
    return ACTIVATION_FUNCTIONS[layer.activation](product)


def quantize_activations(x: Tensor, spec: ActivationSpec, fmt: NumberFormat) -> tuple[Tensor, Tensor]:
    """Return (q, scale): scale is amax(|x|) / max_value of a token, or of a group of its values; 1 where that is 0.

    x: (n, K) float. q: (n, K / values_per_element) of fmt.storage_dtype, encode(x / scale), rounded to nearest even
    and saturated. scale: (n, C) float32, C is 1 for strategy token and K / group_size for group. All in float32.
    """
    n, K = x.shape
    grouped = x.float().view(n, -1, spec.group_size or K)
    # A tensor, not a number: on CUDA torch multiplies by 1 / number, which rounds differently.
    scale = grouped.abs().amax(2) / torch.full((), fmt.max_value, device=x.device)
    scale = torch.where(scale == 0, 1.0, scale)
    scaled = (grouped / scale.unsqueeze(2)).clamp_(-fmt.max_value, fmt.max_value)
    q = torch.empty(n, K // fmt.values_per_element, dtype=fmt.storage_dtype, device=x.device)
    fmt.encode(scaled.view(n, K), q)
    return q, scale


def fake_quantized(x: Tensor, spec: ActivationSpec | None, fmt: NumberFormat | None) -> Tensor:
    """Return x (n, K) as its quantized form decodes, decode(q) * scale, in x's dtype if 32-bit or wider, else float32.

    Without a spec it is x itself.
    """
    if spec is None or fmt is None or not x.numel():
        return x
    q, scale = quantize_activations(x, spec, fmt)
    decoded = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    fmt.decode(q, decoded)
    decoded.view(*scale.shape, -1).mul_(scale.unsqueeze(2))
    return decoded.to(x.dtype) if x.dtype.itemsize > 4 else decoded
