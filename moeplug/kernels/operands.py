"""Check what a kernel is given, at set-up and at each call, and say what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moeplug.errors import PluginError, UsageError
from moeplug.formats import NumberFormat
from moeplug.kernels.select import KernelRequest
from moeplug.moe.layout import ACTIVATIONS
from moeplug.quantization import E4M3, does_not_divide, scale_values
from moeplug.spec import ActivationSpec

HIDDEN_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Operand:
    """The weights of one product, as a kernel reads them.

    weight: (E, N, K / values_per_element) of the format's storage dtype. scale: (E, N, C), for blocks (E, R, C), or
    None; torch.uint8 holds exponents, byte e means 2**(e - 127). zero_point: (E, N, C) or None. global_scale: (E, N)
    float32, which multiplies scale, or None. bias: (E, N) float or None.
    Strides are any, except that a weight's rows are contiguous.
    words: values along K are in the order of `moeplug.moe.layout.in_words`; else in the plain order.
    group_size: weights along K that share a scale, K for one scale a row; the last of a row may be fewer.
    scale_rows: rows that share a row of scales, 1 but for blocks. parts: 2 in w13, whose R rows of scales are gate's,
    then up's, in every layout; 1 in w2 and where there is no gate.
    """

    format: NumberFormat
    weight: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    N: int
    K: int
    group_size: int
    scale_rows: int = 1
    parts: int = 1
    global_scale: Tensor | None = None
    bias: Tensor | None = None
    words: bool = False

    def scales_of(self, e: int, rows: slice) -> Tensor:
        """Return (n, C) float32: what rows of expert e are multiplied by, with gate's rows before up's."""
        assert self.scale is not None
        if self.scale_rows == 1:
            scales = scale_values(self.scale[e, rows])
        else:
            halves = [
                scale_values(part).repeat_interleave(self.scale_rows, 0) for part in self.scale[e].chunk(self.parts)
            ]
            scales = torch.cat([half[: self.N // self.parts] for half in halves])[rows]
        return scales if self.global_scale is None else scales * self.global_scale[e, rows].unsqueeze(1)


def operand(
    request: KernelRequest,
    buffer: str,
    weights: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    words: bool = False,
) -> Operand:
    """Return buffer "w13" or "w2" with its scales; raise PluginError where a stage left the wrong shapes.

    words: the layout's, for this buffer.
    """
    layer, first = request.layer, buffer == "w13"
    spec, fmt = (request.gate_up, request.gate_up_format) if first else (request.down, request.down_format)
    N, K = (layer.w13_rows, layer.hidden_size) if first else layer.weight_shape("down")
    parts = 2 if first and layer.gated else 1
    weight = weights[buffer]
    E = weight.shape[0]
    bias = weights.get(f"{buffer}_bias")
    if bias is not None:
        _expect(f"layer {layer.index}: {buffer}_bias", bias, (E, N))
    _expect(f"layer {layer.index}: {buffer}", weight, (E, N, K // fmt.values_per_element), fmt.storage_dtype)
    if weight.stride(2) != 1 and weight.shape[2] > 1:
        raise PluginError(f"layer {layer.index}: {buffer}: rows must be contiguous, but strides are {weight.stride()}")
    if not fmt.scaled:
        return Operand(fmt, weight, None, None, N, K, K, parts=parts, bias=bias)
    scale_rows, group_size = (spec.scale_rows, spec.columns(K)) if spec else (1, K)
    R, C = parts * -(-(N // parts) // scale_rows), -(-K // group_size)
    scale = _found(request, scales, f"{buffer}_scale")
    _expect(f"layer {layer.index}: {buffer}_scale", scale, (E, R, C))
    zero_point = global_scale = None
    if spec and not spec.symmetric:
        zero_point = _found(request, scales, f"{buffer}_zero_point")
        _expect(f"layer {layer.index}: {buffer}_zero_point", zero_point, (E, N, C))
    if spec and spec.scale_dtype == E4M3:
        global_scale = _found(request, scales, f"{buffer}_global_scale")
        _expect(f"layer {layer.index}: {buffer}_global_scale", global_scale, (E, N), torch.float32)
    return Operand(fmt, weight, scale, zero_point, N, K, group_size, scale_rows, parts, global_scale, bias, words)


def reason_against_numbers(request: KernelRequest) -> str | None:
    """Return why no core kernel serves these numbers, in one line, or None."""
    layer = request.layer
    if layer.activation not in ACTIVATIONS:
        return f"activation {layer.activation!r} is none of {', '.join(ACTIVATIONS)}"
    if not layer.gated and layer.activation == "swiglu_clamped":
        return "activation 'swiglu_clamped' is of gate and up, but the experts have no gate"
    return _reason_against_activations(
        "input_activations", request.input_activations, layer.hidden_size
    ) or _reason_against_activations("intermediate", request.intermediate, layer.intermediate_size)


def check_call(hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None, H: int) -> None:
    """Raise UsageError where a forward's arguments do not fit each other or the layer. Shapes as ExpertsForward has."""
    M = hidden.shape[0]
    if hidden.ndim != 2 or hidden.shape[1] != H or hidden.dtype not in HIDDEN_DTYPES:
        raise UsageError(f"hidden is {_described(hidden)}; expected (M, {H}) of bfloat16, float16 or float32")
    if topk_ids.ndim != 2 or topk_ids.shape[0] != M or topk_ids.dtype not in (torch.int32, torch.int64):
        raise UsageError(f"topk_ids is {_described(topk_ids)}; expected ({M}, T) of int32 or int64")
    if topk_weights.shape != topk_ids.shape or not topk_weights.is_floating_point():
        raise UsageError(f"topk_weights is {_described(topk_weights)}; expected {tuple(topk_ids.shape)} of float32")
    if out is not None and (out.shape != hidden.shape or out.dtype not in (hidden.dtype, torch.float32)):
        raise UsageError(f"out is {_described(out)}; expected {tuple(hidden.shape)} of {hidden.dtype} or float32")


def _reason_against_activations(field: str, spec: ActivationSpec | None, K: int) -> str | None:
    if spec is None:
        return None
    if spec.strategy == "tensor":
        return f"{field}: a scale for all tokens makes a token's result depend on its batch; use strategy: token"
    if spec.group_size and K % spec.group_size:
        return f"{field}: {does_not_divide(K, spec.group_size)} strategy: token"
    return None


def _found(request: KernelRequest, scales: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in scales:
        found = ", ".join(sorted(scales)) or "nothing"
        raise PluginError(f"layer {request.layer.index}: stage create_scales left no {name!r}, only {found}")
    return scales[name]


def _expect(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
        raise PluginError(f"{what} is {_described(tensor)}; expected {shape}" + (f" of {dtype}" if dtype else ""))


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"
