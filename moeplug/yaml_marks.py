"""Read YAML as plain data that remembers its lines, and report every problem as file:line:col with a caret.

    document = load_yaml(path)                        data, and where each key and value stands
    scheme = validate(document, Scheme, SchemeError)  a pydantic model, or all problems at once

Only what YAML 1.2 and JSON share is read: mappings with text keys, lists, text, true/false, null, decimal numbers.
Anchors, aliases, merge keys, tags, directives and duplicate keys are refused: each is a way to make a file mean
something else than it seems to say. A plain word is never read differently than YAML 1.2 reads it: `on`, `1_000`,
`1:30` and dates are texts; `True`, `010` and `0x1f`, about which parsers disagree, are refused.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml

from moeplug.errors import InputOutputError, MoeplugError, SchemeError
from moeplug.problems import DataPath, Document, Position, Problem, did_you_mean, escape, fail, listing, show
from moeplug.validation import check, field_error, require_api, validate

__all__ = [
    "DataPath",
    "Document",
    "Position",
    "Problem",
    "check",
    "did_you_mean",
    "document_of",
    "fail",
    "field_error",
    "listing",
    "load_yaml",
    "parse_yaml",
    "require_api",
    "show",
    "validate",
]

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 16
MAX_NODES: Final = 20_000  # about 1 s of pure-Python parsing; a scheme has some fifty
MAX_DIGITS: Final = 18  # below 2**63, so every reader of the data agrees

ASIDE: Final = -1  # in a path: what follows is a key, or the value of a duplicate key, and is in no data

# YAML 1.1 also breaks lines at NEL, LS and PS, 1.2 does not; U+FEFF inside a file is always an accident.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]|\r(?!\n)")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_DISPUTED = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false", "Null": "null", "NULL": "null"}
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}


def load_yaml(path: Path, error: type[MoeplugError] = SchemeError) -> Document:
    """Return the document in a file; raise `error` with every problem, InputOutputError if it cannot be read."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise InputOutputError(f"{escape(str(path))}: {_reason(path, problem)}") from problem
    return parse_yaml(_decode(raw, str(path), error), str(path), error)


def parse_yaml(text: str, name: str, error: type[MoeplugError] = SchemeError) -> Document:
    """Return the document in a text; `name` stands for the file in messages. Raise `error` with every problem."""
    text = text.removeprefix("\ufeff")
    lines = tuple(line.removesuffix("\r") for line in text.split("\n"))
    empty = Document(name, None, lines={name: lines})
    problems = list(_bad_characters(empty, lines, text))
    if problems:
        fail(problems, error)
    composer = _Composer(empty, text)
    data = composer.compose()
    if composer.problems:
        fail(composer.problems, error)
    return Document(name, data, composer.keys, composer.values, {name: lines})


def document_of(data: Any, name: str = "<data>", error: type[MoeplugError] = SchemeError) -> Document:
    """Return plain Python data (no file) as a Document, tuples as lists; raise `error` with what is not plain."""
    problems: list[Problem] = []
    document = Document(name, None)
    plain = _plain(data, (), lambda path, message: problems.append(document.problem(path, message)))
    if problems:
        fail(problems, error)
    return Document(name, plain)


def _plain(data: Any, path: DataPath, report: Callable[[DataPath, str], None]) -> Any:
    """Return data as lists, dicts and scalars; report whatever YAML could not hold."""
    if data is None or isinstance(data, bool):
        return data
    if isinstance(data, str):
        if _FORBIDDEN.search(data):
            report(path, "the text holds a control character or half a character")
        return str(data)
    if isinstance(data, int | float):
        if not math.isfinite(data) if isinstance(data, float) else abs(data) >= 10**MAX_DIGITS:
            report(path, "not a finite number" if isinstance(data, float) else f"more than {MAX_DIGITS} digits")
        return data
    if len(path) >= MAX_DEPTH:
        report(path[:1], f"nested deeper than {MAX_DEPTH} levels")
        return None
    if isinstance(data, Mapping):
        for key in data:
            if not isinstance(key, str) or _FORBIDDEN.search(key):
                report(path, f"the key is {show(key)}, but keys are texts")
        return {str(key): _plain(value, (*path, str(key)), report) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(item, (*path, i), report) for i, item in enumerate(data)]
    report(path, f"found a {type(data).__name__}, expected plain data: mappings, lists, texts, numbers, true, null")
    return None


class _TooMuch(Exception):
    """The document is larger or deeper than any honest one; nothing after this point is read."""


