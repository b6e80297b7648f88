"""Open a checkpoint folder, check everything about it that headers can tell, and stream its weights.

    checkpoint = Checkpoint.open("models/OLMoE-1B-7B")
    pieces = in_file_order(Piece(t, 0, t.nbytes) for t in checkpoint.tensors.values())
    for piece, content in checkpoint.stream(pieces, buffers):
        ...

Opening reads no weights. model.safetensors.index.json decides what belongs to the checkpoint where it exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplug.checkpoint.files import (
    SourceFile,
    Stamp,
    counted,
    listed,
    locate_file,
    refuse_os_error,
    safe_name_problem,
    shown,
    strict_json,
)
from moeplug.checkpoint.safetensors_header import Header, TensorInfo, read_header
from moeplug.checkpoint.streaming import (
    FileReader,
    Piece,
    Ring,
    Span,
    Stream,
    Told,
    in_file_order,
    in_turn,
    require_fit,
    spans_of,
    untold,
)
from moeplug.errors import CheckpointError, InputOutputError, UsageError

__all__ = ["Checkpoint", "Piece", "Ring", "Span", "Stream", "TensorInfo", "in_file_order", "read_config"]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Shard:
    """One validated file: what to open, what the file system said of it, and what its header says."""

    source: SourceFile
    stamp: Stamp
    header: Header


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder of safetensors that was checked to the byte, except for the weights themselves.

    config: config.json. tensors: by name, what the index (or the only file) declares. total_bytes: of these tensors.
    notes: what is odd but harmless, for the user to read once.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    total_bytes: int
    notes: tuple[str, ...]
    shards: tuple[Shard, ...]
    json_digests: tuple[tuple[str, str], ...]

    @classmethod
    def open(cls, path: str | Path, *, allow_symlinks: bool = False) -> Checkpoint:
        """Validate the checkpoint in a folder: config.json, the index, and the header of every shard.

        allow_symlinks: accept shards that are symlinks to anywhere. Those that a Hugging Face cache makes, and those
        that stay in the folder, are always accepted.
        Raises CheckpointError, InputOutputError, or UsageError where `path` is no folder of a checkpoint.
        """
        folder = _require_folder(Path(path))
        config_bytes = _config_bytes(folder, allow_symlinks)
        config = _parse_config(config_bytes, folder / CONFIG)
        digests = [(CONFIG, hashlib.sha256(config_bytes).hexdigest())]
        notes: list[str] = []
        if _exists(folder / INDEX):
            index_bytes = locate_file(folder, INDEX, allow_symlinks=allow_symlinks).read_whole()
            digests.append((INDEX, hashlib.sha256(index_bytes).hexdigest()))
            weight_map = parse_index(index_bytes, folder / INDEX)
            shards = _open_shards(folder, sorted(set(weight_map.values())), allow_symlinks)
            tensors = _follow_index(weight_map, shards, folder, notes)
        else:
            shards = _open_shards(folder, [_only_file(folder, notes)], allow_symlinks)
            tensors = dict(shards[0].header.tensors)
        return cls(
            path=folder,
            config=config,
            tensors=tensors,
            files=tuple(shard.source.path for shard in shards),
            total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            notes=tuple(notes),
            shards=tuple(shards),
            json_digests=tuple(digests),
        )

    def fingerprint(self) -> str:
        """Return a sha256 over config, index, headers and file sizes: all but the weights, so it costs nothing."""
        lines = [f"{name} {digest}" for name, digest in self.json_digests]
        for shard in self.shards:
            lines.append(f"{shard.source.path.name} {shard.stamp.size} {shard.header.digest}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def stream(self, pieces: Sequence[Piece], buffers: Sequence[memoryview]) -> Stream:
        """Yield each piece with its bytes, in the given order (see `in_file_order`), read ahead.

        buffers: 2 or more, writable, each as large as the largest piece. A yielded memoryview lies in one of them and
        is valid until the next step. Close the generator to stop early; then its thread and file are gone.
        Raises CheckpointError where a file is not the one that was validated, InputOutputError where a read fails.
        """
        return in_turn(self.ring(pieces, buffers))

    def ring(
        self, pieces: Sequence[Piece], buffers: Sequence[memoryview], threads: int = 1, told: Told = untold
    ) -> Ring:
        """Return the pieces as spans that several threads read and any thread takes; arguments as in `stream`.

        told: called after each read by the thread that read.
        """
        files = {shard.source.path: (shard.source, shard.stamp) for shard in self.shards}
        foreign = [piece for piece in pieces if self.tensors.get(piece.tensor.name) != piece.tensor]
        if foreign:
            raise ValueError(f"a piece is of another checkpoint: {foreign[0]}")
        views = require_fit(pieces, buffers)
        return Ring(spans_of(pieces, views[0].nbytes), views, lambda: FileReader(files), threads, told)


def _require_folder(path: Path) -> Path:
    """Return path if it is a folder; else say what it is, and how to get one."""
    try:
        path.stat()
    except FileNotFoundError as error:
        raise InputOutputError(f"{path}: there is no such folder{_hub_hint(path)}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputOutputError(f"{shown(str(path))}: {getattr(error, 'strerror', None) or error}") from error
    if not path.is_dir():
        raise UsageError(f"{path}: is a file; give the checkpoint's folder, which holds config.json and the weights")
    return path


def _hub_hint(path: Path) -> str:
    parts = path.parts
    looks_like_id = len(parts) == 2 and all(part.replace("-", "").replace("_", "").replace(".", "") for part in parts)
    if path.is_absolute() or not looks_like_id:
        return ""
    return (
        f". If {path} is a Hugging Face id: moeplug reads local folders and downloads nothing; "
        f"run `hf download {path} --local-dir {parts[1]}` and give {parts[1]}"
    )


def _exists(path: Path) -> bool:
    return os.path.lexists(path)  # a dangling symlink counts: it is then refused, and not taken for "no index"


def read_config(path: str | Path, *, allow_symlinks: bool = False) -> dict[str, Any]:
    """Return the config.json of a folder that need not hold weights, or of the file itself."""
    folder, name = Path(path), CONFIG
    if folder.is_file() and folder.suffix == ".json":
        folder, name = folder.parent, folder.name
    return _parse_config(_config_bytes(_require_folder(folder), allow_symlinks, name), folder / name)


def _parse_config(content: bytes, path: Path) -> dict[str, Any]:
    config = strict_json(content, path, constants=True)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object; expected the model's configuration")
    return config


def _config_bytes(folder: Path, allow_symlinks: bool, name: str = CONFIG) -> bytes:
    if not _exists(folder / name):
        raise CheckpointError(f"{folder}: has no {name}, so what the weights are is not known; give a model's folder")
    return locate_file(folder, name, allow_symlinks=allow_symlinks).read_whole()


def parse_index(content: bytes, path: Path) -> dict[str, str]:
    """Return tensor name → shard name of an index, each checked to be a plain file name in its folder."""
    index = strict_json(content, path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map from tensor names to files; download it again")
    checked: set[str] = set()  # thousands of tensors lie in tens of files
    for name, value in weight_map.items():
        if isinstance(value, str) and value in checked:
            continue
        problem = safe_name_problem(value)
        if problem:
            raise CheckpointError(f"{path}: the file of tensor {shown(name)}, {shown(value)}, {problem}")
        checked.add(value)
    return weight_map


def _open_shards(folder: Path, names: list[str], allow_symlinks: bool) -> list[Shard]:
    """Validate every shard before anything is loaded; report all that are missing, or all that are damaged, at once."""
    missing = [name for name in names if not _exists(folder / name)]
    if missing:
        count = f"{len(missing)} of {len(names)} shards are missing"
        raise CheckpointError(f"{folder}: {count}: {listed(missing)}; download them again")
    shards: list[Shard] = []
    errors: list[CheckpointError] = []
    for name in names:
        try:
            shards.append(_open_shard(locate_file(folder, name, allow_symlinks=allow_symlinks)))
        except CheckpointError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        rest = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
        details = "".join(f"\n  {error}" for error in errors[:10])
        raise CheckpointError(f"{folder}: {len(errors)} of {len(names)} shards cannot be used:{details}{rest}")
    return shards


def _open_shard(source: SourceFile) -> Shard:
    descriptor = source.open()
    try:
        return Shard(source, Stamp.of(descriptor), read_header(descriptor, source.path))
    finally:
        os.close(descriptor)


def _follow_index(
    weight_map: Mapping[str, str], shards: Sequence[Shard], folder: Path, notes: list[str]
) -> dict[str, TensorInfo]:
    """Return the tensors that the index names, from the shards it names; note what the shards hold beside them."""
    headers = {shard.source.path.name: shard.header for shard in shards}
    ghosts = [f"{shown(name)} in {file}" for name, file in weight_map.items() if name not in headers[file].tensors]
    if ghosts:
        count = f"{len(ghosts)} of {len(weight_map)} tensors"
        raise CheckpointError(
            f"{folder / INDEX}: names {count} that the shard does not hold: {listed(ghosts)}; "
            "index and shards are of different exports: download both again"
        )
    held = [(name, file) for file, header in headers.items() for name in header.tensors]
    extra = [f"{shown(name)} in {file}" for name, file in held if weight_map.get(name) != file]
    if extra:
        notes.append(f"ignored: {counted(len(extra), 'tensor')} that {INDEX} does not name: {listed(extra, 3)}")
    return {name: headers[file].tensors[name] for name, file in weight_map.items()}


def _names(names: list[str]) -> str:
    return listed([shown(name) for name in names], 3)


def _only_file(folder: Path, notes: list[str]) -> str:
    """Return the one weight file of a folder without an index, or say what the folder holds instead."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        refuse_os_error(folder, error)
    found = [name for name in names if name.endswith(".safetensors")]
    if SINGLE in found:
        ignored = [name for name in found if name != SINGLE]
        if ignored:
            notes.append(f"ignored: {counted(len(ignored), 'file')} beside {SINGLE}: {_names(ignored)}")
        return SINGLE
    if len(found) == 1:
        if not found[0].isprintable():
            raise CheckpointError(f"{folder}: the file {shown(found[0])} has a name that cannot be printed; rename it")
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: holds {len(found)} .safetensors files and no {INDEX}, so which belong together, and which of "
            f"two tensors of one name counts, is not known: {_names(found)}; download the index"
        )
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{folder}: holds only pickles ({_names(pickles)}), which can run code when opened; moeplug never opens "
            f"one. Where you trust it, convert it, and take its tokenizer along:\n  {_converting(folder)}"
        )
    raise CheckpointError(f"{folder}: holds no .safetensors file; give the folder of a downloaded model")


def _converting(folder: Path) -> str:
    """Return the shell command by which transformers writes a folder's weights as safetensors."""
    source, target, auto = (
        json.dumps(text, ensure_ascii=False) for text in (str(folder), f"{folder.name or 'model'}-safetensors", "auto")
    )
    code = f"AutoModelForCausalLM.from_pretrained({source}, dtype={auto}).save_pretrained({target})"
    return f"python -c {shlex.quote(f'from transformers import AutoModelForCausalLM; {code}')}"
