"""Say which kernel serves a group of experts on a device, and why not the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moeplug.errors import SchemeError
from moeplug.moe.layout import LayerSpec, Layout
from moeplug.spec import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from torch import Tensor

    from moeplug.formats import NumberFormat


@dataclass(frozen=True)
class Device:
    """What a kernel has to know of a device, as data, so that selection is tested without one.

    type: "cpu" or "cuda". compute_capability: (9, 0) on Hopper; None on CPU. name: as torch.cuda.get_device_name says.
    """

    type: str
    index: int = 0
    compute_capability: tuple[int, int] | None = None
    name: str = ""

    def __str__(self) -> str:
        return self.type if self.type == "cpu" else f"{self.type}:{self.index}"


@dataclass(frozen=True)
class KernelRequest:
    """What a group of experts needs: sizes, formats of both products, and the device. Pure data.

    input_activations, intermediate: how the first and the second product's input is quantized, None: not; their
    formats beside them. Neither is quantized where the weights it meets are not.
    """

    layer: LayerSpec
    device: Device
    gate_up: WeightSpec | None
    down: WeightSpec | None
    gate_up_format: NumberFormat
    down_format: NumberFormat
    input_activations: ActivationSpec | None = None
    intermediate: ActivationSpec | None = None
    activation_format: NumberFormat | None = None
    intermediate_format: NumberFormat | None = None

    def describe(self) -> str:
        """Return the specs in a few words, for example `int8 channel` or `int8 g128 + bfloat16`."""
        sides = (self.gate_up, self.gate_up_format), (self.down, self.down_format)
        names = [fmt.name if spec is None else spec.describe() for spec, fmt in sides]
        label = names[0] if names[0] == names[1] else " + ".join(names)
        quantized = {a.describe() for a in (self.input_activations, self.intermediate) if a is not None}
        return ", ".join([label, *(f"{text} activations" for text in sorted(quantized))])


class ExpertsForward(Protocol):
    """What stage 5 returns: the experts' part of a MoE layer."""

    def __call__(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return (M, H): the sum over T, in the order of T, of topk_weights * expert(hidden).

        hidden: (M, H) float. topk_weights: (M, T) float32. topk_ids: (M, T) int32 or int64, slots of the buffers;
        an id below 0 or at least E contributes nothing, a repeated id counts twice.
        out: (M, H) of hidden's dtype or float32, written and returned; None: a new tensor of hidden's dtype.
        """


class Kernel(ABC):
    """One fused-MoE kernel: what it serves, the weight layout it wants, and how to bind it to buffers.

    layout: the one of every request; a kernel that wants several has a `layout_for` of its own.
    """

    name: str
    layout: Layout

    def layout_for(self, request: KernelRequest) -> Layout:
        """Return the layout of the buffers that `bind` will be given for this request."""
        return self.layout

    @abstractmethod
    def reason_against(self, request: KernelRequest) -> str | None:
        """Return None if this kernel serves the request, else why not, in one line."""

    @abstractmethod
    def bind(
        self, request: KernelRequest, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> ExpertsForward:
        """Return the callable over these buffers (shapes as in `moeplug.hookspecs`, stages 1 and 4)."""

    def __repr__(self) -> str:
        return f"<kernel {self.name}>"


Against = tuple[tuple[str, str], ...]  # (kernel, the reason against it)


@dataclass(frozen=True)
class Selection:
    """The chosen kernel, and the reason against every other one that was asked before or instead."""

    kernel: Kernel
    against: Against


def _reason_against_rows(kernel: Kernel, request: KernelRequest) -> str | None:
    """Return why a kernel's layout has no place for these experts: one that was written for gates takes no others."""
    if request.layer.gated or kernel.layout_for(request).gate_up == "up":
        return None
    return "wants gate and up, but the experts have no gate"


def select_kernel(request: KernelRequest, kernels: Iterable[Kernel]) -> Selection:
    """Return the first kernel that serves the request; raise SchemeError with every reason if none does."""
    chosen, against = judge_kernels(request, kernels)
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in against) or "no kernel is registered"
        raise SchemeError(f"layer {request.layer.index}: no kernel serves this scheme on {request.device}: {reasons}")
    return Selection(chosen, against)


def judge_kernels(request: KernelRequest, kernels: Iterable[Kernel]) -> tuple[Kernel | None, Against]:
    """Return the first kernel that serves the request, None if none does, and the reasons against the others."""
    chosen, against = None, []
    for kernel in kernels:
        reason = kernel.reason_against(request) or _reason_against_rows(kernel, request)
        if reason is None and chosen is None:
            chosen = kernel
        else:
            against.append((kernel.name, reason or f"{chosen.name if chosen else ''} is preferred"))
    return chosen, tuple(against)
