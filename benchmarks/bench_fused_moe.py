"""Time the experts of real models on your GPU: moeplug's schemes, torch and transformers beside them, and the limits.

    python benchmarks/bench_fused_moe.py --out fused_moe.json --plot fused_moe.png       on a GPU, in --seconds (300)
    python benchmarks/bench_fused_moe.py --shapes mixtral-8x7b 64,2048,1024,8 --schemes bf16 int8 --m 1 64 --peers torch
    python benchmarks/bench_fused_moe.py --from-harness peers.json --plot kernels.png --markdown --reduce small.json
    python benchmarks/bench_fused_moe.py --cpu-smoke                                     tiny layers, no GPU needed

A cell is one contestant on a shape, a scheme and M tokens: hidden states, router weights and ids in, combined output
out. graph: replays of one CUDA graph of several calls, each with its own tokens and routing, so that little is left in
L2 from the call before; eager: the same calls in a Python loop. Medians, p10 and p90 over the repeats. The limit is
max(bytes of the experts touched, hidden and output / bandwidth, flops / rate of the type multiplied), both measured
first: the better of a copy and a sum of 1 GB, and products of 8192 x 8192. A cell is right where rows of the
output, poisoned before, agree with moeplug/moe/reference.py on the weights as they are stored. Exits with 1 if a cell
of moeplug is wrong or fails. Drawing needs matplotlib: pip install 'moeplug[plot]'.

Peers: torch (torch.nn.functional.grouped_mm, bf16), transformers (its grouped_mm experts, bf16) and, where it is
installed, vllm (fused_experts on its own bf16, int8 and fp8 weights of the same kind as the scheme's).
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import plot_fused_moe as plots
import torch
import torch.nn.functional as F
from torch import Tensor

import moeplug
from moeplug import Scheme
from moeplug.moe.experts import ExpertGroup, QuantizedExperts
from moeplug.moe.layout import PROJECTIONS, Projection, buffer_name
from moeplug.moe.reference import ExpertWeights, experts_reference
from moeplug.quantization import Scales, dequantize
from moeplug.registry import Registry

Inputs = tuple[Tensor, Tensor, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

# name: E, H, I, T
SHAPES = {
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "mixtral-8x7b": (8, 4096, 14336, 2),
    "deepseek-v3-ep8": (32, 7168, 2048, 8),
    "gpt-oss-20b": (32, 2880, 2880, 4),
    "jamba-mini": (16, 4096, 14336, 2),
    "olmoe": (64, 2048, 1024, 8),
}
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
UNQUANTIZED = "bf16"
SMOKE_SHAPE, SMOKE_SCHEMES, SMOKE_TOKENS = "4,64,32,2", ("bf16", "int8", "int8-w8a8"), (1, 5)
PEERS = ("torch", "transformers", "vllm")
ROWS_CHECKED = 4
# Relative rms. bfloat16 rounds the intermediate and the output by 2**-9 at most: 0.002. Peers round gate, up and every
# expert's output as well. A quantized activation that lies between two steps may go either way: int8 has steps of 0.8 %
# of a row's largest value, e4m3 of 6 % of its own. Wrong scales or a swapped gate and up are above 0.1.
TOLERANCE = {"bf16": 0.006, "peer": 0.015, "int8": 0.02, "fp8": 0.05}
GB = 10**9


@dataclass(frozen=True)
class Shape:
    """One layer's experts."""

    name: str
    E: int
    H: int
    I: int
    T: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Return a shape by its name, or of "E,H,I,T"."""
        if text in SHAPES:
            return cls(text, *SHAPES[text])
        try:
            E, H, I, T = (int(part) for part in text.split(","))
        except ValueError:
            known = ", ".join(SHAPES)
            raise argparse.ArgumentTypeError(f"{text!r} is none of {known}, and not E,H,I,T") from None
        return cls(text, E, H, I, T)

    def weights(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return w13 (E, 2I, H) and w2 (E, H, I), bfloat16, normal, so that outputs are near 1."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(E: int, N: int, K: int) -> Tensor:
            w = torch.empty(E, N, K, dtype=torch.bfloat16, device=device)
            return w.normal_(0, K**-0.5, generator=generator)

        return normal(self.E, 2 * self.I, self.H), normal(self.E, self.H, self.I)

    def inputs(self, M: int, device: torch.device) -> list[Inputs]:
        """Return several inputs, each with its own tokens and routing: one call must not warm L2 for the next."""
        generator = torch.Generator().manual_seed(M)
        sets = []
        for _ in range(next(count for limit, count in ((8, 16), (128, 8), (512, 4), (2048, 2), (M, 1)) if limit >= M)):
            hidden = torch.randn(M, self.H, generator=generator).bfloat16()
            weights, ids = torch.randn(M, self.E, generator=generator).softmax(-1).topk(self.T)
            weights = weights / weights.sum(-1, keepdim=True)
            sets.append((hidden.to(device), weights.to(device), ids.int().to(device)))
        return sets


class StoredWeights(Sequence[ExpertWeights]):
    """The experts as a module's buffers hold them, dequantized to float32 one by one when asked for."""

    def __init__(self, experts: QuantizedExperts) -> None:
        """Read from experts."""
        self._experts = experts

    def __len__(self) -> int:
        return self._experts.layer.num_experts

    def __getitem__(self, e: int) -> ExpertWeights:
        group = next(group for group in self._experts.groups if e in group.ctx.experts)
        return ExpertWeights(*(self._decoded(group, projection, e) for projection in PROJECTIONS))

    def _decoded(self, group: ExpertGroup, projection: Projection, e: int) -> Tensor:
        stored, spec = self._experts.stored(projection, e).unsqueeze(0), group.ctx.spec(projection)
        buffers, name = dict(group.named_buffers()), buffer_name(projection)
        slot = group.ctx.experts.index(e)

        def part(kind: str) -> Tensor | None:
            tensor = buffers.get(f"{name}_{kind}")
            if tensor is None:
                return None
            if spec is not None and spec.block_structure and kind == "scale":  # gate's rows of scales, then up's
                halves = tensor.chunk(1 if projection == "down" else 2, dim=1)
                return halves[projection == "up"][slot : slot + 1]
            return group.ctx.layout.view(tensor, projection)[slot : slot + 1]

        global_scale = part("global_scale")
        scales = Scales(
            part("scale"), part("zero_point"), None if global_scale is None else global_scale.unsqueeze(2),
            spec.ragged_block if spec else None,
        )  # fmt: skip
        return dequantize(stored, scales, group.ctx.format(projection))[0]


