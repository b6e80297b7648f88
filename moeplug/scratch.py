"""Scratch memory that is made once per thread: on a CPU, fresh pages cost more than the arithmetic on them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}


_buffers = _Buffers()


def scratch(name: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a contiguous tensor with arbitrary contents, valid until this thread asks for the same name again.

    Kept for the life of the thread at the largest size that was asked for, so ask for chunks. On a GPU it is a fresh
    tensor: torch's own allocator keeps memory there. Measured on 2.4 GB of weights, 2 cores: 1.8 million page faults
    (3.2 s in the kernel) with fresh temporaries, 0.3 million, those of the result, with these.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    held = _buffers.by_name.get(name)
    if held is None or held.numel() < nbytes:
        held = _buffers.by_name[name] = torch.empty(nbytes, dtype=torch.uint8)
    return held[:nbytes].view(dtype).view(shape)
