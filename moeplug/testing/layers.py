"""Quantize random layers through all five stages, watch what a plugin does on the way, and say what is right."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from moeplug.formats import NumberFormat
from moeplug.hookspecs import StageContext
from moeplug.kernels.select import Device, Kernel, select_kernel
from moeplug.manifest import Manifest
from moeplug.moe.experts import QuantizedExperts
from moeplug.moe.layout import PROJECTIONS, LayerSpec, Projection, buffer_name
from moeplug.moe.reference import ExpertWeights, experts_reference
from moeplug.pipeline import LayerBuilder, LayerPlan, plan_layer
from moeplug.quantization import Scales, dequantize, quantize, squared_error
from moeplug.registry import Registry
from moeplug.scheme import Scheme
from moeplug.spec import ActivationSpec, WeightSpec

LAYER_INDEX: Final = 5  # of every layer here: schemes often keep the first layers as they are
H100: Final = Device("cuda", 0, (9, 0), "NVIDIA H100")
FILL, OTHER_FILL = 0xA5, 0x5A  # what buffers hold before a plugin writes them


class Shape(NamedTuple):
    """Sizes of one MoE layer."""

    E: int
    T: int
    H: int
    I: int


REAL_SHAPES: Final = {
    "Mixtral-8x7B": Shape(8, 2, 4096, 14336),
    "OLMoE-1B-7B": Shape(64, 8, 2048, 1024),
    "Qwen3-30B-A3B": Shape(128, 8, 2048, 768),
    "Qwen3-235B-A22B": Shape(128, 8, 4096, 1536),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880),
    "DeepSeek-V3": Shape(256, 8, 7168, 2048),
}
RAGGED_SHAPES: Final = {
    "odd": Shape(3, 2, 53, 37),
    "one-value": Shape(2, 1, 1, 1),
    "one-block-and-a-rest": Shape(2, 2, 136, 264),
    "one-expert": Shape(1, 1, 96, 64),
    "an-even-number": Shape(3, 3, 70, 34),
}


@dataclass(frozen=True)
class Kept:
    """What stage 3 left of one expert weight: (1, N, K) as it was given, as it was stored, and its scales."""

    given: Tensor
    stored: Tensor
    scales: Scales


class WatchedRegistry(Registry):
    """The installed plugins, called as in a load; keeps what stage 3 made and notes what hooks may not do.

    fill: the byte that new buffers are full of. offences: sentences, one for each thing a hook should not have done.
    """

    def begin(self, fill: int = FILL) -> None:
        """Forget the layer before."""
        self._fill = fill
        self._buffers: dict[tuple[int, ...], Mapping[str, Tensor]] = {}
        self.kept: dict[tuple[Projection, int], Kept] = {}
        self.offences: list[str] = []

    @property
    def watched(self) -> bool:
        """Every call of a stage is looked at."""
        return True

    def call(self, stage: str, ctx: StageContext, default: Callable[[], Any], **given: Any) -> Any:
        """Ask for one stage, as `Registry.call` does."""
        if stage == "quantize":
            return self._quantize(ctx, default, **given)
        answer = super().call(stage, ctx, default, **given)
        if stage == "allocate" and isinstance(answer, Mapping):
            self._buffers[ctx.experts] = answer
            for buffer in answer.values():
                buffer.view(torch.uint8).fill_(self._fill)
        return answer

    def _quantize(
        self,
        ctx: StageContext,
        default: Callable[[], Any],
        projection: Projection,
        experts: Sequence[int],
        tensor: Tensor,
        out: Tensor,
    ) -> Any:
        buffers = self._buffers[ctx.experts]
        expected, given = {name: buffer.clone() for name, buffer in buffers.items()}, tensor.clone()
        scales = super().call("quantize", ctx, default, projection=projection, experts=experts, tensor=tensor, out=out)
        slot = ctx.experts.index(experts[0])
        ctx.layout.view(expected[buffer_name(projection)], projection)[slot : slot + len(experts)] = out
        for name, buffer in buffers.items():
            if not same_bytes(buffer, expected[name]):
                self.offences.append(f"stage quantize, {projection} of experts {experts}: wrote {name} outside `out`")
        if isinstance(scales, Scales):  # else the pipeline refuses it in a moment
            for b, expert in enumerate(experts):
                one = slice(b, b + 1)
                self.kept[projection, expert] = Kept(given[one], out[one].clone(), _copied(scales, one))
        return scales


def _copied(scales: Scales, experts: slice) -> Scales:
    scale, zero_point, global_scale = (
        None if part is None else part[experts].clone()
        for part in (scales.scale, scales.zero_point, scales.global_scale)
    )
    return Scales(scale, zero_point, global_scale, scales.block)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same bytes; NaN is then like any other value."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@dataclass(frozen=True)
class Layer:
    """A quantized layer with all that its tests have to know.

    worst_error: the largest relative rms error of an expert weight, as the load reports it.
    """

    experts: QuantizedExperts
    w13: Tensor
    w2: Tensor
    plan: LayerPlan
    kept: dict[tuple[Projection, int], Kept]
    offences: list[str]
    worst_error: float

    @property
    def stored_bytes(self) -> dict[str, Tensor]:
        """Return all buffers: weights, scales, zero points."""
        return dict(self.experts.named_buffers())

    def original(self, projection: Projection, expert: int) -> Tensor:
        """Return (N, K) as the layer was made from."""
        I = self.w2.shape[2]
        return {"gate": self.w13[expert, :I], "up": self.w13[expert, I:], "down": self.w2[expert]}[projection]

    def ctx_of(self, expert: int) -> StageContext:
        """Return the context of the group that holds an expert."""
        return next(group.ctx for group in self.plan.groups if expert in group.ctx.experts)

    def decoded(self, projection: Projection, expert: int) -> Tensor:
        """Return (N, K) float32: what stage 3 stored, times the scales that it returned."""
        kept, ctx = self.kept[projection, expert], self.ctx_of(expert)
        words = ctx.layout.words(projection)
        return dequantize(kept.stored, kept.scales, ctx.format(projection), None, words)[0]

    def reference(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, decoded: bool = True) -> Tensor:
        """Return (M, H) float32 by `moeplug.moe.reference`, of what is stored or, with decoded=False, of the originals.

        With the originals activations are not quantized.
        """
        total = torch.zeros(hidden.shape, device=hidden.device)
        for group in self.plan.groups:
            ctx = group.ctx
            slots = torch.full_like(topk_ids, -1)
            for slot, expert in enumerate(ctx.experts):
                slots[topk_ids == expert] = slot
            request = ctx.request if decoded else replace(ctx.request, input_activations=None, intermediate=None)
            weights = [self._expert(e, decoded) for e in ctx.experts]
            total += experts_reference(hidden, topk_weights, slots, weights, request=request, out_dtype=torch.float32)
        return total

    def _expert(self, expert: int, decoded: bool) -> ExpertWeights:
        make = self.decoded if decoded else self.original
        return ExpertWeights(*(make(p, expert).float() for p in PROJECTIONS))

    @property
    def multiplies_fp8(self) -> bool:
        """Return whether tensor cores may multiply 8-bit floats, whose products they add with about 13 bits."""
        requests = [group.ctx.request for group in self.plan.groups]
        formats = [fmt for request in requests for fmt in (request.activation_format, request.intermediate_format)]
        return any(fmt is not None and fmt.native == torch.float8_e4m3fn for fmt in formats)

    @property
    def quantizes_activations(self) -> bool:
        """Return whether an input or an intermediate is quantized."""
        requests = [group.ctx.request for group in self.plan.groups]
        return any(request.input_activations or request.intermediate for request in requests)


def random_weights(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return w13 (E, 2I, H) and w2 (E, H, I) in bfloat16 in which every confusion shows.

    Rows differ in size, columns grow eightfold along K, up is four times gate, no row centres on zero: a scale of
    another row, group or projection, or a zero point of another sign, is then far off. Outputs are near 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def weight(N: int, K: int) -> Tensor:
        rows = torch.exp(0.7 * torch.randn(shape.E, N, 1, generator=generator))
        columns = torch.logspace(-0.45, 0.45, K) if K > 1 else torch.ones(1)
        values = torch.randn(shape.E, N, K, generator=generator) + 0.4
        return values * rows * columns / (2 * math.sqrt(K))

    gate, up = weight(shape.I, shape.H), 4 * weight(shape.I, shape.H)
    return torch.cat([gate, up], 1).bfloat16(), weight(shape.H, shape.I).bfloat16()


def normal_weights(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return normal w13 and w2 in bfloat16, as trained weights nearly are: what declared errors are measured on."""
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(shape.E, 2 * shape.I, shape.H, generator=generator) * 0.02
    return w13.bfloat16(), (torch.randn(shape.E, shape.H, shape.I, generator=generator) * 0.02).bfloat16()


