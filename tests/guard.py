"""Watch a process that reads untrusted data: what it may never do there is written down, and a hang ends it.

guard = Guard(folder)       # from here on; an audit hook cannot be taken away again, so only in a child process
guard.found                 # what happened that must not: [("os.system", "touch x"), ...]
with time_limit(10):        # else the process dies by SIGALRM, after all Python stacks were printed
    ...
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Events that no reading of data causes, by how their names begin: processes, sockets, other code, changed files.
FORBIDDEN = (
    "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.startfile", "subprocess.Popen", "pty.spawn",
    "socket.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "ctypes.dlopen", "pickle.",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
    "os.kill", "os.putenv", "shutil.", "tempfile.",
)  # fmt: skip
PLUGINS = "moeplug"  # moeplug itself, and the official plugins: moeplug_int8 and so on
MOST = 5  # that are written down: one import is hundreds of events
# What the kernel says of this machine: torch and the planner ask it for cores and memory.
SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom")


def _code_folders() -> tuple[str, ...]:
    """Return where Python, the installed packages (sys.path has those of editable ones) and this checkout lie."""
    paths = {*sysconfig.get_paths().values(), *sys.path, sys.base_prefix, sys.prefix, str(ROOT)}
    return tuple(sorted(os.path.realpath(path) for path in paths if path))


def _top_modules() -> set[str]:
    return {name.partition(".")[0] for name in sys.modules}


class Guard:
    """An audit hook: it writes down, and lets everything go on, so that a canary shows what really ran."""

    def __init__(self, folder: Path) -> None:
        """folder: where data lie, the only place outside the code's own that may be read."""
        self.found: list[tuple[str, str]] = []
        self.code = _code_folders()
        self.readable = (os.path.realpath(folder), *self.code)
        self.importable = _top_modules()  # and moeplug's own
        self.on = True
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Write nothing down meanwhile: for what the test itself does."""
        with self._switched(False):
            yield

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Write down again, within `paused`; what is imported by now may be imported."""
        self.importable |= _top_modules()
        with self._switched(True):
            yield
        # importlib.import_module, which imports by a name in data, causes no import event.
        if new := [name for name in _top_modules() - self.importable if not name.startswith(PLUGINS)]:
            self.found.append(("import", ", ".join(new)))

    @contextlib.contextmanager
    def _switched(self, on: bool) -> Iterator[None]:
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("open", "os.listdir", "os.scandir"):
            wrong = not self._may_open(arguments)
        elif event == "import":
            top = arguments[0].partition(".")[0]
            wrong = top not in self.importable and not top.startswith(PLUGINS)
        elif event in ("exec", "compile"):
            wrong = not self._is_code_of_ours(arguments)
        else:
            wrong = event.startswith(FORBIDDEN)
        if wrong and len(self.found) < MOST:
            with self.paused():
                self.found.append((event, ascii(arguments)[:300]))

    def _may_open(self, arguments: tuple[Any, ...]) -> bool:
        path, flags = arguments[0], arguments[2] if len(arguments) > 2 else 0
        if isinstance(path, int):
            return True
        try:
            place = os.path.realpath(os.fsdecode("." if path is None else path))
        except ValueError:  # a NUL: nothing has this name
            return True
        if place.startswith(SYSTEM):
            return True
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return not writes and any(place == home or place.startswith(home + os.sep) for home in self.readable)

    def _is_code_of_ours(self, arguments: tuple[Any, ...]) -> bool:
        """Return whether code comes from a file of the installed packages: it is then part of an import."""
        source = arguments[0]
        name = source.co_filename if isinstance(source, CodeType) else arguments[-1]
        name = os.fsdecode(name) if isinstance(name, bytes | str) else ""
        return name.startswith("<frozen ") or any(name.startswith(home + os.sep) for home in self.code)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Die by a signal if the body computes for longer, even inside C code; all threads' stacks go to stderr first.

    Seconds are those of this process, because others may have the machine; waiting ends after twelve times as many.
    """
    timers = (signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, 12 * seconds)
    for timer, number, limit in timers:
        faulthandler.register(number, all_threads=True, chain=True)
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer, *_ in timers:
            signal.setitimer(timer, 0)
