"""Launch what `moeplug.kernels.encode` has for expert weights on a GPU; `moeplug.quantization` asks here first.

A weight of 3 MB takes a GPU microseconds, and Python hundreds with one operation after another: here it is one launch,
which is remembered with all its arguments but the addresses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from moeplug.formats import NumberFormat
from moeplug.kernels.encode import largest_magnitude_kernel, quantize_weights_kernel
from moeplug.kernels.launch import Launch, Ref, current_device, hooked
from moeplug.spec import WeightSpec

TILE = 2048  # weights that a program holds at a time: 16 in each thread's registers
# Said outright: Triton 3.9 warns where fusion is left out, and a fused product would give other bits than a CPU's.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
Shape = tuple[int, ...]
Kinds = tuple[tuple[torch.dtype, tuple[int, ...], int], ...]  # of tensors: dtype, strides, address modulo 16


@dataclass(frozen=True)
class Slots:
    """A slice of a tensor along its first axis, known by its address alone.

    Slicing lets other threads run Python, as every operation of torch does; where these read a checkpoint, it is 50 to
    100 µs until this thread may go on.
    """

    tensor: Tensor
    dtype: torch.dtype
    shape: Shape
    strides: Shape
    start: int
    slot_bytes: int
    slot: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> Slots:
        """Return all of a tensor."""
        slot_bytes = tensor.stride(0) * tensor.element_size()
        return cls(tensor, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.data_ptr(), slot_bytes)

    def at(self, slot: int, count: int) -> Slots:
        """Return slots slot to slot + count."""
        start = self.start + slot * self.slot_bytes
        return Slots(self.tensor, self.dtype, (count, *self.shape[1:]), self.strides, start, self.slot_bytes, slot)

    def data_ptr(self) -> int:
        """Return the address of the first element, as a tensor does."""
        return self.start

    def stride(self) -> Shape:
        """Return the strides, as a tensor does."""
        return self.strides

    def as_tensor(self) -> Tensor:
        """Return the slice."""
        return self.tensor[self.slot : self.slot + self.shape[0]]


Placed = Tensor | Slots


def largest_magnitude(weight: Tensor) -> Tensor:
    """Return (B,) float32, the largest |weight| of each of B weights (B, N, K); not finite where one is not."""
    peaks = torch.zeros(weight.shape[0], dtype=torch.int32, device=weight.device)
    _run(_largest_magnitude, (weight.shape,), weight, peaks)
    return peaks.view(torch.float32)


def serves(spec: WeightSpec, fmt: NumberFormat, out: Tensor) -> bool:
    """Return whether `quantize` can do it."""
    group = _columns_of_a_scale(spec)
    in_powers = all(side & (side - 1) == 0 for side in (spec.scale_rows, group))
    in_powers = in_powers and spec.scale_rows * max(group, 64) <= 1 << 14 and group <= TILE  # tiles hold whole groups
    simple = spec.symmetric and spec.scale_dtype != "float8_e4m3fn" and in_powers and not 0 < group < 16
    return simple and out.stride(2) == 1 and fmt.triton_encode() is not None


def parts_of_sums(N: int, K: int, spec: WeightSpec, step: int) -> int:
    """Return in how many parts the error of a weight (N, K), of every step-th row, is summed."""
    rows, _, column_tiles = _tiles(K, spec)
    return int(triton.cdiv(N, step if rows < step else rows) * column_tiles)


def quantize(weight: Tensor, spec: WeightSpec, fmt: NumberFormat, out: Tensor, words: bool, scale: Tensor) -> None:
    """Write weight's codes into out and their scales (B, R, C), as `moeplug.quantization.quantize` says."""
    peaks = largest_magnitude(weight).view(torch.int32) if spec.strategy == "tensor" else scale  # or not looked at
    _run(_quantize, (weight.shape, scale.shape, spec, fmt, words, 0), weight, out, scale, peaks, scale)


class DirectWeights:
    """One projection's weights on their way to where kernels read them, with what is measured of each."""

    def __init__(self, out: Tensor, scale: Tensor, spec: WeightSpec, fmt: NumberFormat, words: bool, step: int) -> None:
        """Prepare for out (E, N, K') and scale (E, R, C); with one scale a weight R may be N, and all rows get it.

        step: the error is taken from rows 0, step, 2 * step, … alone.
        """
        (E, N, packed), device = out.shape, out.device
        parts = parts_of_sums(N, packed * fmt.values_per_element, spec, step)
        self._given = spec, fmt, words, step
        self._peaks = torch.zeros(E, dtype=torch.int32, device=device)
        self._sums = torch.empty(E, parts, 2, dtype=torch.float64, device=device)
        self._kept = [Slots.of(tensor) for tensor in (out, scale, self._peaks, self._sums)]
        self.slots: list[int] = []  # that `quantize` was asked for

    def quantize(self, slot: int, weight: Tensor) -> None:
        """Take weight (B, N, K) as slots slot, slot + 1, …."""
        spec, fmt, words, step = self._given
        out, scale, peaks, sums = (kept.at(slot, weight.shape[0]) for kept in self._kept)
        if spec.strategy == "tensor":
            _run(_largest_magnitude, (weight.shape,), weight, peaks)
        _run(_quantize, (weight.shape, scale.shape, spec, fmt, words, step), weight, out, scale, peaks, sums)
        self.slots += range(slot, slot + weight.shape[0])

    def measured(self) -> tuple[Tensor, Tensor]:
        """Return of `slots` (n, 2) float64, sums of squares of error and weight, and (n, 2) float32, the peak twice."""
        return self._sums.sum(1)[self.slots], self._peaks.view(torch.float32)[self.slots, None].expand(-1, 2)


