"""The contract: five stages, in running order, that a plugin may answer for the expert groups a scheme gives it.

    allocate → load → quantize → create_scales → setup_kernel

The unit is an expert group: the experts of one layer that share a weight spec and a plugin. For each stage exactly one
provider is asked: the plugin that the scheme (or an override) names for the group. It answers, or returns None, which
means "use the core's default". Every stage has a default, so a plugin implements only what its format needs more.
`firstresult` never chooses; two answers are an error. Observers (`kind: observer`) wrap stages and answer none; what
lies between the stages, reading and copying, they are told with `moeplug_event`.

    import moeplug

    @moeplug.hookimpl
    def moeplug_register(registry):
        registry.add_format(MyFormat())

Where weights are quantized on a CPU, stages load and quantize of different weights are called from several threads at
once, also of one layer; the other stages are called once a group. That holds for observers too. On a GPU the core's own
part in these two stages is one launch for several weights, unless an observer watches or a plugin has a hook for load.

Axis letters, and the shapes of w13 (E, 2I, H) and w2 (E, H, I), are those of `moeplug.moe.layout`; E counts the
group's experts here, in slot order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from moeplug.moe.layout import LayerSpec, Layout, Projection
from moeplug.spec import WeightSpec

if TYPE_CHECKING:
    from torch import Tensor

    from moeplug.formats import NumberFormat
    from moeplug.kernels.select import ExpertsForward, Kernel, KernelRequest
    from moeplug.quantization import Scales
    from moeplug.registry import Registration

hookspec = pluggy.HookspecMarker("moeplug")
hookimpl = pluggy.HookimplMarker("moeplug")


@dataclass(frozen=True)
class StageContext:
    """What every stage is told about the group it works for. Read-only.

    experts: the layer's expert ids in slot order; slot s of every buffer belongs to experts[s].
    options: the scheme's own `options:`, checked against plugin.yaml.
    """

    plugin: str | None
    request: KernelRequest
    experts: tuple[int, ...]
    kernel: Kernel
    options: Mapping[str, Any]

    @property
    def layer(self) -> LayerSpec:
        """The MoE block: index, sizes, activation, source dtype."""
        return self.request.layer

    @cached_property
    def layout(self) -> Layout:
        """The planned kernel's: where rows lie in w13 and w2, and values along K. Fixed before any byte."""
        return self.kernel.layout_for(self.request)

    @cached_property
    def device(self) -> str:
        """Where buffers live, for example "cpu" or "cuda:0"."""
        return str(self.request.device)

    def spec(self, projection: Projection) -> WeightSpec | None:
        """Return how this projection is stored; None: unquantized."""
        return self.request.down if projection == "down" else self.request.gate_up

    def format(self, projection: Projection) -> NumberFormat:
        """Return the registered number format of this projection."""
        return self.request.down_format if projection == "down" else self.request.gate_up_format


@dataclass(frozen=True)
class LoadEvent:
    """Something that a load did between two moments, beside the stages.

    what: "read", bytes came from a file; "copy", they were brought to a GPU (a CPU takes them where they are); "load",
    all of it, told last, also where the load fails. tensor: whose bytes, by its name in the checkpoint, or the first
    of several that lie side by side; "" for "load".
    started, ended: seconds as time.perf_counter gives them.
    """

    what: Literal["read", "copy", "load"]
    tensor: str
    nbytes: int
    started: float
    ended: float


@hookspec
def moeplug_register(registry: Registration) -> None:
    """Register the formats and kernels that plugin.yaml declares.

    When: once, when a scheme first names the plugin, or `--observe` an observer, which may prepare itself here.
    Listing and checking never come here.
    Given: registry, with add_format(NumberFormat) and add_kernel(Kernel).
    Return: nothing. A name that plugin.yaml does not declare, or a declared one that was not added, is an error, and
    then nothing of this plugin stays registered.

        @moeplug.hookimpl
        def moeplug_register(registry):
            registry.add_format(Int8())
    """


@hookspec
def moeplug_allocate(ctx: StageContext) -> Mapping[str, Tensor] | None:
    """Stage 1: make the group's empty weight buffers, in the planned layout.

    When: once per group, before the first of its weights arrives.
    Given: ctx.
    Return: {"w13": (E, 2I, H / values_per_element), "w2": (E, H, I / values_per_element)}, each in its format's
    storage dtype on ctx.device. Later stages write every element exactly once.
    None: the core allocates just that.

        @moeplug.hookimpl
        def moeplug_allocate(ctx):
            E, H, I = len(ctx.experts), ctx.layer.hidden_size, ctx.layer.intermediate_size
            empty = functools.partial(torch.empty, dtype=torch.uint8, device=ctx.device)
            return {"w13": empty(E, 2 * I, H // 2), "w2": empty(E, H, I // 2)}
    """


