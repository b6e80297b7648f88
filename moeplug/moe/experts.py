"""QuantizedExperts: what the pipeline leaves behind in place of a layer's experts, an nn.Module for inference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor, nn

from moeplug.errors import SchemeError, UsageError
from moeplug.kernels import ops
from moeplug.moe.layout import PROJECTIONS, LayerSpec, Layout, Projection, buffer_name
from moeplug.quantization import reordered

if TYPE_CHECKING:
    from moeplug.hookspecs import StageContext
    from moeplug.kernels.select import ExpertsForward


LAYOUT_KEYS: Final = ("layout", "version", "rows", "w13_words", "w2_words")  # of a state: what may differ


class Binder(Protocol):
    """What can plan a group for another device and bind its kernel: the pipeline's end of a module's life."""

    def replan(self, ctx: StageContext, device: torch.device) -> StageContext:
        """Return ctx with the kernel that serves the group on device; raise SchemeError where none does."""

    def bind(self, ctx: StageContext, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> ExpertsForward:
        """Run stage 5 on these buffers."""


class ExpertGroup(nn.Module):
    """The experts of one layer that share a spec: their buffers and the callable bound to them.

    Buffers: w13 (E, 2I, K'), w2 (E, H, K'), and the scales as stage 4 made them. Their dtypes never change:
    `.to(torch.bfloat16)` moves a model's floats, and would turn scales and fp8 bytes into something else.
    """

    def __init__(
        self, ctx: StageContext, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], binder: Binder
    ) -> None:
        super().__init__()
        self.ctx = ctx
        self._binder = binder
        self._weight_names, self._scale_names = tuple(weights), tuple(scales)
        for name, tensor in {**weights, **scales}.items():
            self.register_buffer(name, tensor)
        self._handle = ops.new_handle(self)
        self._bind()

    def weights(self) -> dict[str, Tensor]:
        """Return the buffers that stage 1 made, by name: not the scales."""
        return {name: self.get_buffer(name) for name in self._weight_names}

    def stored(self, projection: Projection, slot: int) -> Tensor:
        """Return one expert weight's stored values (N, K / values_per_element), layout undone; maybe a view."""
        weight = self.ctx.layout.view(self.get_buffer(buffer_name(projection)), projection)[slot : slot + 1]
        return reordered(weight, self.ctx.format(projection), self.ctx.layout.words(projection), False)[0]

    def forward(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return (M, H): this group's part of the layer. topk_ids are slots of this group."""
        if ops.is_traced(hidden):
            return ops.experts(hidden, topk_weights, topk_ids, out, list(self.buffers()), self._handle)
        return self.bound()(hidden, topk_weights, topk_ids, out=out)

    def bound(self) -> ExpertsForward:
        """Return the kernel as it is bound now; raise UsageError on the meta device, where none is."""
        if self._experts_forward is None:
            raise UsageError("these experts are on the meta device: load or move them before calling them")
        return self._experts_forward

    def extra_repr(self) -> str:
        return f"{len(self.ctx.experts)} x {describe(self.ctx)} by {self.ctx.kernel.name}"

    def _bind(self) -> None:
        self._experts_forward: ExpertsForward | None = None
        if self.get_buffer("w13").device.type != "meta":
            scales = {name: self.get_buffer(name) for name in self._scale_names}
            self._experts_forward = self._binder.bind(self.ctx, self.weights(), scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertGroup:
        """Move buffers as fn moves them, keep their dtypes, and plan anew where the device asks for it."""
        moved = {name: _moved(fn, buffer) for name, buffer in self._buffers.items() if buffer is not None}
        device = moved["w13"].device
        if device.type != "meta" and str(device) != self.ctx.device:
            ctx = self._binder.replan(self.ctx, device)
            moved = {n: self._relaid(t, n, self.ctx.layout, ctx.layout) for n, t in moved.items()}
            self.ctx = ctx
        for name, tensor in moved.items():
            self._buffers[name] = tensor
        self._bind()
        return self

    def _relaid(self, tensor: Tensor, name: str, source: Layout, target: Layout) -> Tensor:
        """Return a buffer brought from one layout into another: values along K first, then rows."""
        projection: Projection = "down" if name.startswith("w2") else "gate"
        spec = self.ctx.spec(projection)
        if name == buffer_name(projection):
            fmt = self.ctx.format(projection)
            tensor = reordered(tensor, fmt, source.words(projection), target.words(projection))
        elif name.endswith("_scale") and tensor.dim() == 3:
            E, N, C = tensor.shape
            tensor = target.empty_scales((E, N, C), tensor.dtype, tensor.device).copy_(tensor)
        of_blocks = name.endswith("_scale") and spec is not None and spec.scale_rows > 1
        return tensor if of_blocks and tensor.dim() == 3 else relayout(tensor, name, source, target)

    def get_extra_state(self) -> Tensor:
        """Return what the buffers mean (layout, version, specs) as JSON bytes (n,) uint8: any format holds them."""
        return torch.tensor(list(json.dumps(self._meaning(), sort_keys=True).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is left to do: `_load_from_state_dict` compared and converted before it copied."""

    def _meaning(self) -> dict[str, Any]:
        request, layout = self.ctx.request, self.ctx.layout
        return {
            "layout": layout.name,
            "version": layout.version,
            "rows": layout.gate_up,
            "w13_words": layout.w13_words,
            "w2_words": layout.w2_words,
            "experts": list(self.ctx.experts),
            "plugin": self.ctx.plugin,
            "gate_up": None if request.gate_up is None else request.gate_up.model_dump(mode="json"),
            "down": None if request.down is None else request.down.model_dump(mode="json"),
        }

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save scales in the plain order of memory too: safetensors writes no other."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._buffers:
            destination[prefix + name] = destination[prefix + name].contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse a state of another spec before a byte is copied; a state of another layout is laid out anew."""
        extra = state_dict.get(prefix + "_extra_state")
        if extra is None:
            raise SchemeError(f"{prefix}_extra_state is missing: this state_dict does not say how it is laid out")
        saved, mine = json.loads(bytes(extra.tolist())), self._meaning()
        differing = [key for key in mine if key not in LAYOUT_KEYS and saved.get(key) != mine[key]]
        if differing:
            key = differing[0]
            raise SchemeError(f"{prefix}{key}: the state has {saved.get(key)}, this module has {mine[key]}")
        if (saved["layout"], saved["version"]) != (mine["layout"], mine["version"]):
            # States from before words have plain values, in a layout that is called as it arranges rows.
            rows, words = saved.get("rows", saved["layout"]), (saved.get(key, False) for key in LAYOUT_KEYS[3:])
            source = Layout(saved["layout"], saved["version"], rows, *words)
            for name in self._buffers:
                state_dict[prefix + name] = self._relaid(state_dict[prefix + name], name, source, self.ctx.layout)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._bind()  # assign=True puts other tensors in the buffers' places

    def __getstate__(self) -> dict[str, Any]:
        """Leave the bound kernel out of copies: each binds its own buffers."""
        return {**self.__dict__, "_experts_forward": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = ops.new_handle(self)
        self._bind()


class QuantizedExperts(nn.Module):
    """A layer's routed experts, quantized. Call it with what a router gives; it returns the combined output.

    forward(hidden (M, H), topk_weights (M, T), topk_ids (M, T)) -> (M, H). Inference only. Repeats bit for bit.
    """

    def __init__(self, layer: LayerSpec, groups: Sequence[ExpertGroup]) -> None:
        super().__init__()
        self.layer = layer
        self.groups = nn.ModuleList(groups)
        self.unfinished: str | None = None  # why the weights are not to be used: half of them are of another model
        # Ids are then slots as they are. Worked out here: comparing 128 ids costs 2 us a call.
        self._one_group = len(groups) == 1 and groups[0].ctx.experts == tuple(range(layer.num_experts))
        slots = [_slot_table(group.ctx.experts, layer.num_experts) for group in groups]
        # (groups, E + 1): expert id → slot of a group, -1 for not there; the last column takes every id out of range.
        self.slots: Tensor
        self.register_buffer("slots", torch.stack(slots).to(groups[0].get_buffer("w13").device), persistent=False)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weights and scales."""
        return sum(t.nbytes for group in self.groups for t in group.buffers())

    @property
    def kernels(self) -> tuple[str, ...]:
        """Return the kernel of each group."""
        return tuple(group.ctx.kernel.name for group in self.expert_groups())

    def forward(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return (M, H) in hidden's dtype: the sum over T, in order, of topk_weights * expert(hidden).

        hidden: (M, H) bfloat16, float16 or float32. topk_weights: (M, T), used as float32. topk_ids: (M, T) int32 or
        int64; an id out of range contributes nothing (-1 is "not mine" under expert parallelism).
        """
        self._check(hidden, topk_weights, topk_ids)
        topk_weights = topk_weights.float()
        if self._one_group:
            return next(iter(self.groups))(hidden, topk_weights, topk_ids, out=out)  # type: ignore[no-any-return]
        return self._sum_of_groups(hidden, topk_weights, topk_ids, out)

    def stored(self, projection: Projection, expert: int) -> Tensor:
        """Return one expert weight's stored values (N, K / values_per_element), as they were before any layout."""
        group, slot = self._place(expert)
        return group.stored(projection, slot)

    def _sum_of_groups(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None) -> Tensor:
        """Add the groups' parts in float32, in group order, and round once."""
        E = self.layer.num_experts
        inside = (topk_ids >= 0) & (topk_ids < E)
        ids = torch.where(inside, topk_ids, E).long()
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        part = torch.empty_like(total)
        for group, slots in zip(self.groups, self.slots, strict=True):
            total += group(hidden, topk_weights, slots[ids], out=part)
        return total.to(hidden.dtype) if out is None else out.copy_(total)

    def _require_finished(self) -> None:
        if self.unfinished is not None:
            raise UsageError(f"layer {self.layer.index} holds a mixture of weights: {self.unfinished}")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._require_finished()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _place(self, expert: int) -> tuple[ExpertGroup, int]:
        for group in self.expert_groups():
            if expert in group.ctx.experts:
                return group, group.ctx.experts.index(expert)
        raise UsageError(f"layer {self.layer.index} has no expert {expert}; it has 0 to {self.layer.num_experts - 1}")

    def expert_groups(self) -> list[ExpertGroup]:
        """Return the groups, in the order of the plan."""
        return list(self.groups)  # type: ignore[arg-type]

    def _check(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        self._require_finished()
        if hidden.dim() != 2 or hidden.shape[1] != self.layer.hidden_size:
            raise UsageError(f"hidden is {tuple(hidden.shape)}; expected (M, {self.layer.hidden_size})")
        if topk_ids.shape != topk_weights.shape or topk_ids.dim() != 2 or topk_ids.shape[0] != hidden.shape[0]:
            found = f"topk_weights {tuple(topk_weights.shape)}, topk_ids {tuple(topk_ids.shape)}"
            raise UsageError(f"{found}; expected both ({hidden.shape[0]}, T)")
        if topk_ids.dtype not in (torch.int32, torch.int64) or not topk_weights.is_floating_point():
            found = f"topk_weights {topk_weights.dtype}, topk_ids {topk_ids.dtype}"
            raise UsageError(f"{found}; expected floats, then int32 or int64 ids (weights come before ids)")
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise UsageError("QuantizedExperts is for inference: call it under torch.no_grad()")

    def extra_repr(self) -> str:
        layer = self.layer
        sizes = f"E={layer.num_experts}, H={layer.hidden_size}, I={layer.intermediate_size}"
        return f"layer {layer.index}, {sizes}, {self.nbytes:,} bytes"


def describe(ctx: StageContext) -> str:
    """Return a group's specs in a few words, for example `int8 channel` or `int8 g128 + bfloat16`."""
    return ctx.request.describe()


def relayout(tensor: Tensor, name: str, source: Layout, target: Layout) -> Tensor:
    """Return w13, or a scale or bias in w13's row order, (E, 2I, ...), with rows brought into another layout."""
    if not name.startswith("w13") or source.gate_up == target.gate_up:
        return tensor
    result = torch.empty_like(tensor)
    for projection in PROJECTIONS[:2]:
        target.view(result, projection).copy_(source.view(tensor, projection))
    return result


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def _slot_table(experts: Sequence[int], num_experts: int) -> Tensor:
    table = torch.full((num_experts + 1,), -1, dtype=torch.int64)
    table[list(experts)] = torch.arange(len(experts))
    return table
