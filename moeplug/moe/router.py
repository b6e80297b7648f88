"""Say how router logits become experts and their weights, and compute it in plain torch: the definition for the kernel.

The numbers, for one token's logits (E,), all in float32 whatever the logits' dtype:

    score   = softmax(logits), or sigmoid(logits), or the logits themselves ("softmax_of_chosen")
    choice  = score + bias; without a bias, and where no group score is a sum, the logits: they order as the scores do,
              but stay apart where scores round to the same number, so that every device chooses the same experts
    groups  = n_group runs of E / n_group experts; the topk_group runs with the greatest group score stay: the greatest
              choice in the run, or the sum of its two greatest
    ids     = the T experts that stay with the greatest choice, greatest first
    weights = score[ids], or softmax(logits[ids]); divided by (their sum + epsilon), or by least_sum where that is
              greater, if renormalize (norm p: by their p-norm instead of their sum); * scaling_factor;
              * expert_scale[ids] where there is one

Score "sparsemixer" is a rule of its own: expert after expert, the greatest logit is taken, and its weight is its
softmax among those left that are near it: (greatest - logit) / max(|logit|, greatest) <= 2 * jitter.

Equal choices: the lowest expert id first, and the lowest group. A NaN counts as greater than all numbers, as in
torch.topk: it is chosen, its weight is NaN (with softmax all weights of its token), and so nothing hides it. Infinities
follow from the formulas: an expert at -inf is chosen last, with weight 0; softmax of a token with +inf, or with nothing
but -inf, is NaN. Ids are always in range, and distinct within a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from moeplug.errors import UsageError

Score = Literal["softmax", "sigmoid", "softmax_of_chosen", "sparsemixer"]
GroupScore = Literal["max", "top2_sum"]
MOST_EXPERTS: Final = 1024  # the kernel keeps a token's row in registers: 32 numbers a thread of one warp
LOGITS_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class RouterSpec:
    """One routing rule, as in the module's docstring; raises UsageError where its parts contradict each other.

    mixtral: RouterSpec(2, renormalize=True). gpt_oss: RouterSpec(4, "softmax_of_chosen"). deepseek_v3: RouterSpec(8,
    "sigmoid", n_group=8, topk_group=4, group_score="top2_sum", renormalize=True, epsilon=1e-20, scaling_factor=2.5).
    """

    top_k: int
    score: Score = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_score: GroupScore = "max"
    renormalize: bool = False
    epsilon: float = 0.0
    scaling_factor: float = 1.0
    least_sum: float = 0.0
    norm: float = 1.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise UsageError(f"top_k={self.top_k}; expected at least 1 expert per token")
        if self.score not in get_args(Score):
            raise UsageError(f"score={self.score!r}; expected one of {', '.join(get_args(Score))}")
        if self.group_score not in get_args(GroupScore):
            raise UsageError(f"group_score={self.group_score!r}; expected one of {', '.join(get_args(GroupScore))}")
        if not 1 <= self.topk_group <= self.n_group:
            raise UsageError(
                f"topk_group={self.topk_group}, n_group={self.n_group}; expected 1 <= topk_group <= n_group"
            )
        if self.renormalize and self.score == "softmax_of_chosen":
            raise UsageError(
                "renormalize with softmax_of_chosen: those weights sum to 1 already; leave one of them out"
            )
        if not (self.epsilon >= 0 and math.isfinite(self.epsilon)) or (self.epsilon and not self.renormalize):
            raise UsageError(f"epsilon={self.epsilon}; expected a finite number from 0 on, and 0 without renormalize")
        if not (self.least_sum >= 0 and math.isfinite(self.least_sum)) or (self.least_sum and not self.renormalize):
            raise UsageError(
                f"least_sum={self.least_sum}; expected a finite number from 0 on, and 0 without renormalize"
            )
        if not self.norm > 0:
            raise UsageError(f"norm={self.norm}; expected a number above 0: 1 divides by the sum")
        if self.score == "sparsemixer" and (self.renormalize or self.n_group > 1 or not self.jitter > 0):
            raise UsageError("sparsemixer needs jitter above 0, and has neither groups nor renormalize")
        if not math.isfinite(self.scaling_factor):
            raise UsageError(f"scaling_factor={self.scaling_factor}; expected a finite number")

    @property
    def is_fused(self) -> bool:
        """Return whether the GPU kernel knows the rule; the others run as torch operations."""
        return self.score != "sparsemixer" and self.norm == 1 and not self.least_sum

    @property
    def limits_groups(self) -> bool:
        """Return whether some groups are left out."""
        return self.topk_group < self.n_group

    def chooses_by_score(self, has_bias: bool) -> bool:
        """Return whether experts are chosen by score plus bias; otherwise by their logits."""
        return has_bias or (self.limits_groups and self.group_score == "top2_sum")


def check_route(logits: Tensor, spec: RouterSpec, bias: Tensor | None) -> None:
    """Raise UsageError unless these logits (M, E) and bias (E,) can be routed by spec."""
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MOST_EXPERTS:
        raise UsageError(f"logits are {tuple(logits.shape)}; expected (M, E) with E from 1 to {MOST_EXPERTS}")
    if logits.dtype not in LOGITS_DTYPES:
        raise UsageError(f"logits are {logits.dtype}; expected bfloat16, float16 or float32")
    E = logits.shape[1]
    if E % spec.n_group:
        raise UsageError(f"n_group={spec.n_group} does not divide E={E} experts")
    if spec.limits_groups and spec.group_score == "top2_sum" and spec.n_group == E:
        raise UsageError(f"n_group={spec.n_group} leaves 1 expert per group; top2_sum needs 2, use group_score='max'")
    if spec.top_k > E // spec.n_group * spec.topk_group:
        left = f"{spec.topk_group} of {spec.n_group} groups of {E // spec.n_group} experts"
        raise UsageError(f"top_k={spec.top_k} is more than {left}")
    if bias is None:
        return
    if spec.score == "sparsemixer":
        raise UsageError("sparsemixer chooses by logits alone: it takes no bias")
    if bias.shape != logits.shape[1:] or not bias.is_floating_point():
        raise UsageError(f"bias is {tuple(bias.shape)} {bias.dtype}; expected floats ({E},), one per expert")
    if bias.device != logits.device:
        raise UsageError(f"bias is on {bias.device}, logits are on {logits.device}; move one of them")


def route_reference(
    logits: Tensor, spec: RouterSpec, bias: Tensor | None = None, expert_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (topk_weights (M, T) float32, topk_ids (M, T) int32) of logits (M, E), bias (E,) for the choice only.

    expert_scale: (E,) float, what each expert's weights are multiplied by last.
    """
    check_route(logits, spec, bias)
    weights, ids = (_sparsemixer if spec.score == "sparsemixer" else _chosen)(logits.float(), spec, bias)
    return scaled_by_expert(weights, ids, expert_scale), ids


