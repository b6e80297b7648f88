"""Say what is wrong in a file, and where: `file:line:col: path: message`, the source line, and a caret."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from moeplug.errors import MoeplugError

DataPath = tuple[str | int, ...]

MAX_SHOWN: Final = 20


@dataclass(frozen=True)
class Position:
    """A place in a file; line and column count from 1, and line 0 means that the data came from no file."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{escape(self.file)}:{self.line}:{self.column}" if self.line else escape(self.file)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where. Its str() is a line for the user, the source line, and a caret."""

    file: str
    line: int
    column: int
    path: str
    message: str
    source: str = ""

    def __str__(self) -> str:
        where = ": ".join(part for part in (str(Position(self.file, self.line, self.column)), self.path) if part)
        return "\n".join([f"{where}: {self.message}", *_caret_lines(self.source, self.column)])


@dataclass(frozen=True)
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and the position of every key and value in it.

    A path is a tuple of keys and indices, () for the whole: ("overrides", 0, "layers").
    """

    name: str
    data: Any
    keys: Mapping[DataPath, Position] = field(default_factory=dict)
    values: Mapping[DataPath, Position] = field(default_factory=dict)
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def mark(self, path: DataPath, *, key: bool = False) -> Position:
        """Return where the value (or its key) stands; for what is not in the file, where its nearest owner does."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.values:
                table = self.keys if key or length < len(path) else self.values
                return table[path[:length]]
        return Position(self.name)

    def position(self, path: DataPath) -> tuple[int, int]:
        """Return (line, column) of the value at path, both from 1."""
        position = self.mark(path)
        return position.line, position.column

    def problem(self, path: DataPath, message: str, *, key: bool = False) -> Problem:
        """Return a Problem at the value of path; with key=True at its key."""
        return self.problem_at(self.mark(path, key=key), path, message)

    def problem_at(self, position: Position, path: DataPath, message: str) -> Problem:
        """Return a Problem at a position that the caller knows."""
        lines = self.lines.get(position.file, ())
        source = lines[position.line - 1] if 0 < position.line <= len(lines) else ""
        return Problem(position.file, position.line, position.column, show_path(path), message, source)


def fail(problems: Iterable[Problem], error: type[MoeplugError]) -> NoReturn:
    """Raise `error` whose text is all problems in file order, and which carries them as `.problems`."""
    ordered = tuple(sorted(problems, key=lambda problem: (problem.file, problem.line, problem.column)))
    shown = [str(problem) for problem in ordered[:MAX_SHOWN]]
    if len(ordered) > MAX_SHOWN:
        shown.append(f"and {len(ordered) - MAX_SHOWN} more problems")
    failure = error("\n".join(shown))
    vars(failure)["problems"] = ordered
    raise failure


def did_you_mean(found: object, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'channel'?` if one of `allowed` is close to what was found, else an empty text."""
    close = difflib.get_close_matches(str(found)[:80].lower(), list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def listing(names: Iterable[str], most: int = 12) -> str:
    """Return names separated by commas, `none` if there are none, and only how many more after the first ones."""
    shown = list(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return (", ".join(shown[:most]) or "none") + more


def show(value: object) -> str:
    """Return a value as YAML would write it, escaped and at most some 60 characters long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def show_path(path: DataPath) -> str:
    """Return `overrides[0].layers` for ("overrides", 0, "layers")."""
    text = ""
    for part in path[: path.index(-1)] if -1 in path else path:
        name = f"[{part}]" if isinstance(part, int) else part if re.fullmatch(r"[\w-]{1,60}", part) else show(part)
        text += name if isinstance(part, int) or not text else f".{name}"
    return text


def escape(text: str) -> str:
    """Return text with all that could move a terminal's cursor or hide (ESC, bidi marks) written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _caret_lines(source: str, column: int) -> list[str]:
    """Return the source line and a caret below its column (from 1), cut to a window of some 110 characters."""
    if not source.strip() or column < 1:
        return []
    start = max(0, min(column - 80, len(source) - 110))
    before, after = escape(source[start : column - 1]), escape(source[max(start, column - 1) : start + 110])
    cut = "..." if start else ""
    width = sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in cut + before)
    return [f"    {cut}{before}{after}".rstrip(), f"    {' ' * width}^"]
