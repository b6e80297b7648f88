"""Hold the Triton kernels to the reference on a GPU: errors, repeatability, CUDA graphs, 64-bit offsets; and time them.

    python benchmarks/check_kernels.py --out kernels.json        on a GPU, several minutes on an H100
    python benchmarks/check_kernels.py --quick                   one case of each kind of weights
    python benchmarks/check_kernels.py --cpu-smoke               tiny cases under triton's interpreter

Exits with 1 if any case fails. Times are information: median of 20 calls on one input (weights may sit in L2), eager
and as a CUDA graph, beside torch's bfloat16 grouped product over the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["TRITON_INTERPRET"] = "1" if "--cpu-smoke" in sys.argv else "0"  # read when triton.jit decorates

import torch
from kernel_cases import KINDS, PLAIN, Case, StoredExperts, compare, grouped, inputs_of, poisoned_out, request_of

from moeplug.kernels import Device
from moeplug.kernels.fused_moe import TritonKernel
from moeplug.moe.layout import ACTIVATIONS
from moeplug.moe.reference import experts_reference
from moeplug.spec import ActivationSpec, WeightSpec

QWEN: dict[str, Any] = {"E": 128, "T": 8, "H": 2048, "I": 768, "dtype": "bfloat16"}
BF16: dict[str, Any] = {"gate_up": None, "down": None, "weight_dtype": "bfloat16"}
# Of KINDS, those whose kernels differ most; compiling them takes most of the time.
QUICK = (
    *("bf16", "int8", "int8-bytes", "int8-w8a8", "int4-g32-asym", "int4-g128", "int4-g64-a8", "mxfp4", "nvfp4"),
    *("fp8-w8a8", "fp8-block", "fp8-weights", "no-gate"),
)
ASYMMETRIC = WeightSpec(format="int8", symmetric=False)


def both(spec: WeightSpec) -> dict[str, Any]:
    """Return the fields of a case whose two products share a spec."""
    return {"gate_up": spec, "down": spec}


def gpu_cases() -> list[Case]:
    """Return what is checked on a GPU; neighbours with equal weights share them."""
    cases = [Case(f"qwen-int8-channel-M{M}", M=M, **QWEN) for M in (0, 1, 16, 128, 512, 4096)]
    ragged: dict[str, Any] = {"E": 12, "T": 3, "H": 1000, "I": 550, "dtype": "bfloat16", "activation": "gelu"}
    weights = {
        "int8-tensor": both(WeightSpec(format="int8", strategy="tensor")),
        "int8-channel-asymmetric": both(ASYMMETRIC),
        "int8-g32": both(grouped(32)),
        "int8-g32-asymmetric": both(grouped(32, False, "bfloat16")),
        "int8-g64": both(grouped(64)),
        "int8-g64-asymmetric": both(grouped(64, False)),
        "int8-g128": both(grouped(128, True, "float16")),
        "int8-g128-asymmetric": both(grouped(128, False)),
        "bf16": BF16,
        "int8-up-bf16-down": {"down": None},
    }
    for name, specs in weights.items():
        cases += [Case(f"qwen-{name}-M{M}", M=M, **QWEN, **specs) for M in (1, 4096)]
    for name, fields in KINDS.items():
        cases += [Case(f"qwen-{name}-M{M}", **QWEN | {"M": M} | fields) for M in (1, 64, 2048)]
    plain = both(WeightSpec(format="int8"))
    for activation in ACTIVATIONS:
        fields = ragged | plain | {"activation": activation, "activation_limit": 0.7, "bias": True}
        cases.append(Case(f"ragged-{activation}-bias-M40", M=40, **fields))
        cases.append(Case(f"ragged-{activation}-on-input-M40", M=40, **fields, router_weight_on_input=True))
    for dtype in ("float16", "float32"):
        fields = QWEN | {"dtype": dtype}
        cases += [Case(f"qwen-{dtype}-int8-channel-M{M}", M=M, **fields) for M in (1, 512)]
        cases.append(Case(f"qwen-{dtype}-int8-g64-asymmetric-M512", M=512, **fields, **both(grouped(64, False))))
        cases.append(Case(f"qwen-{dtype}-weights-bf16-M64", M=64, **fields, **BF16))
    for M in (3, 700):
        cases.append(Case(f"ragged-int8-channel-M{M}", M=M, **ragged))
        cases.append(Case(f"ragged-int8-g50-M{M}", M=M, **ragged, **both(grouped(50, False))))
        cases.append(Case(f"ragged-bf16-M{M}", M=M, **ragged, **BF16))
    ids: dict[str, Any] = {"E": 256, "T": 8, "H": 512, "I": 264, "dtype": "bfloat16", "activation": "gelu_tanh"}
    for pattern in ("hostile", "half_the_experts", "one_expert", "nobody"):
        cases.append(Case(f"ids-{pattern}", M=300, ids=pattern, ids_dtype="int32", out_dtype="float32", **ids))
    cases.append(Case("strided", M=77, strided=True, **ids))
    # w13 has 7.5e9 elements: expert 74 and later begin beyond 2**31.
    large: dict[str, Any] = {"E": 256, "T": 8, "H": 7168, "I": 2048, "dtype": "bfloat16"}
    cases += [Case(f"beyond-2**31-M{M}", M=M, **large) for M in (1, 64, 2048)]
    return cases


def quick_cases() -> list[Case]:
    """Return a small call of each kind: what is worth a look after every change to a kernel."""
    sizes: dict[str, Any] = {"E": 16, "T": 4, "H": 512, "I": 256, "dtype": "bfloat16"}
    return [Case(f"quick-{name}", **sizes | {"M": 1 if i % 2 else 300} | KINDS[name]) for i, name in enumerate(QUICK)]


def smoke_cases() -> list[Case]:
    """Return one tiny case of each kind above."""
    tiny: dict[str, Any] = {"M": 3, "E": 3, "H": 40, "I": 24}
    return [
        Case("channel", **tiny),
        Case("channel-M0", **tiny | {"M": 0}),
        Case("bf16", **tiny, **BF16, dtype="bfloat16"),
        Case("g20-asymmetric", **tiny | {"I": 60}, **both(grouped(20, False))),
        Case("fp32", **tiny, dtype="float32", ids="hostile", ids_dtype="int32"),
        Case("fp16-strided", **tiny, **PLAIN, strided=True, out_dtype="float32"),
    ]


class Bench:
    """Builds weights, runs cases, and keeps one row of results per case."""

    def __init__(self, device: Device, quick: bool = False) -> None:
        """Measure on device; a CPU runs under the interpreter and is not timed. quick: torch is not timed either."""
        self.device, self.rows, self.quick = device, list[dict[str, Any]](), quick
        self.on_gpu = device.type == "cuda"
        self._experts: StoredExperts | None = None
        self._key: object = None

    def experts_of(self, case: Case) -> StoredExperts:
        """Return the case's weights; the last ones are kept, and freed before others are made."""
        key = replace(case, name="", M=0, ids="", ids_dtype="", strided=False, out_dtype=None, dtype="")
        if key != self._key:
            self._experts = None
            if self.on_gpu:
                torch.cuda.empty_cache()
            stored = StoredExperts(TritonKernel(), request_of(case, self.device), case.E, bias=case.bias)
            self._experts, self._key = stored, key
        assert self._experts is not None
        return self._experts

    def run(self, case: Case) -> None:
        """Add a row: errors, whether it repeats, whether a CUDA graph gives the same bits, times."""
        started = time.perf_counter()
        specs = ("gate_up", "down", "input_activations", "intermediate")
        row: dict[str, Any] = {"case": asdict(case) | {k: _label(getattr(case, k)) for k in specs}}
        try:
            row |= self._measured(case)
        except Exception:
            row |= {"ok": False, "error": traceback.format_exc(limit=-6)}
        row["seconds"] = round(time.perf_counter() - started, 2)
        self.rows.append(row)
        print(_line(row), flush=True)

    def _measured(self, case: Case) -> dict[str, Any]:
        experts = self.experts_of(case)
        forward = TritonKernel().bind(experts.request, experts.weights, experts.scales)
        inputs = inputs_of(case, str(self.device))
        with _poisoned_memory():
            out = forward(*inputs, out=poisoned_out(case, inputs[0]))
            again = forward(*inputs, out=poisoned_out(case, inputs[0]))
        expected = experts_reference(*inputs, experts, request=experts.request, out_dtype=torch.float32)
        slack = 4.0 if case.dtype == "bfloat16" and not self.on_gpu else 1.0  # the interpreter truncates to bfloat16
        if case.input_activations or case.intermediate:  # values of h may come to lie a step of their format away
            slack *= 4.0
        result = compare(out, expected, inputs[0].dtype, torch.equal(out, again), slack)
        row = asdict(result) | {"ok": result.ok}
        del expected, again
        if self.on_gpu and case.M:
            row |= self._graph(case, forward, inputs)
            row["ok"] = row["ok"] and row["graph_equals_eager"]
            small = case.M > 1 and _bytes_in_bf16(case) < 3e9
            row["torch_us"] = _torch_time(experts, inputs) if small and not self.quick else None
        return row

    def _graph(self, case: Case, forward: Callable[..., Any], inputs: tuple[Any, ...]) -> dict[str, Any]:
        """Capture once, replay on other tokens and other ids than were captured, and time both ways."""
        static = [x.clone() for x in inputs]
        others = inputs_of(case, str(self.device), seed=2)
        for _ in range(2):  # compiles before capture
            forward(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward(*static)
        equal = []
        for values in (inputs, others):
            for kept, value in zip(static, values, strict=True):
                kept.copy_(value)
            captured.fill_(torch.nan)
            graph.replay()
            equal.append(torch.equal(captured, forward(*values)))
        return {
            "graph_equals_eager": all(equal),
            "eager_us": _time(lambda: forward(*inputs)),
            "graph_us": _time(graph.replay),
        }


class _poisoned_memory:
    """Make torch.empty return NaN, so that nothing unwritten can pass for a number."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


def _time(call: Callable[[], object], repeats: int = 20) -> float:
    """Return the median of microseconds of single calls, host time included where it is longer."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e6)
    return round(statistics.median(times), 1)


def _torch_time(experts: StoredExperts, inputs: tuple[Any, ...]) -> float | str:
    """Return the microseconds of torch's bfloat16 grouped products over the same tokens, weights dequantized."""
    try:
        w13, w2 = _plain_weights(experts)
        hidden, topk_weights, topk_ids = inputs
        return _time(lambda: _torch_grouped(hidden.bfloat16(), topk_weights, topk_ids, w13, w2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]


def _plain_weights(experts: StoredExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (w13 (E, 2I, H), w2 (E, H, I)) in bfloat16, gate rows before up rows."""
    w13, w2 = [], []
    for e in range(len(experts)):
        gate, up, down = experts[e]
        w13.append(torch.cat([gate, up]).bfloat16())
        w2.append(down.bfloat16())
    return torch.stack(w13), torch.stack(w2)


def _torch_grouped(hidden: Any, topk_weights: Any, topk_ids: Any, w13: Any, w2: Any) -> Any:
    T, E = topk_ids.shape[1], w13.shape[0]
    valid = ((topk_ids >= 0) & (topk_ids < E)).flatten()
    ids = torch.where(valid, topk_ids.flatten().long(), E - 1)
    sorted_ids, pairs = torch.sort(ids)
    ends = torch.searchsorted(sorted_ids, torch.arange(E, device=ids.device), right=True).int()
    gate, up = torch._grouped_mm(hidden[pairs // T], w13.transpose(1, 2), offs=ends).chunk(2, 1)
    y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2), offs=ends)
    y = y * (topk_weights.flatten() * valid)[pairs, None].to(y.dtype)
    return torch.zeros_like(hidden).index_add_(0, pairs // T, y)


def _bytes_in_bf16(case: Case) -> float:
    return 2.0 * case.E * 3 * case.H * case.I


def _label(spec: WeightSpec | ActivationSpec | None) -> str:
    if spec is None:
        return "unquantized"
    return f"{spec.describe()} {spec.scale_dtype}" if isinstance(spec, WeightSpec) else spec.describe()


def _line(row: dict[str, Any]) -> str:
    name, verdict = row["case"]["name"], "ok  " if row["ok"] else "FAIL"
    if "error" in row:
        return f"{verdict} {name}\n{row['error']}"
    errors = (
        f"max {row['max_error']:.2e} (limit {row['limit']:.1e}) rms {row['rms_error']:.2e} repeats {row['repeats']}"
    )
    times = [f"{key} {row[key]}" for key in ("graph_equals_eager", "eager_us", "graph_us", "torch_us") if key in row]
    return f"{verdict} {name:44} {errors} {' '.join(times)}"


def versions() -> dict[str, Any]:
    """Return what the numbers depend on."""
    import triton

    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "compute_capability": torch.cuda.get_device_capability() if cuda else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "command": " ".join(["python", "benchmarks/check_kernels.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def chosen(cases: list[Case], only: str) -> Iterator[Case]:
    """Return the cases whose name holds `only`."""
    return (case for case in cases if only in case.name)


def main() -> int:
    """Run every case, write the JSON, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one small case of each kind of weights")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny cases under triton's interpreter, no GPU")
    arguments = parser.parse_args()
    if arguments.cpu_smoke:
        bench, cases = Bench(Device("cpu")), smoke_cases()
    elif torch.cuda.is_available():
        device = Device("cuda", 0, torch.cuda.get_device_capability())
        bench, cases = Bench(device, arguments.quick), quick_cases() if arguments.quick else gpu_cases()
    else:
        parser.error("no CUDA device; --cpu-smoke runs tiny cases under the interpreter")
    started = time.perf_counter()
    for case in chosen(cases, arguments.only):
        bench.run(case)
    failed = [row["case"]["name"] for row in bench.rows if not row["ok"]]
    summary = {"seconds": round(time.perf_counter() - started, 1), "cases": len(bench.rows), "failed": failed}
    print(json.dumps(versions() | summary))
    if arguments.out:
        arguments.out.write_text(json.dumps(versions() | summary | {"results": bench.rows}, indent=1) + "\n")
    return 1 if failed or not bench.rows else 0


if __name__ == "__main__":
    sys.exit(main())
