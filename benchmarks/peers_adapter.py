"""moeplug's column in a harness of peers: `make(scheme, w13, w2)` returns the experts as a callable.

The tables of docs/kernels-h100.md come from a harness that gives every contestant the same bfloat16 weights, tokens and
routing in one process, and asks for callable(hidden (M, H), topk_weights (M, T), topk_ids (M, T)) -> (M, H). Put a link
to this file where it looks for contestants, and run it from a checkout. A harness that calls `prepare(M, calls, timer)`
has the kernel tuned for these sizes first, as it lets its peers be; otherwise the shipped table and rules choose.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from formats import SPECS, scheme_of

import moeplug
from moeplug.kernels import tune
from moeplug.kernels.fused_moe import TritonExperts
from moeplug.scheme import Scheme
from moeplug.spec import ActivationSpec, WeightSpec

TOKEN: Final = {fmt: ActivationSpec(format=fmt) for fmt in ("int8", "fp8")}
GROUPS_OF_128: Final = ActivationSpec(format="fp8", strategy="group", group_size=128)
INT4: Final = WeightSpec(format="int4", strategy="group", group_size=128, scale_dtype="bfloat16")
BY_NAME: Final[dict[str, tuple[WeightSpec, ActivationSpec | None]]] = {
    "int8_w8a16": (SPECS["int8"], None),
    "int8_w8a8": (SPECS["int8"], TOKEN["int8"]),
    "fp8_tensor": (SPECS["fp8-tensor"], TOKEN["fp8"]),
    "fp8_channel": (SPECS["fp8-channel"], TOKEN["fp8"]),
    "fp8_block": (SPECS["fp8-block"], GROUPS_OF_128),
    "int4_w4a16": (INT4, None),
    "mxfp4_w4a16": (SPECS["mxfp4"], None),
}
SCHEMES: Final = ["bf16", *BY_NAME]


class Contestant:
    """One scheme's experts."""

    def __init__(self, experts: Callable[..., Tensor]) -> None:
        """Call these experts, until `prepare` finds a faster schedule for a number of tokens."""
        self._experts = experts
        self._tuned: dict[int, Callable[..., Tensor]] = {}
        self.best: dict[int, str] = {}
        if not isinstance(experts, TritonExperts):
            self.prepare = None  # type: ignore[assignment, method-assign]

    def __call__(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return self._tuned.get(hidden.shape[0], self._experts)(hidden, topk_weights, topk_ids)

    def prepare(self, M: int, calls: Sequence[tuple[Tensor, Tensor, Tensor]], timer: Any) -> int:
        """Tune for M tokens; return how many schedules were timed. Times are moeplug's own, not the harness's."""
        assert isinstance(self._experts, TritonExperts)
        result = tune.tune(self._experts, calls[0][2].shape[1], M)
        self._tuned[M] = self._experts.with_schedule(result.row.schedule)
        self.best[M] = result.describe()
        return result.measured


def make(scheme: str, w13: Tensor, w2: Tensor) -> Contestant:
    """Return the experts of w13 (E, 2I, H), gate rows then up rows, and w2 (E, H, I) under one of SCHEMES."""
    experts = moeplug.quantize_experts(w13, w2, _scheme(scheme))
    return Contestant(torch.no_grad()(experts) if w13.device.type == "cpu" else experts.groups[0].bound())


def _scheme(name: str) -> Scheme:
    if name == "bf16":
        return Scheme.from_data({"api": 1, "name": name, "plugin": "int8", "weights": None})
    weights, activations = BY_NAME[name]
    return scheme_of(weights, activations, activations)
