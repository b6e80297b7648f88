"""Run the Triton kernels' cases under TRITON_INTERPRET=1 and print {name: errors} as JSON.

The interpreter is chosen when a kernel is decorated, so this is a process of its own: test_kernels_interpreter.py
starts it once, with the names to run.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from formats import FORMATS, SPECS, blocks, grouped
from kernel_cases import ALL_CASES, CASES, TOKEN, Case, StoredExperts, inputs_of, request_of, run_case

from moeplug import quantization
from moeplug.kernels import weights
from moeplug.kernels.fused_moe import TritonExperts, TritonKernel
from moeplug.kernels.operands import operand
from moeplug.kernels.schedule import Blocks, Schedule
from moeplug.kernels.select import Device, ExpertsForward, KernelRequest
from moeplug.spec import ActivationSpec, WeightSpec
from moeplug.testing.interpreter import round_conversions

H100: Final = Device("cuda", 0, (9, 0))


@dataclass(frozen=True)
class Forced(TritonKernel):
    """The kernel with a schedule of the test's choosing, instead of what `choose_schedule` says."""

    schedule: Schedule | None = None

    def bind(
        self, request: KernelRequest, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> ExpertsForward:
        layout = self.layout_for(request)
        w13 = operand(request, "w13", weights, scales, layout.w13_words)
        return TritonExperts(
            request, w13, operand(request, "w2", weights, scales, layout.w2_words), schedule=self.schedule
        )


def _schedules() -> dict[str, Schedule]:
    """Every road through the kernels that an interpreter can take (TMA is none)."""
    plain, swapped = Blocks(16, 64, 64, 2, 4, 2), Blocks(16, 64, 128, 1, 4, 2, SWAP=True)
    tall, wide = Blocks(64, 64, 64, 8, 4, 2), Blocks(16, 128, 64, 2, 4, 2)
    return {
        "sorted": Schedule(0, plain, plain),
        "sorted-swap": Schedule(0, swapped, swapped),
        "sorted-split": Schedule(0, plain, replace(plain, SPLIT_K=2)),
        "pairs": Schedule(32, plain, plain),
        "pairs-swap-split": Schedule(32, swapped, replace(swapped, BLOCK_K=64, SPLIT_K=2)),
        "half": Schedule(0, tall, replace(tall, SWAP=True)),
        "wide": Schedule(0, wide, plain),  # the first product quantizes groups of 64 itself
    }


def _forced_cases() -> dict[str, tuple[Case, Schedule]]:
    """Every schedule with weights of every kind. An expert gets 0 to 24 of 24 pairs: full, half and empty blocks."""
    clamped: dict[str, Any] = {"activation": "swiglu_clamped", "activation_limit": 0.7}
    both: dict[str, Any] = {"input_activations": TOKEN["int8"], "intermediate": TOKEN["int8"]}
    of_64 = ActivationSpec(format="fp8", strategy="group", group_size=64)
    groups: dict[str, Any] = {"input_activations": of_64, "intermediate": of_64}
    kinds: dict[str, tuple[WeightSpec | None, dict[str, Any]]] = {
        "unquantized": (None, {"weight_dtype": "float16"}),
        "int8-words": (WeightSpec(format="int8", symmetric=False), {"bias": True, **clamped}),
        "int8-bytes": (WeightSpec(format="int8"), {"H": 136, "I": 144, "router_weight_on_input": True}),
        "int4-g32-asym": (grouped("int4", 32, symmetric=False), {}),
        "int4-g128": (grouped("int4", 128, scale_dtype="float16"), {"I": 256}),
        "mxfp4": (SPECS["mxfp4"], {"bias": True}),
        "fp8-block": (blocks("fp8", 64, 64), {}),
        "int8-w8a8": (WeightSpec(format="int8"), both),
        "fp8-groups": (WeightSpec(format="fp8"), groups),
        "no-gate": (grouped("int8", 32, symmetric=False), {"gated": False, "activation": "relu2", "bias": True}),
        "no-gate-groups": (WeightSpec(format="fp8"), groups | {"gated": False, "activation": "relu2"}),
        "w4a8": (grouped("int4", 64), both | {"intermediate": TOKEN["fp8"]}),
    }
    cases = {}
    for schedule_name, schedule in _schedules().items():
        for kind, (spec, fields) in kinds.items():
            fields = {"M": 12, "H": 128, "I": 128, "gate_up": spec, "down": spec, "ids": "hostile"} | fields
            steps_in_groups = not kind.endswith("groups") or of_64.group_size >= schedule.first.BLOCK_K
            if (schedule_name == "wide" and not kind.endswith("groups")) or not steps_in_groups:
                continue
            if schedule_name == "half":  # of 70 pairs one expert has 64 and some more, or fewer than 32
                fields |= {"M": 70, "T": 1, "E": 2}
            cases[f"{schedule_name}-{kind}"] = (Case(f"{schedule_name}-{kind}", **fields), schedule)
    return cases


def _served() -> list[str]:
    """Return the cases that the kernel serves on a GPU; the CPU's kernel serves other groups of nibbles too."""
    asked = {name: replace(request_of(case), device=H100) for name, case in ALL_CASES.items()}
    return [name for name, request in asked.items() if TritonKernel().reason_against(request) is None]


def _repeats(name: str) -> bool:
    """Return whether a case repeats what others prove, with another scale type, hidden type or schedule."""
    if name in FORCED:
        everywhere = name.endswith(("int8-words", "int4-g32-asym", "fp8-block"))
        return not everywhere and name.startswith(("sorted-split-", "pairs-swap-split-", "half-"))
    if name in CASES:
        return name.startswith(("int8-", "hidden-")) and name.endswith(("-float16", "-bfloat16"))
    return name.endswith("-bfloat16") and name.removesuffix("-bfloat16") in SPECS


FORCED: Final = _forced_cases()
SERVED: Final = [*_served(), *FORCED]
SLOW: Final = [name for name in SERVED if _repeats(name)]
QUICK: Final = [name for name in SERVED if name not in SLOW]
DECODES: Final = [f"decode-{name}" for name in FORMATS]


def slack(case: Case) -> float:
    """Return the factor on the usual limit: where activations are quantized, h may come to lie on the other side of a
    rounding boundary, and one value of it is then a step of its format off."""
    return 2.0 if case.input_activations or case.intermediate else 1.0


def _decodes(name: str) -> bool:
    """Return whether the decode function of a format gives its values for every word, whatever is multiplied."""
    from moeplug.testing._decode_words import decoded_and_expected

    fmt, same = FORMATS[name], []
    for dtype in fmt.exact_in:
        decoded, expected = decoded_and_expected(fmt, dtype)
        number = ~expected.isnan()  # e4m3 has one NaN, which is never stored
        same.append(torch.equal(decoded[number], expected[number]))
    return all(same)


ENCODES: Final = [f"encode-{name}" for name, spec in SPECS.items() if FORMATS[spec.format].triton_encode()]


def _encodes(name: str) -> bool:
    """Return whether weights are quantized, and their errors taken, with the bytes and numbers of the core's torch."""
    spec = SPECS[name]
    fmt, K = FORMATS[spec.format], max(192, 2 * spec.columns(1 << 14) if spec.group_size else 0)
    for N, words, dtype, transposed in ((130, False, torch.float16, False), (7, True, torch.float32, True)):
        weight = torch.randn(2, N, K) * 0.02
        weight[0, 0], weight[0, 1, 0], weight[1, -1] = 0.0, 3.0, weight[1, -1] * 1e-4
        weight[1, 1, :64] = torch.linspace(-0.127, 0.127, 64)
        weight = weight.to(dtype)
        weight = weight.mT.contiguous().mT if transposed else weight
        poisoned = torch.full((2, 2 * N, K // fmt.values_per_element), 0x55, dtype=fmt.storage_dtype)
        expected, found = poisoned.clone()[:, ::2], poisoned[:, ::2]  # every second row, as gate's among up's
        scales = quantization.quantize(weight, spec, fmt, expected, words)
        if not weights.serves(spec, fmt, found):
            assert not spec.symmetric or spec.scale_dtype == quantization.E4M3, "no other spec is left to torch"
            continue
        scale = torch.full_like(scales.scale.view(torch.uint8), 0x7F).view(scales.scale.dtype)
        weights.quantize(weight, spec, fmt, found, words, scale)
        same = [torch.equal(expected, found), torch.equal(scales.scale, scale)]
        same.append(torch.equal(quantization.largest_magnitude(weight), weights.largest_magnitude(weight)))
        # Into slots of what a layer keeps, where a weight's one scale is every row's.
        rows = N if spec.strategy == "tensor" else scale.shape[1]
        layer = torch.full((3, 2 * N, found.shape[2]), 0x55, dtype=fmt.storage_dtype)
        layer_scale = torch.full((3, 2 * rows, scale.shape[2]), 0.5).to(scale.dtype)
        for step in (1, 3):
            direct = weights.DirectWeights(layer[:, ::2], layer_scale[:, ::2], spec, fmt, words, step)
            direct.quantize(1, weight)
            direct.quantize(0, weight[:1])
            order, (squares, peaks) = [0, 0, 1], direct.measured()
            errors = quantization.squared_error(weight, expected, scales, fmt, words, step)
            same += [torch.equal(expected[order], layer[:, ::2]), bool((layer[:, 1::2] == 0x55).all())]
            same.append(torch.equal(scales.scale[order].expand(3, rows, -1), layer_scale[:, ::2]))
            same.append(torch.allclose(squares, errors[[order[slot] for slot in direct.slots]], rtol=1e-5))
            same.append(torch.equal(peaks[:, 1], weights.largest_magnitude(weight)[[0, 1, 0]]))
            layer.fill_(0x55)
        if not all(same):
            return False
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight[1, 3, 5] = bad
        peaks = weights.largest_magnitude(weight)
        if math.isfinite(peaks[1]) or not math.isfinite(peaks[0]):
            return False
    return True


def _nan_token() -> bool:
    """Return whether a token of NaN, in a block with others of its expert, leaves theirs as they are."""
    same = []
    for schedule in map(_schedules().get, CHECKED):
        for activations in (None, TOKEN["int8"]):
            case = Case("nan", M=6, E=2, H=128, I=128, input_activations=activations, intermediate=activations)
            request = request_of(case)
            kernel, experts = Forced(schedule), StoredExperts(Forced(schedule), request, case.E)
            forward = kernel.bind(request, experts.weights, experts.scales)
            hidden, topk_weights, topk_ids = inputs_of(case)
            clean = forward(hidden, topk_weights, topk_ids)
            hidden[2] = torch.nan
            spoiled = forward(hidden, topk_weights, topk_ids)
            others = [0, 1, 3, 4, 5]
            same.append(bool(spoiled[2].isnan().all()) and torch.equal(spoiled[others], clean[others]))
    return all(same)


CHECKED: Final = ("sorted", "pairs-swap-split", "half")
CHECKS: Final = {"nan-token": _nan_token}


def main(names: list[str]) -> None:
    """Run the named cases (none: all), each in its own try, and print the results as one JSON object."""
    round_conversions()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then gives NaN: nothing unwritten is read
    results = {}
    for name in names or [*SERVED, *DECODES, *ENCODES, *CHECKS]:
        if name in CHECKS:
            results[name] = {"ok": CHECKS[name]()}
            continue
        if name in DECODES:
            results[name] = {"ok": _decodes(name.removeprefix("decode-"))}
            continue
        if name in ENCODES:
            results[name] = {"ok": _encodes(name.removeprefix("encode-"))}
            continue
        case, schedule = FORCED.get(name) or (ALL_CASES[name], None)
        try:
            result = run_case(case, Forced(schedule), slack=slack(case))
            results[case.name] = asdict(result) | {"ok": result.ok}
        except Exception:
            results[case.name] = {"ok": False, "error": traceback.format_exc(limit=-4)}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
