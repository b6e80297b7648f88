"""Read an export of moeplug's own form: layers as a kernel reads them, so loading is reading and nothing else.

Where the kernel planned here wants another layout than the one that was exported, a layer is laid out anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from moeplug.checkpoint.files import shown
from moeplug.checkpoint.memory import TORCH_DTYPES
from moeplug.checkpoint.reader import Checkpoint, Piece, in_file_order
from moeplug.checkpoint.record import read_record
from moeplug.checkpoint.writer import MANIFEST
from moeplug.errors import CheckpointError
from moeplug.hookspecs import StageContext
from moeplug.moe.experts import ExpertGroup
from moeplug.pipeline import Job, LayerPlan, Plan, plan_layer
from moeplug.pipeline.allocate import buffer_shapes
from moeplug.pipeline.builder import LayerErrors
from moeplug.pipeline.create_scales import ScaleStore
from moeplug.pipeline.plan import activate_plugins, check_dense_dtypes
from moeplug.pipeline.setup_kernel import PipelineBinder
from moeplug.registry import Registry
from moeplug.scheme import Scheme

QUANT_METHOD: Final = "moeplug"  # in config.json's quantization_config
MEANING: Final = "_extra_state"  # the tensor that says how the others of a group are laid out
MOST_MEANING: Final = 1 << 20  # of 16,384 expert ids and two specs, 110 kB


def is_stored(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of an export of our own form."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def plan_stored(checkpoint: Checkpoint, registry: Registry, device: torch.device, *, with_dense: bool) -> Plan:
    """Return the plan of loading an export: its own scheme, with the kernels that serve it on this device."""
    manifest = read_record(checkpoint.path)
    made, errors = manifest["made"], recorded_errors(manifest)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    family = registry.family_of(config)
    scheme = Scheme.from_text(made["scheme"]["yaml"], str(checkpoint.path / MANIFEST))
    activate_plugins(scheme, registry, device)
    layers = family.layers(config)
    unknown = [layer.index for layer in layers if str(layer.index) not in made["dtypes"] or layer.index not in errors]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path}: {MANIFEST} knows nothing of layer {unknown[0]}, which config.json has"
        )
    more = sorted(set(map(int, made["dtypes"])) - {layer.index for layer in layers})
    if more:
        raise CheckpointError(f"{checkpoint.path}: config.json knows nothing of layer {more[0]}, which {MANIFEST} has")
    layers = [
        replace(
            layer,
            dtype=made["dtypes"][str(layer.index)],
            bias=f"{layer.name}.groups.0.w2_bias" in checkpoint.tensors,
        )
        for layer in layers
    ]
    prefixes = tuple(f"{layer.name}.groups." for layer in layers)
    kept = tuple(tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(prefixes))
    if with_dense:
        check_dense_dtypes(kept)
    plans = tuple(plan_layer(layer, scheme, registry, device) for layer in layers)
    for plan in plans:
        _require_stored(checkpoint, plan, registry)
    return Plan(checkpoint, family, scheme, device, plans, (), kept, with_dense, stored=errors)


def _require_stored(checkpoint: Checkpoint, plan: LayerPlan, registry: Registry) -> None:
    """Raise CheckpointError unless the export has a layer's tensors, each of its shape and type, and no others."""
    folder = f"{plan.layer.name}.groups."
    expected: set[str] = set()
    for number, group in enumerate(plan.groups):
        request = group.ctx.request
        on_meta = replace(group.ctx, request=replace(request, device=replace(request.device, type="meta")))
        for name, buffer in StoredGroup(on_meta, registry).buffers.items():
            full = f"{folder}{number}.{name}"
            expected.add(full)
            found = checkpoint.tensors.get(full)
            dtype = str(buffer.dtype).removeprefix("torch.")
            if found is None or found.shape != tuple(buffer.shape) or TORCH_DTYPES.get(found.dtype) != dtype:
                described = "is missing" if found is None else f"is {found.shape} {found.dtype}"
                raise CheckpointError(
                    f"{checkpoint.path}: {full} {described}; expected {tuple(buffer.shape)} {dtype}; export it again"
                )
        _require_meaning(checkpoint, f"{folder}{number}.{MEANING}")
        expected.add(f"{folder}{number}.{MEANING}")
    more = [name for name in checkpoint.tensors if name.startswith(folder) and name not in expected]
    if more:
        raise CheckpointError(f"{checkpoint.path}: {shown(more[0])} belongs to no group of experts; export it again")


def _require_meaning(checkpoint: Checkpoint, name: str) -> None:
    found = checkpoint.tensors.get(name)
    if found is None or found.dtype != "U8" or len(found.shape) != 1 or found.nbytes > MOST_MEANING:
        described = "is missing" if found is None else f"is {found.shape} {found.dtype}"
        raise CheckpointError(
            f"{checkpoint.path}: {name} {described}; expected at most {MOST_MEANING:,} bytes, U8; export it again"
        )


def recorded_errors(manifest: Mapping[str, Any]) -> dict[int, LayerErrors]:
    """Return the errors of each layer that moeplug.json says were measured when it was quantized."""
    parts: dict[int, list[Mapping[str, Any]]] = {}
    for facts in manifest["files"].values():
        for layer, errors in facts.get("errors", {}).items():
            parts.setdefault(int(layer), []).append(errors)
    found = {}
    for layer, all_errors in sorted(parts.items()):
        worst = max(all_errors, key=lambda errors: errors["worst"])
        weights = sum(errors["weights"] for errors in all_errors)
        mean = sum(errors["mean"] * errors["weights"] for errors in all_errors) / weights
        squares = sum(errors["sum_of_squares"] for errors in all_errors)
        found[layer] = LayerErrors(worst["worst"], mean, worst["where"], squares)
    return found


