"""Write a text file whole or not at all, and find out before the work whether it could be written after it."""

from __future__ import annotations

import errno
import secrets
import tempfile
from pathlib import Path

from moeplug.errors import InputOutputError


def write_whole(path: Path, text: str) -> None:
    """Write a text file by one rename, so that nothing half-written is ever seen under its name."""
    temporary = path.parent / f".moeplug-{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("x", encoding="utf-8") as file:  # new, and 0o666 under the umask, as any file
                file.write(text)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputOutputError(f"{path}: cannot be written: {error.strerror}") from error


def check_writable(path: Path) -> None:
    """Raise InputOutputError where a file could not be written, before the work whose result it is to hold."""
    try:
        if path.exists() and not path.is_file():  # it would come by a rename, which would replace a device
            raise OSError(errno.EEXIST, "it exists, and is no file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputOutputError(f"{path}: cannot be written: {error.strerror}") from error
