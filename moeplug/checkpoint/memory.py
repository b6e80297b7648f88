"""A checkpoint that is a dictionary of tensors: what a training loop has in its hands.

    checkpoint = MemoryCheckpoint.of(state_dict, config)

It has the tensors of `Checkpoint`, and gives their bytes on the device where they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeplug.checkpoint.safetensors_header import DTYPE_BITS, TensorInfo
from moeplug.checkpoint.streaming import Piece
from moeplug.errors import UsageError

TORCH_DTYPES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
IN_MEMORY = Path("memory")


@dataclass(frozen=True, eq=False)
class MemoryCheckpoint:
    """Tensors by the names that they have in a checkpoint's files, and the config.json that they belong to."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    contents: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, contents: Mapping[str, Tensor], config: dict[str, Any]) -> MemoryCheckpoint:
        """Return the checkpoint of these tensors; UsageError where one has a dtype that no checkpoint has."""
        names = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
        tensors: dict[str, TensorInfo] = {}
        offset = 0
        for name, tensor in contents.items():
            dtype = names.get(str(tensor.dtype).removeprefix("torch."))
            if dtype is None:
                raise UsageError(f"{name}: dtype {tensor.dtype} is not one that a checkpoint has")
            nbytes = tensor.numel() * DTYPE_BITS[dtype] // 8
            tensors[name] = TensorInfo(name, dtype, tuple(tensor.shape), IN_MEMORY, offset, nbytes)
            offset += nbytes
        return cls(IN_MEMORY, config, tensors, contents)

    def fingerprint(self) -> str:
        """Return a sha256 over config, names, dtypes and shapes."""
        tensors = [[tensor.name, tensor.dtype, tensor.shape] for tensor in self.tensors.values()]
        return hashlib.sha256(json.dumps([self.config, tensors], sort_keys=True).encode()).hexdigest()

    def content(self, piece: Piece) -> Tensor:
        """Return a piece's bytes, (n,) uint8, where the tensor is: a view of a contiguous one."""
        tensor = self.contents[piece.tensor.name].detach()
        start = piece.start
        if tensor.dim() > 1 and not tensor.is_contiguous():  # of a transposed stack of experts, copy those asked for
            each = piece.tensor.nbytes // tensor.shape[0]
            first = start // each
            tensor, start = tensor[first : -(-(start + piece.nbytes) // each)], start - first * each
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        return flat[start : start + piece.nbytes]
