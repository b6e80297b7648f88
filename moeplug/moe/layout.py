"""Name the axes of a MoE layer, and say where each projection's rows and values lie in the kernel's buffers.

The axis letters, everywhere the same:
    M tokens        T experts per token (top-k)     E experts
    N out           K in                            G group: weights along K that share a scale
    H hidden        I intermediate

A layer is w13 (E, 2I, H), which holds gate and up, and w2 (E, H, I), which holds down. Experts without a gate have up
alone in w13, (E, I, H).
One projection of one expert, (N, K), is an *expert weight*: gate (I, H), up (I, H), down (H, I).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Projection = Literal["gate", "up", "down"]
PROJECTIONS: Final[tuple[Projection, ...]] = ("gate", "up", "down")
ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "none", "swiglu_clamped")


@dataclass(frozen=True)
class LayerSpec:
    """One MoE block: its place in the model, its sizes and its activation.

    index: the decoder layer's index in the model, from 0. dtype: the checkpoint's, for example "bfloat16".
    The output is sum over T of topk_weight * (act(x @ gate.T) * (x @ up.T)) @ down.T.
    activation_alpha, activation_limit, activation_offset: read by activation "swiglu_clamped" alone, which is
    gate * sigmoid(alpha * gate) * (up + offset) with gate at most limit and up within -limit and limit.
    router_weight_on_input: topk_weight multiplies both products before the activation instead of the output.
    gated: false: experts have no gate, and the hidden values are act(x @ up.T). bias: all projections have biases.
    """

    index: int
    name: str
    num_experts: int
    experts_per_token: int
    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    dtype: str = "bfloat16"
    activation_alpha: float = 1.702
    activation_limit: float | None = None
    activation_offset: float = 1.0
    router_weight_on_input: bool = False
    gated: bool = True
    bias: bool = False

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The projections that an expert has."""
        return PROJECTIONS if self.gated else PROJECTIONS[1:]

    @property
    def w13_rows(self) -> int:
        """How many rows one expert has in w13."""
        return 2 * self.intermediate_size if self.gated else self.intermediate_size

    def weight_shape(self, projection: Projection) -> tuple[int, int]:
        """Return (N, K) of one expert weight."""
        if projection == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size


@dataclass(frozen=True)
class Layout:
    """Where rows lie in w13 and w2, and values along K: named, with an inverse, fixed by allocation.

    `rows` gives the slice of a buffer's rows that a projection owns, so writing through `view` lays weights out and
    reading through it brings the plain (E, N, K) back, bit for bit.
    w13_words, w2_words: values along K are in the order of `in_words`, so that 16 bits hold values 16 apart; else in
    the plain order. scales_along: the axis along which scales, (E, N, C), are neighbours in memory.
    """

    name: str
    version: int
    gate_up: Literal["concatenated", "interleaved", "up"]
    w13_words: bool = False
    w2_words: bool = False
    scales_along: Literal["K", "N"] = "K"

    def words(self, projection: Projection) -> bool:
        """Return whether this projection's values are stored in words."""
        return self.w2_words if projection == "down" else self.w13_words

    def rows(self, projection: Projection, intermediate_size: int) -> slice:
        """Return which rows of w13 (2I rows) or w2 (all rows) hold this projection."""
        if projection == "down" or self.gate_up == "up":
            return slice(None)
        first = projection == "gate"
        if self.gate_up == "interleaved":  # one tile of w13 then holds gate i and up i side by side
            return slice(0 if first else 1, None, 2)
        return slice(0, intermediate_size) if first else slice(intermediate_size, None)

    def view(self, buffer: Tensor, projection: Projection) -> Tensor:
        """Return projection's (E, N, K) of a buffer (E, rows, K), or (E, N) of (E, rows): a view, never a copy."""
        return buffer[:, self.rows(projection, buffer.shape[1] // 2)]

    def empty_scales(self, shape: tuple[int, int, int], dtype: torch.dtype, device: str | torch.device) -> Tensor:
        """Return (E, N, C) with neighbours as scales_along says. Bytes stay along K: a row's are loaded together."""
        import torch

        E, N, C = shape
        if self.scales_along == "K" or dtype.itemsize == 1 or C == 1:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty(E, C, N, dtype=dtype, device=device).transpose(1, 2)


WORDS: Final = 16  # in a run: the values along K that a tensor core's operand keeps in the same registers
CONCATENATED: Final = Layout("concatenated", 1, "concatenated")
INTERLEAVED: Final = Layout("interleaved", 1, "interleaved", scales_along="N")
UP_ONLY: Final = Layout("up-only", 1, "up")  # of experts without a gate


def interleaved(w13_words: bool, w2_words: bool, gated: bool = True) -> Layout:
    """Return the layout of interleaved rows with words in either buffer; without, it is INTERLEAVED.

    Without a gate there is nothing to interleave: rows are up's.
    """
    with_words = "".join(f"-{name}" for name, words in (("w13", w13_words), ("w2", w2_words)) if words)
    if gated and not with_words:
        return INTERLEAVED
    rows: Literal["interleaved", "up"] = "interleaved" if gated else "up"
    name = f"{'interleaved' if gated else 'up-only-n'}{'-words' if with_words else ''}{with_words}"
    return Layout(name, 2, rows, w13_words, w2_words, "N")


def buffer_name(projection: Projection) -> Literal["w13", "w2"]:
    """Return the buffer that holds a projection."""
    return "w2" if projection == "down" else "w13"


def in_words(values: Tensor, q: int) -> Tensor:
    """Return values (..., K) as (..., K / (16 q), 16, q), a view: the last q share 16 bits, lowest bits first.

    So word j of a run of 16 q values holds values j, j + 16, ..., j + 16 (q - 1).
    """
    return values.view(*values.shape[:-1], -1, q, WORDS).transpose(-1, -2)
