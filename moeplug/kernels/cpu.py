"""Run a layer's experts on a CPU in plain torch, grouped by expert, with weights decoded a few MiB at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplug.kernels.cpu_products import Product, Tokens, working
from moeplug.kernels.operands import Operand, check_call, operand, reason_against_numbers
from moeplug.kernels.select import ExpertsForward, Kernel, KernelRequest
from moeplug.moe.activations import activated, fake_quantized
from moeplug.moe.layout import CONCATENATED, UP_ONLY, Layout
from moeplug.moe.reference import round_intermediate
from moeplug.moe.routing import sort_by_expert

# Bytes of float32 expert outputs kept until the sum over T; longer inputs run in parts. Weights are decoded once a
# part, which a part of 256 tokens and more hides behind its products.
CONTRIBUTION_BYTES: Final = 64 << 20
LEAST_TOKENS_PER_PART: Final = 256
# Experts with few tokens go through the activation together, until they have this many pairs: on small tensors an
# operation costs 2 to 5 us whatever its size.
PAIRS_PER_BATCH: Final = 128
# Pairs that Python sorts; torch's sort, search and copy of offsets cost 30 us, as much as sorting 256 ids.
PAIRS_SORTED_BY_PYTHON: Final = 256


class Run(NamedTuple):
    """The pairs first to end, in sorted order, that expert e works for."""

    e: int
    first: int
    end: int


class CpuKernel(Kernel):
    """Experts on a CPU: any format, any group size.

    Products are float32, or, with 16-bit hidden and large weights of a scale a row, what is as good within the
    reference's tolerance: `moeplug.kernels.cpu_products` has the ways and what they cost.
    """

    name = "cpu-grouped"
    layout = CONCATENATED

    def layout_for(self, request: KernelRequest) -> Layout:
        """Return gate rows before up rows, or up's alone."""
        return CONCATENATED if request.layer.gated else UP_ONLY

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
        self._request = request
        self._E, self._H, self._rows = gate_up.weight.shape[0], down.N, gate_up.N
        self._gate_up, self._down = Product(gate_up, may_round=True), Product(down, may_round=False)

    @torch.no_grad()
    def __call__(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
        check_call(hidden, topk_weights, topk_ids, out, self._H)
        if out is None:
            out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        M, T = topk_ids.shape
        if M * T == 0:
            return out.zero_()
        step = max(LEAST_TOKENS_PER_PART, CONTRIBUTION_BYTES // max(4 * T * self._H, 1))
        for m in range(0, M, step):
            part = slice(m, m + step)
            self._forward(hidden[part], topk_weights[part], topk_ids[part], out[part])
        return out

    def _forward(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor) -> None:
        """Write the experts' part of these tokens: every expert with tokens once, then the sum over T in order."""
        (M, T), request = topk_ids.shape, self._request
        if self._few_pairs(topk_ids):
            out.copy_(self._by_pair(hidden, topk_weights, topk_ids))
            return
        on_input = request.layer.router_weight_on_input
        x = fake_quantized(hidden, request.input_activations, request.activation_format)
        runs, pairs, position = _sorted_by_expert(topk_ids, self._E)
        weights = topk_weights.float()
        every_pair_served = sum(run.end - run.first for run in runs) == M * T
        if not every_pair_served:
            weights = weights.masked_fill((topk_ids < 0) | (topk_ids >= self._E), 0)
        y = (torch.empty if every_pair_served else torch.zeros)(M * T, self._H)
        for batch in _batches(runs):
            of_batch = slice(batch[0].first, batch[-1].end)
            tokens = x if M == 1 else x.index_select(0, pairs[of_batch] // T)
            factors = weights.reshape(-1, 1)[pairs[of_batch]] if on_input else None
            self._experts(batch, tokens, factors, hidden.dtype, y[of_batch])
        out.copy_(_combined(y, position, None if on_input else weights))

    def _few_pairs(self, topk_ids: Tensor) -> bool:
        """Return whether `_by_pair` serves the call: few pairs, small weights, nothing quantized on the way."""
        request, P = self._request, topk_ids.numel()
        if request.input_activations or request.intermediate or request.layer.router_weight_on_input:
            return False
        if not self._gate_up.takes_pairs(P) or not self._down.takes_pairs(P):
            return False
        return all(0 <= e < self._E for e in topk_ids.reshape(-1).tolist())

    def _by_pair(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Return (M, H) float32 without sorting: pairs meet copies of their experts' weights in a batched product.

        Ten operations whatever the number of experts, where one after another costs ten each.
        """
        (M, T), ids = topk_ids.shape, topk_ids.reshape(-1).long()
        x = hidden.float().unsqueeze(1).expand(-1, T, -1).reshape(M * T, -1)
        h = round_intermediate(activated(self._gate_up.of_pairs(x, ids), self._request.layer), hidden.dtype)
        first, *others = (self._down.of_pairs(h, ids).view(M, T, -1) * topk_weights.float().unsqueeze(2)).unbind(1)
        for contribution in others:
            first += contribution
        return first

    def _experts(
        self, batch: list[Run], x: Tensor, weight_of_input: Tensor | None, dtype: torch.dtype, out: Tensor
    ) -> None:
        """Write into out (n, H) float32 what the experts of a batch make of their tokens, router weights not applied.

        x: (n, K), or (1, K) where there is one token. weight_of_input: (n, 1), for the first products. dtype: hidden's.
        """
        request, start = self._request, batch[0].first
        products = working("gate and up", (out.shape[0], self._rows))
        tokens = Tokens(x)
        for e, first, end in batch:
            own = slice(first - start, end - start)
            factor = None if weight_of_input is None else weight_of_input[own]
            self._gate_up(tokens, slice(0, 1) if x.shape[0] == 1 else own, e, products[own], factor)
        h = activated(products, request.layer)
        h = h.to(dtype) if request.intermediate is None else round_intermediate(h, dtype)
        tokens = Tokens(fake_quantized(h, request.intermediate, request.intermediate_format))
        for e, first, end in batch:
            own = slice(first - start, end - start)
            self._down(tokens, own, e, out[own])


def _combined(y: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    """Return (M, H): for each token the sum, in the order of T, of weights (M, T) * y[position]; None: of y[position].

    One pass; a gather and an addition for each of 8 choices took 20 times as long (M=512, H=2048).
    """
    return F.embedding_bag(position, y, mode="sum", per_sample_weights=weights)


def _sorted_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[list[Run], Tensor, Tensor]:
    """Return the runs of pairs by expert, the pairs (P,) int64 in that order, and where each went, (M, T) int64.

    One token's pairs stay as they are: each of its choices is a run.
    """
    M, T = topk_ids.shape
    if M * T > PAIRS_SORTED_BY_PYTHON:
        pairs, offsets = sort_by_expert(topk_ids, num_experts)
        bounds = enumerate(pairwise(offsets.tolist()))
        runs = [Run(e, first, end) for e, (first, end) in bounds if first < end]
        position = torch.empty_like(pairs).index_copy_(0, pairs, torch.arange(M * T))
        return runs, pairs, position.view(M, T)
    ids = topk_ids.reshape(-1).tolist()
    if M == 1:
        pairs = torch.arange(T)
        return [Run(e, p, p + 1) for p, e in enumerate(ids) if 0 <= e < num_experts], pairs, pairs.view(1, T)
    order = sorted(range(M * T), key=ids.__getitem__)
    places, runs = [0] * len(order), []
    for place, pair in enumerate(order):
        e, places[pair] = ids[pair], place
        if runs and runs[-1].e == e:
            runs[-1] = Run(e, runs[-1].first, place + 1)
        elif 0 <= e < num_experts:
            runs.append(Run(e, place, place + 1))
    return runs, torch.tensor(order, dtype=torch.int64), torch.tensor(places, dtype=torch.int64).view(M, T)


def _batches(runs: list[Run]) -> Iterator[list[Run]]:
    """Yield runs that follow on each other together until they have PAIRS_PER_BATCH pairs."""
    batch: list[Run] = []
    for run in runs:
        if batch and (run.first != batch[-1].end or run.end - batch[0].first > PAIRS_PER_BATCH):
            yield batch
            batch = []
        batch.append(run)
    if batch:
        yield batch