def _run(make: Callable[..., Launch], given: tuple[Any, ...], weight: Tensor, *others: Placed) -> None:
    """Launch what make(*given, device, kinds of tensors) returns on tensors."""
    tensors, device = (weight, *others), weight.device
    addresses = [tensor.data_ptr() for tensor in tensors]
    kinds = [(t.dtype, t.stride(), address % 16) for t, address in zip(tensors, addresses, strict=True)]
    launch = make(*given, device, tuple(kinds))
    with current_device(device):
        if not launch.direct or hooked():
            launch.first([t.as_tensor() if isinstance(t, Slots) else t for t in tensors])
        else:
            launch.again(addresses, triton.runtime.driver.active.get_current_stream(device.index))


@functools.lru_cache(maxsize=1024)
def _largest_magnitude(shape: Shape, device: torch.device, kinds: Kinds) -> Launch:
    B, N, K = shape
    rows, columns = _tile(K)
    arguments = _strides("w", kinds[0][1]) | {
        "w_ptr": Ref(0), "peak_ptr": Ref(1), "N": N, "K": K, "ROWS": rows, "COLUMNS": columns
    }  # fmt: skip
    return Launch(largest_magnitude_kernel, (triton.cdiv(N, rows), B), arguments, OPTIONS)


@functools.lru_cache(maxsize=1024)
def _quantize(
    shape: Shape, scale_shape: Shape, spec: WeightSpec, fmt: NumberFormat, words: bool, step: int,
    device: torch.device, kinds: Kinds,
) -> Launch:  # fmt: skip
    from moeplug.quantization import E8M0, range_of

    (B, N, K), (_, R, C), (_, q, s, _, sums) = shape, scale_shape, (strides for _, strides, _ in kinds)
    low, high = range_of(spec, fmt)
    group, exponents, tensor = _columns_of_a_scale(spec), spec.scale_dtype == E8M0, spec.strategy == "tensor"
    rows, columns, column_tiles = _tiles(K, spec)
    arguments = _strides("w", kinds[0][1]) | _strides("s", s) | {
        "w_ptr": Ref(0), "q_ptr": Ref(1), "s_ptr": Ref(2), "peak_ptr": Ref(3), "sums_ptr": Ref(4),
        "N": N, "K": K, "R": R, "C": C, "stride_qb": q[0], "stride_qn": q[1], "stride_eb": sums[0],
        "low": low, "high": high, "half_range": (high - low) / 2,
        "least": 0.0 if exponents else torch.finfo(kinds[2][0]).tiny,
        "ENCODE": fmt.triton_encode(), "TENSOR": tensor, "STEP": step, "PEAKS": step > 0 and not tensor,
        "SCALE_ROWS": spec.scale_rows, "GROUPED": group > 0,
        "EXPONENT": math.frexp(fmt.max_value)[1] - 1 if exponents else None,
        "PACK": fmt.values_per_element, "PLACES": fmt.values_per_word if words else 0,
        "ROWS": rows, "GROUPS": columns // (group or columns), "GROUP": group or columns,
    }  # fmt: skip
    warps = 8 if rows * columns > TILE else 4
    return Launch(
        quantize_weights_kernel, (triton.cdiv(N, rows), column_tiles, B), arguments, OPTIONS | {"num_warps": warps}
    )


def _tiles(K: int, spec: WeightSpec) -> tuple[int, int, int]:
    """Return (rows, columns, tiles along K) of programs that quantize; one with a row of scales for each row loops."""
    group = _columns_of_a_scale(spec)
    if spec.scale_rows > 1:
        rows, columns = spec.scale_rows, max(group, 64)  # a run of values that lie 16 apart in words is at most 64
    else:
        rows, columns = _tile(max(K, group))
    return rows, columns, triton.cdiv(K, columns) if group else 1


def _columns_of_a_scale(spec: WeightSpec) -> int:
    """Return how many columns share a scale, 0 where all of a row do."""
    return (spec.block_structure[1] if spec.block_structure else spec.group_size) or 0


def _tile(K: int) -> tuple[int, int]:
    """Return (rows, columns), powers of two, of a tile of weights that have K columns."""
    columns = min(TILE, max(64, triton.next_power_of_2(K)))
    return TILE // columns, columns


def _strides(letter: str, strides: Sequence[int]) -> dict[str, int]:
    """Return the arguments that say a tensor's strides."""
    axes = "bnc" if letter == "s" else "bnk"
    return {f"stride_{letter}{axis}": stride for axis, stride in zip(axes, strides, strict=True)}
