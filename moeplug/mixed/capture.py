"""Run a model on a text and keep what its experts are given: hidden states, expert ids and router weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeplug import evaluation
from moeplug.api import Loaded
from moeplug.pipeline import Progress


class Sample(NamedTuple):
    """What one layer's experts were given, on the host. hidden: (M, H). topk_ids, topk_weights: (M, T)."""

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


def capture(loaded: Loaded, ids: Tensor, progress: Progress | None = None) -> dict[int, Sample]:
    """Return layer index → Sample of the tokens ids (n,). The samples take n * H * 2 bytes a layer on the host.

    loaded: the model, with runtime transformers: unquantized, or under a scheme that fits where that does not.
    """
    parts: dict[int, list[Sample]] = {index: [] for index in loaded.layers}
    hooks = [loaded.layers[index].register_forward_pre_hook(_keeper(given)) for index, given in parts.items()]
    evaluation.score_text(loaded.model, ids, progress)
    for hook in hooks:
        hook.remove()
    return {index: Sample(*map(torch.cat, zip(*given, strict=True))) for index, given in parts.items()}


def _keeper(given: list[Sample]) -> Any:
    def keep(_module: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, topk_ids, topk_weights = arguments  # the order of TransformersExperts
        given.append(Sample(hidden.cpu(), topk_ids.cpu(), topk_weights.float().cpu()))

    return keep
