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

from kernel_cases import CASES, Case, run_case


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
