"""The router kernel's cases; as a script it runs them and prints {name: what differs} as JSON.

    TRITON_INTERPRET=1 python tests/router_cases.py cpu          test_router.py starts it so, once
    PYTHONPATH=. python tests/router_cases.py cuda               on a GPU, needs neither pytest nor transformers

The interpreter is chosen when a kernel is decorated, so that is a process of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass

import torch

from moeplug.moe.router import RouterSpec, route_reference

DEEPSEEK_V3 = RouterSpec(8, "sigmoid", 8, 4, "top2_sum", True, 1e-20, 2.5)
DEEPSEEK_V2 = RouterSpec(6, "softmax", 8, 3, "max", scaling_factor=16.0)
QWEN3 = RouterSpec(8, renormalize=True)
GPT_OSS = RouterSpec(4, "softmax_of_chosen")
# Exponentials, a quotient and a sum over T or E in another order: a few units of float32 each.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """M tokens over E experts. bias: none, float32 or bfloat16. kind: what the logits look like, see `inputs_of`."""

    name: str
    spec: RouterSpec
    E: int
    M: int = 5
    dtype: str = "float32"
    bias: str | None = None
    kind: str = "normal"
    strided: bool = False


GROUPED_BY_MAX = RouterSpec(3, "softmax", 4, 2, "max", True)
GROUPED_BY_SUM = RouterSpec(3, "sigmoid", 4, 2, "top2_sum", True, 1e-20)
KINDS = ("coarse", "all_equal", "one_is_inf", "most_are_minus_inf", "minus_inf", "one_is_nan", "nan", "zeros", "far")

_ALL = [
    Case("qwen3", QWEN3, 128, dtype="bfloat16"),
    Case("deepseek_v3", DEEPSEEK_V3, 256, bias="float32"),
    Case("deepseek_v2_groups_of_20", DEEPSEEK_V2, 160),
    Case("mixtral", RouterSpec(2, renormalize=True), 8, M=33, dtype="bfloat16"),
    Case("gpt_oss", GPT_OSS, 32, dtype="float16"),
    Case("minimax_m2", RouterSpec(8, "sigmoid", renormalize=True), 256, bias="bfloat16"),
    Case("softmax_with_bias", RouterSpec(6, epsilon=1e-12, renormalize=True), 64, bias="float32"),
    Case("softmax_of_chosen_with_bias", GPT_OSS, 32, bias="float32"),
    Case("sum_of_groups_without_bias", GROUPED_BY_SUM, 12),
    Case("sum_of_groups_of_3_of_5", RouterSpec(5, "sigmoid", 5, 2, "top2_sum"), 15, bias="float32"),
    Case("all_groups_stay", RouterSpec(4, "sigmoid", 4, 4, "top2_sum"), 16, bias="float32"),
    Case("one_expert_per_group", RouterSpec(2, n_group=6, topk_group=3), 6),
    Case("one_expert", RouterSpec(1, renormalize=True), 1, M=40),
    Case("one_expert_sigmoid_with_bias", RouterSpec(1, "sigmoid"), 1, bias="float32"),
    Case("all_experts", RouterSpec(13, "sigmoid", renormalize=True), 13),
    Case("1024_experts", RouterSpec(32), 1024, M=2),
    Case("no_tokens", QWEN3, 128, M=0),
    Case("many_tokens", RouterSpec(2), 6, M=130),
    Case("strided", QWEN3, 100, strided=True, dtype="bfloat16"),
    Case("strided_with_bias", DEEPSEEK_V3, 256, strided=True, bias="float32"),
    *(Case(f"softmax_{kind}", RouterSpec(3, renormalize=True), 12, kind=kind) for kind in KINDS),
    *(Case(f"sigmoid_{kind}", RouterSpec(3, "sigmoid", renormalize=True), 12, kind=kind) for kind in KINDS),
    *(Case(f"softmax_of_chosen_{kind}", RouterSpec(3, "softmax_of_chosen"), 12, kind=kind) for kind in KINDS),
    *(Case(f"max_of_groups_{kind}", GROUPED_BY_MAX, 12, kind=kind) for kind in KINDS),
    *(Case(f"sum_of_groups_{kind}", GROUPED_BY_SUM, 12, kind=kind, bias="float32") for kind in KINDS),
]
CASES = {case.name: case for case in _ALL}


def inputs_of(case: Case, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (logits (M, E), bias (E,) or None), the same on every device."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(case.M, case.E, generator=g) * 2
    bias = None if case.bias is None else torch.randn(case.E, generator=g).to(getattr(torch, case.bias)) * 0.1
    nan, inf = float("nan"), float("inf")
    if case.kind == "coarse":  # many ties
        logits = logits.round()
    elif case.kind == "all_equal":
        logits, bias = torch.full_like(logits, -1.5), None if bias is None else torch.zeros_like(bias)
    elif case.kind == "one_is_inf":
        logits[:, 4] = inf
    elif case.kind == "most_are_minus_inf":
        logits[:, 2:] = -inf
    elif case.kind in ("minus_inf", "nan"):
        logits[1:] = -inf if case.kind == "minus_inf" else nan
    elif case.kind == "one_is_nan":
        logits[:, 7] = nan
        logits[2, 3] = -nan
    elif case.kind == "zeros":
        logits = torch.where(logits > 0, 0.0, -0.0)
    elif case.kind == "far":  # scores underflow to 0 and saturate at 1, logits still differ
        logits *= 100
    logits = logits.to(getattr(torch, case.dtype))
    if case.strided:
        wide = torch.full((case.M, 2 * case.E + 3), nan, dtype=logits.dtype)
        wide[:, 1 : 2 * case.E : 2] = logits
        logits = wide.to(device)[:, 1 : 2 * case.E : 2]
        if bias is not None:
            bias = bias.repeat_interleave(3).to(device)[::3]
    return logits.to(device), None if bias is None else bias.to(device)


def difference(found: tuple[torch.Tensor, torch.Tensor], case: Case) -> str | None:
    """Return None if weights and ids are the reference's, else what differs. No case has choices a rounding apart."""
    (weights, ids), (logits, bias) = found, inputs_of(case)
    weights, ids = weights.cpu(), ids.cpu()
    expected_weights, expected_ids = route_reference(logits, case.spec, bias)
    if (weights.dtype, ids.dtype) != (torch.float32, torch.int32):
        return f"dtypes are {weights.dtype}, {ids.dtype}"
    if ids.shape != expected_ids.shape or weights.shape != expected_ids.shape:
        return f"shapes are {tuple(weights.shape)}, {tuple(ids.shape)}, not {tuple(expected_ids.shape)}"
    if not torch.equal(ids, expected_ids):
        return f"ids {ids.tolist()}, not {expected_ids.tolist()}"
    if not torch.allclose(weights, expected_weights, rtol=TOLERANCE, atol=1e-30, equal_nan=True):
        return f"weights {weights.tolist()}, not {expected_weights.tolist()}"
    return None


def main(device: str) -> None:
    """Run every case, each in its own try, and print the results as one JSON object."""
    from moeplug.kernels.router import route_triton

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then gives NaN: nothing unwritten is read
    results = {}
    for case in CASES.values():
        try:
            logits, bias = inputs_of(case, device)
            results[case.name] = difference(route_triton(logits, case.spec, bias), case)
        except Exception:
            results[case.name] = traceback.format_exc(limit=-4)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
