"""Run a layer's experts as two Triton products and a sum: what is checked, chosen and launched on the host.

triton is imported when a kernel is bound, so this module can be imported, and asked what it serves, without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from moeplug.formats import NumberFormat
from moeplug.kernels.launch import Launch, Ref, Workspace, current_device, hooked
from moeplug.kernels.operands import Operand, check_call, operand, reason_against_numbers
from moeplug.kernels.select import Device, ExpertsForward, Kernel, KernelRequest
from moeplug.kernels.tuning import Blocks, Numbers, Schedule, choose_schedule, power_of_two_above
from moeplug.moe.layout import INTERLEAVED, WORDS, Layout, interleaved
from moeplug.quantization import E4M3
from moeplug.spec import ActivationSpec, WeightSpec

INPUTS: Final = ("hidden", "topk_weights", "topk_ids", "out")  # of a call, in the order of its signature
LEAST_COMPUTE_CAPABILITY: Final = (8, 0)
HOPPER: Final = (9, 0)  # and later: programmatic dependent launch, bulk copies into L2
LEAST_FP8: Final = (8, 9)
LEAST_GROUP_SIZE: Final = 16  # the least K of a 16-bit tl.dot
LEAST_ACTIVATION_GROUP: Final = 32  # the least K of an 8-bit tl.dot
SMALL_GROUPS: Final = (16, 32)  # powers of two, so that a run of 32 or 64 weights is whole groups
ELEMENTS_QUANTIZED: Final = 4096  # by a program of eight warps: 16 a thread
FETCHED_BYTES: Final = 16 << 20  # weights fetched ahead of a product: more of them push each other out of L2 (50 MB)
LARGEST_SMALL_SCALE: Final = 254 - 126  # e8m0: 2**1, which times 2**126 is the largest power of two of a bfloat16
MOST_LANES: Final = 4096  # pairs that a program of prepare_kernel looks at together
LARGE_PARTIAL_BYTES: Final = 32 << 20  # float32 partials beyond this leave L2 (50 MB); they are kept in 16 bits
REMEMBERED_CALLS: Final = 512  # a server's batch sizes; more would grow without bound over a long run


class TritonKernel(Kernel):
    """Experts on a CUDA device, gate and up rows interleaved, so that one tile of the first product holds both.

    Weights that are decoded lie in words of 16 bits where K and the groups allow it (`_in_words`).
    """

    name = "triton-fused-moe"
    layout = INTERLEAVED

    def layout_for(self, request: KernelRequest) -> Layout:
        """Return interleaved rows, with words in either buffer whose weights are decoded."""
        H, I = request.layer.hidden_size, request.layer.intermediate_size
        return interleaved(
            _in_words(request.gate_up, request.gate_up_format, request.activation_format, H),
            _in_words(request.down, request.down_format, request.intermediate_format, I),
            request.layer.gated,
        )

    def reason_against(self, request: KernelRequest) -> str | None:
        """Return None if this kernel serves the request, else why not, in one line."""
        if request.device.type != "cuda":
            return f"needs a CUDA device, not {request.device}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        if (request.device.compute_capability or (0, 0)) < LEAST_COMPUTE_CAPABILITY:
            return f"needs compute capability 8.0, {request.device} has {_capability(request.device)}"
        layer = request.layer
        return (
            reason_against_numbers(request)
            or _reason_against_format(request.gate_up, request.gate_up_format, layer.hidden_size, request.device)
            or _reason_against_format(request.down, request.down_format, layer.intermediate_size, request.device)
            or _reason_against_activations(request.input_activations, request.activation_format, request.gate_up,
                                           request.gate_up_format, layer.hidden_size, request.device)
            or _reason_against_activations(request.intermediate, request.intermediate_format, request.down,
                                           request.down_format, layer.intermediate_size, request.device)
        )  # fmt: skip

    def bind(
        self, request: KernelRequest, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> ExpertsForward:
        """Return the callable over these buffers (shapes as in `moeplug.hookspecs`, stages 1 and 4)."""
        layout = self.layout_for(request)
        return TritonExperts(
            request,
            operand(request, "w13", weights, scales, layout.w13_words),
            operand(request, "w2", weights, scales, layout.w2_words),
        )


class TritonExperts:
    """The bound kernel: everything that does not depend on the tokens is worked out once, per number of tokens."""

    def __init__(
        self, request: KernelRequest, gate_up: Operand, down: Operand, schedule: Schedule | None = None
    ) -> None:
        """Bind to buffers. schedule: for every call; None: `choose_schedule` says."""
        from moeplug.kernels import _fused_moe

        self._kernels: ModuleType = _fused_moe
        self._request = request
        self._operands = gate_up, down
        self._E = gate_up.weight.shape[0]
        self._schedule = schedule
        self._small_scales = tuple(_has_small_scales(operand) for operand in self._operands)
        self._interpreted = bool(_fused_moe.INTERPRETED.value)
        # What Hopper has: launches that overlap, and bulk fetches into L2.
        self._hopper = not self._interpreted and (request.device.compute_capability or (0, 0)) >= HOPPER
        self._calls: dict[tuple[Any, ...], _Call] = {}

    def __call__(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        key = _signature(hidden, topk_weights, topk_ids, out)
        call = self._calls.get(key)
        if call is None:
            check_call(hidden, topk_weights, topk_ids, out, self._operands[1].N)
            if topk_ids.numel() == 0:  # no token, or no expert per token: a grid of 0 is a sticky CUDA error
                return out.zero_()
            call = self._remember(key, _Call(self, hidden, topk_weights, topk_ids, out))
        with current_device(hidden.device):
            call(hidden, topk_weights, topk_ids, out)
        return out

    def with_schedule(self, schedule: Schedule) -> TritonExperts:
        """Return the same experts, every call of which takes this schedule."""
        return TritonExperts(self._request, *self._operands, schedule=schedule)

    def _remember(self, key: tuple[Any, ...], call: _Call) -> _Call:
        if len(self._calls) >= REMEMBERED_CALLS:
            self._calls.clear()
        self._calls[key] = call
        return call


class _Call:
    """All launches of calls with one signature: shapes, dtypes, strides and alignments."""

    def __init__(self, experts: TritonExperts, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor):
        self._workspace = Workspace(INPUTS)
        self._launches = _Planner(experts, self._workspace, hidden, topk_weights, topk_ids, out).launches()
        self._direct = False

    def __call__(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor) -> None:
        memory = torch.empty(self._workspace.nbytes, dtype=torch.uint8, device=hidden.device)
        if self._direct and not hooked():
            inputs = (hidden.data_ptr(), topk_weights.data_ptr(), topk_ids.data_ptr(), out.data_ptr())
            addresses = self._workspace.addresses(inputs, memory.data_ptr())
            stream = torch._C._cuda_getCurrentRawStream(hidden.device.index)
            for launch in self._launches:
                launch.again(addresses, stream)
            return
        tensors = self._workspace.tensors((hidden, topk_weights, topk_ids, out), memory)
        for launch in self._launches:
            launch.first(tensors)
        self._direct = all(launch.direct for launch in self._launches)


class _Planner:
    """Turn a call's shapes into its launches."""

    def __init__(
        self,
        experts: TritonExperts,
        workspace: Workspace,
        hidden: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        out: Tensor,
    ) -> None:
        self._x = experts
        self._request, self._kernels = experts._request, experts._kernels
        self._workspace = workspace
        self._hidden, self._topk_weights, self._topk_ids, self._out = hidden, topk_weights, topk_ids, out
        self.M, self.T = topk_ids.shape
        self.P, self.E = self.M * self.T, experts._E
        self.H, self.I = experts._operands[1].N, experts._operands[1].K
        self._dots = [
            _dot_dtype(operand, fmt, hidden.dtype, experts._interpreted)
            for operand, fmt in zip(experts._operands, self._activation_formats(), strict=True)
        ]
        self.schedule = experts._schedule or choose_schedule(
            self.M, self.T, self.E, self.H, self.I, self._numbers(0), self._numbers(1), self._request.device
        )
        slots = self.P // self.schedule.first.BLOCK_M + self.E  # as prepare_kernel numbers them
        self._num_blocks = self.P if self.schedule.pairs else slots

    def launches(self) -> list[Launch]:
        """Return the launches in order, with their workspace reserved."""
        x, launches = self._ref("hidden"), self._prepare()
        x_scale, h_scale, strides = None, None, (self._hidden.stride(0), self._hidden.stride(1))
        if self._request.input_activations:
            x, x_scale, strides = self._ref("x_quantized"), self._ref("x_scale"), (self.H, 1)
        spec, fmt = self._request.intermediate, self._request.intermediate_format
        if self._first_quantizes(spec):
            h, h_scale = self._quantized("h", self.P, self.I, spec, fmt)
            launches.append(self._product(0, x, strides, x_scale, h, self.I, h_scale))
        else:
            h = self._workspace.add("h", (self.P, self.I), self._hidden.dtype)
            launches.append(self._product(0, x, strides, x_scale, h, self.I))
            if spec:
                launches.append(self._quantize("h", h, (self.I, 1), (self.P, self.I), spec, fmt))
                h, h_scale = self._ref("h_quantized"), self._ref("h_scale")
        second = self.schedule.second
        large = self.P * self.H * 4 * second.SPLIT_K > LARGE_PARTIAL_BYTES
        dtype = self._hidden.dtype if large else torch.float32
        partial = self._workspace.add("partial", (second.SPLIT_K * self.P, self.H), dtype)
        launches.append(self._product(1, h, (self.I, 1), h_scale, partial, self.H))
        launches.append(self._sum(partial))
        return launches

    def _first_quantizes(self, spec: ActivationSpec | None) -> bool:
        """Return whether tiles of the first product hold whole groups of h, which it can then quantize itself."""
        blocks, group = self.schedule.first, (spec.group_size or 0) if spec else 0
        columns = blocks.BLOCK_N // 2 if self._request.layer.gated else blocks.BLOCK_N
        return group > 0 and columns % group == 0 and self.I % group == 0 and not blocks.SWAP

    def _prepare(self) -> list[Launch]:
        """Return what comes before the first product: sorting, quantization of hidden, or nothing."""
        spec, fmt = self._request.input_activations, self._request.activation_format
        strides = (self._hidden.stride(0), self._hidden.stride(1))
        if self.schedule.pairs:
            return [self._quantize("x", self._ref("hidden"), strides, (self.M, self.H), spec, fmt)] if spec else []
        q, scale = self._quantized("x", self.M, self.H, spec, fmt) if spec else (None, None)
        arguments = {
            "ids_ptr": self._ref("topk_ids"),
            "stride_im": self._topk_ids.stride(0), "stride_it": self._topk_ids.stride(1),
            "pairs_ptr": self._workspace.add("pairs", (self.P,), torch.int32),
            "table_ptr": self._workspace.add("table", (self._num_blocks, 4), torch.int32),
            "x_ptr": self._ref("hidden") if spec else None, "stride_xm": strides[0], "stride_xk": strides[1],
            "q_ptr": q, "q_scale_ptr": scale, "T": self.T, "P": self.P, "E": self.E, "num_blocks": self._num_blocks,
            "DENSE": self._topk_ids.is_contiguous(), "LANES": max(min(power_of_two_above(self.P), MOST_LANES), 32),
            "BLOCK_M": self.schedule.first.BLOCK_M, "PDL": self._pdl, "M": self.M,
            **self._quantization(spec, fmt, self.H, prefix="X_"),
        }  # fmt: skip
        programs = self.E + (-(-self.M // arguments["BLOCK_R"]) if spec else 0)
        return [self._launch("prepare_kernel", (programs,), arguments, num_warps=8)]

    def _quantize(
        self, name: str, x: Ref, strides: tuple[int, int], shape: tuple[int, int], spec: ActivationSpec | None,
        fmt: NumberFormat | None,
    ) -> Launch:  # fmt: skip
        """Return the launch that quantizes x, of this shape, row by row."""
        q, scale = self._quantized(name, *shape, spec, fmt)
        arguments = {
            "x_ptr": x, "stride_xm": strides[0], "stride_xk": strides[1], "q_ptr": q, "scale_ptr": scale,
            "rows": shape[0], "PDL": self._pdl, **self._quantization(spec, fmt, shape[1]),
        }  # fmt: skip
        return self._launch("quantize_kernel", (-(-shape[0] // arguments["BLOCK_R"]),), arguments, num_warps=8)

    def _quantized(
        self, name: str, rows: int, K: int, spec: ActivationSpec | None, fmt: NumberFormat | None
    ) -> tuple[Ref, Ref]:
        assert spec is not None
        assert fmt is not None
        assert fmt.native is not None
        C = -(-K // spec.group_size) if spec.group_size else 1
        q = self._workspace.add(f"{name}_quantized", (rows, K), fmt.native)
        return q, self._workspace.add(f"{name}_scale", (rows, C), torch.float32)

    @staticmethod
    def _quantization(
        spec: ActivationSpec | None, fmt: NumberFormat | None, K: int, prefix: str = ""
    ) -> dict[str, Any]:
        """Return the constants of a row's quantization."""
        maximum = fmt.max_value if fmt else 1.0
        group = (spec.group_size or 0) if spec else 0
        width = power_of_two_above(K)
        rows = max(1, ELEMENTS_QUANTIZED // width)
        return {"K": K, f"{prefix}GROUP": group, "BLOCK_R": rows, "BLOCK_K": width, "MAX_VALUE": maximum}

    def _product(
        self, which: int, x: Ref, strides: tuple[int, int], x_scale: Ref | None, out: Ref, out_width: int,
        out_scale: Ref | None = None,
    ) -> Launch:  # fmt: skip
        """Return the launch of the first or the second product. out_scale: the first one quantizes what it gives."""
        request, operand, dot = self._request, self._x._operands[which], self._dots[which]
        blocks = self.schedule.second if which else self.schedule.first
        layer, tiles_n = request.layer, -(-operand.N // blocks.BLOCK_N)
        pairs, spec = self.schedule.pairs, request.intermediate if which else request.input_activations
        group = _group(operand)
        elements = _elements(operand, dot)
        scale_weights = _scales_weights(operand, group, dot, elements.places, blocks)
        scale_dtype = dot if scale_weights and _exact_scales(operand, dot) else torch.float32
        decode, exponent = elements.decode, 0
        if scale_weights and self._x._small_scales[which] and dot == torch.bfloat16:
            decode, exponent = self._kernels.SMALL.get(decode, (decode, 0))
        K = operand.K
        halves = decode is None and bool(spec and spec.group_size) and _in_halves(operand, blocks)
        rows = elements.weight.stride(1) == elements.weight.shape[2] and elements.row_bytes % 16 == 0
        fetch = rows and min(self.P, self.E) * operand.N * elements.row_bytes <= FETCHED_BYTES
        arguments = {
            "x_ptr": x, "stride_xm": strides[0], "stride_xk": strides[1], "x_scale_ptr": x_scale,
            **_weight_arguments(operand, elements, blocks, halves),
            "topk_weight_ptr": self._ref("topk_weights"),
            "stride_tm": self._topk_weights.stride(0), "stride_tt": self._topk_weights.stride(1),
            "ids_ptr": self._ref("topk_ids") if pairs else None,
            "stride_im": self._topk_ids.stride(0), "stride_it": self._topk_ids.stride(1),
            "pairs_ptr": None if pairs else self._ref("pairs"), "table_ptr": None if pairs else self._ref("table"),
            "out_ptr": out, "stride_om": out_width, "out_scale_ptr": out_scale,
            "alpha": float(layer.activation_alpha), "limit": float(layer.activation_limit or float("inf")),
            "offset": float(layer.activation_offset),
            "T": self.T, "P": self.P, "E": self.E, "N": operand.N, "K": K,
            "num_blocks": self._num_blocks, "tiles_n": tiles_n, "GROUP_M": 1 if pairs else blocks.GROUP_M,
            "GATE_UP": which == 0, "GATED": layer.gated, "ACTIVATION": layer.activation,
            "ROUTER_WEIGHT": layer.router_weight_on_input == (which == 0),
            "GROUP": group, "SCALE_ROWS": operand.scale_rows, "X_GROUP": (spec.group_size or 0) if spec else 0,
            "SCALE_WEIGHTS": scale_weights, "SCALE_DTYPE": self._tl(scale_dtype),
            "E8M0": operand.scale is not None and operand.scale.dtype == torch.uint8,
            "PLACES": elements.places, "EXPONENT": exponent, "BYTES": elements.bytes,
            "OUT_GROUP": request.intermediate.group_size if out_scale and request.intermediate else 0,
            "HIDDEN_DTYPE": self._tl(self._hidden.dtype),
            "MAX_VALUE": request.intermediate_format.max_value if request.intermediate_format else 1.0,
            "PAIRS": pairs, "SPLIT_K": blocks.SPLIT_K,
            "BLOCK_M": blocks.BLOCK_M, "BLOCK_N": blocks.BLOCK_N, "BLOCK_K": blocks.BLOCK_K,
            "EVEN_K": K // blocks.SPLIT_K % blocks.BLOCK_K == 0, "SWAP": blocks.SWAP, "TMA": blocks.TMA,
            # wgmma with its left operand in registers: only compute capability 9.x has it.
            "DRAIN": self._pdl and blocks.SWAP and elements.decode is not None and self._capability[0] == 9,
            "HALF": blocks.BLOCK_M >= 64 and not pairs and self.schedule.half,
            "FETCH": self._pdl and fetch,
            "PDL": self._pdl, "DOT_DTYPE": self._tl(dot), "decode": decode,
        }  # fmt: skip
        options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
        if blocks.maxnreg:
            options["maxnreg"] = blocks.maxnreg
        grid = (self._num_blocks * tiles_n, blocks.SPLIT_K)
        return self._launch("experts_kernel", grid, arguments, **options)

    def _sum(self, partial: Ref) -> Launch:
        block = 1024 if self.M > 64 else 256
        arguments = {
            "partial_ptr": partial, "ids_ptr": self._ref("topk_ids"),
            "stride_im": self._topk_ids.stride(0), "stride_it": self._topk_ids.stride(1),
            "out_ptr": self._ref("out"), "stride_om": self._out.stride(0), "stride_on": self._out.stride(1),
            "P": self.P, "E": self.E, "N": self.H, "T": self.T, "SPLIT_K": self.schedule.second.SPLIT_K,
            "BLOCK_N": block, "PDL": self._pdl,
        }  # fmt: skip
        return self._launch("sum_kernel", (self.M, -(-self.H // block)), arguments, num_warps=4 if self.M > 64 else 2)

    def _launch(self, kernel: str, grid: tuple[int, ...], arguments: Mapping[str, Any], **options: Any) -> Launch:
        if self._pdl:
            options["launch_pdl"] = True
        # Said outright: Triton 3.9 warns where it is left out, 3.10 changes the default.
        return Launch(getattr(self._kernels, kernel), grid, arguments, options | {"enable_fp_fusion": True})

    @property
    def _pdl(self) -> bool:
        return self._x._hopper

    def _tl(self, dtype: torch.dtype) -> Any:
        name = {torch.float8_e4m3fn: "float8e4nv"}.get(dtype, str(dtype).removeprefix("torch."))
        return getattr(self._kernels.tl, name)

    @property
    def _capability(self) -> tuple[int, int]:
        return self._request.device.compute_capability or (0, 0)

    def _ref(self, name: str) -> Ref:
        return self._workspace.ref(name)

    def _activation_formats(self) -> tuple[NumberFormat | None, NumberFormat | None]:
        return self._request.activation_format, self._request.intermediate_format

    def _numbers(self, which: int) -> Numbers:
        operand, dot, group = self._x._operands[which], self._dots[which], _group(self._x._operands[which])
        spec = self._request.intermediate if which else self._request.input_activations
        return Numbers(
            weight_bits=operand.weight.dtype.itemsize * 8 // operand.format.values_per_element,
            dot=str(dot).removeprefix("torch."),
            group_size=group or None,
            sum_scaled=group > 0 and not _must_scale_weights(operand) and not _exact_scales(operand, dot),
            scale_rows=operand.scale_rows,
            x_group=spec.group_size if spec else None,
            in_bytes=_elements(operand, dot).bytes,
        )


def _signature(hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor) -> tuple[Any, ...]:
    """Return what a call's launches follow from. Triton compiles for addresses that are multiples of 16, or are not."""
    addresses = hidden.data_ptr() | out.data_ptr(), topk_weights.data_ptr(), topk_ids.data_ptr()
    return (
        hidden.shape, topk_ids.shape, hidden.dtype, topk_weights.dtype, topk_ids.dtype, out.dtype,
        hidden.stride(), topk_weights.stride(), topk_ids.stride(), out.stride(),
        addresses[0] % 16, addresses[1] % 16, addresses[2] % 16,
    )  # fmt: skip


def _dot_dtype(
    operand: Operand, activations: NumberFormat | None, hidden: torch.dtype, interpreted: bool
) -> torch.dtype:
    """Return what the product multiplies: the activations' type, or hidden's where every stored weight is exact in it.

    Weights that zero points or scales change as they are decoded are no 8-bit numbers: they meet 16-bit ones.
    The interpreter's bfloat16 dot is wrong (it multiplies the bits as integers), so there the operands are float32.
    """
    if activations is not None and operand.zero_point is None and not _must_scale_weights(operand):
        assert activations.native is not None
        return activations.native
    fmt = operand.format
    exact = hidden in fmt.exact_in if fmt.scaled else operand.weight.dtype == hidden
    if not exact or (interpreted and hidden == torch.bfloat16):
        return torch.float32
    return hidden


def _has_small_scales(operand: Operand) -> bool:
    """Return whether e8m0 scales leave room for 2**126, which then corrects the exponents of small floats as well."""
    scale = operand.scale
    if scale is None or scale.dtype != torch.uint8 or scale.device.type == "cpu":  # the interpreter decodes plainly
        return False
    return scale.device.type == "meta" or int(scale.max()) <= LARGEST_SMALL_SCALE


def _group(operand: Operand) -> int:
    """Return how many weights along K share a scale; 0 where a row has one scale, or there are none."""
    several = operand.group_size < operand.K or operand.scale_rows > 1
    return operand.group_size if operand.scale is not None and several else 0


def _scales_weights(operand: Operand, group: int, dot: torch.dtype, places: int, blocks: Blocks) -> bool:
    """Return whether a group's scale multiplies weights, not the sum over the group.

    Multiplying the sum is exact but costs BLOCK_M * BLOCK_N multiplications a step and breaks up the accumulation, so
    it is for few tokens and for scales that are not exact in 16 bits. A scaled weight rounds to 16 bits (2**-9). A
    step, or a run of words, that holds several groups leaves no choice.
    """
    if not group or dot.itemsize == 1 or (group % blocks.BLOCK_K and blocks.BLOCK_K % group):
        return False
    if group < blocks.BLOCK_K or group < 16 * places:
        return True
    return _exact_scales(operand, dot) and (group < 64 or blocks.BLOCK_M > 32)


def _exact_scales(operand: Operand, dot: torch.dtype) -> bool:
    """Return whether every scale is a number of the type that is multiplied."""
    assert operand.scale is not None
    scale = operand.scale.dtype
    return (
        dot in (scale, torch.float32) or scale == torch.float8_e4m3fn or (scale, dot) == (torch.uint8, torch.bfloat16)
    )


@dataclass(frozen=True)
class _Elements:
    """A product's weights as the kernel loads them: (E, N, K / places) elements."""

    weight: Tensor
    places: int
    bytes: bool
    decode: Any

    @property
    def row_bytes(self) -> int:
        return self.weight.shape[2] * self.weight.dtype.itemsize


def _elements(operand: Operand, dot: torch.dtype) -> _Elements:
    """Return what the kernel loads: words of 16 bits, bytes, or the numbers that are multiplied."""
    fmt, weight = operand.format, operand.weight
    if not fmt.scaled:
        return _Elements(weight, 1, False, None)
    if dot == fmt.native:
        return _Elements(weight.view(fmt.native), 1, False, None)
    if operand.words:
        words = weight.view(torch.uint16)
        return _Elements(words, operand.K // words.shape[2], False, fmt.triton_decode())
    return _Elements(weight, 1, True, fmt.triton_decode())


def _weight_arguments(operand: Operand, elements: _Elements, blocks: Blocks, halves: bool) -> dict[str, Any]:
    """Return a product's tensors with their strides, by the kernel's names. halves: see `_in_halves`."""
    weight, scale, zero_point = elements.weight, operand.scale, operand.zero_point
    strides = scale.stride() if scale is not None else (0, 0, 0)
    zero_strides = zero_point.stride() if zero_point is not None else (0, 0, 0)
    return {
        "w_ptr": weight, "stride_we": weight.stride(0), "stride_wn": weight.stride(1),
        "w_desc": _descriptor(elements, blocks, halves) if blocks.TMA else None,
        "scale_ptr": scale, "stride_se": strides[0], "stride_sn": strides[1], "stride_sc": strides[2],
        "zero_ptr": zero_point, "stride_ze": zero_strides[0], "stride_zn": zero_strides[1],
        "stride_zc": zero_strides[2], "global_ptr": operand.global_scale, "bias_ptr": operand.bias,
    }  # fmt: skip


def _descriptor(elements: _Elements, blocks: Blocks, halves: bool) -> Any:
    """Return a TMA descriptor of (E * N, K / places) that copies tiles; half tiles, and the kernel multiplies so."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows = blocks.BLOCK_N // 2 if halves else blocks.BLOCK_N
    return TensorDescriptor.from_tensor(elements.weight.flatten(0, 1), [rows, blocks.BLOCK_K // elements.places])


def _in_halves(operand: Operand, blocks: Blocks) -> bool:
    """Return whether a tile's columns are summed half by half: each step's sum is scaled, and registers are short.

    Where blocks of scales hold whole tiles and whole steps; weights and activations are multiplied as they are stored.
    """
    whole = operand.scale_rows % blocks.BLOCK_N == 0 and operand.group_size % blocks.BLOCK_K == 0
    even = operand.K // blocks.SPLIT_K % blocks.BLOCK_K == 0
    per_thread = blocks.BLOCK_M * blocks.BLOCK_N // (32 * blocks.num_warps)
    return operand.scale_rows > 1 and whole and even and blocks.TMA and not blocks.SWAP and per_thread >= 128


def _in_words(spec: WeightSpec | None, fmt: NumberFormat, activations: NumberFormat | None, K: int) -> bool:
    """Return whether weights (N, K) are stored in words: those that are decoded, where a step over K can be whole runs.

    A step lies in one group of scales, or, where groups are 16 or 32, holds whole ones.
    """
    if spec is None or fmt.values_per_word < 2 or _multiplied_as_stored(spec, fmt, activations):
        return False
    run, group = WORDS * fmt.values_per_word, spec.columns(K)
    return K % run == 0 and (group == K or group % run == 0 or group in SMALL_GROUPS)


def _must_scale_weights(operand: Operand) -> bool:
    """Return whether a step over K, a run of words at least, holds several groups: no sum is of one of them."""
    return operand.words and _group(operand) % (WORDS * operand.format.values_per_word) != 0


def _multiplied_as_stored(spec: WeightSpec, fmt: NumberFormat, activations: NumberFormat | None) -> bool:
    """Return whether stored weights are of the activations' type; with a zero point they would need a ninth bit."""
    return activations is not None and fmt.native is not None and fmt.native == activations.native and spec.symmetric


def _reason_against_format(spec: WeightSpec | None, fmt: NumberFormat, K: int, device: Device) -> str | None:
    if spec is None:
        return None
    packed, group = fmt.values_per_element, spec.columns(K)
    if packed not in (1, 2):
        return f"format {fmt.name} packs {packed} values into one element; 1 and 2 are served"
    if fmt.triton_decode() is None:
        return f"format {fmt.name} has no triton_decode"
    if spec.scale_dtype == E4M3 and (device.compute_capability or (0, 0)) < LEAST_FP8:
        return f"scale_dtype {E4M3} needs compute capability 8.9, {device} has {_capability(device)}"
    if group < min(LEAST_GROUP_SIZE, K):
        return f"group_size={group} is below {LEAST_GROUP_SIZE}, the least K of a tensor core product"
    run = WORDS * fmt.values_per_word
    if packed == 1:
        return None
    if K % run:
        return f"packed format {fmt.name}: K={K} is not a multiple of {run}; use a format of 8 bits, or weights: null"
    if group != K and group % run and group not in SMALL_GROUPS:
        return f"packed format {fmt.name}: group_size={group} is not 16, 32 or a multiple of {run}; use one of them"
    return None


def _capability(device: Device) -> str:
    return "{}.{}".format(*device.compute_capability or (0, 0))


def _reason_against_activations(
    spec: ActivationSpec | None, fmt: NumberFormat | None, weights: WeightSpec | None, weight_format: NumberFormat,
    K: int, device: Device,
) -> str | None:  # fmt: skip
    if spec is None or weights is None:
        return None
    if fmt is None or fmt.native is None:
        return f"activations of format {spec.format}: the tensor cores have no such type"
    if fmt.native == torch.float8_e4m3fn and (device.compute_capability or (0, 0)) < LEAST_FP8:
        found = f"fp8 activations need compute capability 8.9, {device} has {_capability(device)}"
        return f"{found}; leave them in 16 bits, as fp8-w8a16 does"
    if weight_format.native != fmt.native and fmt.native not in weight_format.exact_in:
        return f"weights of format {weight_format.name} are not exact as {fmt.native}, the activations' type"
    if spec.group_size is None:
        return None
    run = WORDS * weight_format.values_per_word if weight_format.values_per_element == 2 else 0
    least, columns = max(LEAST_ACTIVATION_GROUP, run), weights.columns(K)
    if spec.group_size < least or spec.group_size & (spec.group_size - 1):
        found = f"activations: group_size={spec.group_size} is no power of two from {least} on"
        return f"{found}; use one, or strategy: token"
    if columns % spec.group_size and spec.group_size % columns:
        return f"activations: group_size={spec.group_size} and {columns} of the weights: one must divide the other"
    return None