def scaled_by_expert(weights: Tensor, ids: Tensor, expert_scale: Tensor | None) -> Tensor:
    """Return weights (M, T) times expert_scale (E,) of their experts."""
    return weights if expert_scale is None else weights * expert_scale.float()[ids.long()]


def _chosen(logits: Tensor, spec: RouterSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = _scores(logits, spec)
    choice = logits
    if spec.chooses_by_score(bias is not None):
        choice = scores if bias is None else scores + bias.float()
    order = _descending(choice)
    if spec.limits_groups:
        left_out = ~_kept(choice, spec).gather(1, order)
        order = order.gather(1, torch.sort(left_out.to(torch.uint8), dim=1, stable=True).indices)
    ids = order[:, : spec.top_k]
    weights = scores.gather(1, ids)
    if spec.score == "softmax_of_chosen":
        weights = weights.softmax(1)
    if spec.renormalize:
        total = weights.sum(1, keepdim=True) if spec.norm == 1 else weights.norm(spec.norm, 1, keepdim=True)
        weights = weights / (total + spec.epsilon).clamp(min=spec.least_sum)
    return weights * spec.scaling_factor, ids.to(torch.int32)


def _sparsemixer(logits: Tensor, spec: RouterSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    ids = _descending(logits)[:, : spec.top_k]
    left, weights = logits, []
    for chosen in torch.split(ids, 1, dim=1):
        greatest = left.gather(1, chosen)
        far = (greatest - logits) / torch.maximum(logits.abs(), greatest) > 2 * spec.jitter
        weights.append(left.masked_fill(far, -math.inf).softmax(1).gather(1, chosen))
        left = left.scatter(1, chosen, -math.inf)
    return torch.cat(weights, 1) * spec.scaling_factor, ids.to(torch.int32)


def _scores(logits: Tensor, spec: RouterSpec) -> Tensor:
    if spec.score == "softmax":
        return logits.softmax(1)
    return logits.sigmoid() if spec.score == "sigmoid" else logits


def _descending(x: Tensor) -> Tensor:
    """Return the indices (M, n) that sort rows from greatest to least: NaN first, the lower index first of equals."""
    # A radix sort on a GPU may tell -0.0 from 0.0.
    return torch.sort(torch.where(x == 0, 0.0, x), dim=1, descending=True, stable=True).indices


def _kept(choice: Tensor, spec: RouterSpec) -> Tensor:
    """Return (M, E) bool: whether an expert's group is among the topk_group best."""
    groups = choice.view(choice.shape[0], spec.n_group, choice.shape[1] // spec.n_group)
    group_scores = groups.amax(2) if spec.group_score == "max" else groups.topk(2, dim=2).values.sum(2)
    best = _descending(group_scores)[:, : spec.topk_group]
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
    return kept.unsqueeze(2).expand_as(groups).flatten(1)