class StoredGroup:
    """One group of a layer: empty buffers of the planned layout, which the stored tensors of these names fill."""

    def __init__(self, ctx: StageContext, registry: Registry) -> None:
        self._ctx, self._binder = ctx, PipelineBinder(registry)
        self._weights = {
            name: torch.empty(shape, dtype=dtype, device=ctx.device)
            for name, (shape, dtype) in buffer_shapes(ctx).items()
        }
        if ctx.layer.bias:
            dtype, E = getattr(torch, ctx.layer.dtype), len(ctx.experts)
            rows = {"w13_bias": ctx.layer.w13_rows, "w2_bias": ctx.layer.hidden_size}
            self._weights |= {name: torch.empty(E, n, dtype=dtype, device=ctx.device) for name, n in rows.items()}
        self._scales = ScaleStore(ctx).tensors
        self._staged: dict[str, Tensor] | None = None

    @property
    def module(self) -> ExpertGroup:
        """The group, bound to its buffers as they are now."""
        return ExpertGroup(self._ctx, self._weights, self._scales, self._binder)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What the group holds, by the names that a kernel knows."""
        return {**self._weights, **self._scales}

    def targets(self, meaning: Tensor) -> dict[str, Tensor]:
        """Return where each stored tensor is to be read into. meaning: what the export says of the layout."""
        buffers = self.buffers
        mine = self.module.get_extra_state()
        if torch.equal(meaning, mine) and all(buffer.is_contiguous() for buffer in buffers.values()):
            return buffers
        self._staged = {name: torch.empty(tuple(b.shape), dtype=b.dtype) for name, b in buffers.items()}
        return dict(self._staged)

    def finish(self, meaning: Tensor) -> ExpertGroup:
        """Return the group, filled; SchemeError where what is stored is of another spec."""
        module = self.module
        if self._staged is not None:
            try:
                module.load_state_dict({**self._staged, MEANING: meaning})
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # it is a file's text
                where = f"layer {self._ctx.layer.index}: {MEANING}"
                raise CheckpointError(
                    f"{where} does not say how the layer is laid out: {error}; export it again"
                ) from error
            self._staged = None
        return module


class StoredJob(Job):
    """Reads every tensor to its place; a layer is finished with its last one."""

    in_order = True

    def _pieces_to_read(self) -> list[Piece]:
        self._targets: dict[str, tuple[int, Tensor]] = {}
        self._left: dict[int, int] = {}
        self._groups: dict[int, list[tuple[StoredGroup, Tensor]]] = {}
        meanings = self._read_meanings()
        for layer in self._plan.layers:
            self._prepare(layer, meanings)
        tensors = [self._plan.checkpoint.tensors[name] for name in self._targets]
        step = self._plan.read_buffer_bytes // 16 * 16
        pieces = [Piece(t, s, min(step, t.nbytes - s)) for t in tensors for s in range(0, t.nbytes, step)]
        return in_file_order([*pieces, *super()._pieces_to_read()])

    def _prepare(self, layer: LayerPlan, meanings: Mapping[str, Tensor]) -> None:
        """Make a layer's buffers."""
        index = layer.layer.index
        self._groups[index], self._left[index] = [], 0
        for number, group in enumerate(layer.groups):
            prefix = f"{layer.layer.name}.groups.{number}."
            meaning = meanings[prefix + MEANING]
            stored = StoredGroup(group.ctx, self._registry)
            self._groups[index].append((stored, meaning))
            for name, target in stored.targets(meaning).items():
                self._targets[prefix + name] = index, target
                self._left[index] += target.nbytes

    def _read_meanings(self) -> dict[str, Tensor]:
        groups = [(plan.layer.name, number) for plan in self._plan.layers for number in range(len(plan.groups))]
        tensors = [self._plan.checkpoint.tensors[f"{name}.groups.{number}.{MEANING}"] for name, number in groups]
        pieces = in_file_order(Piece(tensor, 0, tensor.nbytes) for tensor in tensors)
        buffers = [memoryview(bytearray(max((p.nbytes for p in pieces), default=1))) for _ in range(2)]
        assert isinstance(self._plan.checkpoint, Checkpoint)
        return {
            piece.tensor.name: torch.tensor(list(data), dtype=torch.uint8)
            for piece, data in self._plan.checkpoint.stream(pieces, buffers)
        }

    def _keep(self, piece: Piece, raw: Tensor) -> None:
        """Copy bytes to their place; the last of a layer finish it."""
        if piece.tensor.name not in self._targets:
            super()._keep(piece, raw)
            return
        layer, target = self._targets[piece.tensor.name]
        self._note_peak(piece, raw)
        target.view(-1).view(torch.uint8)[piece.start : piece.start + piece.nbytes].copy_(raw)
        self._left[layer] -= piece.nbytes
        if self._left[layer] == 0:
            groups = [stored.finish(meaning) for stored, meaning in self._groups.pop(layer)]
            assert self._plan.stored is not None
            experts = self._module_class(self._layer_plans[layer].layer, groups)
            self._finish(layer, experts, self._plan.stored[layer])
