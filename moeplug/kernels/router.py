"""Route tokens to experts: one Triton launch on a GPU, plain torch elsewhere.

    topk_weights, topk_ids = route(router_logits, RouterSpec(8, renormalize=True))

Numbers as `moeplug.moe.router` defines them. The kernel chooses the same experts as the reference wherever they are
chosen by logits; where by score plus bias, two choices within a rounding of float32 may come in the other order.
triton is imported at the first launch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from moeplug.errors import UsageError
from moeplug.kernels.launch import current_device
from moeplug.moe.router import GroupScore, RouterSpec, Score, check_route, route_reference, scaled_by_expert

# Logits that one program of one warp holds at least: less would leave lanes idle. Chosen, not measured.
LEAST_LOGITS_PER_PROGRAM: Final = 32


def route(
    logits: Tensor, spec: RouterSpec, bias: Tensor | None = None, expert_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (topk_weights (M, T) float32, topk_ids (M, T) int32) of logits (M, E), greatest choice first.

    logits: bfloat16, float16 or float32, any strides, E up to 1024. bias: (E,) float, for the choice only.
    expert_scale: (E,) float, what each expert's weights are multiplied by last. Inference only.
    Raises UsageError where they do not fit each other or spec.
    """
    check_route(logits, spec, bias)
    if torch.is_grad_enabled() and logits.requires_grad:
        raise UsageError("route is for inference: call it under torch.no_grad(); route_reference has gradients")
    if not spec.is_fused:
        return route_reference(logits, spec, bias, expert_scale)
    if torch.compiler.is_compiling():  # eager calls spare themselves the dispatcher
        weights, ids = torch.ops.moeplug.route(
            logits, bias, spec.top_k, spec.score, spec.n_group, spec.topk_group, spec.group_score,
            spec.renormalize, spec.epsilon, spec.scaling_factor,
        )  # fmt: skip
    else:
        weights, ids = _route(logits, spec, bias)
    return scaled_by_expert(weights, ids, expert_scale), ids


def route_triton(logits: Tensor, spec: RouterSpec, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what `route` does, by the kernel whatever the device: on a CPU under triton's interpreter, for tests.

    The arguments are taken as checked.
    """
    M, E = logits.shape
    weights = torch.empty(M, spec.top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(M, spec.top_k, dtype=torch.int32, device=logits.device)
    if M == 0:  # a grid of 0 is a sticky CUDA error
        return weights, ids
    launch = launch_of(E, spec, bias is not None)
    with current_device(logits.device):
        _kernel()[(-(-M // launch["BLOCK_M"]),)](
            logits, logits.stride(0), logits.stride(1), bias, 0 if bias is None else bias.stride(0),
            weights, ids, M, **launch,
        )  # fmt: skip
    return weights, ids


@lru_cache(maxsize=256)
def launch_of(E: int, spec: RouterSpec, has_bias: bool) -> dict[str, Any]:
    """Return the keyword arguments of the kernel's launch."""
    BLOCK_G, BLOCK_S = _power_of_two(spec.n_group), _power_of_two(E // spec.n_group)
    return {
        "T": spec.top_k,
        "SCORE": spec.score,
        "BY_SCORE": spec.chooses_by_score(has_bias),
        "N_GROUP": spec.n_group,
        "TOPK_GROUP": spec.topk_group,
        "TOP2_SUM": spec.group_score == "top2_sum",
        "GROUP_SIZE": E // spec.n_group,
        "RENORMALIZE": spec.renormalize,
        "EPSILON": float(spec.epsilon),
        "SCALING_FACTOR": float(spec.scaling_factor),
        "BLOCK_M": max(1, LEAST_LOGITS_PER_PROGRAM // (BLOCK_G * BLOCK_S)),
        "BLOCK_G": BLOCK_G,
        "BLOCK_S": BLOCK_S,
        "num_warps": 1,  # triton lays a row over all warps of a program, and its reductions then wait for each other
        "enable_fp_fusion": True,  # said outright: Triton 3.9 warns where it is left out
    }


def _route(logits: Tensor, spec: RouterSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return (route_triton if logits.is_cuda else route_reference)(logits, spec, bias)


@lru_cache(maxsize=1)
def _kernel() -> Any:
    try:
        from moeplug.kernels import _router
    except ImportError as error:
        raise UsageError(
            f"route on a GPU needs triton ({error}): pip install triton, or use route_reference"
        ) from error
    return _router.route_kernel


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@torch.library.custom_op(
    "moeplug::route",
    mutates_args=(),
    schema="(Tensor logits, Tensor? bias, int top_k, str score, int n_group, int topk_group, str group_score, "
    "bool renormalize, float epsilon, float scaling_factor) -> (Tensor, Tensor)",
)
def _route_op(
    logits: Tensor, bias: Tensor | None, top_k: int, score: Score, n_group: int, topk_group: int,
    group_score: GroupScore, renormalize: bool, epsilon: float, scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What torch.compile sees of `route`: a RouterSpec's fields one by one, for a schema knows no dataclass."""
    spec = RouterSpec(top_k, score, n_group, topk_group, group_score, renormalize, epsilon, scaling_factor)
    return _route(logits, spec, bias)


@_route_op.register_fake
def _(logits: Tensor, bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)
