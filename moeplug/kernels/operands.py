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
from moeplug.quantization import STRATEGIES
from moeplug.spec import WeightSpec

HIDDEN_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Operand:
    """The weights of one product, as a kernel reads them.

    weight: (E, N, K / values_per_element) of the format's storage dtype. scale: (E, N, C) or None; zero_point: the
    same shape or None. Strides are any, except that a weight's rows are contiguous. group_size: K / C.
    """

    format: NumberFormat
    weight: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    N: int
    K: int
    group_size: int


def operand(
    request: KernelRequest, buffer: str, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> Operand:
    """Return buffer "w13" or "w2" with its scales; raise PluginError where a stage left the wrong shapes."""
    layer, first = request.layer, buffer == "w13"
    spec, fmt = (request.gate_up, request.gate_up_format) if first else (request.down, request.down_format)
    N, K = (2 * layer.intermediate_size, layer.hidden_size) if first else layer.weight_shape("down")
    weight = weights[buffer]
    E = weight.shape[0]
    _expect(f"layer {layer.index}: {buffer}", weight, (E, N, K // fmt.values_per_element), fmt.storage_dtype)
    if weight.stride(2) != 1 and weight.shape[2] > 1:
        raise PluginError(f"layer {layer.index}: {buffer}: rows must be contiguous, but strides are {weight.stride()}")
    if not fmt.scaled:
        return Operand(fmt, weight, None, None, N, K, K)
    C = K // spec.group_size if spec and spec.group_size else 1
    scale = _found(request, scales, f"{buffer}_scale")
    _expect(f"layer {layer.index}: {buffer}_scale", scale, (E, N, C))
    zero_point = None
    if spec and not spec.symmetric:
        zero_point = _found(request, scales, f"{buffer}_zero_point")
        _expect(f"layer {layer.index}: {buffer}_zero_point", zero_point, (E, N, C))
    return Operand(fmt, weight, scale, zero_point, N, K, K // C)


def reason_against_numbers(request: KernelRequest) -> str | None:
    """Return why no core kernel serves these numbers, in one line, or None."""
    if request.input_activations or request.intermediate:
        return "only 16-bit and float32 activations, not quantized ones"
    if request.layer.activation not in ACTIVATIONS:
        return f"activation {request.layer.activation!r} is none of {', '.join(ACTIVATIONS)}"
    return _unknown_strategy(request.gate_up) or _unknown_strategy(request.down)


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


def _unknown_strategy(spec: WeightSpec | None) -> str | None:
    return (
        f"strategy {spec.strategy} is none of {', '.join(STRATEGIES)}"
        if spec and spec.strategy not in STRATEGIES
        else None
    )


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