@hookspec
def moeplug_load(ctx: StageContext, projection: Projection, experts: Sequence[int], tensor: Tensor) -> Tensor | None:
    """Stage 2: turn weights as read into weights ready to encode.

    When: for each expert weight (or a batch of B of one projection), in file order, from any thread. Layers interleave.
    Given: projection; experts, the B layer-wide expert ids; tensor (B, N, K) in the checkpoint's dtype on ctx.device,
    finite (already checked), valid only until the next call.
    Return: (B, N, K) of 16- or 32-bit floats, finite. It may be `tensor` itself, which must not be changed in place:
    it may be the caller's own.
    None: the core takes the tensor as it is.
    Not called for weights that a checkpoint stores in the scheme's own numbers: they pass stages 2 and 3 by.

        @moeplug.hookimpl
        def moeplug_load(ctx, projection, experts, tensor):
            return tensor @ rotation(tensor.shape[-1]) if projection == "down" else None
    """


@hookspec
def moeplug_quantize(
    ctx: StageContext, projection: Projection, experts: Sequence[int], tensor: Tensor, out: Tensor
) -> Scales | None:
    """Stage 3: write the stored values of B expert weights into the buffer, and return their final scales.

    When: right after stage 2, for the same batch.
    Given: tensor (B, N, K) from stage 2; out (B, N, K / values_per_element) of the format's storage dtype: a view
    into w13 or w2 whose rows are already in the kernel's layout, maybe strided, holding arbitrary bytes. Values along K
    lie as ctx.layout.words(projection) says: give that to `moeplug.quantization.encode`, or to
    `moeplug.quantization.quantize`, and they come to lie right.
    Return: Scales(scale=(B, R, C), zero_point=None or the same shape); R and C as `moeplug.quantization.scale_shape`
    gives them, scale already rounded to the spec's scale_dtype, because encoding with one number and storing another
    costs accuracy. Scales() where the spec is None.
    None: the core quantizes by granularity, then encodes with the format (`moeplug.quantization.quantize`).

        @moeplug.hookimpl
        def moeplug_quantize(ctx, projection, experts, tensor, out):
            scales = search_scales(tensor, ctx.spec(projection))
            encode(tensor / scales.scale, ctx.format(projection), out, ctx.layout.words(projection))
            return scales
    """


@hookspec
def moeplug_create_scales(ctx: StageContext, scales: Mapping[Projection, Scales]) -> Mapping[str, Tensor] | None:
    """Stage 4: bring the group's scales into the shapes and order that the kernel reads. Only rearrange.

    When: once per group, after its last weight.
    Given: scales: for gate, up and down the Scales of all E experts in slot order, scale (E, R, C).
    Return: {"w13_scale": (E, 2I, C), "w2_scale": (E, H, C)}, and "w13_zero_point", "w2_zero_point" of the same shape
    when asymmetric; C is 1 for strategy tensor and channel, K / group_size, rounded up, for group. Rows lie in
    ctx.layout's order.
    Blocks of several rows: {"w13_scale": (E, 2R, C), "w2_scale": (E, R, C)}, gate's rows first, in every layout.
    "w13_global_scale": (E, 2I) and "w2_global_scale": (E, H) float32 beside scale_dtype float8_e4m3fn.
    Keys of unquantized projections are left out. Gate and up are laid beside each other, never merged.
    None: the core does just that.

        @moeplug.hookimpl
        def moeplug_create_scales(ctx, scales):
            return {"w2_scale": scales["down"].scale.transpose(1, 2).contiguous(), ...}
    """


@hookspec
def moeplug_setup_kernel(
    ctx: StageContext, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> ExpertsForward | None:
    """Stage 5: bind the planned kernel to the finished buffers.

    When: once per group after stage 4, and again when the module is moved or its state is loaded.
    Given: weights as stage 1 made them, filled; scales as stage 4 made them.
    Return: a callable (hidden (M, H), topk_weights (M, T) float32, topk_ids (M, T) int32 or int64, *, out=None)
    -> (M, H); see `moeplug.kernels.ExpertsForward`. Ids are slots of this group, -1 for experts of other groups.
    None: the core binds ctx.kernel.

        @moeplug.hookimpl
        def moeplug_setup_kernel(ctx, weights, scales):
            return functools.partial(my_fused_experts, weights["w13"], weights["w2"], scales)
    """


@hookspec
def moeplug_event(event: LoadEvent) -> None:
    """Tell an observer what happens between the stages: reading, copying, and the end of the load.

    When: after it happened. Reads are told by the threads that read, while others run the stages.
    Given: event.
    Return: nothing. Only observers are told; this hook is the one that they implement without a wrapper.

        @moeplug.hookimpl
        def moeplug_event(event):
            if event.what == "read":
                print(event.tensor, event.nbytes, event.ended - event.started, file=sys.stderr)
    """


STAGE_HOOKS = (
    "moeplug_allocate",
    "moeplug_load",
    "moeplug_quantize",
    "moeplug_create_scales",
    "moeplug_setup_kernel",
)
