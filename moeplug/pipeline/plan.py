"""Say everything that will happen, from headers alone, before a weight byte is read, or refuse."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moeplug.checkpoint.dummy import DummyCheckpoint
from moeplug.checkpoint.encoded import Encoding
from moeplug.checkpoint.family import Family
from moeplug.checkpoint.locate import WeightSource, by_piece
from moeplug.checkpoint.memory import TORCH_DTYPES, MemoryCheckpoint
from moeplug.checkpoint.reader import Checkpoint, TensorInfo
from moeplug.errors import CheckpointError, RefusedError, SchemeError
from moeplug.formats import NumberFormat, Unquantized
from moeplug.hookspecs import StageContext
from moeplug.kernels.select import Device, KernelRequest, select_kernel
from moeplug.manifest import check_scheme
from moeplug.moe.experts import describe
from moeplug.moe.layout import LayerSpec
from moeplug.pipeline.setup_kernel import device_of
from moeplug.quantization import CHUNK_ELEMENTS, bytes_of_weight, check_spec
from moeplug.registry import Plugin, Registry
from moeplug.scheme import Scheme
from moeplug.spec import WeightSpec

if TYPE_CHECKING:
    from moeplug.pipeline.builder import LayerErrors

ALLOWANCE = 64 << 20  # bytes that a load may need beyond what it leaves, unless 4 expert weights are more
# Smaller weights are read together: a read of less does not reach a disk's speed, and a GPU's copies cost launches.
# A GPU gets what the allowance has room for, up to this: what is read together is quantized together, and Python takes
# a part of a millisecond for one weight or for ten.
SPAN_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
STACKED_BYTES = 4 << 20  # of small weights that are copied side by side, where they do not lie evenly spaced
MOST_READERS, MOST_WORKERS = 6, 4
HOST_BYTES = 16 << 20  # of a load onto a GPU beside its read buffers: threads, tables, events
STAGED = 2  # buffers on a GPU: one is copied to while the other is quantized


@dataclass(frozen=True)
class GroupPlan:
    """An expert group with its planned kernel, and the reason against every other kernel."""

    ctx: StageContext
    against: tuple[tuple[str, str], ...]

    @property
    def nbytes(self) -> int:
        """Return the stored bytes of the group, scales included."""
        ctx = self.ctx
        shapes = {p: ctx.layer.weight_shape(p) for p in ctx.layer.projections}
        sizes = [bytes_of_weight(ctx.spec(p), ctx.format(p), *shape) for p, shape in shapes.items()]
        return len(ctx.experts) * (sum(sizes) + bytes_of_biases(ctx.layer))


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer: its groups and its bytes before and after."""

    layer: LayerSpec
    groups: tuple[GroupPlan, ...]
    encoded_bytes: int | None = None  # of a layer that is quantized already

    @property
    def bytes_before(self) -> int:
        """Return the bytes of the layer's expert weights in the checkpoint."""
        if self.encoded_bytes is not None:
            return self.encoded_bytes
        layer = self.layer
        weights = len(layer.projections) * layer.hidden_size * layer.intermediate_size * dtype_of(layer).itemsize
        return layer.num_experts * (weights + bytes_of_biases(layer))

    @property
    def bytes_after(self) -> int:
        """Return the bytes of the layer's stored experts, scales included."""
        return sum(group.nbytes for group in self.groups)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints of this layer."""
        return {
            "layer": self.layer.index,
            "experts": self.layer.num_experts,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "groups": [
                {
                    "experts": ranges(group.ctx.experts),
                    "plugin": group.ctx.plugin,
                    "weights": describe(group.ctx),
                    "kernel": group.ctx.kernel.name,
                    "layout": group.ctx.layout.name,
                    "kernels_not_chosen": dict(group.against),
                }
                for group in self.groups
            ],
        }


@dataclass(frozen=True)
class Plan:
    """Everything that a load will do. `moeplug plan` prints it; `moeplug load` runs it and is held to it."""

    checkpoint: Checkpoint | DummyCheckpoint | MemoryCheckpoint
    family: Family
    scheme: Scheme
    device: torch.device
    layers: tuple[LayerPlan, ...]
    sources: tuple[WeightSource, ...]
    kept: tuple[TensorInfo, ...]
    with_dense: bool
    encoding: Encoding | None = None  # of a checkpoint that is quantized already
    stored: Mapping[int, LayerErrors] | None = None  # of an export of our own form: the errors that it recorded

    @property
    def expert_bytes_before(self) -> int:
        """Return the bytes of all expert weights in the checkpoint."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def expert_bytes_after(self) -> int:
        """Return the bytes of all expert weights as they will be kept."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Return the bytes of every tensor outside the experts; they stay as they are."""
        return sum(tensor.nbytes for tensor in self.kept)

    @property
    def read_buffer_bytes(self) -> int:
        """Return the size of one read buffer: the largest piece of an expert tensor, or several small ones."""
        return max([self._span_bytes, *(source.nbytes for source in self.sources)])

    @property
    def readers(self) -> int:
        """Return how many threads read: on a CPU the others quantize.

        At least two, so that a disk has something to do while one waits for a buffer: with one, a cold load of int8 on
        two cores gave 0.6 to 1.1 GB/s, with two 0.9 to 1.1.
        """
        cores = usable_cores()
        return max(2, min(MOST_READERS, cores if self.device.type == "cuda" else cores // 2))

    @property
    def workers(self) -> int:
        """Return how many threads quantize; one gives a GPU its work, or takes what is quantized already."""
        alone = self.device.type == "cuda" or self.encoding is not None or self.stored is not None
        return 1 if alone else min(MOST_WORKERS, usable_cores())

    @property
    def read_buffers(self) -> int:
        """Return how many buffers the host has: one for each thread and one more, as far as the allowance goes."""
        if self.device.type == "cuda":
            return max(2, (self._allowed - HOST_BYTES) // self.read_buffer_bytes)
        fits = (self._allowed - self.workers * self._scratch_bytes - (1 << 20)) // self.read_buffer_bytes
        return max(2, min(fits, self.workers + self.readers + 1))

    @property
    def transient_bytes(self) -> int:
        """Return the memory needed on the device only while loading: staging and float32 scratch."""
        staged = STAGED if self.device.type == "cuda" else self.read_buffers
        # 1 MiB: error sums, slot tables, and what allocators round up.
        return staged * self.read_buffer_bytes + self.workers * self._scratch_bytes + (1 << 20)

    @property
    def _allowed(self) -> int:
        """Return what a load may need beyond what stays."""
        weights = [
            (layer.bytes_before, len(layer.layer.projections) * layer.layer.num_experts) for layer in self.layers
        ]
        return max(ALLOWANCE, 4 * max((nbytes // count for nbytes, count in weights), default=0))

    @property
    def _span_bytes(self) -> int:
        most = SPAN_BYTES.get(self.device.type, 4 << 20)
        if self.device.type != "cuda":
            return most
        return min(most, (self._allowed - self._scratch_bytes - (1 << 20)) // STAGED)

    @property
    def _scratch_bytes(self) -> int:
        """Return what one thread needs for arithmetic: four copies of a chunk in float32."""
        chunk = CHUNK_ELEMENTS.get(self.device.type, 1 << 20)
        nbytes = 4 * 4 * chunk + STACKED_BYTES
        if self.encoding is not None:  # float32 values of a weight, twice, and the small parts of a layer
            nbytes += 8 * max(layer.layer.hidden_size * layer.layer.intermediate_size for layer in self.layers)
            nbytes += max(layer.bytes_before for layer in self.layers) // 8
        return nbytes

    @property
    def peak_bytes(self) -> int:
        """Return the peak bytes on the device: what stays (dense weights too if they are loaded), and staging."""
        return self.expert_bytes_after + (self.dense_bytes if self.with_dense else 0) + self.transient_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return what `moeplug plan --json` prints."""
        return {
            "model": str(self.checkpoint.path),
            "model_type": self.family.name,
            "scheme": self.scheme.name,
            "device": str(self.device),
            "layers": [layer.as_dict() for layer in self.layers],
            "expert_bytes_before": self.expert_bytes_before,
            "expert_bytes_after": self.expert_bytes_after,
            "dense_bytes": self.dense_bytes,
            "dense_tensors": len(self.kept),
            "transient_bytes": self.transient_bytes,
            "peak_bytes": self.peak_bytes,
            "quantized_already": None if self.encoding is None else self.encoding.label,
            "notes": list(self.checkpoint.notes),
        }


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan_model(
    checkpoint: Checkpoint | DummyCheckpoint | MemoryCheckpoint,
    family: Family,
    scheme: Scheme,
    registry: Registry,
    device: torch.device,
    *,
    with_dense: bool,
    budget: int | None = None,
    encoding: Encoding | None = None,
) -> Plan:
    """Return the plan of a load, or raise: SchemeError, CheckpointError, PluginError, RefusedError over budget.

    encoding: how the checkpoint's experts are quantized already.
    """
    layers, sources = locate_layers(checkpoint, family, encoding)
    check_overrides(scheme, layers)
    claimed = {source.tensor.name for source in sources}
    if encoding is not None:
        claimed |= {name for name in checkpoint.tensors if name.endswith(encoding.ignored)}
    kept = family.unclaimed(checkpoint.tensors, claimed, _own_config(checkpoint, encoding))
    if with_dense:
        check_dense_dtypes(kept)
    plans = tuple(plan_layer(layer, scheme, registry, device) for layer in layers)
    if encoding is not None:
        _require_same_numbers(plans, scheme, encoding)
        read = {piece: held[0].layer for piece, held in by_piece(sources).items()}
        sizes = {index: sum(p.nbytes for p, i in read.items() if i == index) for index in set(read.values())}
        plans = tuple(replace(plan, encoded_bytes=sizes[plan.layer.index]) for plan in plans)
    plan = Plan(checkpoint, family, scheme, device, plans, tuple(sources), kept, with_dense, encoding)
    require_budget(plan, budget)
    return plan


def require_budget(plan: Plan, budget: int | None) -> None:
    """Raise RefusedError where a load needs more bytes on the device than the budget has."""
    if budget is not None and plan.peak_bytes > budget:
        raise RefusedError(
            f"this load needs {gigabytes(plan.peak_bytes)} on {plan.device} at its peak: experts "
            f"{gigabytes(plan.expert_bytes_after)}, other weights "
            f"{gigabytes(plan.dense_bytes if plan.with_dense else 0)}, "
            f"while loading {gigabytes(plan.transient_bytes)}; --budget allows {gigabytes(budget)}. Nothing was read. "
            "A scheme with fewer bits makes the experts smaller; the rest needs a larger budget"
        )


def locate_layers(
    checkpoint: Checkpoint | DummyCheckpoint | MemoryCheckpoint, family: Family, encoding: Encoding | None = None
) -> tuple[list[LayerSpec], list[WeightSource]]:
    """Return the MoE layers, and where each of their expert weights lies in the files."""
    layers: list[LayerSpec] = []
    sources: list[WeightSource] = []
    for layer in family.layers(_own_config(checkpoint, encoding)):
        if encoding is None:
            found = family.locate(layer, checkpoint.tensors)
        else:
            found = family.locate_encoded(layer, checkpoint.tensors, encoding)
        # config.json's dtype is only a claim; the tensors' own counts, and locate saw that a layer has one.
        dtype = TORCH_DTYPES[found[0].tensor.dtype] if encoding is None else layer.dtype
        bias = any(source.of_bias for source in found)
        layers.append(replace(layer, dtype=dtype, bias=bias))
        sources.extend(found)
    return layers, sources


def _own_config(
    checkpoint: Checkpoint | DummyCheckpoint | MemoryCheckpoint, encoding: Encoding | None
) -> dict[str, Any]:
    """Return config.json without what `encoding` says already."""
    return {key: value for key, value in checkpoint.config.items() if not encoding or key != "quantization_config"}


def plan_layer(layer: LayerSpec, scheme: Scheme, registry: Registry, device: torch.device) -> LayerPlan:
    """Return one layer's groups: its experts by spec and plugin, each group with the kernel that will run it."""
    groups = []
    for wanted in wanted_groups(layer, scheme, registry, device_of(device)):
        selection = select_kernel(wanted.request, registry.kernels(wanted.plugin))
        options = _options_of(wanted.plugin, scheme, registry)
        ctx = StageContext(wanted.plugin, wanted.request, wanted.experts, selection.kernel, options)
        groups.append(GroupPlan(ctx, selection.against))
    return LayerPlan(layer, tuple(groups))


@dataclass(frozen=True)
class WantedGroup:
    """An expert group before a kernel is chosen for it."""

    plugin: str | None
    experts: tuple[int, ...]
    request: KernelRequest


def wanted_groups(layer: LayerSpec, scheme: Scheme, registry: Registry, device: Device) -> list[WantedGroup]:
    """Return one layer's experts by spec and plugin."""
    by_spec: dict[tuple[str | None, WeightSpec | None, WeightSpec | None], list[int]] = {}
    for expert in range(layer.num_experts):
        by_spec.setdefault(_specs_of(layer, scheme, expert), []).append(expert)
    return [
        WantedGroup(plugin, tuple(experts), _request(layer, scheme, registry, device, gate_up, down))
        for (plugin, gate_up, down), experts in by_spec.items()
    ]


def activate_plugins(scheme: Scheme, registry: Registry, device: torch.device | None) -> None:
    """Check a scheme against what its plugins declare, and import them.

    The device must be one that they serve; None: whatever they serve.
    """
    where = str(scheme.source) if scheme.source is not None else f"scheme '{scheme.name}'"
    plugins = [registry.require(name, where) for name in sorted(scheme.plugins())]
    if problems := check_scheme(scheme, registry.manifests()):
        raise SchemeError("\n".join(str(problem) for problem in problems))
    for plugin in plugins:
        if device is not None and (reason := reason_against_device(plugin, device_of(device))):
            raise SchemeError(f"{where}: {reason}")
        registry.activate(plugin.name, where)
    of_activations = {spec.format for spec in (scheme.input_activations, scheme.intermediate) if spec is not None}
    for name, manifest in registry.manifests().items():
        if of_activations & set(manifest.formats):
            registry.activate(name, where)


def check_dense_dtypes(kept: Sequence[TensorInfo]) -> None:
    """Raise CheckpointError where this torch has no dtype for a tensor."""
    for tensor in kept:
        if not hasattr(torch, TORCH_DTYPES.get(tensor.dtype, "")):
            known = ", ".join(name for name, torch_name in TORCH_DTYPES.items() if hasattr(torch, torch_name))
            raise CheckpointError(
                f"{tensor.file}: {tensor.name}: dtype {tensor.dtype} is unknown to this torch; expected one of {known}"
            )


def reason_against_device(plugin: Plugin, device: Device) -> str | None:
    """Return None if the plugin's `needs:` are met by the device, else why not, in one line."""
    needs = None if plugin.manifest is None else plugin.manifest.needs
    if needs is None:
        return None
    served = [name for name in ("cuda", "cpu") if getattr(needs, name) is not None]
    if device.type not in served:
        return f"{plugin.label} serves {', '.join(served)}, not {device}; choose another --device"
    least = needs.cuda.minimum if needs.cuda is not None and device.type == "cuda" else None
    if least is not None and (device.compute_capability or (0, 0)) < least:
        found = "{}.{}".format(*device.compute_capability or (0, 0))
        return f"{plugin.label} needs compute capability {least[0]}.{least[1]}; {device} has {found}"
    return None


def check_overrides(scheme: Scheme, layers: Sequence[LayerSpec]) -> None:
    """Raise SchemeError where an override selects no layer or expert of this model: it would do nothing, silently."""
    experts = [(layer.index, expert) for layer in layers for expert in range(layer.num_experts)]
    for index, override in enumerate(scheme.overrides):
        if not any(override.selects(layer, expert) for layer, expert in experts):
            moe = ranges([layer.index for layer in layers])
            most = max(layer.num_experts for layer in layers)
            raise SchemeError(
                f"{scheme.where(('overrides', index))}: overrides.{index} selects nothing: this model has MoE layers "
                f"{moe} with experts 0-{most - 1}"
            )


def _require_same_numbers(layers: Sequence[LayerPlan], scheme: Scheme, encoding: Encoding) -> None:
    """Raise SchemeError where a scheme wants other numbers than are stored and does not say `requantize: true`."""
    for layer in layers:
        for group in layer.groups:
            for projection in layer.layer.projections:
                spec = group.ctx.spec(projection)
                if encoding.matches(spec) or scheme.requantize:
                    continue
                wanted = "unquantized weights" if spec is None else spec.describe()
                stored = encoding.spec.model_dump(mode="json", exclude_defaults=True)
                raise SchemeError(
                    f"{scheme.where(('weights',))}: the checkpoint is already quantized ({encoding.label}), and the "
                    f"scheme asks for {wanted} in layer {layer.layer.index}, {projection}. To keep what is stored, ask "
                    f"for it: weights: {stored}. To dequantize it and quantize again, which adds one error to another, "
                    "write requantize: true"
                )


def _request(
    layer: LayerSpec,
    scheme: Scheme,
    registry: Registry,
    device: Device,
    gate_up: WeightSpec | None,
    down: WeightSpec | None,
) -> KernelRequest:
    inputs = None if gate_up is None else scheme.input_activations
    between = None if down is None else scheme.intermediate
    request = KernelRequest(
        layer=layer,
        device=device,
        gate_up=gate_up,
        down=down,
        gate_up_format=_format(gate_up, layer, registry),
        down_format=_format(down, layer, registry),
        input_activations=inputs,
        intermediate=between,
        activation_format=None if inputs is None else registry.format(inputs.format),
        intermediate_format=None if between is None else registry.format(between.format),
    )
    for projection in layer.projections:
        spec = down if projection == "down" else gate_up
        fmt = request.down_format if projection == "down" else request.gate_up_format
        if spec is not None:
            _check_fit(scheme, layer, projection, spec, fmt)
    return request


def _options_of(plugin: str | None, scheme: Scheme, registry: Registry) -> dict[str, Any]:
    """Return the scheme's options for its own plugin, and the declared defaults for any other."""
    manifest = registry.manifests().get(plugin or "")
    return {} if manifest is None else manifest.with_defaults(scheme.options if plugin == scheme.plugin else {})


def _check_fit(scheme: Scheme, layer: LayerSpec, projection: Any, spec: WeightSpec, fmt: NumberFormat) -> None:
    try:
        check_spec(spec, fmt, *layer.weight_shape(projection))
    except SchemeError as error:
        owners: list[tuple[str | int, ...]] = [
            ("overrides", index) for index, override in enumerate(scheme.overrides) if override.weights == spec
        ]
        where = scheme.where((*(owners[-1] if owners else ()), "weights", "group_size"))
        raise SchemeError(f"{where}: layer {layer.index}, {projection}: {error}") from error


def _specs_of(layer: LayerSpec, scheme: Scheme, expert: int) -> tuple[str | None, WeightSpec | None, WeightSpec | None]:
    (up_plugin, up), (down_plugin, down) = (scheme.weights_for(layer.index, expert, p) for p in ("gate_up", "down"))
    plugins = {plugin for plugin, spec in ((up_plugin, up), (down_plugin, down)) if spec is not None}
    if len(plugins) > 1:
        raise SchemeError(
            f"{scheme.where(('overrides',))}: layer {layer.index}, expert {expert}: gate_up is by plugin {up_plugin}, "
            f"down by plugin {down_plugin}; one expert has one plugin"
        )
    return (plugins.pop() if plugins else None), up, down


def _format(spec: WeightSpec | None, layer: LayerSpec, registry: Registry) -> NumberFormat:
    return Unquantized(dtype_of(layer)) if spec is None else registry.format(spec.format)


def dtype_of(layer: LayerSpec) -> torch.dtype:
    """Return the torch dtype of a layer's weights in the checkpoint."""
    dtype: torch.dtype = getattr(torch, layer.dtype)
    return dtype


def bytes_of_biases(layer: LayerSpec) -> int:
    """Return the bytes of one expert's biases; they stay as the checkpoint has them."""
    return (layer.w13_rows + layer.hidden_size) * dtype_of(layer).itemsize if layer.bias else 0


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as a scheme writes them, for example "0-3,9"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def gigabytes(count: float) -> str:
    """Return bytes for people: decimal units, as `--budget` reads them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