class _Composer:
    """Turns parser events into data and positions, going on after each problem that is not a syntax error."""

    def __init__(self, document: Document, text: str) -> None:
        self.document = document
        self.loader: Any = yaml.SafeLoader(text)  # the pure Python one: the C parser dies of deep nesting
        self.keys: dict[DataPath, Position] = {}
        self.values: dict[DataPath, Position] = {}
        self.problems: list[Problem] = []

    def compose(self) -> Any:
        """Return the data of the only document, or None with `problems` filled."""
        try:
            return self._stream()
        except _TooMuch:
            return None
        except yaml.MarkedYAMLError as problem:
            self._report(problem.problem_mark or problem.context_mark, (), _syntax_words(problem))
        except (yaml.YAMLError, ValueError, OverflowError):
            # PyYAML lets out ValueError and OverflowError of "\U99999999" and of %YAML 1.<many digits>
            self._report(self.loader.get_mark(), (), "not valid YAML: a number after \\U or %YAML is too large")
        return None

    def _stream(self) -> Any:
        self.loader.get_event()
        if self.loader.check_event(yaml.StreamEndEvent):
            self._report(None, (), "the file is empty; expected 'key: value' lines")
            return None
        start = self.loader.get_event()
        if start.version or start.tags:
            self._report(start.start_mark, (), "directives (%YAML, %TAG) are not allowed; remove the line")
        data = self._node(())
        self.loader.get_event()
        if not self.loader.check_event(yaml.StreamEndEvent):
            self._report(self.loader.peek_event().start_mark, (), "a second document; one file holds one document")
        return data

    def _node(self, path: DataPath) -> Any:
        event = self.loader.get_event()
        self.values[path] = position = self._position(event.start_mark)
        self.keys.setdefault(path, position)
        if len(self.values) > MAX_NODES:
            self._report(event.start_mark, (), f"more than {MAX_NODES} values; no file of ours is so large")
            raise _TooMuch
        if isinstance(event, yaml.AliasEvent):
            self._report(
                event.start_mark, path, f"aliases (*{_short(event.anchor)}) are not allowed; write the value out"
            )
            return None
        self._refuse_anchor_and_tag(event, path)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            self._report(event.start_mark, path[:1], f"nested deeper than {MAX_DEPTH} levels")
            raise _TooMuch
        return self._list(path) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(path)

    def _list(self, path: DataPath) -> list[Any]:
        items: list[Any] = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            items.append(self._node((*path, len(items))))
        self.loader.get_event()
        return items

    def _mapping(self, path: DataPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            mark = self.loader.peek_event().start_mark
            key = self._key(path)
            place = (*path, key)
            if key in mapping:
                first = self.keys[place].line
                self._report(mark, place, f"duplicate key: {show(key)} is already in line {first}; keep one of them")
                self._node((*path, ASIDE, len(self.values)))  # read to the end, kept nowhere
                continue
            self.keys[place] = self._position(mark)
            mapping[key] = self._node(place)
        self.loader.get_event()
        return mapping

    def _key(self, path: DataPath) -> str:
        event = self.loader.peek_event()
        plain = isinstance(event, yaml.ScalarEvent) and event.style is None
        known = len(self.problems)
        key = self._node((*path, ASIDE, len(self.values)))
        if plain and event.value == "<<":
            self._report(event.start_mark, path, "merge keys (<<) are not allowed; write the keys out")
        elif len(self.problems) == known and not isinstance(key, str):
            self._report(event.start_mark, path, f"the key is {show(key)}, but keys are texts{_quoted_hint(event)}")
        return key if isinstance(key, str) else f"? {len(self.values)}"

    def _refuse_anchor_and_tag(self, event: Any, path: DataPath) -> None:
        if event.anchor is not None:
            self._report(
                event.start_mark, path, f"anchors (&{_short(event.anchor)}) are not allowed; write the value out"
            )
        if event.tag is not None:
            self._report(event.start_mark, path, f"tags ({show(event.tag)}) are not allowed: the file is only data")

    def _scalar(self, event: Any, path: DataPath) -> Any:
        if event.style is None and event.tag is None:
            value, complaint = _plain_scalar(event.value)
        else:
            value, complaint = event.value, None
        if isinstance(value, str) and _FORBIDDEN.search(value):
            complaint = "the text holds a control character or half a character"
        if complaint:
            self._report(event.start_mark, path, complaint)
        return value

    def _position(self, mark: Any) -> Position:
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        return Position(self.document.name, line, column)

    def _report(self, mark: Any, path: DataPath, message: str) -> None:
        self.problems.append(self.document.problem_at(self._position(mark), path, message))


def _plain_scalar(text: str) -> tuple[Any, str | None]:
    """Return (value, None) or (None, what is wrong) of an unquoted scalar, by the rules of YAML 1.2."""
    if text in _CONSTANTS:
        return _CONSTANTS[text], None
    if text in _DISPUTED:
        return None, f"{text}: YAML versions read it differently; write {_DISPUTED[text]}, or '{text}' in quotes"
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        return _float(text)
    if _NOT_FINITE.fullmatch(text):
        return None, f"{text} is not a finite number"
    if re.fullmatch(r"[-+]?0[xo][0-9a-fA-F]+", text):
        return None, f"{show(text)}: only decimal numbers are read; put a text in quotes"
    return text, None


def _integer(text: str) -> tuple[int | None, str | None]:
    digits = text.lstrip("+-")
    if len(digits) > MAX_DIGITS:
        return None, f"a number of {len(digits)} digits; at most {MAX_DIGITS} are allowed"
    if len(digits) > 1 and digits[0] == "0":
        return None, f"{text}: YAML versions read leading zeros differently; write {int(text)}, or '{text}' in quotes"
    return int(text), None


def _float(text: str) -> tuple[float | None, str | None]:
    if len(text) > 40:
        return None, f"a number of {len(text)} characters; at most 40 are allowed"
    value = float(text)
    digits = re.split("[eE]", text)[0]
    if math.isinf(value) or (value == 0 and re.search("[1-9]", digits)):
        return None, f"{text} is too {'large' if value else 'small'} for a 64-bit number"
    return value, None


def _short(text: str | None) -> str:
    text = text or ""
    return escape(text if len(text) <= 40 else f"{text[:37]}...")


def _quoted_hint(event: Any) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        return ""
    return (
        f"; write '{_short(event.value)}' in quotes if it is one" if event.value else "; nothing stands before the ':'"
    )


_SYNTAX_HINTS = (  # part of PyYAML's message, what it usually means
    (
        "mapping values are not allowed",
        "a second ': ' in the line, or wrong indentation; put a text with ': ' in quotes",
    ),
    (
        "could not find expected ':'",
        "this is not 'key: value'; a ':' or a closing quote is missing in or above this line",
    ),
    ("expected <block end>", "the indentation fits no line above, or a list and keys are mixed"),
    ("expected ',' or ']'", "the list is not closed with ']', or a ',' is missing"),
    ("expected ',' or '}'", "the mapping is not closed with '}', or a ',' is missing"),
    ("cannot start any token", "a text cannot begin with this character; put it in quotes"),
    ("unexpected end of stream", "a quote is not closed"),
    ("unknown escape character", "in double quotes a backslash starts an escape; use single quotes"),
    ("expected the node content", "a value is missing here"),
    ("expected '<document start>'", "after the first document nothing may follow"),
)


def _syntax_words(problem: yaml.MarkedYAMLError) -> str:
    words = problem.problem or "cannot be read"
    hint = next((hint for part, hint in _SYNTAX_HINTS if part in words), words)
    opened, at = problem.context_mark, problem.problem_mark
    since = f" (begun in line {opened.line + 1})" if opened and at and opened.line != at.line else ""
    return f"not valid YAML: {hint}{since}"


def _bad_characters(document: Document, lines: Sequence[str], text: str) -> Iterator[Problem]:
    """Report the size, and the first character of each line that no text file has."""
    if len(text) > MAX_BYTES:
        yield document.problem_at(Position(document.name, 1, 1), (), f"larger than {MAX_BYTES} bytes")
        return
    for number, line in enumerate(lines, start=1):
        bad = _FORBIDDEN.search(line)
        tab = -1 if line.lstrip().startswith("#") else line.find("\t")
        if bad:
            words = f"the character U+{ord(bad[0]):04X} is not allowed; remove it"
            yield document.problem_at(Position(document.name, number, bad.start() + 1), (), words)
        elif tab >= 0:
            words = 'a tab; use spaces (inside a double-quoted text, write "\\t")'
            yield document.problem_at(Position(document.name, number, tab + 1), (), words)


def _decode(raw: bytes, name: str, error: type[MoeplugError]) -> str:
    def stop(message: str, line: int = 1, column: int = 1) -> NoReturn:
        fail([Problem(name, line, column, "", message)], error)

    if len(raw) > MAX_BYTES:
        stop(f"larger than {MAX_BYTES} bytes; is this the right file?")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        stop("the file is UTF-16; save it as UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        before = raw[: problem.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8")) + 1
        stop(f"byte 0x{raw[problem.start]:02x} is not UTF-8; save the file as UTF-8", before.count(b"\n") + 1, column)


def _open_regular(path: str, flags: int) -> int:
    """Open without waiting for the writer of a FIFO, and take nothing but a regular file."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return descriptor


def _reason(path: Path, problem: Exception) -> str:
    if not isinstance(problem, FileNotFoundError):
        return f"cannot be read: {getattr(problem, 'strerror', None) or problem}"
    if path.is_symlink():
        return f"a symlink to {escape(os.readlink(path))}, which does not exist"  # noqa: PTH115
    beside = sorted(entry.name for entry in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    if not path.parent.is_dir():
        return (
            f"no such file: there is no folder {escape(str(path.parent))}; run from another folder, or give it in full"
        )
    return (
        f"no such file{did_you_mean(path.name, beside) or '.'} Check the path; it counts from {escape(str(Path.cwd()))}"
    )