def random_tokens(
    shape: Shape, M: int = 7, seed: int = 1, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden (M, H), topk_weights (M, T) and topk_ids (M, T) int64, the same expert twice now and then."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, shape.H, generator=generator).to(dtype)
    topk_weights = torch.rand(M, shape.T, generator=generator) + 0.1
    return hidden, topk_weights, torch.randint(0, shape.E, (M, shape.T), generator=generator)


def specs_of(scheme: Scheme) -> list[WeightSpec]:
    """Return every spec of weights in a scheme, overrides included."""
    return [spec for spec in (scheme.weights, *(o.weights for o in scheme.overrides)) if spec is not None]


def activations_of(scheme: Scheme) -> list[ActivationSpec]:
    """Return every spec of activations in a scheme."""
    return [spec for spec in (scheme.input_activations, scheme.intermediate) if spec is not None]


def fitting_shape(scheme: Scheme) -> Shape:
    """Return small sizes that a scheme cannot refuse: whole groups, whole words of 16 bits, H and I different."""
    groups = [spec.group_size or 1 for spec in specs_of(scheme)]
    groups += [spec.group_size or 1 for spec in activations_of(scheme)]
    unit = math.lcm(64, *groups)  # a run of words of four values is 64
    return Shape(3, 2, 3 * unit, 2 * unit)


def activate(registry: Registry, scheme: Scheme) -> None:
    """Import the plugins that a scheme needs, whatever device they serve."""
    formats = {spec.format for spec in specs_of(scheme)} | {spec.format for spec in activations_of(scheme)}
    for name, manifest in registry.manifests().items():
        if name in scheme.plugins() or formats & set(manifest.formats):
            registry.activate(name, f"scheme '{scheme.name}'")


def layer_spec(shape: Shape) -> LayerSpec:
    """Return a layer of these sizes."""
    return LayerSpec(LAYER_INDEX, f"layer {LAYER_INDEX}", *shape)


def build(
    registry: WatchedRegistry,
    scheme: Scheme,
    shape: Shape,
    weights: tuple[Tensor, Tensor] | None = None,
    *,
    fill: int = FILL,
    whole_projections: bool = False,
    as_on_gpu: Device | None = None,
    accept: float | None = None,
) -> Layer:
    """Return a layer quantized through all stages, on its weights' device.

    weights: w13 and w2, bfloat16; None: `random_weights`. whole_projections: all experts of a projection in one call,
    last projection first, instead of one by one. as_on_gpu: on a CPU, with the kernel and the layout that this GPU
    would get; triton has to be in its interpreter. accept: as `accept: relative_rms` of a scheme, whose own is not
    asked: random weights are worse than any that a user has.
    """
    w13, w2 = random_weights(shape) if weights is None else weights
    activate(registry, scheme)
    plan = plan_layer(layer_spec(shape), scheme, registry, w13.device)
    if as_on_gpu is not None:
        contexts = [(group, kernel_on(registry, group.ctx, as_on_gpu)) for group in plan.groups]
        plan = replace(plan, groups=tuple(replace(g, ctx=replace(g.ctx, kernel=kernel)) for g, kernel in contexts))
    registry.begin(fill)
    builder = LayerBuilder(plan, registry, accept)
    parts: dict[Projection, Tensor] = {"gate": w13[:, : shape.I], "up": w13[:, shape.I :], "down": w2}
    if whole_projections:
        for projection in reversed(PROJECTIONS):
            builder.feed(projection, range(shape.E), parts[projection])
    else:
        for expert in range(shape.E):
            for projection, tensor in parts.items():
                builder.feed(projection, (expert,), tensor[expert : expert + 1])
    experts, errors = builder.finish()
    return Layer(experts, w13, w2, plan, registry.kept, registry.offences, errors.worst)


def kernel_on(registry: Registry, ctx: StageContext, device: Device) -> Kernel:
    """Return the kernel that a group would get on a device; raise SchemeError where none serves it."""
    request = replace(ctx.request, device=device)
    return select_kernel(request, registry.kernels(ctx.plugin)).kernel


def difference_by_token(out: Tensor, expected: Tensor) -> Tensor:
    """Return (M,) float64: each token's largest |out - expected|, as a part of the largest |expected| of all."""
    largest = expected.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return (out.double() - expected.double()).abs().amax(1) / largest


def problem_of(layer: Layer, out: Tensor, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> str | None:
    """Return how a layer's output differs from the reference on what is stored, or None where it is as good as it.

    Allowed is a unit of the last place of hidden's dtype: half for the result, half for an intermediate that float32
    rounding moved across a boundary; in float32, where nothing is rounded, 64 units, for sums in another order. Where
    activations are quantized, now and then one value comes to lie a step of its format off, and its token with it: then
    twice that for half of the tokens, and 2**-5 for each. GPUs sum 8-bit floats to 2**-10 (H100: 3e-4).
    """
    if not out.numel():
        return None
    differences = difference_by_token(out, layer.reference(hidden, topk_weights, topk_ids))
    unit = torch.finfo(hidden.dtype).eps * (1 if hidden.dtype.itemsize < 4 else 64)
    allowed = [(float(differences.max()), unit)]
    if layer.quantizes_activations:
        allowed = [(float(differences.max()), 2**-5)]
        if len(differences) > 2:
            coarse = 2.0**-10 if layer.multiplies_fp8 and out.is_cuda else 0.0
            allowed.append((float(differences.median()), max(2 * unit, coarse)))
    for found, limit in allowed:
        if not found <= limit:  # NaN is not
            return f"{found:.3g} of the largest value off the reference; {limit:.3g} is allowed"
    return None


def values_of(fmt: NumberFormat) -> Tensor:
    """Return every finite value that a format's byte can hold, (n,) float64, sorted, each once."""
    stored = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(fmt.storage_dtype).view(256, 1)
    decoded = torch.empty(256, fmt.values_per_element)
    fmt.decode(stored, decoded)
    values: Tensor = torch.unique(decoded[decoded.isfinite()].double())
    return values


def values_in_range(fmt: NumberFormat, symmetric: bool) -> Tensor:
    """Return the values (n,) float64 that weights may become: the symmetric range, or the one with zero points."""
    low, high = (-fmt.max_value, fmt.max_value) if symmetric or not fmt.asymmetric_range else fmt.asymmetric_range
    values = values_of(fmt)
    return values[(values >= low) & (values <= high)]


def nearest(values: Tensor, numbers: Tensor) -> Tensor:
    """Return the nearest of values (n,), sorted, for each of numbers, in float64."""
    above = torch.searchsorted(values, numbers.double()).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    closer = (numbers - values[below]).abs() <= (values[above] - numbers).abs()
    return torch.where(closer, values[below], values[above])


class NearestOf(NumberFormat):
    """A format with another's values, whose encode is right by construction: what a rounding error is held to."""

    storage_dtype = torch.uint8

    def __init__(self, fmt: NumberFormat, symmetric: bool) -> None:
        self.name, self.bits, self.max_value = fmt.name, fmt.bits, fmt.max_value
        self.asymmetric_range = fmt.asymmetric_range
        self._values = values_in_range(fmt, symmetric)

    def encode(self, scaled: Tensor, out: Tensor) -> None:
        out.copy_(torch.searchsorted(self._values, nearest(self._values, scaled)))

    def decode(self, stored: Tensor, out: Tensor) -> None:
        out.copy_(self._values[stored.int()])


def error_of_the_core(weight: Tensor, spec: WeightSpec, fmt: NumberFormat) -> float:
    """Return the relative rms error of weight (N, K) under moeplug's own scales, every value rounded to the nearest."""
    exact, given = NearestOf(fmt, spec.symmetric), weight.unsqueeze(0)
    stored = torch.empty(given.shape, dtype=torch.uint8)
    scales = quantize(given, spec, exact, stored)
    return relative_rms(squared_error(given, stored, scales, exact))


def error_of(kept: Kept, ctx: StageContext, projection: Projection) -> float:
    """Return the relative rms error of what stage 3 stored."""
    words = ctx.layout.words(projection)
    return relative_rms(squared_error(kept.given, kept.stored, kept.scales, ctx.format(projection), words))


def relative_rms(squares: Tensor) -> float:
    """Return sqrt(error / weight) of (1, 2) sums of squares; 0 for a weight of zeros that stayed so."""
    error, weight = squares[0].tolist()
    return math.sqrt(error / weight) if weight else math.sqrt(error)


@contextmanager
def new_tensor_bytes() -> Iterator[Callable[[], int]]:
    """Give a function that returns the bytes of tensors made since: of all that Python holds, each storage once."""
    gc.collect()
    gc.freeze()  # what is older is set aside, so that each count walks over what is new and not over all of torch
    try:
        yield _tensor_bytes
    finally:
        gc.unfreeze()


def _tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def projections_of(layer: Layer) -> Iterator[tuple[Projection, int, WeightSpec | None, Kept]]:
    """Yield (projection, expert, spec, what stage 3 left) of every expert weight."""
    for (projection, expert), kept in layer.kept.items():
        yield projection, expert, layer.ctx_of(expert).spec(projection), kept


def scheme_for(capability: str, manifest: Manifest, fmt: str, base: Scheme | None, activation: str) -> Scheme:
    """Return a scheme that asks for one capability of a format.

    base: a scheme of the plugin's own that uses the format; its scale_dtype, group_size and options then serve.
    activation: the activations' format.
    """
    spec = base.weights if base is not None else None
    weights: dict[str, Any] = {"format": fmt, "scale_dtype": spec.scale_dtype if spec else "float32"}
    size = spec.group_size if spec is not None and spec.strategy == "group" else 64
    sizes: dict[str, dict[str, Any]] = {"group": {"group_size": size}, "block": {"block_structure": [32, 64]}}
    able = [word.removeprefix("per_") for word in manifest.capabilities if word.startswith("per_")]
    strategy = (able or ["channel"])[0]
    data: dict[str, Any] = {"api": 1, "name": "claim", "plugin": manifest.name, "weights": weights}
    data["options"] = base.options if base is not None else {}
    if capability == "zero_points":
        strategy = next((s for s in ("channel", "group") if s in able), "channel")
        weights |= {"symmetric": False, "scale_dtype": "float32"}
    elif capability.startswith("activation_per_"):
        of_activations = capability.removeprefix("activation_per_")
        data["input_activations"] = {"format": activation, "strategy": of_activations, **sizes.get(of_activations, {})}
    else:
        strategy = capability.removeprefix("per_")
    weights |= {"strategy": strategy, **sizes.get(strategy, {})}
    return Scheme.from_data(data)
