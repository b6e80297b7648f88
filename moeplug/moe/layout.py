"""Name the axes of a MoE layer, and say where each projection's rows lie in the kernel's buffers.

The axis letters, everywhere the same:
    M tokens        T experts per token (top-k)     E experts
    N out           K in                            G group: weights along K that share a scale
    H hidden        I intermediate

A layer is w13 (E, 2I, H), which holds gate and up, and w2 (E, H, I), which holds down.
One projection of one expert, (N, K), is an *expert weight*: gate (I, H), up (I, H), down (H, I).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from torch import Tensor

Projection = Literal["gate", "up", "down"]
PROJECTIONS: Final[tuple[Projection, ...]] = ("gate", "up", "down")
ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class LayerSpec:
    """One MoE block: its place in the model, its sizes and its activation.

    index: the decoder layer's index in the model, from 0. dtype: the checkpoint's, for example "bfloat16".
    The output is sum over T of topk_weight * (act(x @ gate.T) * (x @ up.T)) @ down.T.
    """

    index: int
    name: str
    num_experts: int
    experts_per_token: int
    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    dtype: str = "bfloat16"

    def weight_shape(self, projection: Projection) -> tuple[int, int]:
        """Return (N, K) of one expert weight."""
        if projection == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size


@dataclass(frozen=True)
class Layout:
    """Where rows lie in w13 and w2: a named transformation whose inverse is the same view.

    `rows` gives the slice of a buffer's rows that a projection owns, so writing through `view` lays weights out and
    reading through it brings the plain (E, N, K) back, bit for bit. Nothing changes a layout after allocation.
    """

    name: str
    version: int
    gate_up: Literal["concatenated", "interleaved"]

    def rows(self, projection: Projection, intermediate_size: int) -> slice:
        """Return which rows of w13 (2I rows) or w2 (all rows) hold this projection."""
        if projection == "down":
            return slice(None)
        first = projection == "gate"
        if self.gate_up == "interleaved":  # one tile of w13 then holds gate i and up i side by side
            return slice(0 if first else 1, None, 2)
        return slice(0, intermediate_size) if first else slice(intermediate_size, None)

    def view(self, buffer: Tensor, projection: Projection) -> Tensor:
        """Return projection's (E, N, K) of a buffer (E, rows, K): a view, never a copy."""
        return buffer[:, self.rows(projection, buffer.shape[1] // 2)]


CONCATENATED: Final = Layout("concatenated", 1, "concatenated")
INTERLEAVED: Final = Layout("interleaved", 1, "interleaved")


def buffer_name(projection: Projection) -> Literal["w13", "w2"]:
    """Return the buffer that holds a projection."""
    return "w2" if projection == "down" else "w13"
