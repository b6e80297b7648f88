"""Run a layer's experts on a CPU in plain torch, grouped by expert, with weights decoded a few MiB at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from moeplug.kernels.operands import Operand, check_call, operand, reason_against_numbers
from moeplug.kernels.select import ExpertsForward, Kernel, KernelRequest
from moeplug.moe.layout import CONCATENATED
from moeplug.moe.reference import ACTIVATION_FUNCTIONS, round_intermediate
from moeplug.moe.routing import sort_by_expert
from moeplug.scratch import scratch

# Weights decoded at once. M=1, (1536, 2048) stored bytes: 2**20 elements 0.42 ms, 2**16 2.0 ms (a launch per chunk),
# 2**22 0.60 ms (out of L2 before it is read).
CHUNK_ELEMENTS: Final = 1 << 20
# Bytes of float32 expert outputs kept until the sum over T; longer inputs run in parts. Weights are decoded once a
# part, which a part of 256 tokens and more hides behind its products.
CONTRIBUTION_BYTES: Final = 64 << 20
LEAST_TOKENS_PER_PART: Final = 256


class CpuKernel(Kernel):
    """Experts on a CPU: any format, any group size. Products in float32, whatever hidden's dtype.

    A bfloat16 product is 2 to 3 times as fast where the CPU has AVX-512 BF16, but torch rounds its result to bfloat16,
    which the reference does not.
    """

    name = "cpu-grouped"
    layout = CONCATENATED

    def reason_against(self, request: KernelRequest) -> str | None:
        """Return None if this kernel serves the request, else why not, in one line."""
        if request.device.type != "cpu":
            return f"runs on a CPU, not on {request.device}"
        return reason_against_numbers(request)

    def bind(
        self, request: KernelRequest, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> ExpertsForward:
        """Return the callable over these buffers (shapes as in `moeplug.hookspecs`, stages 1 and 4)."""
        return _CpuExperts(request, operand(request, "w13", weights, scales), operand(request, "w2", weights, scales))


class _CpuExperts:
    """The bound kernel."""

    def __init__(self, request: KernelRequest, gate_up: Operand, down: Operand) -> None:
        self._activate = ACTIVATION_FUNCTIONS[request.layer.activation]
        self._gate_up, self._down = gate_up, down
        self._E = gate_up.weight.shape[0]

    @torch.no_grad()
    def __call__(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
        check_call(hidden, topk_weights, topk_ids, out, self._down.N)
        if out is None:
            out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        M, T = topk_ids.shape
        step = max(LEAST_TOKENS_PER_PART, CONTRIBUTION_BYTES // max(4 * T * self._down.N, 1))
        for m in range(0, M, step):
            part = slice(m, m + step)
            self._forward(hidden[part], topk_weights[part], topk_ids[part], out[part])
        return out

    def _forward(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor) -> None:
        """Write the experts' part of these tokens: every expert with tokens once, then the sum over T in order."""
        (M, T), H = topk_ids.shape, self._down.N
        x, weight_of_pair = hidden.float(), topk_weights.float().reshape(-1, 1)
        contributions = torch.zeros(M * T, H)
        pairs, offsets = sort_by_expert(topk_ids, self._E)
        bounds = offsets.tolist()
        for e, (first, end) in enumerate(pairwise(bounds)):
            if first < end:
                of_expert = pairs[first:end]
                y = self._expert(e, x if M == 1 else x[of_expert // T], hidden.dtype)
                contributions[of_expert] = y * weight_of_pair[of_expert]
        total = torch.zeros(M, H)
        for t in range(T):
            total += contributions.view(M, T, H)[:, t]
        out.copy_(total)

    def _expert(self, e: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (n, H) float32: expert e applied to x (n, H) float32, the intermediate rounded as dtype says."""
        gate, up = _product(x, self._gate_up, e).chunk(2, dim=1)
        return _product(round_intermediate(self._activate(gate).mul_(up), dtype), self._down, e)


def _product(x: Tensor, weights: Operand, e: int) -> Tensor:
    """Return (n, N) float32: x (n, K) float32 times expert e's weights, scales and zero points applied."""
    out = torch.empty(x.shape[0], weights.N)
    for rows in _row_chunks(weights):
        torch.mm(x, _decoded(weights, e, rows).T, out=out[:, rows])
    if weights.scale is not None and weights.group_size == weights.K:
        out *= weights.scale[e, :, 0]  # one multiplication per output instead of one per weight
    return out


def _row_chunks(weights: Operand) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(weights.K, 1))
    return (slice(n, min(n + step, weights.N)) for n in range(0, weights.N, step))


def _decoded(weights: Operand, e: int, rows: slice) -> Tensor:
    """Return (n, K) float32 scratch of some rows of expert e: zero points off, scales of groups along K applied."""
    stored = weights.weight[e, rows]
    w = scratch("decoded", (stored.shape[0], weights.K), stored.device)
    weights.format.decode(stored, w)
    grouped = w.view(w.shape[0], -1, weights.group_size)
    if weights.zero_point is not None:
        grouped -= weights.zero_point[e, rows].float().unsqueeze(-1)
    if weights.scale is not None and weights.group_size < weights.K:
        grouped *= weights.scale[e, rows].float().unsqueeze(-1)
    return w
