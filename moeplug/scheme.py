"""Turn a scheme YAML into a Scheme, or say which line is wrong.

    scheme = Scheme.from_file("schemes/int8.yaml")
    scheme = find_scheme("int8", registry.scheme_files())
    plugin, spec = scheme.weights_for(layer=3, expert=0, projection="down")

A scheme is data: no key holds a path, an import or a regular expression.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from moeplug.errors import SchemeError
from moeplug.spec import ActivationSpec, WeightSpec
from moeplug.validation import NAME_PATTERN, field_error
from moeplug.yaml_marks import (
    DataPath,
    Document,
    Position,
    Problem,
    check,
    did_you_mean,
    document_of,
    fail,
    listing,
    load_yaml,
    parse_yaml,
    require_api,
    show,
    validate,
)

API: Final = 1
MAX_EXTENDS: Final = 8
NOT_INHERITED: Final = ("api", "name", "description", "extends")

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
WeightGroup = Literal["gate_up", "down"]
Span = tuple[int, int]


@functools.lru_cache(maxsize=256)
def parse_ranges(text: str) -> tuple[Span, ...]:
    """Return the inclusive (first, last) pairs of a text such as "0-3,9"; raise ValueError with what is expected."""
    spans = []
    for part in text.split(","):
        if not (match := re.fullmatch(r" *([0-9]{1,6})(?:-([0-9]{1,6}))? *", part)):
            raise ValueError(f'found {show(text)}, expected numbers and inclusive ranges such as "0-3,9"')
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ValueError(f"the range {first}-{last} is empty; write {last}-{first}")
        spans.append((first, last))
    return tuple(spans)


def _ranges_text(value: Any) -> Any:
    """Take one number for a range, and check a text."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f'found {show(value)}, expected numbers and inclusive ranges in one text such as "0-3,9"')
    parse_ranges(value)
    return value


Ranges = Annotated[str, BeforeValidator(_ranges_text, json_schema_input_type=str | int)]


class Override(BaseModel):
    """Some experts, and what is different for them. What it leaves out stays as the scheme says."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layers: Ranges | None = Field(
        default=None, description='decoder layer indices, inclusive ranges such as "0-1" or "0,3-5"; left out: all'
    )
    projections: tuple[WeightGroup, ...] | None = Field(
        default=None, min_length=1, description="gate_up, down or both; left out: both"
    )
    experts: Ranges | None = Field(
        default=None, description='expert ids within a layer, inclusive ranges such as "0-3,9"; left out: all'
    )
    weights: WeightSpec | None = Field(
        default=None, description="how these weights are stored; null: unquantized, as the checkpoint has them"
    )
    plugin: Name | None = Field(default=None, description="the plugin that does it; left out: the scheme's own")

    @model_validator(mode="after")
    def _selects_and_changes_something(self) -> Override:
        if self.layers is None and self.projections is None and self.experts is None:
            raise ValueError("selects nothing: give layers, projections or experts")
        if "weights" not in self.model_fields_set and self.plugin is None:
            raise ValueError("changes nothing: give weights or plugin")
        return self

    def selects(self, layer: int, expert: int, projection: str | None = None) -> bool:
        """Return whether it is about this expert weight; projection None: about any of the expert's."""
        return (
            _within(layer, self.layers)
            and _within(expert, self.experts)
            and (projection is None or self.projections is None or projection in self.projections)
        )


