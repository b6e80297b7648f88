"""Time the fused router against plain torch, eager and as a CUDA graph, and hold its results to the reference.

    python benchmarks/bench_router.py --out router.json          on a GPU, within a minute; --seconds 150 skips nothing
    python benchmarks/bench_router.py --cpu-smoke                few tokens under triton's interpreter, to run the logic

Rows: the kernel; `moeplug.moe.router.route_reference`; the same rule as transformers writes it, with torch.topk (ties
open); both of them under torch.compile; and, as graphs only, the kernel with other launches ("kernel 4x1": BLOCK_M 4,
1 warp). Microseconds per call, median (p10 to p90): graph from CUDA events around a replay of 20 calls; eager as wall
time of 20 calls and one synchronisation, so host time where that is longer. Logits are in L2, where a router's product
leaves them. What there was no time for is listed as skipped. Exits with 1 if results differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["TRITON_INTERPRET"] = "1" if "--cpu-smoke" in sys.argv else "0"  # read when triton.jit decorates

import torch

from moeplug.kernels import router
from moeplug.moe.router import RouterSpec, route_reference

Call = Callable[[], Any]
TOKENS = (1, 8, 32, 128, 2048, 8192)
CALLS = 20
# name: rule, E, dtype of the logits as transformers computes them, whether there is a bias
RULES = {
    "softmax_E128_T8": (RouterSpec(8, renormalize=True), 128, torch.bfloat16, False),
    "groups_E256_T8": (RouterSpec(8, "sigmoid", 8, 4, "top2_sum", True, 1e-20, 2.5), 256, torch.float32, True),
    "softmax_E8_T2": (RouterSpec(2, renormalize=True), 8, torch.bfloat16, False),
}
LAUNCHES = ((1, 1), (2, 1), (4, 1), (4, 4), (16, 4))  # BLOCK_M, num_warps
COMPILE_SECONDS = 15.0  # what torch.compile of one rule may take; none starts with less left
# Two choices a float32 rounding apart may swap: with scores of 256 experts, about 2 tokens in 1000.
MOST_SWAPPED = 0.01


def as_transformers(logits: torch.Tensor, spec: RouterSpec, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return (weights, ids) by the operations of transformers' Qwen3Moe, Mixtral and DeepseekV3 routers."""
    scores = logits.softmax(-1, dtype=torch.float) if spec.score == "softmax" else logits.float().sigmoid()
    choice = scores if bias is None else scores + bias
    if spec.n_group > 1:
        groups = choice.view(choice.shape[0], spec.n_group, -1)
        best = groups.topk(2, dim=-1)[0].sum(dim=-1).topk(spec.topk_group, dim=-1, sorted=False)[1]
        mask = torch.zeros(groups.shape[:2], device=choice.device).scatter_(1, best, 1)
        mask = mask.unsqueeze(-1).expand(groups.shape).reshape(choice.shape)
        choice = choice.masked_fill(~mask.bool(), float("-inf"))
    ids = choice.topk(spec.top_k, dim=-1)[1]
    weights = scores.gather(1, ids)
    if spec.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + spec.epsilon)
    return weights * spec.scaling_factor, ids


