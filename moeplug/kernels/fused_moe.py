"""Run a layer's experts as two Triton products and a sum: what is checked, chosen and launched on the host.

triton is imported when a kernel is bound, so this module can be imported, and asked what it serves, without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from moeplug.formats import NumberFormat
from moeplug.kernels.operands import Operand, check_call, operand, reason_against_numbers
from moeplug.kernels.select import ExpertsForward, Kernel, KernelRequest
from moeplug.kernels.tuning import ElementBytes, choose_blocks
from moeplug.moe.layout import INTERLEAVED
from moeplug.moe.routing import BlockTable, Routing, block_table, sort_by_expert
from moeplug.spec import WeightSpec

LEAST_COMPUTE_CAPABILITY: Final = (8, 0)
FP_FUSION: Final = True  # said outright: Triton 3.9 warns where it is left out, 3.10 changes the default
LEAST_GROUP_SIZE: Final = 16  # the least K of a 16-bit tl.dot
BLOCK_H: Final = 1024  # columns a program of the last sum: 16-byte loads of four warps, twice
REMEMBERED_LAUNCHES: Final = 512  # a server's batch sizes; more would grow without bound over a long run


class TritonKernel(Kernel):
    """Experts on a CUDA device, gate and up rows interleaved, so that one tile of the first product holds both."""

    name = "triton-fused-moe"
    layout = INTERLEAVED

    def reason_against(self, request: KernelRequest) -> str | None:
        """Return None if this kernel serves the request, else why not, in one line."""
        if request.device.type != "cuda":
            return f"needs a CUDA device, not {request.device}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        found = request.device.compute_capability or (0, 0)
        if found < LEAST_COMPUTE_CAPABILITY:
            return f"needs compute capability 8.0, {request.device} has {found[0]}.{found[1]}"
        return (
            reason_against_numbers(request)
            or _reason_against_format(request.gate_up, request.gate_up_format)
            or _reason_against_format(request.down, request.down_format)
        )

    def bind(
        self, request: KernelRequest, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> ExpertsForward:
        """Return the callable over these buffers (shapes as in `moeplug.hookspecs`, stages 1 and 4)."""
        return _TritonExperts(
            request, operand(request, "w13", weights, scales), operand(request, "w2", weights, scales)
        )


class _TritonExperts:
    """The bound kernel: everything that does not depend on the tokens is worked out once."""

    def __init__(self, request: KernelRequest, gate_up: Operand, down: Operand) -> None:
        from moeplug.kernels import _fused_moe

        self._kernels: ModuleType = _fused_moe
        self._activation = request.layer.activation
        self._device = request.device
        self._E = gate_up.weight.shape[0]
        self._gate_up, self._down = gate_up, down
        self._gate_up_arguments = _weight_arguments(gate_up)
        self._down_arguments = _weight_arguments(down)
        self._launches: dict[tuple[int, int, torch.dtype], tuple[dict[str, Any], dict[str, Any]]] = {}

    def __call__(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
        check_call(hidden, topk_weights, topk_ids, out, self._down.N)
        if out is None:
            out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if topk_ids.numel() == 0:  # no token, or no expert per token: a grid of 0 is a sticky CUDA error
            return out.zero_()
        with _current_device(hidden.device):
            self._launch(hidden, topk_weights, topk_ids, out)
        return out

    def _launch(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor) -> None:
        """Sort, multiply, multiply, sum. Every size below follows from the arguments' shapes: no synchronisation."""
        (M, T), (H, I), E = topk_ids.shape, (self._down.N, self._down.K), self._E
        first, second = self._launches_for(M, T, hidden.dtype)
        routing = sort_by_expert(topk_ids, E)
        table = block_table(routing, first["BLOCK_M"])
        intermediate = torch.empty(M * T, I, dtype=hidden.dtype, device=hidden.device)
        # float32: rounding the T terms of a sum to 16 bits would double the error of the final cast.
        partial = torch.empty(M * T, H, dtype=torch.float32, device=hidden.device)

        self._kernels.gate_up_kernel[_grid(table, self._gate_up.N, first)](
            hidden, hidden.stride(0), hidden.stride(1), *self._gate_up_arguments,
            *_routing_arguments(routing, table), intermediate, I, table.expert.shape[0],
            E=E, T=T, ACTIVATION=self._activation, **first,
        )  # fmt: skip
        if second["BLOCK_M"] != first["BLOCK_M"]:
            table = block_table(routing, second["BLOCK_M"])
        self._kernels.down_kernel[_grid(table, H, second)](
            intermediate, I, *self._down_arguments,
            topk_weights, topk_weights.stride(0), topk_weights.stride(1),
            *_routing_arguments(routing, table), partial, H, table.expert.shape[0],
            E=E, T=T, **second,
        )  # fmt: skip
        self._kernels.sum_kernel[(M, -(-H // BLOCK_H))](
            partial, H, topk_ids, topk_ids.stride(0), topk_ids.stride(1), out, out.stride(0), out.stride(1),
            E=E, T=T, N=H, BLOCK_N=BLOCK_H, num_warps=4, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip

    def _launches_for(self, M: int, T: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the keyword arguments of both products' launches, remembered per M, T and dtype."""
        if (M, T, dtype) not in self._launches:
            if len(self._launches) >= REMEMBERED_LAUNCHES:
                self._launches.clear()
            chosen = tuple(self._choose_launch(product, M, T, dtype) for product in (self._gate_up, self._down))
            self._launches[M, T, dtype] = chosen[0], chosen[1]
        return self._launches[M, T, dtype]

    def _choose_launch(self, product: Operand, M: int, T: int, dtype: torch.dtype) -> dict[str, Any]:
        dot = _dot_dtype(product, dtype, self._kernels.INTERPRETED)
        sizes = ElementBytes(product.weight.dtype.itemsize, dtype.itemsize, dot.itemsize)
        group_size = product.group_size if product.group_size < product.K else None
        blocks = choose_blocks(M, self._E, T, product.N, product.K, self._device, sizes, group_size)
        return asdict(blocks) | {
            "enable_fp_fusion": FP_FUSION,
            "N": product.N,
            "K": product.K,
            "GROUP": product.group_size,
            "DOT_DTYPE": getattr(self._kernels.tl, str(dot).removeprefix("torch.")),
            "decode": product.format.triton_decode(),
        }


def _dot_dtype(product: Operand, hidden_dtype: torch.dtype, interpreted: bool) -> torch.dtype:
    """Return what the product multiplies: hidden's dtype where every stored weight converts to it exactly.

    The interpreter's bfloat16 dot is wrong (it multiplies the bits as integers), so there the operands are float32.
    """
    exact = product.format.scaled or product.weight.dtype == hidden_dtype
    if not exact or (interpreted and hidden_dtype == torch.bfloat16):
        return torch.float32
    return hidden_dtype


def _reason_against_format(spec: WeightSpec | None, fmt: NumberFormat) -> str | None:
    if fmt.values_per_element != 1:
        return f"format {fmt.name} packs {fmt.values_per_element} values into one element; only 1 is served"
    if fmt.triton_decode() is None:
        return f"format {fmt.name} has no triton_decode"
    if spec and spec.group_size and spec.group_size < LEAST_GROUP_SIZE:
        return f"group_size={spec.group_size} is below {LEAST_GROUP_SIZE}, the least K of a tensor core product"
    return None


def _weight_arguments(product: Operand) -> tuple[Any, ...]:
    """Return a product's tensors with their strides, in the order of the kernels' parameters."""
    scale, zero_point = product.scale, product.zero_point
    return (
        *(product.weight, product.weight.stride(0), product.weight.stride(1)),
        *((scale, *scale.stride()) if scale is not None else (None, 0, 0, 0)),
        *((zero_point, *zero_point.stride()) if zero_point is not None else (None, 0, 0, 0)),
    )


def _routing_arguments(routing: Routing, table: BlockTable) -> tuple[Tensor, ...]:
    return routing.pairs, routing.offsets, table.expert, table.blocks_through


def _grid(table: BlockTable, N: int, launch: Mapping[str, Any]) -> tuple[int]:
    return (table.expert.shape[0] * -(-N // launch["BLOCK_N"]),)


def _current_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which triton launches on device; free where it is the current one already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