class Accept(BaseModel):
    """What the user accepts; a load that comes out worse is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    relative_rms: float = Field(
        gt=0, description="largest rms(decoded - weight) / rms(weight) of an expert; a load with a worse one is refused"
    )


class Scheme(BaseModel):
    """How the experts of a model are quantized: a user's YAML file, read and checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    api: Literal[1] = Field(description="version of the scheme language: 1")
    name: Name = Field(description="the scheme's name: a-z, 0-9, '.', '_' and '-'")
    description: str | None = Field(default=None, max_length=1000, description="one line for `moeplug schemes`")
    extends: Name | None = Field(
        default=None,
        description="a scheme in the same folder, or an installed one; keys given here replace its keys, "
        "overrides are appended to its overrides",
    )
    plugin: Name | None = Field(
        default=None, description="the installed plugin that brings the format; needed where anything is quantized"
    )
    weights: WeightSpec | None = Field(description="how expert weights are stored; null: as the checkpoint has them")
    input_activations: ActivationSpec | None = Field(
        default=None, description="how a layer's input is quantized before gate and up; null: not"
    )
    intermediate: ActivationSpec | None = Field(
        default=None,
        description="how the value between gate_up and down is quantized; left out: as input_activations; null: not",
    )
    overrides: tuple[Override, ...] = Field(
        default=(), description="exceptions; for each expert weight the last one that matches wins"
    )
    accept: Accept | None = Field(default=None, description="limits; left out: errors are reported, never refused")
    requantize: bool = Field(
        default=False, description="true: dequantize a checkpoint that is quantized already, and quantize it anew"
    )
    options: dict[str, Any] = Field(default={}, description="the plugin's own options, as its plugin.yaml declares")

    _document: Document = PrivateAttr(default_factory=lambda: Document("<scheme>", None))
    _source: Path | None = PrivateAttr(default=None)

    @classmethod
    def from_file(cls, path: str | Path, installed: Mapping[str, Path] | None = None) -> Scheme:
        """Return the scheme in a file.

        installed: scheme name → file, where `extends:` looks after the file's own folder.
        Raises SchemeError with every problem, InputOutputError if the file cannot be read.
        """
        return cls._make(load_yaml(Path(path)), Path(path), installed or {})

    @classmethod
    def from_text(cls, text: str, name: str = "<string>", installed: Mapping[str, Path] | None = None) -> Scheme:
        """Return the scheme in a YAML text; `name` stands for the file in messages."""
        return cls._make(parse_yaml(text, name), None, installed or {})

    @classmethod
    def from_data(
        cls, data: Mapping[str, Any], name: str = "<data>", installed: Mapping[str, Path] | None = None
    ) -> Scheme:
        """Return the scheme in plain Python data, with the same checks."""
        return cls._make(document_of(data, name), None, installed or {})

    @classmethod
    def _make(cls, document: Document, source: Path | None, installed: Mapping[str, Path]) -> Scheme:
        require_api(document, API, SchemeError, "the scheme")
        resolved = _with_parents(document, source, installed)
        scheme = validate(resolved, cls, SchemeError)
        scheme._document, scheme._source = resolved, source
        return scheme

    @model_validator(mode="after")
    def _is_complete(self) -> Scheme:
        if self.weights is not None and self.plugin is None:
            raise field_error("plugin", f"missing: name the plugin that brings the format {self.weights.format!r}")
        for index, override in enumerate(self.overrides):
            if override.weights is not None and override.plugin is None and self.plugin is None:
                missing = f"missing: name the plugin that brings the format {override.weights.format!r}"
                raise field_error(("overrides", index, "plugin"), missing)
        if "intermediate" not in self.model_fields_set:
            vars(self)["intermediate"] = self.input_activations  # the model is frozen, and still being made
        return self

    @property
    def source(self) -> Path | None:
        """The file that the scheme came from; None if it came from a text or from data."""
        return self._source

    @property
    def sha256(self) -> str:
        """The hash of what the scheme does: of all fields but name, description and extends, as canonical JSON.

        Parents are merged in and defaults written out, so comments, key order and `x-` keys do not count.
        """
        data = self.model_dump(mode="json", exclude={"name", "description", "extends", "overrides"})
        if not self.requantize:  # schemes from before this field keep their hash
            del data["requantize"]
        data["overrides"] = [o.model_dump(mode="json", include=o.model_fields_set) for o in self.overrides]
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def weights_for(self, layer: int, expert: int, projection: str) -> tuple[str | None, WeightSpec | None]:
        """Return (plugin, spec) of one expert weight, (None, None) where it stays unquantized.

        The last override that selects it wins, alone: what it leaves out is the scheme's own, not another
        override's. projection: gate_up or down; gate and up mean gate_up.
        """
        group = "gate_up" if projection in ("gate", "up") else projection
        winner = next((o for o in reversed(self.overrides) if o.selects(layer, expert, group)), None)
        spec, plugin = self.weights, self.plugin
        if winner is not None:
            spec = winner.weights if "weights" in winner.model_fields_set else spec
            plugin = winner.plugin or plugin
        return (None, None) if spec is None else (plugin, spec)

    def plugins(self) -> set[str]:
        """Return the names of all plugins that the scheme names."""
        return {name for name in (self.plugin, *(o.plugin for o in self.overrides)) if name is not None}

    def where(self, path: DataPath) -> str:
        """Return `file:line:col` of ("weights", "group_size"), or of the nearest key above it in the file."""
        return str(self._document.mark(path))

    def problem(self, path: DataPath, message: str, *, key: bool = False) -> Problem:
        """Return a Problem at a value of the scheme, for checks that need more than the scheme."""
        return self._document.problem(path, message, key=key)

    def check_options(self, model: type[BaseModel]) -> list[Problem]:
        """Return what is wrong with `options:` by the model that a plugin's manifest makes of its declaration."""
        document = dataclasses.replace(self._document, data={"options": self.options})
        return check(document, model, ("options",))[1]

    def to_yaml(self) -> str:
        """Return the scheme as YAML with its parents merged in: what was given, without defaults and comments."""
        data = self.model_dump(mode="json", exclude_unset=True, exclude={"extends"})
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def yaml_line(value: Any) -> str:
    """Return plain data as YAML on one line, as schemes have it: {format: int8, strategy: channel}."""
    # In a list: a plain scalar alone would be followed by a line of dots.
    return yaml.dump([value], Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=math.inf).strip()[1:-1]


