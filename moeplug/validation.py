"""Make a pydantic model of a document, or say in plain words what is wrong at which position."""

from __future__ import annotations

import enum
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from moeplug.errors import MoeplugError, SchemeError
from moeplug.problems import DataPath, Document, Problem, did_you_mean, fail, show

M = TypeVar("M", bound=BaseModel)

NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
IGNORED: Final = "x-"  # keys that begin so belong to other tools

_MAPPING = "a mapping (key: value)"
_EXPECTED: Final[dict[str, str]] = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "dataclass_type": _MAPPING,
    "none_required": "null",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "{min_length} or more items",
    "too_long": "{max_length} or fewer items",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
}
_NAME_WORDS: Final = "a name of a-z, 0-9, '.', '_' and '-' that begins with a letter or digit, at most 64 long"


def validate(document: Document, model: type[M], error: type[MoeplugError] = SchemeError) -> M:
    """Return the model made of the document; raise `error` with every problem at its position.

    Keys that start with `x-` are ignored. The data are validated as JSON, so a strict model takes a YAML list for a
    tuple. A validator of the model may raise ValueError, or `field_error` to point at one of its fields.
    """
    result, problems = check(document, model)
    if result is None:
        fail(problems, error)
    return result


def check(document: Document, model: type[M], at: DataPath = ()) -> tuple[M | None, list[Problem]]:
    """Return (the model made of what stands at path `at`, []), or (None, every problem in file order)."""
    data = _value_at(document.data, at)
    if not isinstance(data, dict):
        return None, [document.problem(at, f"found {_found(data)}, expected {_MAPPING}")]
    translator = _Translator(document, model, at)
    try:
        result = model.model_validate_json(json.dumps(_without_ignored(data)))
    except ValidationError as error:
        return None, translator.problems(error.errors(include_url=False))
    miscast = list(translator.miscast(data, ()))
    return (None, miscast) if miscast else (result, [])


def require_api(document: Document, supported: int, error: type[MoeplugError], what: str) -> None:
    """Raise one clear error if the file is written for another api, instead of ten about keys that came with it."""
    found = document.data.get("api") if isinstance(document.data, dict) else supported
    if not isinstance(found, int) or isinstance(found, bool) or found == supported:
        return
    todo = "upgrade moeplug" if found > supported else f"rewrite it for api {supported}"
    message = f"{what} is written for api {found}, this moeplug reads api {supported}; {todo}"
    fail([document.problem(("api",), message)], error)


def field_error(at: str | DataPath, message: str) -> PydanticCustomError:
    """Return what a model's validator raises to point at a field: `raise field_error("group_size", "...")`."""
    path = (at,) if isinstance(at, str) else at
    return PydanticCustomError("value_error", "{message}", {"message": message, "at": path})


