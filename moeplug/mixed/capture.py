"""Run a model on a text and keep what its experts are given: hidden states, expert ids and router weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeplug import api, evaluation
from moeplug.mixed.candidates import NONE, unquantized
from moeplug.mixed.task import Task
from moeplug.moe.experts import QuantizedExperts
from moeplug.pipeline import Progress
from moeplug.scheme import Scheme


class Sample(NamedTuple):
    """What one layer's experts were given, on the host. hidden: (M, H). topk_ids, topk_weights: (M, T)."""

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


def capture(
    task: Task,
    ids: Tensor,
    *,
    scheme: str | Path | Scheme = NONE,
    loading: Progress | None = None,
    progress: Progress | None = None,
) -> dict[int, Sample]:
    """Return layer index → Sample of the tokens ids (n,).

    scheme: how the model runs: `none`, unquantized, or under a scheme that fits where that does not. It is loaded as
    `load` does, and gone afterwards. The samples take n * H * 2 bytes a layer on the host.
    loading, progress: told of (bytes read, bytes to read) and (tokens, tokens in all).
    """
    resolved = unquantized().scheme if scheme == NONE else scheme
    path, registry = task.checkpoint.path, task.registry
    loaded = api.load(path, resolved, device=task.device, runtime="transformers", progress=loading, registry=registry)
    parts: dict[int, list[Sample]] = {index: [] for index in loaded.layers}
    for experts in loaded.layers.values():
        experts.register_forward_pre_hook(_keeper(parts, experts))
    evaluation.score_text(loaded.model, ids, progress)
    return {index: Sample(*map(torch.cat, zip(*given, strict=True))) for index, given in parts.items()}


def _keeper(parts: dict[int, list[Sample]], experts: QuantizedExperts) -> Any:
    def keep(_module: Any, given: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, topk_ids, topk_weights = given  # the order of TransformersExperts
        parts[experts.layer.index].append(Sample(hidden.cpu(), topk_ids.cpu(), topk_weights.float().cpu()))

    return keep