class Bench:
    """Runs calls and keeps one row for each."""

    def __init__(self, device: str, seconds: float) -> None:
        """Measure on device, in about these seconds; on a CPU times mean nothing."""
        self.device, self.rows, self.skipped = device, list[dict[str, Any]](), list[str]()
        self.budget = seconds
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return how long this bench has run."""
        return round(time.perf_counter() - self.started, 1)

    def inputs(self, rule: str, M: int) -> tuple[torch.Tensor, RouterSpec, torch.Tensor | None]:
        """Return (logits, spec, bias) of M random tokens."""
        spec, E, dtype, has_bias = RULES[rule]
        g = torch.Generator().manual_seed(M)
        logits = (torch.randn(M, E, generator=g) * 2).to(self.device, dtype)
        return logits, spec, (torch.randn(E, generator=g) * 0.1).to(self.device) if has_bias else None

    def add(self, rule: str, M: int, name: str, call: Call, eager: bool = True, **more: Any) -> None:
        """Add a row: times of call, and whatever more there is to say."""
        row = {"rule": rule, "M": M, "name": name, **more}
        try:
            if eager or self.device == "cpu":
                row["eager_us"] = self._times(call)
            if self.device != "cpu":
                row["graph_us"] = _graph_times(call)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        self.rows.append(row)
        print(_line(row), flush=True)

    def _times(self, call: Call) -> list[float]:
        """Return microseconds per call (median, p10, p90) of CALLS calls in a row."""
        repeats, calls, synchronize = (30, CALLS, torch.cuda.synchronize) if self.device != "cpu" else (3, 1, _nothing)
        for _ in range(3):
            call()
        times = []
        for _ in range(repeats):
            synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                call()
            synchronize()
            times.append((time.perf_counter() - started) * 1e6 / calls)
        return _spread(times)

    def compare(self, rule: str, M: int) -> dict[str, Any]:
        """Return how the kernel's results differ from the reference's, and whether that is right."""
        logits, spec, bias = arguments = self.inputs(rule, M)
        weights, ids = router.route_triton(logits, spec, bias)
        again = router.route_triton(logits, spec, bias)
        expected, expected_ids = route_reference(*arguments)
        same = (ids == expected_ids).all(1)
        error = float(((weights - expected).abs() / expected)[same].max()) if bool(same.any()) else 0.0
        differing = M - int(same.sum())
        allowed = max(1, int(M * MOST_SWAPPED)) if spec.chooses_by_score(bias is not None) else 0
        repeats = torch.equal(weights, again[0]) and torch.equal(ids, again[1])
        ok = differing <= allowed and error < 1e-5 and repeats
        return {"ok": ok, "tokens_differing": differing, "max_relative_error": error, "repeats": repeats}

    def eager(self, tokens: tuple[int, ...]) -> None:
        """Add the rows that need no torch.compile."""
        for rule in RULES:
            for M in tokens:
                arguments = self.inputs(rule, M)
                self.add(rule, M, "kernel", _call(router.route, arguments), **self.compare(rule, M))
                self.add(rule, M, "reference", _call(route_reference, arguments))
                self.add(rule, M, "transformers", _call(as_transformers, arguments))

    def launches(self, tokens: tuple[int, ...]) -> None:
        """Add the kernel's rows with other launches."""
        for rule in RULES:
            for BLOCK_M, num_warps in LAUNCHES:
                if self.seconds > self.budget - 3:
                    self.skipped.append(f"{rule} kernel {BLOCK_M}x{num_warps}")
                    continue
                for M in tokens:
                    logits, spec, bias = arguments = self.inputs(rule, M)
                    launch = router.launch_of(logits.shape[1], spec, bias is not None)
                    launch = launch | {"BLOCK_M": BLOCK_M, "num_warps": num_warps}
                    with mock.patch.object(router, "launch_of", _always(launch)):
                        call = _call(router.route_triton, arguments)
                        self.add(rule, M, f"kernel {BLOCK_M}x{num_warps}", call, eager=False)

    def compiled(self, tokens: tuple[int, ...]) -> None:
        """Add the rows of torch.compile, as long as there is time."""
        backend = "inductor" if self.device != "cpu" else "eager"
        for name, function in (("reference", route_reference), ("transformers", as_transformers)):
            for rule in RULES:
                torch._dynamo.reset()
                # dynamic: two compilations per rule, M=1 and the rest, instead of one per M.
                compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)
                for M in tokens:
                    if M in tokens[:2] and self.seconds > self.budget - COMPILE_SECONDS:
                        self.skipped.append(f"{rule} {name}, compiled, M from {M} on")
                        break
                    self.add(rule, M, f"{name}, compiled", _call(compiled, self.inputs(rule, M)))


def _graph_times(call: Call, repeats: int = 50) -> list[float]:
    """Return microseconds per call (median, p10, p90) of CALLS calls captured in one CUDA graph."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return _spread(times)


def _spread(times: list[float]) -> list[float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return [round(value, 2) for value in (statistics.median(times), deciles[0], deciles[-1])]


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Call:
    return lambda: function(*arguments)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def _nothing() -> None:
    pass


def _line(row: dict[str, Any]) -> str:
    times = [f"{key} {row[key][0]} ({row[key][1]} to {row[key][2]})" for key in ("eager_us", "graph_us") if key in row]
    others = [f"{k} {v}" for k, v in row.items() if k not in ("rule", "M", "name", "eager_us", "graph_us")]
    return f"{row['rule']:16} M={row['M']:<5} {row['name']:22} {' '.join([*times, *others])}"


def versions() -> Iterator[tuple[str, Any]]:
    """Yield what the numbers depend on."""
    import triton

    yield "gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else None
    yield from (("torch", torch.__version__), ("triton", triton.__version__), ("python", platform.python_version()))
    yield "command", " ".join(["python", "benchmarks/bench_router.py", *sys.argv[1:]])
    yield "date", time.strftime("%Y-%m-%d")


def main() -> int:
    """Run everything, write the JSON, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--cpu-smoke", action="store_true", help="few tokens under triton's interpreter, no GPU")
    parser.add_argument("--seconds", type=float, default=58.0, help="start nothing long after this time (58)")
    arguments = parser.parse_args()
    if not arguments.cpu_smoke and not torch.cuda.is_available():
        parser.error("no CUDA device; --cpu-smoke runs few tokens under the interpreter")
    bench = Bench("cpu" if arguments.cpu_smoke else "cuda", arguments.seconds)
    tokens = (1, 8) if arguments.cpu_smoke else TOKENS
    with torch.no_grad():
        bench.eager(tokens)
        bench.compiled(tokens)
        bench.launches(tokens)
    failed = [
        f"{row['rule']} M={row['M']} {row['name']}" for row in bench.rows if not row.get("ok", True) or "error" in row
    ]
    summary = dict(versions()) | {"seconds": bench.seconds, "failed": failed, "skipped": bench.skipped}
    print(json.dumps(summary))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary | {"results": bench.rows}, indent=1) + "\n")
    return 1 if failed or not bench.rows else 0


if __name__ == "__main__":
    sys.exit(main())