class _Translator:
    """Turns pydantic's error entries into problems: in plain words, at the right key or value, each only once."""

    def __init__(self, document: Document, model: type[BaseModel], at: DataPath) -> None:
        self.document, self.model, self.at = document, model, at
        self.data = _value_at(document.data, at)

    def problems(self, details: Sequence[ErrorDetails]) -> list[Problem]:
        """Return one problem per place, in file order."""
        expected: dict[DataPath, list[str]] = {}
        found: list[Problem] = []
        misspelt = set()
        for detail in details:
            path = self._path(detail)
            if detail["type"] == "extra_forbidden":
                problem, meant = self._unknown_key(path)
                found.append(problem)
                misspelt.add((*path[:-1], meant))
            elif (words := self._expected(detail, path)) is not None:
                if not words:
                    continue
                expected.setdefault(path, []).extend(w for w in words if w not in expected.get(path, ()))
            elif detail["type"] != "missing":
                found.append(self._problem(path, _own_words(detail)))
        missing = [path for path in (self._path(d) for d in details if d["type"] == "missing") if path not in misspelt]
        found += [self._missing(path) for path in dict.fromkeys(missing)]
        found += [self._wrong_value(path, words) for path, words in expected.items()]
        return sorted(found, key=lambda problem: (problem.file, problem.line, problem.column))

    def miscast(self, data: Any, path: DataPath) -> Iterable[Problem]:
        """Yield the values that only Python's 1 == 1.0 == True makes equal to an allowed one."""
        if isinstance(data, dict | list):
            for key, value in data.items() if isinstance(data, dict) else enumerate(data):
                yield from self.miscast(value, (*path, key))
        elif isinstance(data, bool | int | float) and (choices := self._choices(path)):
            equal = [choice for choice in choices if choice == data]
            if equal and type(data) not in map(type, equal):
                yield self._wrong_value(path, [show(choice) for choice in choices])

    def _path(self, detail: ErrorDetails) -> DataPath:
        """Return the path inside the data: pydantic's loc also names union members, which are no keys."""
        path: list[str | int] = []
        node = self.data
        loc = detail["loc"]
        for i, part in enumerate(loc):
            inside = part in node if isinstance(node, dict) else isinstance(node, list) and _is_index(part, node)
            if inside:
                node = node[part]
                path.append(part)
            elif detail["type"] == "missing" and i == len(loc) - 1:
                path.append(part)
        path.extend(detail.get("ctx", {}).get("at", ()))
        return tuple(path)

    def _problem(self, path: DataPath, message: str, *, key: bool = False) -> Problem:
        return self.document.problem((*self.at, *path), message, key=key)

    def _unknown_key(self, path: DataPath) -> tuple[Problem, str]:
        *owner, key = path
        allowed = [name for model in self._models(tuple(owner)) for name in _field_names(model)]
        meant = did_you_mean(key, allowed)
        message = f"unknown key {show(key)}{meant} Allowed: {', '.join(allowed)}"
        if not meant:
            message = f"unknown key {show(key)}; allowed: {', '.join(allowed) or 'none'}"
        return self._problem(path, message, key=True), meant.partition("'")[2].partition("'")[0]

    def _missing(self, path: DataPath) -> Problem:
        *owner, key = path
        if isinstance(key, int):
            return self._problem(tuple(owner), f"item {key + 1} is missing")
        meaning = self._description(path)
        return self._problem(path, f"{show(key)} is missing{': ' if meaning else ''}{meaning}")

    def _expected(self, detail: ErrorDetails, path: DataPath) -> list[str] | None:
        kind, context = detail["type"], detail.get("ctx", {})
        if kind in ("literal_error", "enum"):
            return [show(choice) for choice in self._choices(path)] or [str(context.get("expected"))]
        if kind == "string_pattern_mismatch":
            return [
                _NAME_WORDS if context["pattern"] == NAME_PATTERN else self._pattern_words(path, context["pattern"])
            ]
        if kind == "too_short" and len(_value_at(self.data, path) or ()) >= context["min_length"]:
            return []  # pydantic counts good items only, and has reported the bad ones
        limits = {name: int(x) if isinstance(x, float) and x.is_integer() else x for name, x in context.items()}
        return [_EXPECTED[kind].format(**limits)] if kind in _EXPECTED else None

    def _pattern_words(self, path: DataPath, pattern: object) -> str:
        described = self._description(path)
        return f"{described} ({pattern})" if described else f"a text that matches {pattern}"

    def _description(self, path: DataPath) -> str:
        """Return what the model says about the field at path; of an item, what it says about the list."""
        while path and isinstance(path[-1], int):
            path = path[:-1]
        fields = [_field_names(model).get(str(path[-1])) for model in self._models(path[:-1])] if path else []
        return next((info.description for info in fields if info is not None and info.description), "")

    def _wrong_value(self, path: DataPath, expected: list[str]) -> Problem:
        value = _value_at(self.data, path)
        choices = [choice for choice in self._choices(path) if isinstance(choice, str)]
        meant = did_you_mean(value, choices) if isinstance(value, str) else ""
        return self._problem(
            path, f"found {_found(value)}, expected {_either(expected)}{meant or _hint(value, expected)}"
        )

    def _choices(self, path: DataPath) -> list[Any]:
        choices: list[Any] = []
        for annotation in _annotations_at(self.model, path):
            if get_origin(annotation) is Literal:
                choices += get_args(annotation)
            elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
                choices += [member.value for member in annotation]
        return choices

    def _models(self, path: DataPath) -> list[type[BaseModel]]:
        return [a for a in _annotations_at(self.model, path) if isinstance(a, type) and issubclass(a, BaseModel)]


def _annotations_at(model: type[BaseModel], path: DataPath) -> list[Any]:
    """Return the types that may stand at path, unions and annotations taken apart."""
    found = [model]
    for part in path:
        found = [inner for annotation in found for step in _step(annotation, part) for inner in _members(step)]
    return found


def _step(annotation: Any, part: str | int) -> Iterable[Any]:
    """Yield the types of one item of a list, one value of a mapping, or one field of a model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if part in _field_names(annotation):
            yield _field_names(annotation)[str(part)].annotation
    elif isinstance(part, int):
        yield from (a for a in get_args(annotation) if a is not Ellipsis)
    elif isinstance(get_origin(annotation), type) and issubclass(get_origin(annotation), Mapping):
        yield get_args(annotation)[1]


def _members(annotation: Any) -> Iterable[Any]:
    if get_origin(annotation) is typing.Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (typing.Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _field_names(model: type[BaseModel]) -> dict[str, Any]:
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _own_words(detail: ErrorDetails) -> str:
    """Return the message of the model's own validator, or pydantic's with a small first letter."""
    if (error := detail.get("ctx", {}).get("error")) is not None:
        return str(error)
    message = detail["msg"]
    return message if detail["type"] == "value_error" else message[:1].lower() + message[1:]


def _found(value: object) -> str:
    if isinstance(value, str):
        return f"the text {show(value)}" if value else "an empty text"
    if isinstance(value, list) and value:
        return f"a list of {len(value)}"
    return f"the number {value}" if isinstance(value, int | float) and not isinstance(value, bool) else show(value)


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _hint(value: object, expected: Sequence[str]) -> str:
    """Explain the usual reasons for a value of the wrong type."""
    if isinstance(value, str) and "true or false" in expected and value.lower() in ("on", "off", "yes", "no"):
        return f"; YAML 1.2 reads {value} as a text"
    if isinstance(value, str) and ({"a whole number", "a number"} & set(expected) or value in expected):
        plain = value.replace("_", "")
        return f"; write {plain}" if re.fullmatch(r"-?[1-9][0-9]*", plain) else ""
    if not isinstance(value, str | dict | list | None) and "a text" in expected:
        return f"; put it in quotes: '{show(value)}'"
    return ""


def _without_ignored(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_ignored(value) for key, value in data.items() if not key.startswith(IGNORED)}
    return [_without_ignored(item) for item in data] if isinstance(data, list) else data


def _value_at(data: Any, path: DataPath) -> Any:
    for part in path:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and _is_index(part, data)
        if not inside:
            return None
        data = data[part]
    return data


def _is_index(part: object, items: Sequence[object]) -> bool:
    return isinstance(part, int) and 0 <= part < len(items)
