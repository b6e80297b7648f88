"""Write a checkpoint folder that is there whole or not at all, and that can be continued after a crash.

    with Staging.open(target, made, resume=False) as staging:
        if not staging.has(shard.name):
            with staging.shard(shard, lambda: {"worst_relative_rms": ...}) as file:
                file.write("model.norm.weight", 0, data)
        staging.add("config.json", [content])
        staging.publish()

Files grow in a folder beside the target, `.NAME.moeplug-OWNER`; each is synced, then gets its name, then stands in
moeplug.json with its sha256. Publishing is one rename of the folder. The folder's own name says which process writes
it, so taking over what a dead process left is one rename too, and no lock can be left behind. What dead processes left
beside the target, whatever they were writing, is removed where no file of it is finished.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from moeplug.checkpoint.files import kind_of, read_into, shown, strict_json
from moeplug.checkpoint.safetensors_header import DTYPE_BITS, LENGTH_BYTES
from moeplug.errors import CheckpointError, InputOutputError, UsageError

MANIFEST: Final = "moeplug.json"
METADATA: Final = "__metadata__"  # in a header: no tensor
MARK: Final = ".moeplug-"  # between the target's name and the owner's, in the name of an unfinished folder
PARTIAL: Final = ".partial"
HASH_BYTES: Final = 1 << 20
# A sync cannot be interrupted: of 5 GB that the system has not begun to write it takes many seconds, of this much at
# most 2 on a disk of 130 MB/s.
SYNC_BYTES: Final = 1 << 28
RESUMING: Final = "resuming"  # in moeplug.json until it is published: what has to be as it was when it is continued
T = TypeVar("T")


class FileLayer:
    """The system calls of an export, one method each, so that a test can make the k-th of them fail."""

    def create(self, path: Path) -> int:
        """Create a file, which must not be there, and return its descriptor, open for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write some of the data at an offset and return how many bytes."""
        return os.pwrite(descriptor, data, offset)

    def fsync(self, descriptor: int) -> None:
        """Wait until the disk has a file, or a folder's names."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name, atomically."""
        source.rename(target)

    def free_bytes(self, folder: Path) -> int:
        """Return the bytes that we may still write to the disk of a folder."""
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write. dtype: safetensors' name, for example "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return its bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class OutputShard:
    """A safetensors file to write, and where each tensor lies in it."""

    name: str
    tensors: tuple[OutputTensor, ...]

    @property
    def header(self) -> bytes:
        """Return everything before the tensors' bytes. The widest dtypes come first, so that each is aligned."""
        entries: dict[str, Any] = {METADATA: {"format": "pt"}}
        position = 0
        for tensor in sorted(self.tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype]):
            offsets = [position, position + tensor.nbytes]
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
            position = offsets[1]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(LENGTH_BYTES, "little") + text

    @property
    def nbytes(self) -> int:
        """Return the file's size."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def in_shards(tensors: Iterable[Sequence[OutputTensor]], limit: int) -> list[OutputShard]:
    """Return shards of at most `limit` bytes of tensors each, in order; what comes together stays together."""
    parts: list[list[OutputTensor]] = [[]]
    size = 0
    names = {METADATA}
    for together in tensors:
        for tensor in together:
            if tensor.name in names:
                raise CheckpointError(f"two tensors of the export would be called {shown(tensor.name)}")
            names.add(tensor.name)
        nbytes = sum(tensor.nbytes for tensor in together)
        if parts[-1] and size + nbytes > limit:
            parts.append([])
            size = 0
        parts[-1] += together
        size += nbytes
    if len(parts) == 1:
        return [OutputShard("model.safetensors", tuple(parts[0]))]
    count = len(parts)
    return [OutputShard(f"model-{i:05}-of-{count:05}.safetensors", tuple(part)) for i, part in enumerate(parts, 1)]


class OutputFile:
    """One file on its way: bytes go to offsets, `finish` syncs it and gives it its name."""

    def __init__(self, path: Path, files: FileLayer) -> None:
        self._path, self._files = path, files
        self._partial = path.with_name(path.name + PARTIAL)
        self._descriptor = files.create(self._partial)
        self._offsets: dict[str, int] = {}
        self._missing = 0
        self._unsynced = 0

    def begin(self, shard: OutputShard) -> None:
        """Write a shard's header; `write` then takes its tensors' names."""
        header = shard.header
        self.write_at(0, header)
        entries = json.loads(header[LENGTH_BYTES:])
        del entries[METADATA]
        self._missing = sum(tensor.nbytes for tensor in shard.tensors)
        self._offsets = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}

    def write(self, name: str, start: int, data: bytes | memoryview) -> None:
        """Write bytes of a tensor, counted from its own begin; each byte of a shard once."""
        self.write_at(self._offsets[name] + start, data)
        self._missing -= len(data)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of the data; the system may take less than it is given, so give it the rest again."""
        view = memoryview(data).cast("B")
        while view.nbytes:
            count = _repeated(lambda: self._files.write(self._descriptor, view, offset))  # noqa: B023  # called at once
            view, offset = view[count:], offset + count
            self._unsynced += count
            if self._unsynced >= SYNC_BYTES:
                self._sync()

    def _sync(self) -> None:
        _repeated(lambda: self._files.fsync(self._descriptor))
        self._unsynced = 0

    def finish(self) -> dict[str, Any]:
        """Sync and name the file; return its size and the sha256 of what can be read back."""
        assert self._missing == 0, f"{self._path}: {self._missing} bytes of its tensors were not written"
        self._sync()
        digest, size = _digest(self._descriptor, self._path)
        self.close()
        _repeated(lambda: self._files.rename(self._partial, self._path))
        return {"bytes": size, "sha256": digest}

    def close(self) -> None:
        """Close the file as it is."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Staging:
    """The folder beside the target. See the module's docstring."""

    _lock: Final = threading.Lock()
    _in_this_process: Final[set[Path]] = set()

    def __init__(
        self, folder: Path, target: Path, made: Mapping[str, Any], resuming: Mapping[str, str], files: FileLayer
    ) -> None:
        self.folder, self._target, self._files = folder, target, files
        self._manifest: dict[str, Any] = {"api": 1, "made": dict(made), RESUMING: dict(resuming), "files": {}}

    @classmethod
    @contextmanager
    def open(
        cls,
        target: Path,
        made: Mapping[str, Any],
        *,
        resuming: Mapping[str, str] | None = None,
        resume: bool = False,
        files: FileLayer | None = None,
    ) -> Iterator[Staging]:
        """Begin a folder for target, or continue the one that is there. A symlink to a folder is followed, and stays.

        made: what it is made from and how; only an export of the same may be continued. resuming: what else has to be
        as it was, but is not published. On an error what is finished stays for `resume`, and nothing else. Raises
        UsageError where the target exists or is being written, InputOutputError where the system refuses.
        """
        files = files or FileLayer()
        with _refusals(target), cls._lock:
            require_absent(target)
            target = target.resolve()
            _remove_orphans(target.parent)
            staging = cls(_take(target, files), target, made, resuming or {}, files)
            cls._in_this_process.add(staging.folder)
        try:
            with _refusals(target):
                staging._continue(resume)
                try:
                    yield staging
                finally:
                    staging._sweep()
        finally:
            cls._in_this_process.discard(staging.folder)

    def has(self, name: str) -> bool:
        """Return whether a file is finished, in this run or in the one that is continued."""
        return name in self._manifest["files"]

    @property
    def finished(self) -> Mapping[str, Mapping[str, Any]]:
        """What moeplug.json says of each finished file."""
        return self._manifest["files"]  # type: ignore[no-any-return]

    def require_free(self, nbytes: int) -> None:
        """Raise InputOutputError where the disk has not that many bytes left."""
        free = self._files.free_bytes(self.folder)
        if free < nbytes:
            raise InputOutputError(
                f"{self._target}: {nbytes:,} bytes are still to be written, and the disk has {free:,} left; "
                "free some, or choose another disk"
            )

    @contextmanager
    def shard(self, shard: OutputShard, facts: Callable[[], Mapping[str, Any]]) -> Iterator[OutputFile]:
        """Write a shard: its header is there, and when the block ends without an error it is finished.

        facts: asked when the block ends, for what goes into moeplug.json beside size and hash.
        """
        file = OutputFile(self.folder / shard.name, self._files)
        try:
            file.begin(shard)
            yield file
            self._record(shard.name, {**file.finish(), **facts()})
        finally:
            file.close()

    def add(self, name: str, content: Iterable[bytes]) -> None:
        """Write a whole file, unless a continued run already has it."""
        if self.has(name):
            return
        file = OutputFile(self.folder / name, self._files)
        try:
            position = 0
            for part in content:
                file.write_at(position, part)
                position += len(part)
            self._record(name, file.finish())
        finally:
            file.close()

    def publish(self) -> None:
        """Give the folder its name: from now on the export is there."""
        self._write({key: value for key, value in self._manifest.items() if key != RESUMING})
        self._sync(self.folder)
        require_absent(self._target)
        _repeated(lambda: self._files.rename(self.folder, self._target))
        self._sync(self._target.parent)

    def _record(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write moeplug.json anew with one file more. The file's own name is on disk before moeplug.json's is."""
        self._sync(self.folder)
        finished = {**self._manifest["files"], name: dict(facts)}
        self._write(self._manifest | {"files": dict(sorted(finished.items()))})  # resumed or not, the same bytes

    def _write(self, manifest: dict[str, Any]) -> None:
        file = OutputFile(self.folder / MANIFEST, self._files)
        try:
            file.write_at(0, (json.dumps(manifest, indent=1) + "\n").encode())
            file.finish()
        finally:
            file.close()
        self._manifest = manifest

    def _continue(self, resume: bool) -> None:
        """Take over what a finished shard of the same export is, and remove everything else."""
        found = read_manifest(self.folder) if (self.folder / MANIFEST).exists() else {}
        if found.get("files") and not resume:
            raise UsageError(
                f"{self._target}: an unfinished export of it is there, with {len(found['files'])} finished files; "
                f"continue it with --resume, or remove {self.folder}"
            )
        if found.get("files"):
            # Without it, a run before this one had finished every file and was about to publish.
            self._require_same(found.get("made") or {}, found.get(RESUMING, self._manifest[RESUMING]))
            for name, facts in found["files"].items():
                if is_as_recorded(self.folder / name, facts):
                    self._manifest["files"][name] = facts
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        finished = self._manifest["files"]
        for path in self.folder.iterdir():
            if path.name not in finished and (path.name != MANIFEST or not finished):
                path.unlink()

    def _require_same(self, made: Mapping[str, Any], resuming: Mapping[str, str]) -> None:
        mine = self._manifest["made"]
        now = self._manifest[RESUMING]
        changed = sorted(key for key in {*now, *resuming} if now.get(key) != resuming.get(key))
        if changed and made == mine:
            raise UsageError(
                f"{self._target}: since its finished files were made, these were changed: {', '.join(changed)}; an "
                f"export is never a mix of two models: remove {self.folder} to begin anew"
            )
        differing = sorted(key for key in {*mine, *made} if mine.get(key) != made.get(key))
        if differing:
            raise UsageError(
                f"{self._target}: the unfinished export is another one: {', '.join(differing)} differ; finish it with "
                f"the same model, scheme and format, or remove {self.folder}"
            )

    def _sync(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _repeated(lambda: self._files.fsync(descriptor))
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove what could not be continued: half-written files, and the folder where no file is finished."""
        with suppress(OSError):  # what cannot be removed now is by the next export; published, it is gone
            self._remove_unfinished()
            if not self._manifest["files"]:
                self.folder.rmdir()


def require_absent(target: Path) -> None:
    """Raise UsageError where something is in the way of a new folder; an empty folder is not, nor a symlink to one."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        found = "symlink to nothing" if target.is_symlink() else kind_of(target.lstat().st_mode)
        raise UsageError(f"{target}: is a {found}; give the name of a folder to make")
    if any(target.iterdir()):
        raise UsageError(f"{target}: exists and is not empty; nothing is ever overwritten: give another folder")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what moeplug.json says; CheckpointError where it is not what an export writes."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it is no export of moeplug")
    manifest = strict_json(path.read_bytes(), path)
    if not isinstance(manifest, dict) or manifest.get("api") != 1 or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path}: is not the manifest of an export, api 1")
    return manifest


def is_as_recorded(path: Path, facts: Mapping[str, Any]) -> bool:
    """Return whether a file has the size and the sha256 that were recorded."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        same_size = os.fstat(descriptor).st_size == facts.get("bytes")
        return same_size and _digest(descriptor, path)[0] == facts.get("sha256")
    finally:
        os.close(descriptor)


def _digest(descriptor: int, path: Path) -> tuple[str, int]:
    """Return the sha256 and the size of an open file."""
    digest, size, buffer = hashlib.sha256(), os.fstat(descriptor).st_size, bytearray(HASH_BYTES)
    for offset in range(0, size, HASH_BYTES):
        part = memoryview(buffer)[: min(HASH_BYTES, size - offset)]
        read_into(descriptor, part, offset, path)
        digest.update(part)
    return digest.hexdigest(), size


def _repeated(call: Callable[[], T]) -> T:
    """Call until no signal interrupts it."""
    while True:
        try:
            return call()
        except InterruptedError:
            continue


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputOutputError(
            f"{target}: cannot be written: {error.strerror or error}; finished files are kept for --resume"
        ) from error


def _take(target: Path, files: FileLayer) -> Path:
    """Return our own unfinished folder for target: a new one, or what a dead process left.

    Two that begin at the same moment may both be refused; two never write.
    """
    mine = target.with_name(f".{target.name}{MARK}{_owner()}")
    left = None
    for path in _unfinished(target):
        if _is_used(path):
            raise UsageError(
                f"{target}: is being written by another export, in {path}; wait for it, or, if it runs on another "
                f"machine and has ended, rename that folder to {target.with_name(f'.{target.name}{MARK}left').name}"
            )
        left = path
    if left is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        mine.mkdir()
    elif left != mine:
        try:
            files.rename(left, mine)
        except FileNotFoundError as error:
            raise UsageError(f"{target}: another export has just taken over {left}; wait for it") from error
    others = [path for path in _unfinished(target) if path != mine and _is_used(path)]
    if others:
        if left is None:
            mine.rmdir()
        raise UsageError(f"{target}: is being written by another export, in {others[0]}; wait for it")
    return mine


def _unfinished(target: Path) -> list[Path]:
    prefix = f".{target.name}{MARK}"
    return [path for path in target.parent.iterdir() if path.name.startswith(prefix)] if target.parent.is_dir() else []


def _remove_orphans(parent: Path) -> None:
    """Remove unfinished folders of dead processes of this machine where nothing is finished: no one can use them."""
    for path in parent.iterdir() if parent.is_dir() else ():
        named = re.fullmatch(rf"\..+{re.escape(MARK)}[0-9a-f]+-[0-9a-f]+-[0-9]+-[0-9]+", path.name)
        if named and path.is_dir() and not _is_used(path) and not (path / MANIFEST).exists():
            with suppress(OSError):  # another export removes it, or takes it over, at this moment
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()


def _owner() -> str:
    """Return this process as a part of a file name: machine, boot, number, start."""
    return f"{_machine()}-{_boot()}-{os.getpid()}-{_started(os.getpid())}"


def _is_used(folder: Path) -> bool:
    """Return whether the process that a folder is named after may still be writing it."""
    parts = folder.name.rpartition(MARK)[2].split("-")
    if len(parts) != 4 or not parts[2].isdecimal():
        return False
    machine, boot, number, started = parts
    if machine != _machine():
        return True  # it cannot be asked
    if boot != _boot():
        return False
    if int(number) == os.getpid():
        return folder in Staging._in_this_process
    return _started(int(number)) == started


def _machine() -> str:
    """Return what processes share that see each other: a machine, and in containers of one name a namespace."""
    try:
        processes = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        processes = ""
    return hashlib.sha256(f"{platform.node()} {processes}".encode()).hexdigest()[:8]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "0"


def _started(number: int) -> str | None:
    """Return when a process began, in clock ticks, or None where none of that number runs. "0" without /proc."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "0"
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie writes nothing any more