class Clock:
    """Times calls: with CUDA events on a GPU, with the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Time on device."""
        self.on_gpu = device.type == "cuda"

    def spread(self, call: Callable[[], object], calls: int, target: float = 0.05) -> list[float]:
        """Return seconds of one of the `calls` calls that call makes: median, p10, p90."""
        once = self._seconds(call, 2)[1]
        times = self._seconds(call, int(min(60, max(5, target / once))) if self.on_gpu else 3)
        deciles = statistics.quantiles(times, n=10, method="inclusive")
        return [value / calls for value in (statistics.median(times), deciles[0], deciles[-1])]

    def _seconds(self, call: Callable[[], object], repeats: int) -> list[float]:
        if not self.on_gpu:
            marks = [time.perf_counter()]
            for _ in range(repeats):
                call()
                marks.append(time.perf_counter())
            return [after - before for before, after in pairwise(marks)]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def ceilings(device: torch.device, clock: Clock) -> dict[str, float]:
    """Return what this device reaches, measured: bytes/s, and flop/s of products of bf16, int8 and fp8."""
    n, S = (GB // 4, 8192) if clock.on_gpu else (GB // 100, 256)
    found = {"bw": _bandwidth(n, device, clock)}
    x = torch.randn(S, S, device=device, dtype=torch.bfloat16)
    q, x8 = torch.ones(S, S, device=device, dtype=torch.int8), x.to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    products: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: x @ x.t(),
        "int8": lambda: torch._int_mm(q, q.t()),
        "fp8": lambda: torch._scaled_mm(x8, x8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
    }
    for name, product in products.items():
        try:
            found[name] = 2 * S**3 / clock.spread(product, 1)[0]
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            print(f"no {name} product here ({_reason(error)}): its limit is bf16's", flush=True)
    return found
    return found


def _bandwidth(n: int, device: torch.device, clock: Clock) -> float:
    """Return bytes/s of a copy of n float32, or of their sum, whichever is faster: weights are only read."""
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    copied = clock.spread(lambda: target.copy_(source), 1)[0]
    return max(8 * n / copied, 4 * n / clock.spread(source.sum, 1)[0])


@dataclass
class Contestant:
    """Something that can be timed: peer "moeplug", or whose it is; the numbers that it is held to."""

    peer: str
    forward: Forward
    reference: Callable[[Tensor, Tensor, Tensor], Tensor]
    tolerance: float
    ids_dtype: torch.dtype = torch.int32


def torch_peer(w13: Tensor, w2: Tensor) -> Forward:
    """Return the experts by torch's grouped product: sorted, gate and up, activation, down, weighted sum."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    E, first, second = w13.shape[0], w13.transpose(1, 2), w2.transpose(1, 2)

    def forward(hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        M, T = topk_ids.shape
        sorted_ids, order = topk_ids.flatten().sort()
        experts = torch.arange(E, device=hidden.device, dtype=sorted_ids.dtype)
        ends = torch.searchsorted(sorted_ids, experts, right=True).int()
        gate, up = product(hidden[order // T], first, offs=ends).chunk(2, dim=1)
        y = product(F.silu(gate) * up, second, offs=ends)
        unsorted = torch.empty_like(y).index_copy_(0, order, y).view(M, T, -1)
        return torch.bmm(topk_weights.to(y.dtype).unsqueeze(1), unsorted).squeeze(1)

    return forward


def transformers_peer(shape: Shape, w13: Tensor, w2: Tensor) -> Forward:
    """Return transformers' own experts of a Qwen3-MoE, with its grouped_mm implementation."""
    from transformers import Qwen3MoeConfig
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = {"hidden_size": shape.H, "moe_intermediate_size": shape.I, "num_experts": shape.E}
    with torch.device("meta"):
        module = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, num_experts_per_tok=shape.T, hidden_act="silu"))
    module.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
    module.down_proj = torch.nn.Parameter(w2, requires_grad=False)
    return lambda hidden, weights, ids: grouped_mm_experts_forward(module, hidden, ids, weights.to(hidden.dtype))


