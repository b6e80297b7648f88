"""Open a checkpoint's files safely, and notice when one changes under us.

Names come from data, so they are checked as text before they touch the file system; what is opened is then checked
again through its descriptor. Nothing here trusts a file's size, type or content before it has looked.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

from moeplug.errors import CheckpointError, InputOutputError

# A header, an index or a config of this size is no longer plausible: 100 MB hold about 700,000 tensor names.
MAX_JSON_BYTES = 100_000_000
# 330,000 tensors in one header, or 3,000,000 names in an index; the largest models have 200,000 in all. What is denser
# than names and offsets costs Python 28 times its bytes, and 20 s for 100 MB.
MAX_JSON_VALUES = 3_000_000
MAX_JSON_INTEGER_DIGITS = 18  # below 2**63, so no arithmetic on sizes can surprise
MAX_SHOWN_CHARACTERS = 160


def shown(text: object) -> str:
    """Return text from a file so that it can be printed: quoted, escaped and capped."""
    quoted = ascii(text)
    return quoted if len(quoted) <= MAX_SHOWN_CHARACTERS else quoted[:MAX_SHOWN_CHARACTERS] + "…"


def listed(items: list[str], limit: int = 10) -> str:
    """Return up to `limit` items as one text, with the count of the rest."""
    rest = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def counted(count: int, thing: str) -> str:
    """Return "1 tensor" or "2 tensors"."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


@dataclass(frozen=True)
class Stamp:
    """What the file system says of a file; any difference later means that the file was changed or replaced."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Stamp:
        """Return the stamp of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def require(self, descriptor: int, path: Path) -> None:
        """Raise CheckpointError where an open file is no longer the one of this stamp."""
        found = Stamp.of(descriptor)
        if found != self:
            differing = [name for name in vars(found) if getattr(found, name) != getattr(self, name)]
            raise CheckpointError(
                f"{path}: was changed while it was being read ({', '.join(differing)} differ); "
                "what was read cannot be trusted: start again when nobody writes to it"
            )


@dataclass(frozen=True)
class SourceFile:
    """One file of a checkpoint: `path` for messages, `target` to open (what an allowed symlink points to)."""

    path: Path
    target: Path

    def open(self) -> int:
        """Open for reading, without ever waiting on a FIFO, and return the descriptor of a regular file."""
        try:
            self._require_regular(self.target.stat().st_mode)
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self.target, flags)
        except OSError as error:
            refuse_os_error(self.path, error)
        try:
            # Asked again through the descriptor: the name may have changed its meaning between the two calls.
            self._require_regular(os.fstat(descriptor).st_mode)
            os.set_blocking(descriptor, True)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _require_regular(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{self.path}: is a {kind_of(mode)}, not a regular file; nothing was read from it")

    def read_whole(self, limit: int = MAX_JSON_BYTES) -> bytes:
        """Return the content of a small file, or refuse it because of its size."""
        descriptor = self.open()
        try:
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise CheckpointError(f"{self.path}: has {size:,} bytes; at most {limit:,} are accepted here")
            return read_exactly(descriptor, size, 0, self.path)
        finally:
            os.close(descriptor)


def kind_of(mode: int) -> str:
    """Return what a file is, in words, from its st_mode."""
    kinds = {
        stat.S_IFDIR: "folder",
        stat.S_IFREG: "file",
        stat.S_IFLNK: "symlink",
        stat.S_IFIFO: "FIFO (named pipe)",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


def refuse_os_error(path: Path, error: OSError) -> NoReturn:
    """Raise what the operating system refused as our own error, with the path and its reason."""
    raise InputOutputError(f"{path}: {error.strerror or error}") from error


def read_exactly(descriptor: int, count: int, offset: int, path: Path) -> bytes:
    """Return `count` bytes from `offset`; a file that ends early is refused."""
    content = bytearray(count)
    read_into(descriptor, memoryview(content), offset, path)
    return bytes(content)


def read_into(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from `offset`. The system may give less than was asked, so ask again until it is full."""
    while view.nbytes:
        try:
            count = os.preadv(descriptor, [view], offset)
        except InterruptedError:  # Python repeats such a read itself; some network file systems give it all the same
            continue
        except OSError as error:
            refuse_os_error(path, error)
        if count == 0:
            raise CheckpointError(f"{path}: ends at byte {offset:,}, before its contents do; it was changed or cut")
        view, offset = view[count:], offset + count


def safe_name_problem(value: object) -> str | None:
    """Return why a file name found in data may not be used, or None.

    A name must be its own basename, here and on Windows, so that it cannot leave the checkpoint's folder.
    """
    if not isinstance(value, str):
        return "is not a string"
    if not value:
        return "is empty"
    if not value.isprintable():
        return "holds characters that cannot be printed"
    if "\\" in value or Path(value).name != value or PureWindowsPath(value).name != value:
        return "is not a plain file name inside the checkpoint's folder"
    if not value.endswith(".safetensors") or value == ".safetensors":
        return "does not end in .safetensors"
    return None


def locate_file(folder: Path, name: str, *, allow_symlinks: bool) -> SourceFile:
    """Return the file `name` of a folder; a symlink only where it stays in the checkpoint.

    Allowed targets: the same folder, and the `blobs/` beside the `snapshots/` of a Hugging Face cache.
    """
    path = folder / name
    if not path.is_symlink():
        return SourceFile(path, path)
    target = Path(os.path.realpath(path))
    home = Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not allow_symlinks and target.parent not in allowed:
        raise CheckpointError(
            f"{path}: is a symlink to {shown(str(target))}, outside the checkpoint's folder; put the file itself there"
        )
    if not target.exists():
        raise CheckpointError(f"{path}: is a symlink to {shown(str(target))}, which does not exist; download it again")
    return SourceFile(path, target)


def recognise(head: bytes) -> str | None:
    """Return what a file that is not safetensors seems to be, with what to do, or None."""
    text = head.lstrip().lower()
    if not head:
        return "the file is empty (0 bytes); download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights; run `git lfs pull` in the repository, or download the file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page saved under this name, probably a login or error page; download it again"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "it is a pickle (a PyTorch .bin or .pt file), which can run code when opened; moeplug never opens one"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file; moeplug reads safetensors"
    return None


def strict_json(content: bytes, where: Path, *, constants: bool = False) -> Any:
    """Parse JSON; duplicate keys, huge integers, deep nesting and wrong encodings are CheckpointErrors.

    constants: accept NaN and Infinity, which some config.json files hold; a header or an index never does.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise CheckpointError(f"{where}: the name {shown(twice)} is there twice; one of them would be lost")
        return result

    def integer(digits: str) -> int:
        # "-0" is an integer to Python and not to the safetensors library.
        if digits == "-0" or len(digits.lstrip("-")) > MAX_JSON_INTEGER_DIGITS:
            raise CheckpointError(f"{where}: {shown(digits)} is not a number that belongs here")
        return int(digits)

    def constant(name: str) -> float:
        if constants:
            return float(name)
        raise CheckpointError(f"{where}: {name} is not JSON")

    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise CheckpointError(f"{where}: has over {MAX_JSON_VALUES:,} values, more than any real file")
    try:
        text = content.decode("utf-8")
        return json.loads(text, object_pairs_hook=unique, parse_int=integer, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: byte {error.start:,} is not UTF-8; the file is damaged") from error
    except json.JSONDecodeError as error:
        hint = recognise(content[:64])
        reason = hint if hint else f"{error.msg}; the file is damaged"
        raise CheckpointError(f"{where}:{error.lineno}:{error.colno}: is not JSON: {reason}") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: is nested too deeply to be a real file") from error
