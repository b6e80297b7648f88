"""A checkpoint that exists only as a config.json: its expert weights are made up while they are read.

    checkpoint = DummyCheckpoint.from_config(config, find_family(config))

It has the interface of `Checkpoint`, so `--dummy` measures the same pipeline without a download.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from moeplug.checkpoint.family import Family
from moeplug.checkpoint.locate import WEIGHT_DTYPES
from moeplug.checkpoint.safetensors_header import DTYPE_BITS, TensorInfo
from moeplug.checkpoint.streaming import Piece, Stream, Told, require_fit
from moeplug.errors import CheckpointError

STANDARD_DEVIATION: Final = 0.02  # transformers' initializer_range, and about what trained experts have
# Odd, so that no row length divides it and no two rows of a weight are equal.
BLOCK_NUMBERS: Final = 2**20 + 7
DUMMY_FILE: Final = Path("dummy.safetensors")


@dataclass(frozen=True, eq=False)
class DummyCheckpoint:
    """Generated expert weights: each number depends only on the tensor's name and its place in it."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    total_bytes: int
    notes: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], family: Family) -> DummyCheckpoint:
        """Return the expert tensors of every MoE layer, in the family's first form and config.json's dtype."""
        named = {name: dtype for dtype, name in WEIGHT_DTYPES.items()}
        tensors: dict[str, TensorInfo] = {}
        offset = 0
        for layer in family.layers(config):
            dtype = named[layer.dtype]
            for name, shape in family.dummy_tensors(layer):
                nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
                tensors[name] = TensorInfo(name, dtype, shape, DUMMY_FILE, offset, nbytes)
                offset += nbytes
        notes = (f"{len(tensors):,} generated tensors, {offset:,} bytes: no file is read",)
        return cls(Path("dummy"), dict(config), tensors, (), offset, notes)

    def fingerprint(self) -> str:
        """Return a sha256 over the config and the generated tensors' names, dtypes and shapes."""
        tensors = [[tensor.name, tensor.dtype, tensor.shape] for tensor in self.tensors.values()]
        return hashlib.sha256(json.dumps([self.config, tensors], sort_keys=True).encode()).hexdigest()

    def stream(
        self, pieces: Sequence[Piece], buffers: Sequence[memoryview], told: Told = lambda piece, started, ended: None
    ) -> Stream:
        """Yield each piece with its bytes, as `Checkpoint.stream` does; they are made in the calling thread."""
        return _generated(pieces, require_fit(pieces, buffers), told)


def _generated(pieces: Sequence[Piece], buffers: Sequence[memoryview], told: Told) -> Stream:
    for number, piece in enumerate(pieces):
        view = buffers[number % len(buffers)][: piece.nbytes]
        started = time.perf_counter()
        _fill(np.frombuffer(view, np.uint8), piece)
        told(piece, started, time.perf_counter())
        yield piece, view


def _fill(out: np.ndarray[Any, np.dtype[np.uint8]], piece: Piece) -> None:
    """Write the block's bytes into out, again and again, from a place that the tensor's name decides."""
    block = _block(piece.tensor.dtype)
    item_bytes = DTYPE_BITS[piece.tensor.dtype] // 8
    seed = int.from_bytes(hashlib.sha256(piece.tensor.name.encode()).digest()[:8], "little")
    position = (seed % BLOCK_NUMBERS * item_bytes + piece.start) % block.size
    done = 0
    while done < out.size:
        count = min(out.size - done, block.size - position)
        out[done : done + count] = block[position : position + count]
        done, position = done + count, 0


@functools.cache
def _block(dtype: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of BLOCK_NUMBERS normal numbers in a dtype."""
    numbers = np.random.default_rng(0).standard_normal(BLOCK_NUMBERS, dtype=np.float32) * np.float32(STANDARD_DEVIATION)
    return _encoded(numbers, dtype).view(np.uint8)


def _encoded(numbers: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "F32":
        return numbers
    if dtype == "F16":
        return numbers.astype(np.float16)
    if dtype == "BF16":  # numpy has none: the upper half of a float32, rounded to nearest even
        bits = numbers.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    raise CheckpointError(f"no weights can be generated in dtype {dtype}")
