"""Read the header of a safetensors file, and refuse every file whose header and size do not agree to the byte.

A file is 8 bytes of header length (little endian), that many bytes of JSON, then the tensors' bytes. Each entry of the
JSON names dtype, shape and data_offsets [begin, end), counted from the end of the header. This reader is stricter than
the safetensors library: it also refuses duplicate names, unprintable names, leading white space and unknown keys.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from moeplug.checkpoint.files import MAX_JSON_BYTES, read_exactly, recognise, shown, strict_json
from moeplug.errors import CheckpointError

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = MAX_JSON_BYTES  # the safetensors library's own limit
MAX_NAME: Final = 1_000  # published names have some 80; every message names tensors

DTYPE_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: what it is and where its bytes lie.

    dtype: safetensors' name, for example "BF16". offset: of the first byte, absolute in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A validated header: its tensors in the file's order, its metadata, and the sha256 of its bytes."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    digest: str


def read_header(descriptor: int, path: Path) -> Header:
    """Return the validated header of an open safetensors file. Reads no weight bytes.

    Raises CheckpointError, naming the file and what is wrong, before allocating more than the file's own size.
    """
    size = os.fstat(descriptor).st_size
    head = read_exactly(descriptor, min(size, 64), 0, path)
    if size < LENGTH_BYTES:
        _refuse(path, head, f"has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        limit = f"the file has {size:,} bytes and a header at most {MAX_HEADER_BYTES:,}"
        _refuse(path, head, f"announces a header of {length:,} bytes, but {limit}")
    content = read_exactly(descriptor, length, LENGTH_BYTES, path)
    if not content.startswith(b"{"):
        _refuse(path, head, "its header does not start with '{'")
    return parse_header(content, size, path)


def parse_header(content: bytes, file_bytes: int, path: Path) -> Header:
    """Return the header whose JSON is `content`, of a file of `file_bytes` bytes in all."""
    entries = strict_json(content, path)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object")
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    first_byte = LENGTH_BYTES + len(content)
    tensors = [_tensor(name, entry, first_byte, path) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _require_exact_tiling(tensors, first_byte, file_bytes, path)
    return Header({tensor.name: tensor for tensor in tensors}, metadata, hashlib.sha256(content).hexdigest())


def _refuse(path: Path, head: bytes, reason: str) -> NoReturn:
    hint = recognise(head)
    raise CheckpointError(f"{path}: is not a safetensors file: {hint or reason + '; download it again'}")


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path}: __metadata__ is {shown(value)}; it has to map strings to strings")
    try:
        "".join([*value, *value.values()]).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot hold
        raise CheckpointError(f"{path}: __metadata__ is not valid Unicode: {shown(value)}") from error
    return value


def _tensor(name: str, entry: Any, first_byte: int, path: Path) -> TensorInfo:
    def refuse(problem: str) -> NoReturn:
        raise CheckpointError(f"{path}: tensor {shown(name)}: {problem}")

    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        refuse(f"a name has to be printable text of 1 to {MAX_NAME} characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(f"found {shown(entry)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        refuse(f"dtype {shown(dtype)} is unknown; known: {', '.join(DTYPE_BITS)}")
    if not _are_sizes(shape):
        refuse(f"shape {shown(shape)} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"data_offsets {shown(offsets)} is not [begin, end] with begin <= end")
    nbytes = offsets[1] - offsets[0]
    _require_size(refuse, dtype, shape, nbytes)
    return TensorInfo(name, dtype, tuple(shape), path, first_byte + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    # type(), not isinstance: JSON's true is an int to Python
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _require_size(refuse: Callable[[str], NoReturn], dtype: str, shape: list[int], nbytes: int) -> None:
    # A zero among the sizes must not hide an overflow of the others: the safetensors library refuses that, too.
    if math.prod(max(size, 1) for size in shape) * DTYPE_BITS[dtype] >= 2**63:
        refuse(f"shape {shown(shape)} is too large to exist")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * nbytes:
        needed = f"{bits // 8:,} bytes" if bits % 8 == 0 else f"{bits:,} bits, which do not fill whole bytes"
        refuse(f"{dtype} of shape {shape} needs {needed}; its data_offsets give it {nbytes:,}")


def _require_exact_tiling(tensors: list[TensorInfo], first_byte: int, file_bytes: int, path: Path) -> None:
    """Refuse holes, overlaps, missing bytes and trailing bytes. tensors: sorted by offset."""
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=first_byte)
    if end > file_bytes:
        raise CheckpointError(
            f"{path}: is truncated: its header describes {end:,} bytes, the file has {file_bytes:,}, "
            f"{end - file_bytes:,} are missing; download it again"
        )
    position = first_byte
    for tensor in tensors:
        if tensor.offset != position:
            problem = "leaves a hole before it" if tensor.offset > position else "overlaps the one before it"
            at = f"byte {tensor.offset - first_byte:,}, expected {position - first_byte:,}"
            raise CheckpointError(
                f"{path}: tensor {shown(tensor.name)} {problem}: it begins at {at}; download it again"
            )
        position += tensor.nbytes
    if position != file_bytes:
        raise CheckpointError(
            f"{path}: has {file_bytes - position:,} bytes after its last tensor that the header does not describe; "
            "download it again"
        )