def vllm_peer(kind: str, w13: Tensor, w2: Tensor) -> tuple[Forward, tuple[Tensor, Tensor]]:
    """Return vLLM's fused_experts and the weights as it stores them, dequantized: bf16, int8_w8a16, int8_w8a8, fp8."""
    import vllm.model_executor.layers.fused_moe.config as config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    if kind == "bf16":
        return lambda hidden, weights, ids: fused_experts(hidden, w13, w2, weights, ids), (w13, w2)
    dtype, largest = (torch.float8_e4m3fn, 448.0) if kind == "fp8" else (torch.int8, 127.0)
    (q13, s13), (q2, s2) = (_per_channel(w, dtype, largest) for w in (w13, w2))
    if kind == "fp8":
        quantized = config.fp8_w8a8_moe_quant_config(
            w1_scale=s13, w2_scale=s2, per_act_token_quant=True, per_out_ch_quant=True
        )
    elif kind == "int8_w8a8":
        quantized = config.int8_w8a8_moe_quant_config(
            w1_scale=s13[..., 0], w2_scale=s2[..., 0], a1_scale=None, a2_scale=None, per_act_token_quant=True
        )
    else:
        quantized = config.int8_w8a16_moe_quant_config(
            w1_scale=s13[..., 0], w2_scale=s2[..., 0], w1_zp=None, w2_zp=None
        )

    def forward(hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return fused_experts(hidden, q13, q2, weights, ids, quant_config=quantized)

    return forward, tuple((q.bfloat16() * s).bfloat16() for q, s in ((q13, s13), (q2, s2)))


def _per_channel(w: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """Return w (E, N, K) as (stored, scale (E, N, 1) float32), expert by expert."""
    q, scale = torch.empty_like(w, dtype=dtype), torch.empty(*w.shape[:2], 1, device=w.device)
    for e in range(w.shape[0]):
        scale[e] = w[e].abs().amax(1, keepdim=True).float() / largest
        scaled = w[e].float() / scale[e]
        q[e] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    return q, scale


class Bench:
    """Runs cells while there is time and keeps them."""

    def __init__(self, device: torch.device, seconds: float, peers: Sequence[str]) -> None:
        """Measure on device for about these seconds, with peers beside."""
        self.device, self.budget, self.peers = device, seconds, peers
        self.cells, self.skipped = list[plots.Cell](), list[str]()
        self.started = time.perf_counter()
        self.clock = Clock(device)
        self.registry = Registry.discover()
        self.physical = ceilings(device, self.clock)
        print(
            "ceilings: " + ", ".join(f"{k} {v / 1e12:.3g}" for k, v in self.physical.items()) + " (TB/s, TFLOP/s)",
            flush=True,
        )

    @property
    def seconds(self) -> float:
        """Return how long this bench has run."""
        return round(time.perf_counter() - self.started, 1)

    def run(self, shapes: Sequence[Shape], schemes: Sequence[str], tokens: Sequence[int]) -> None:
        """Add the cells of every shape, scheme, contestant and number of tokens."""
        for shape in shapes:
            w13, w2 = shape.weights(self.device)
            inputs = {M: shape.inputs(M, self.device) for M in tokens}
            for name in schemes:
                if self.seconds > self.budget:
                    self.skipped.append(f"{shape.name} {name}")
                    continue
                self._run_scheme(shape, name, w13, w2, inputs)
            del w13, w2, inputs
            self._free()

    def _run_scheme(self, shape: Shape, name: str, w13: Tensor, w2: Tensor, inputs: dict[int, list[Inputs]]) -> None:
        plain = Scheme.from_text(f"api: 1\nname: {name}\nweights: null\n") if name == UNQUANTIZED else name
        try:
            experts = moeplug.quantize_experts(w13, w2, plain, experts_per_token=shape.T)
        except moeplug.MoeplugError as error:
            print(f"{shape.name} {name}: {_reason(error)}", flush=True)
            self.skipped.append(f"{shape.name} {name}: {_reason(error)}")
            return
        limits = {M: self._limit(shape, experts, sets) for M, sets in inputs.items()}
        for contestant in self._contestants(shape, name, experts, w13, w2):
            for M, sets in inputs.items():
                about = {"shape": shape.name, "scheme": name, "peer": contestant.peer, "M": M}
                if self.seconds > self.budget:
                    self.skipped.append(" ".join(str(value) for value in about.values()))
                    continue
                self._add(about | limits[M], contestant, sets)
            self._free()

    def _contestants(
        self, shape: Shape, name: str, experts: QuantizedExperts, w13: Tensor, w2: Tensor
    ) -> Iterator[Contestant]:
        """Yield moeplug, then the peers that have this scheme; who cannot be built is reported and left out."""
        request = experts.groups[0].ctx.request
        stored, native = StoredWeights(experts), _native(request.activation_format)

        def reference(*inputs: Tensor) -> Tensor:
            return experts_reference(*inputs, stored, request=request, out_dtype=torch.float32)

        yield Contestant(plots.OURS, experts, reference, TOLERANCE[native])
        kind = _kind(name, experts)
        builders: dict[str, Callable[[], tuple[Forward, tuple[Tensor, Tensor]]]] = {}
        if kind == "bf16":
            builders["torch"] = lambda: (torch_peer(w13, w2), (w13, w2))
            builders["transformers"] = lambda: (transformers_peer(shape, w13, w2), (w13, w2))
        if kind is not None:
            builders["vllm"] = lambda: vllm_peer(kind, w13, w2)
        for peer in [peer for peer in builders if peer in self.peers]:
            try:
                forward, weights = builders[peer]()
            except Exception as error:  # whatever a peer raises where it is not installed, or not for this device
                print(f"{shape.name} {name} {peer}: {_reason(error)}", flush=True)
                continue
            tolerance = max(TOLERANCE["peer"], TOLERANCE[native])
            ids_dtype = torch.int64 if peer == "transformers" else torch.int32
            yield Contestant(peer, forward, _reference_of(*weights), tolerance, ids_dtype)

    def _limit(self, shape: Shape, experts: QuantizedExperts, sets: Sequence[Inputs]) -> plots.Cell:
        """Return the bytes and flops that a call cannot do without, and the seconds that they take at the ceilings."""
        touched = statistics.mean(len(ids.unique()) for _, _, ids in sets)
        M, request = sets[0][0].shape[0], experts.groups[0].ctx.request
        moved = touched * experts.nbytes / shape.E + 2 * M * shape.H * 2
        of_product = 2.0 * M * shape.T * shape.H * shape.I
        inputs = (request.activation_format, request.activation_format, request.intermediate_format)
        rates = [self.physical.get(_native(fmt), self.physical["bf16"]) for fmt in inputs]
        memory, math = moved / self.physical["bw"], sum(of_product / rate for rate in rates)
        bound = "mem" if memory >= math else "math"
        return {"limit": max(memory, math), "bound": bound, "bytes": moved, "flops": 3 * of_product}

    def _add(self, cell: plots.Cell, contestant: Contestant, sets: Sequence[Inputs]) -> None:
        """Measure a cell, print its line, keep it."""
        calls = [(hidden, weights, ids.to(contestant.ids_dtype)) for hidden, weights, ids in sets]
        try:
            cell |= self._measured(contestant, calls)
        except Exception as error:  # a peer's failure is a line of the table, and so is ours
            cell |= {"ok": False, "error": _reason(error)}
        self.cells.append(cell)
        print(_line(cell), flush=True)

    def _measured(self, contestant: Contestant, calls: Sequence[Inputs]) -> plots.Cell:
        forward, (hidden, weights, ids) = contestant.forward, calls[0]
        rows = torch.linspace(0, len(hidden) - 1, min(len(hidden), ROWS_CHECKED)).long().to(self.device)
        expected = contestant.reference(hidden[rows], weights[rows], ids[rows])

        def run() -> list[Tensor]:
            return [forward(*call) for call in calls]

        if isinstance(forward, QuantizedExperts):  # peers make their outputs themselves
            poisoned = torch.full_like(hidden, torch.nan)
            errors = [_error(forward(*calls[0], out=poisoned)[rows], expected)]
        else:
            errors = [_error(forward(*calls[0])[rows], expected)]
        eager = self.clock.spread(run, len(calls))
        cell: plots.Cell = {"eager": eager[0], "eager_p10": eager[1], "eager_p90": eager[2]}
        if self.clock.on_gpu:
            try:
                cell |= self._replayed(run, len(calls), rows, expected, errors)
            except RuntimeError as error:
                torch.cuda.synchronize()
                cell["graph_error"] = _reason(error)
        captured = contestant.peer != plots.OURS or "graph_error" not in cell
        return cell | {"error_rms": max(errors), "ok": captured and max(errors) <= contestant.tolerance}

    def _replayed(
        self, run: Callable[[], list[Tensor]], calls: int, rows: Tensor, expected: Tensor, errors: list[float]
    ) -> plots.Cell:
        """Capture the calls, warm since they were timed, poison what they wrote, replay, check and time."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        errors.append(_error(outputs[0][rows], expected))
        if not all(bool(output.isfinite().all()) for output in outputs):
            errors.append(float("inf"))
        median, p10, p90 = self.clock.spread(graph.replay, calls)
        return {"graph": median, "graph_p10": p10, "graph_p90": p90}

    def _free(self) -> None:
        gc.collect()
        if self.clock.on_gpu:
            torch.cuda.empty_cache()


def _reference_of(w13: Tensor, w2: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the reference on float weights (E, 2I, H), (E, H, I), converted one expert at a time."""

    class Experts(Sequence[ExpertWeights]):
        def __len__(self) -> int:
            return w13.shape[0]

        def __getitem__(self, e: int) -> ExpertWeights:
            return ExpertWeights(*w13[e].float().chunk(2), w2[e].float())

    return lambda *inputs: experts_reference(*inputs, Experts(), out_dtype=torch.float32)


def _kind(name: str, experts: QuantizedExperts) -> str | None:
    """Return how vLLM calls weights and activations of the scheme's kind, or None: only one scale a row is compared."""
    request = experts.groups[0].ctx.request
    if name == UNQUANTIZED:
        return "bf16"
    spec, activations = request.gate_up, request.input_activations
    if spec is None or spec != request.down or spec.strategy != "channel" or not spec.symmetric:
        return None
    token = activations is not None and activations.strategy == "token"
    if spec.format == "int8" and (activations is None or token):
        return "int8_w8a8" if token else "int8_w8a16"
    return "fp8" if spec.format == "fp8" and token else None


def _native(activations: Any) -> str:
    """Return the ceiling of what the tensor cores multiply: bf16, int8 or fp8."""
    if activations is None:
        return "bf16"
    return {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(activations.native, "bf16")


def _error(out: Tensor, expected: Tensor) -> float:
    """Return the relative rms error; infinite where out is not finite."""
    error = float((out.float() - expected).norm() / expected.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def _line(cell: plots.Cell) -> str:
    name = f"{cell['shape']:16} {cell['scheme']:14} {cell['peer']:12} M={cell['M']:<5}"
    if "error" in cell:
        return f"{name} FAIL {cell['error']}"
    times = [f"{kind} {cell[kind] * 1e6:9.1f} us" for kind in ("graph", "eager") if kind in cell]
    ratio = f"{plots.time_of(cell) / cell['limit']:6.2f} x limit ({cell['bound']})"
    verdict = "ok  " if cell["ok"] else "FAIL"
    return f"{name} {verdict} {'  '.join(times)} {ratio}  error {cell['error_rms']:.4f} {cell.get('graph_error', '')}"


def versions(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    found = {}
    for package in ("moeplug", "torch", "triton", "transformers", "vllm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": found | {"cuda": torch.version.cuda, "python": platform.python_version()},
        "command": " ".join(["python", "benchmarks/bench_fused_moe.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def measure(arguments: argparse.Namespace) -> tuple[plots.Run, int]:
    """Run the bench; return its cells and the exit status."""
    device = torch.device("cpu") if arguments.cpu_smoke else torch.device("cuda", torch.cuda.current_device())
    bench = Bench(device, arguments.seconds, arguments.peers)
    shapes, schemes, tokens = arguments.shapes, arguments.schemes, arguments.m
    if arguments.cpu_smoke:
        shapes, schemes, tokens = shapes or [Shape.parse(SMOKE_SHAPE)], schemes or SMOKE_SCHEMES, tokens or SMOKE_TOKENS
    shapes = shapes or [Shape.parse(name) for name in SHAPES]
    with torch.no_grad():
        bench.run(shapes, schemes or [UNQUANTIZED, *sorted(bench.registry.scheme_files())], tokens or TOKENS)
    about = versions(device) | {"elapsed_s": bench.seconds, "skipped": bench.skipped, "physical": bench.physical}
    about["shapes"] = {shape.name: [shape.E, shape.H, shape.I, shape.T] for shape in shapes}
    if arguments.out:
        arguments.out.write_text(json.dumps(about | {"cells": bench.cells}, indent=1) + "\n")
    if bench.skipped:
        print(f"skipped: {', '.join(bench.skipped)}")
    ours = [cell for cell in bench.cells if cell["peer"] == plots.OURS]
    timed = [cell for cell in bench.cells if "eager" in cell]
    return plots.Run(about, bench.physical, timed), int(not ours or not all(cell["ok"] for cell in ours))


def main() -> int:
    """Measure, or read; print the tables, draw, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help=f"{', '.join(SHAPES)} (all), or E,H,I,T")
    parser.add_argument("--schemes", nargs="+", help="installed schemes, files, and bf16: unquantized (all)")
    parser.add_argument("--m", nargs="+", type=int, help=f"numbers of tokens ({' '.join(map(str, TOKENS))})")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="who runs beside (all)")
    parser.add_argument("--seconds", type=float, default=300.0, help="start no cell after this time (300)")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny layers on the CPU kernel: times mean nothing")
    parser.add_argument("--from-harness", type=Path, metavar="JSON", help="measure nothing, read these cells")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--reduce", type=Path, metavar="JSON", help="write what tables and plots need, a cell a line")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw rooflines, and ratios to peers in PNG-ratio")
    parser.add_argument("--markdown", action="store_true", help="print the tables (always after measuring)")
    arguments = parser.parse_args()
    if arguments.from_harness:
        run, status = plots.read(arguments.from_harness), 0
    elif arguments.cpu_smoke or torch.cuda.is_available():
        run, status = measure(arguments)
    else:
        parser.error("no CUDA device; --cpu-smoke runs tiny layers on the CPU")
    if arguments.markdown or not arguments.from_harness:
        print("\n" + plots.markdown(run))
    if not arguments.from_harness:
        print("\n" + plots.against_unquantized_peers(run, UNQUANTIZED))
    if arguments.reduce:
        plots.reduce(run, arguments.reduce)
    for file in plots.plot(run, arguments.plot) if arguments.plot else ():
        print(f"drawn: {file}")
    return status


if __name__ == "__main__":
    sys.exit(main())
