"""Run the Triton kernels' cases under TRITON_INTERPRET=1 and print {name: errors} as JSON.

The interpreter is chosen when a kernel is decorated, so this is a process of its own: test_kernels_interpreter.py
starts it once, with the names to run.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_cases import CHANNEL, ID_PATTERNS, Case, grouped, run_case

from moeplug.spec import WeightSpec

SCALE_DTYPES = ("float32", "bfloat16", "float16")


def _int8_cases() -> list[Case]:
    specs: dict[str, WeightSpec] = {}
    for dtype in SCALE_DTYPES:
        specs[f"tensor-{dtype}"] = WeightSpec(format="int8", strategy="tensor", scale_dtype=dtype)
        for symmetric in (True, False):
            kind = f"{'symmetric' if symmetric else 'asymmetric'}-{dtype}"
            specs[f"channel-{kind}"] = WeightSpec(format="int8", symmetric=symmetric, scale_dtype=dtype)
            specs[f"group32-{kind}"] = grouped(32, symmetric, dtype)
    cases = [Case(f"int8-{name}", H=64, I=32, gate_up=spec, down=spec) for name, spec in specs.items()]
    for size, H, I in ((16, 48, 32), (20, 40, 60), (48, 96, 144), (64, 64, 128), (128, 128, 256), (40, 40, 40)):
        spec = grouped(size, symmetric=False)
        cases.append(Case(f"int8-group{size}-K-{H}-and-{I}", H=H, I=I, gate_up=spec, down=spec))
    return cases


def _shape_cases() -> list[Case]:
    cases = [
        Case("no-tokens", M=0),
        Case("one-token", M=1),
        Case("one-token-one-expert", M=1, T=1, E=1),
        Case("no-experts-per-token", T=0),
        Case("ragged-sizes", M=11, H=53, I=37),
        Case("odd-sizes-below-a-block", M=3, H=5, I=3),
        Case("K-of-several-blocks-and-a-tail", M=2, H=300, I=270),
        Case("several-column-tiles", M=20, T=2, H=72, I=200),
        Case("blocks-of-32", M=30, T=2, E=3, H=40, I=24),
        Case("blocks-of-64", M=75, T=2, E=3, H=40, I=24),
        Case("blocks-of-128-int8", M=140, T=1, E=1, H=40, I=72),
        Case(
            "blocks-of-128-unquantized", M=140, T=1, E=1, H=24, I=130, gate_up=None, down=None, weight_dtype="float16"
        ),
        Case("many-experts", M=4, T=4, E=1100, H=8, I=8),
        Case("more-choices-than-experts", M=6, T=7, E=3),
        Case("strided-inputs-and-output", M=9, strided=True),
        Case("strided-inputs-int32-ids", M=9, strided=True, ids_dtype="int32", ids="hostile"),
        Case("float32-output-of-float16", out_dtype="float32"),
    ]
    cases += [
        Case(f"ids-{ids}-{dtype}", M=12, ids=ids, ids_dtype=dtype)
        for ids in ID_PATTERNS
        for dtype in ("int32", "int64")
    ]
    cases += [Case(f"activation-{name}", activation=name) for name in ("silu", "gelu", "gelu_tanh", "relu")]
    return cases


def _dtype_cases() -> list[Case]:
    cases = []
    for dtype in ("float16", "float32", "bfloat16"):
        for weight_dtype in ("float16", "float32", "bfloat16"):
            name = f"hidden-{dtype}-weights-{weight_dtype}"
            cases.append(Case(name, gate_up=None, down=None, dtype=dtype, weight_dtype=weight_dtype))
        cases.append(Case(f"hidden-{dtype}-int8-channel", dtype=dtype))
        cases.append(
            Case(
                f"hidden-{dtype}-int8-group32-asymmetric",
                dtype=dtype,
                H=64,
                I=96,
                gate_up=grouped(32, False),
                down=grouped(32, False),
            )
        )
        cases.append(Case(f"hidden-{dtype}-unquantized-down", dtype=dtype, down=None))
        cases.append(Case(f"hidden-{dtype}-unquantized-gate-up", dtype=dtype, gate_up=None, weight_dtype="float32"))
    # float32 weights make the second product's blocks smaller than the first's: two tables in one call.
    cases.append(Case("two-sizes-of-block", M=40, E=2, gate_up=CHANNEL, down=None, weight_dtype="float32"))
    cases.append(Case("channel-and-group", H=40, I=64, down=grouped(32, False, "bfloat16")))
    return cases


CASES = {case.name: case for case in (*_int8_cases(), *_shape_cases(), *_dtype_cases())}


def slack(case: Case) -> float:
    """Return the factor on the usual limit: the interpreter truncates float32 to bfloat16 instead of rounding it."""
    return 4.0 if case.dtype == "bfloat16" else 1.0


def main(names: list[str]) -> None:
    """Run the named cases (none: all), each in its own try, and print the results as one JSON object."""
    from moeplug.kernels.fused_moe import TritonKernel

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then gives NaN: nothing unwritten is read
    results = {}
    for case in (CASES[name] for name in names or CASES):
        try:
            result = run_case(case, TritonKernel(), slack=slack(case))
            results[case.name] = asdict(result) | {"ok": result.ok}
        except Exception:
            results[case.name] = {"ok": False, "error": traceback.format_exc(limit=-4)}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
