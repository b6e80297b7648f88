"""Measure what every option costs every expert: the error of its output on real tokens, or of its weights alone.

On tokens. Expert e adds w * y(x) to a token's output, w its router weight. Its error under an option is

    sum over its tokens of || w * (y'(x) - y(x)) ||**2  /  sum over the layer's experts and tokens of || w * y(x) ||**2

y' through the five stages and the kernel, exactly as a load would make it, y unquantized, both in float32. Errors of
different experts are nearly uncorrelated, so their sum is the relative squared error of the layer's output. Layers are
added as they are: on the demo model a layer alone in 4 bits costs 0.12 to 0.16 nats of divergence for each unit of
relative error, whichever it is; by absolute error they differ fivefold, because later layers write larger values.

On weights alone (`samples` None). For white inputs the relative squared error of W x is that of W, and that of
act(gate) * up, and of down of it, is to first order the sum. So an expert's relative squared error is taken as

    r = sum over gate, up and down of || W' - W ||**2 / || W ||**2                                    (Frobenius)

and its error as r / E: outputs of equal size, tokens spread evenly. That perplexity grows linearly with such relative
squared errors of layers is the linearity theorem of HIGGS (arXiv 2411.17525).

An expert that no token reaches has its error estimated from its weights too, as if one token came to it with an output
of the layer's mean size: r / (tokens * T). The report says how many experts that were.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moeplug.checkpoint.locate import WeightSource, by_piece
from moeplug.mixed.capture import Sample
from moeplug.mixed.task import Option, Task
from moeplug.moe.experts import QuantizedExperts
from moeplug.moe.layout import PROJECTIONS, LayerSpec, Projection
from moeplug.pipeline import LayerBuilder, LayerPlan, Progress
from moeplug.pipeline.builder import LayerErrors
from moeplug.pipeline.plan import dtype_of

Weights = Mapping[Projection, Tensor]


@dataclass(frozen=True)
class ExpertErrors:
    """The error of one expert under every option. tokens: how many came to it."""

    layer: int
    expert: int
    tokens: int
    errors: Mapping[Option, float]


@dataclass(frozen=True)
class Errors:
    """All experts' errors. tokens: what they were measured on; 0: on the weights alone."""

    experts: tuple[ExpertErrors, ...]
    tokens: int

    @property
    def data_free(self) -> bool:
        """Whether they come from the weights alone."""
        return self.tokens == 0

    @property
    def unreached(self) -> int:
        """How many experts no token reached, so that weights alone gave their errors; 0 where they gave all."""
        return 0 if self.data_free else sum(expert.tokens == 0 for expert in self.experts)

    def relative_rms(self, error: float) -> float:
        """Return the root mean square over the layers of a sum of errors: of a layer's output, relative to it."""
        return math.sqrt(error / len({expert.layer for expert in self.experts}))


class _Found(NamedTuple):
    """What was measured: squared errors and the squared output, or, without tokens, relative errors of weights."""

    layer: LayerSpec
    expert: int
    tokens: int
    energy: float
    squares: dict[Option, float]


def measure(task: Task, samples: Mapping[int, Sample] | None, progress: Progress | None = None) -> Errors:
    """Return the errors, reading the checkpoint once, one expert in memory at a time. samples None: data-free."""
    layers = {layer.layer.index: layer.layer for layer in task.any_plan.layers}
    found = [
        _measure_expert(task, layers[layer], expert, weights, None if samples is None else samples[layer])
        for layer, expert, weights in _experts(task, progress or (lambda done, total: None))
    ]
    tokens = 0 if samples is None else max(len(sample.hidden) for sample in samples.values())
    return Errors(tuple(_relative(found)), tokens)


def _experts(task: Task, progress: Progress) -> Iterator[tuple[int, int, dict[Projection, Tensor]]]:
    """Yield (layer, expert, its weights (N, K) on the device), in the order of layers and experts."""
    plan = task.any_plan
    sources = by_piece(plan.sources)
    pieces = sorted(sources, key=lambda piece: min(map(_place, sources[piece])))
    dtypes = {layer.layer.index: dtype_of(layer.layer) for layer in plan.layers}
    buffers = [memoryview(bytearray(max(piece.nbytes for piece in pieces))) for _ in range(2)]
    done, total = 0, sum(piece.nbytes for piece in pieces)
    weights: dict[Projection, Tensor] = {}
    with closing(task.checkpoint.stream(pieces, buffers)) as stream:
        for piece, data in stream:
            for source in sources[piece]:
                flat = torch.frombuffer(data, dtype=dtypes[source.layer])
                weights[source.projection] = source.weight_of(flat).to(plan.device, copy=True)
                layer, expert = source.layer, source.expert
            if len(weights) == len(PROJECTIONS):
                yield layer, expert, weights
                weights = {}
            done += piece.nbytes
            progress(done, total)
    assert not weights, "the plan has every projection of every expert, and each piece holds one expert's"


def _place(source: WeightSource) -> tuple[int, int, int]:
    return source.layer, source.expert, PROJECTIONS.index(source.projection)


@torch.inference_mode()
def _measure_expert(task: Task, layer: LayerSpec, expert: int, weights: Weights, sample: Sample | None) -> _Found:
    options = {option: task.expert_plans[layer.index, option] for option in task.options}
    x, w = _tokens_of(expert, sample, task.device)
    if not len(x):
        squares = {
            option: _built(task, plan, weights, exact_error=True)[1].sum_of_squares for option, plan in options.items()
        }
        return _Found(layer, expert, 0, 0.0, squares)
    ids = torch.zeros(len(x), 1, dtype=torch.int32, device=task.device)
    exact = _built(task, task.exact_plans[layer.index], weights)[0](x, w, ids)
    squares = {option: _squares(_built(task, plan, weights)[0](x, w, ids) - exact) for option, plan in options.items()}
    return _Found(layer, expert, len(x), _squares(exact), squares)


def _built(
    task: Task, plan: LayerPlan, weights: Weights, exact_error: bool = False
) -> tuple[QuantizedExperts, LayerErrors]:
    """Return a layer of this one expert, through all stages; plugins see it as expert 0."""
    builder = LayerBuilder(plan, task.registry, exact_error=exact_error)
    for projection, weight in weights.items():
        builder.feed(projection, (0,), weight.unsqueeze(0))
    return builder.finish()


def _tokens_of(expert: int, sample: Sample | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (n, H) float32 and (n, 1): the tokens that came to an expert, and their router weights."""
    if sample is None:
        return torch.empty(0, 0), torch.empty(0, 1)
    token, slot = torch.nonzero(sample.topk_ids == expert, as_tuple=True)
    return sample.hidden[token].float().to(device), sample.topk_weights[token, slot].unsqueeze(1).to(device)


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())


def _relative(found: list[_Found]) -> Iterator[ExpertErrors]:
    """Yield each expert with its errors as shares of its layer's squared output."""
    pairs: dict[int, int] = defaultdict(int)
    energy: dict[int, float] = defaultdict(float)
    for of in found:
        pairs[of.layer.index] += of.tokens
        energy[of.layer.index] += of.energy
    for of in found:
        whole = energy[of.layer.index] if of.tokens else pairs[of.layer.index] or of.layer.num_experts
        errors = {option: squares / whole for option, squares in of.squares.items()}
        yield ExpertErrors(of.layer.index, of.expert, of.tokens, errors)
