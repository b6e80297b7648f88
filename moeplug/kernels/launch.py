"""Launch Triton kernels again and again with a few changed addresses, without triton's per-call work.

`kernel[grid](...)` inspects every argument of every call, 20 to 40 µs with fifty of them. A `Launch` does that once;
afterwards it hands the compiled kernel its arguments, with this call's addresses in their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

ALIGNMENT: Final = 256  # bytes, of each part of a workspace


@dataclass(frozen=True)
class Ref:
    """An argument that changes from call to call: the place of a tensor among the call's tensors."""

    index: int


class Workspace:
    """The tensors of one call: those it is given, and named parts of one allocation."""

    def __init__(self, inputs: Sequence[str]) -> None:
        """Name the tensors that a call is given."""
        self.nbytes = 0
        self._names = list(inputs)
        self._parts: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self._offsets: list[int] = []

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Ref:
        """Reserve a tensor in the allocation; return its Ref."""
        self._names.append(name)
        self._parts.append((self.nbytes, shape, dtype))
        self._offsets.append(self.nbytes)
        self.nbytes += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return Ref(len(self._names) - 1)

    def ref(self, name: str) -> Ref:
        """Return the Ref of a tensor by name."""
        return Ref(self._names.index(name))

    def tensors(self, inputs: Sequence[Tensor], memory: Tensor) -> list[Tensor]:
        """Return all tensors in the order of their Refs; memory: (nbytes,) uint8."""
        return [
            *inputs,
            *(
                memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
                for offset, shape, dtype in self._parts
            ),
        ]

    def addresses(self, inputs: Sequence[int], start: int) -> list[int]:
        """Return all tensors' addresses in the order of their Refs, memory beginning at start."""
        return [*inputs, *[start + offset for offset in self._offsets]]


class Launch:
    """One kernel's launch: a grid, its arguments by name, and which of them are Refs."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], options: Mapping[str, Any]):
        """Options: num_warps, num_stages and the like. Arguments: every parameter of the kernel."""
        self._kernel, self._grid, self._options = kernel, (*grid, 1, 1)[:3], dict(options)
        self._arguments = [arguments[name] for name in kernel.arg_names]
        self._refs = [(i, value.index) for i, value in enumerate(self._arguments) if isinstance(value, Ref)]
        self._compiled: Any = None

    def first(self, tensors: Sequence[Tensor]) -> None:
        """Compile, or find, the kernel for these tensors, and launch it."""
        self._compiled = self._kernel[self._grid](*self.filled(tensors), **self._options)

    def filled(self, values: Sequence[Any]) -> list[Any]:
        """Return the arguments with this call's values in the Refs' places."""
        arguments = self._arguments.copy()
        for i, index in self._refs:
            arguments[i] = values[index]
        return arguments

    @property
    def direct(self) -> bool:
        """Return whether `again` can be used: not under the interpreter, which compiles nothing."""
        return self._compiled is not None

    def again(self, addresses: Sequence[int], stream: int) -> None:
        """Launch the kernel that `first` compiled, on tensors of the same dtypes, strides and alignment."""
        compiled = self._compiled
        compiled.run(
            *self._grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *self.filled(addresses)
        )


def hooked() -> bool:
    """Return whether somebody, a profiler for example, hooks triton's launches: `again` would pass by them."""
    import triton

    runtime = triton.knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which triton launches on device; free where it is the current one already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