def find_scheme(name_or_path: str, installed: Mapping[str, Path]) -> Scheme:
    """Return the scheme of a path (with a separator, or ending in .yaml or .yml), else of an installed name.

    installed: scheme name → file, as `Registry.scheme_files()` gives it.
    """
    seems_path = any(sep in name_or_path for sep in {"/", os.sep})
    if seems_path or name_or_path.endswith((".yaml", ".yml")):
        return Scheme.from_file(name_or_path, installed)
    if name_or_path in installed:
        scheme = Scheme.from_file(installed[name_or_path], installed)
        if scheme.name != name_or_path:
            fail(
                [scheme.problem(("name",), f"the scheme is installed as {name_or_path!r}; name has to agree")],
                SchemeError,
            )
        return scheme
    raise SchemeError(f"{_no_such_scheme(name_or_path, installed)}{_file_hint(name_or_path)}")


def _no_such_scheme(name: str, known: Mapping[str, Path]) -> str:
    return f"no scheme is called {show(name)}{did_you_mean(name, known) or '.'} Known: {listing(sorted(known))}"


def _file_hint(name: str) -> str:
    for path in (Path(f"{name[:64]}.yaml"), Path("schemes", f"{name[:64]}.yaml")):
        if re.fullmatch(NAME_PATTERN, name) and path.is_file():
            return f". There is a file; to use it, write {os.path.join('.', path)}"  # noqa: PTH118 (Path drops the ./)
    return ""


def _within(number: int, ranges: str | None) -> bool:
    if ranges is None:
        return True
    firsts, lasts = _sorted_spans(ranges)
    at = bisect.bisect_right(firsts, number)
    return at > 0 and number <= lasts[at - 1]


@functools.lru_cache(maxsize=256)
def _sorted_spans(text: str) -> tuple[list[int], list[int]]:
    """Return where ranges begin, sorted, and the last number of all ranges up to each: a file may hold 500,000."""
    spans = sorted(parse_ranges(text))
    return [first for first, _ in spans], list(itertools.accumulate((last for _, last in spans), max))


def _with_parents(document: Document, source: Path | None, installed: Mapping[str, Path]) -> Document:
    """Return the document with the schemes that it extends merged in, every value still knowing its own file."""
    chain, file = [document], source
    seen = {source.resolve()} if source is not None else set()
    while (parent := _parent_file(chain[-1], file, installed)) is not None:
        extended = load_yaml(parent)
        message = ""
        if parent.resolve() in seen:
            message = "extends itself, directly or through others; break the cycle"
        elif len(chain) > MAX_EXTENDS:
            message = f"more than {MAX_EXTENDS} schemes extend one another"
        if message:
            fail([chain[-1].problem(("extends",), message)], SchemeError)
        require_api(extended, API, SchemeError, "the scheme")
        seen.add(parent.resolve())
        chain.append(extended)
        file = parent
    return functools.reduce(lambda parent, child: _merged(parent, child), reversed(chain))


def _parent_file(document: Document, source: Path | None, installed: Mapping[str, Path]) -> Path | None:
    """Return the file of the scheme that a document extends: in its folder, or installed; None if it extends none."""
    name = document.data.get("extends") if isinstance(document.data, dict) else None
    if name is None:
        return None
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        message = f"found {show(name)}, expected the name of a scheme (a-z, 0-9, '.', '_', '-'), not a path"
        fail([document.problem(("extends",), message)], SchemeError)
    known = {**installed, **_beside(source)}
    if name not in known:
        fail([document.problem(("extends",), _no_such_scheme(name, known))], SchemeError)
    return known[name]


def _beside(source: Path | None) -> dict[str, Path]:
    """Return the schemes in a file's folder and, if the file is a symlink, in the folder of what it points to."""
    if source is None:
        return {}
    folders = [source.resolve().parent, source.parent]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def _merged(parent: Document, child: Document) -> Document:
    """Return child's top-level keys over parent's, child's overrides after parent's."""
    if not isinstance(parent.data, dict) or not isinstance(child.data, dict):
        return child if isinstance(parent.data, dict) else parent
    inherited = {k: v for k, v in parent.data.items() if k not in NOT_INHERITED and k not in child.data}
    data = {**inherited, **child.data}
    before, after = parent.data.get("overrides"), child.data.get("overrides")
    shift = 0
    if isinstance(before, list) and isinstance(after, list):
        data["overrides"] = before + after
        shift = len(before)

    def positions(old: Mapping[DataPath, Position], new: Mapping[DataPath, Position]) -> dict[DataPath, Position]:
        kept = {p: at for p, at in old.items() if p[:1] and (p[0] in inherited or (shift and p[0] == "overrides"))}
        return kept | {_shifted(path, shift): at for path, at in new.items()}

    keys, values = positions(parent.keys, child.keys), positions(parent.values, child.values)
    return Document(child.name, data, keys, values, {**parent.lines, **child.lines})


def _shifted(path: DataPath, shift: int) -> DataPath:
    """Return where a path of the child's overrides lies behind those of the parent."""
    if shift and len(path) > 1 and path[0] == "overrides" and isinstance(path[1], int):
        return ("overrides", path[1] + shift, *path[2:])
    return path


class _Dumper(yaml.SafeDumper):
    """Writes what `parse_yaml` reads back: no aliases, and quotes around all that some reader takes for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[a-z][a-z0-9_.-]*", text) and text not in (
        "true",
        "false",
        "null",
        "on",
        "off",
        "yes",
        "no",
        "y",
        "n",
    )
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)
