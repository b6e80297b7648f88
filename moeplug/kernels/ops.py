"""What torch.compile sees of a group of experts: one operator, of which it knows the shape and does not look inside.

An eager call never comes here: the dispatcher would cost it more than 10 us. Traced calls do, as `moeplug::experts`.

The operator finds its experts by a handle, an int, by default a constant of the traced graph. It stays good for as
long as the group lives, through `.to()` and `load_state_dict`, and always runs the kernel as it is bound now; a copy
of a group has a handle of its own. The group's buffers are arguments only for the tracer's sake: so a graph has them
as inputs, keeps them alive, and is traced again where one changes its device.

A model compiled as a whole is one graph. Who compiles it layer by layer sets
torch._dynamo.config.allow_unspec_int_on_nn_module, else each layer's handle makes a graph (dynamo stops after 8): with
it the handle is an input, as the schema's SymInt allows, and one graph serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Final, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moeplug.errors import UsageError

if TYPE_CHECKING:
    from moeplug.kernels.select import ExpertsForward


class Bound(Protocol):
    """What has a handle: something that a kernel is bound to, a group of experts."""

    def bound(self) -> ExpertsForward:
        """Return the kernel as it is bound now; raise UsageError where none is."""


_handles: Final = count()
_alive: Final[WeakValueDictionary[int, Bound]] = WeakValueDictionary()


def new_handle(group: Bound) -> int:
    """Return a number that stands for group, and for nothing else in this process, for as long as it lives."""
    handle = next(_handles)
    _alive[handle] = group
    return handle


def is_traced(hidden: Tensor) -> bool:
    """Return whether a call has to go through `experts`: torch.compile, make_fx, export, fake or other tensors."""
    if torch.compiler.is_compiling():
        return True
    return type(hidden) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def experts(
    hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None, buffers: Sequence[Tensor], handle: int
) -> Tensor:
    """Return what the group of this handle makes of these tokens: ExpertsForward, for calls that are traced."""
    dtype = None if out is None else out.dtype
    result: Tensor = torch.ops.moeplug.experts(hidden, topk_weights, topk_ids, buffers, handle, dtype)
    return result if out is None else out.copy_(result)


@torch.library.custom_op(
    "moeplug::experts",
    mutates_args=(),
    schema="(Tensor hidden, Tensor topk_weights, Tensor topk_ids, Tensor[] buffers, SymInt handle, "
    "ScalarType? out_dtype=None) -> Tensor",
)
def _experts_op(
    hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, buffers: Sequence[Tensor], handle: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    group = _alive.get(handle)
    if group is None:
        raise UsageError(
            f"the experts of this graph (handle {handle}) no longer exist in this process: keep their module alive for "
            "as long as the graph, and trace again after loading a graph from a file"
        )
    if buffers[0].device != hidden.device:
        raise UsageError(f"hidden is on {hidden.device}, the experts are on {buffers[0].device}: move one of them")
    # The result is contiguous, as traced, whatever strides a plugin's kernel would give a tensor of its own.
    out = hidden.new_empty(hidden.shape, dtype=out_dtype)
    group.bound()(hidden, topk_weights, topk_ids, out=out)
    return out


@_experts_op.register_fake
def _(
    hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, buffers: Sequence[Tensor], handle: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    return hidden.new_empty(hidden.shape, dtype=out_dtype)
