"""Read what a plugin declares in its plugin.yaml, without importing anything of it.

    manifest = Manifest.from_file(package / "plugin.yaml")
    problems = check_scheme(scheme, {manifest.name: manifest})

Capabilities, what a scheme may ask of a plugin's formats:
    per_tensor  per_channel  per_group  per_block                        strategy: of the weights
    zero_points                                                          symmetric: false
    activation_per_tensor  activation_per_token  activation_per_group    strategy: of quantized activations

`options:` is a JSON Schema of the scheme's own `options:`, in this subset: type, description, default, enum, minimum,
maximum, items, properties, required. Other keywords are errors, and an option that `properties` does not name is
refused, so `options: {}` means that there are none.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)

from moeplug.errors import PluginError
from moeplug.scheme import Scheme
from moeplug.spec import ActivationSpec, WeightSpec
from moeplug.validation import NAME_PATTERN, field_error
from moeplug.yaml_marks import (
    DataPath,
    Document,
    Problem,
    did_you_mean,
    listing,
    load_yaml,
    parse_yaml,
    require_api,
    show,
    validate,
)

API: Final = 1

Capability = Literal[
    "per_tensor",
    "per_channel",
    "per_group",
    "per_block",
    "zero_points",
    "activation_per_tensor",
    "activation_per_token",
    "activation_per_group",
]
CAPABILITIES: Final[tuple[str, ...]] = get_args(Capability)

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)
_TYPES_OF_KEYWORD: Final = {
    "minimum": ("integer", "number"),
    "maximum": ("integer", "number"),
    "items": ("array",),
    "properties": ("object",),
    "required": ("object",),
}
_MODULE = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
_FOLDER = r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}/?$"  # no dot, no inner slash: it cannot leave the package


class IncompatibleApi(PluginError):
    """A plugin.yaml that is written for another api than this moeplug reads."""


def _unique(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"named twice: {', '.join(twice)}")
    return names


Name = Annotated[str, Field(pattern=NAME_PATTERN)]
FolderName = Annotated[str, Field(pattern=_FOLDER), AfterValidator(lambda folder: folder.rstrip("/"))]
Names = Annotated[tuple[Name, ...], AfterValidator(_unique)]
Capabilities = Annotated[tuple[Capability, ...], AfterValidator(_unique)]


class OptionSchema(BaseModel):
    """One option of a plugin, or the object of all of them: a subset of JSON Schema."""

    model_config = _STRICT

    type: Literal["string", "integer", "number", "boolean", "array", "object"] | None = Field(
        default=None, description="the value's type; with enum it may be left out"
    )
    description: str | None = Field(default=None, description="what the option does, for people")
    default: Any = Field(default=None, description="what the plugin takes where a scheme does not say")
    enum: tuple[str | int | bool, ...] | None = Field(default=None, min_length=1, description="the allowed values")
    minimum: float | None = Field(default=None, description="smallest allowed number")
    maximum: float | None = Field(default=None, description="largest allowed number")
    items: OptionSchema | None = Field(default=None, description="type array: what each item is")
    properties: dict[str, OptionSchema] = Field(default={}, description="type object: the allowed keys")
    required: tuple[str, ...] = Field(default=(), description="type object: keys that have to be given")
    additionalProperties: Literal[False] = Field(default=False, description="keys without a property are refused")

    @model_validator(mode="after")
    def _keywords_fit_the_type(self) -> OptionSchema:
        for keyword, kinds in _TYPES_OF_KEYWORD.items():
            if keyword in self.model_fields_set and (self.type or "object") not in kinds:
                raise field_error(keyword, f"{keyword} has a meaning only with type: {' or '.join(kinds)}")
        python = {"string": str, "integer": int, "boolean": bool}.get(self.type or "")
        for value in self.enum or ():
            if self.type is not None and type(value) is not python:
                raise field_error("enum", f"{show(value)} is not of type: {self.type}")
        for name in self.required:
            if name not in self.properties:
                raise field_error("required", f"{name!r} is not among properties{did_you_mean(name, self.properties)}")
        for name, option in self.properties.items():
            if option.type is None and option.enum is None:
                raise field_error(("properties", name), "give type or enum")
        return self

    @model_validator(mode="after")
    def _default_fits(self) -> OptionSchema:
        if "default" in self.model_fields_set:
            try:
                TypeAdapter(_python_type(self)).validate_json(json.dumps(self.default), strict=True)
            except ValidationError as error:
                raise field_error("default", f"does not fit: {error.errors()[0]['msg']}") from None
        return self


def _python_type(option: OptionSchema) -> Any:
    """Return the type that pydantic checks a value of this option against."""
    if option.enum is not None:
        return Literal[option.enum]
    if option.type == "array":
        return list[Any] if option.items is None else types.GenericAlias(list, (_python_type(option.items),))
    limits = Field(ge=option.minimum, le=option.maximum)
    simple: dict[str | None, Any] = {"string": str, "boolean": bool}
    simple |= {"integer": Annotated[int, limits], "number": Annotated[float, limits]}
    return simple.get(option.type) or _object_model(option)


def _object_model(option: OptionSchema) -> type[BaseModel]:
    """Return a model of an object's properties; their names are aliases, so that none clashes with pydantic's own."""
    fields: dict[str, Any] = {}
    for index, (name, inner) in enumerate(option.properties.items()):
        default = ... if name in option.required else None
        fields[f"option_{index}"] = (_python_type(inner), Field(default, alias=name, description=inner.description))
    return create_model("Options", __config__=_STRICT, **fields)


class CudaNeeds(BaseModel):
    """What an NVIDIA GPU has to be."""

    model_config = _STRICT

    compute_capability: str | None = Field(
        default=None, pattern=r"^[0-9]{1,2}\.[0-9]$", description='the lowest compute capability, in quotes: "8.0"'
    )

    @property
    def minimum(self) -> tuple[int, int] | None:
        """Return (8, 0) for "8.0"; None: any."""
        if self.compute_capability is None:
            return None
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)


class CpuNeeds(BaseModel):
    """What a CPU has to be: nothing particular so far."""

    model_config = _STRICT


class Needs(BaseModel):
    """The devices that a plugin serves; it is judged when a load is planned, never when plugins are listed."""

    model_config = _STRICT

    cuda: CudaNeeds | None = Field(default=None, description="serves NVIDIA GPUs: {} for any of them")
    cpu: CpuNeeds | None = Field(default=None, description="serves CPUs: {}")


class Manifest(BaseModel):
    """What a plugin declares about itself: plugin.yaml, read before any import."""

    model_config = _STRICT

    api: Literal[1] = Field(description="version of the plugin contract: 1")
    name: Name = Field(description="the plugin's name, as schemes say it and as the entry point is called")
    kind: Literal["scheme", "observer"] = Field(
        default="scheme", description="scheme: brings formats, kernels or schemes; observer: watches stages"
    )
    hooks: str | None = Field(
        default=None,
        pattern=_MODULE,
        max_length=200,
        description="the module with the hooks, such as moeplug_int8.hooks; imported when a scheme names the plugin",
    )
    schemes: FolderName | None = Field(
        default=None, description="the folder of scheme files inside the package, a plain name such as schemes"
    )
    families: FolderName | None = Field(
        default=None, description="the folder of family descriptors inside the package, a plain name such as families"
    )
    formats: Names = Field(default=(), description="number formats that the hooks register")
    kernels: Names = Field(default=(), description="kernels that the hooks register; the core's need no mention")
    capabilities: Capabilities = Field(default=(), description="what a scheme may ask of the formats")
    options: OptionSchema = Field(default_factory=OptionSchema, description="JSON Schema of a scheme's `options:`")
    needs: Needs | None = Field(default=None, description="the devices that it serves; left out: any")

    _document: Document = PrivateAttr(default_factory=lambda: Document("plugin.yaml", None))

    @classmethod
    def from_file(cls, path: str | Path) -> Manifest:
        """Return the manifest in a file.

        Raises PluginError with every problem, IncompatibleApi (a PluginError) where it is for another api,
        InputOutputError if the file cannot be read.
        """
        return cls._make(load_yaml(Path(path), PluginError))

    @classmethod
    def from_text(cls, text: str, name: str = "plugin.yaml") -> Manifest:
        """Return the manifest in a YAML text; `name` stands for the file in messages."""
        return cls._make(parse_yaml(text, name, PluginError))

    @classmethod
    def _make(cls, document: Document) -> Manifest:
        require_api(document, API, IncompatibleApi, "plugin.yaml")
        manifest = validate(document, cls, PluginError)
        manifest._document = document
        return manifest

    @model_validator(mode="after")
    def _brings_something(self) -> Manifest:
        if self.kind == "observer":
            for field in ("schemes", "families", "formats", "kernels", "capabilities"):
                if getattr(self, field):
                    raise field_error(field, "an observer only watches; leave it out, or say kind: scheme")
        if self.hooks is None:
            for field in ("formats", "kernels"):
                if getattr(self, field):
                    raise field_error(field, "hooks is missing: the module whose moeplug_register adds these")
            if self.schemes is None and self.families is None:
                raise field_error("hooks", "the plugin brings nothing: give hooks, schemes or families")
        return self

    def options_model(self) -> type[BaseModel]:
        """Return the pydantic model of a scheme's `options:` for this plugin."""
        return _object_model(self.options)

    def with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return a scheme's options with the declared defaults of those that it does not give."""
        declared = self.options.properties.items()
        return {n: o.default for n, o in declared if "default" in o.model_fields_set} | dict(options)

    def where(self, path: DataPath) -> str:
        """Return `file:line:col` of ("formats", 0), or of the nearest key above it in the file."""
        return str(self._document.mark(path))


def check_scheme(scheme: Scheme, manifests: Mapping[str, Manifest]) -> list[Problem]:
    """Return what a scheme asks of its plugins that they do not declare, each at its position in the scheme.

    manifests: plugin name → manifest of the usable plugins. Nothing is imported.
    """
    problems = list(_plugin_problems(scheme, manifests))
    for path, name, spec in _weight_specs(scheme):
        if name in manifests and manifests[name].kind == "scheme":
            problems += _weight_problems(scheme, path, spec, manifests[name], manifests)
    quantizing = {name for _, name, _ in _weight_specs(scheme)} & manifests.keys()
    for field in ("input_activations", "intermediate"):
        activations = getattr(scheme, field)
        if activations is not None and field in scheme.model_fields_set:
            problems += _activation_problems(scheme, field, activations, sorted(quantizing), manifests)
    problems += _option_problems(scheme, manifests)
    unique = {(p.file, p.line, p.column, p.message): p for p in problems}
    return sorted(unique.values(), key=lambda p: (p.file, p.line, p.column))


def _weight_specs(scheme: Scheme) -> Iterator[tuple[DataPath, str, WeightSpec]]:
    """Yield (where it stands, plugin, spec) of every spec that some plugin has to serve."""
    if scheme.weights is not None and scheme.plugin is not None:
        yield ("weights",), scheme.plugin, scheme.weights
    for index, override in enumerate(scheme.overrides):
        own = "weights" in override.model_fields_set
        spec, plugin = (override.weights if own else scheme.weights), override.plugin or scheme.plugin
        if spec is not None and plugin is not None:
            yield ("overrides", index, "weights" if own else "plugin"), plugin, spec


def _plugin_problems(scheme: Scheme, manifests: Mapping[str, Manifest]) -> Iterator[Problem]:
    named: list[tuple[DataPath, str | None]] = [(("plugin",), scheme.plugin)]
    named += [(("overrides", i, "plugin"), override.plugin) for i, override in enumerate(scheme.overrides)]
    for path, name in named:
        if name is not None and name not in manifests:
            known = listing(sorted(manifests))
            meant = did_you_mean(name, manifests) or ";"
            yield scheme.problem(path, f"plugin {name!r} is not installed or not usable{meant} Installed: {known}")
        elif name is not None and manifests[name].kind == "observer":
            yield scheme.problem(path, f"plugin {name!r} is an observer and quantizes nothing; use --observe {name}")


def _weight_problems(
    scheme: Scheme, path: DataPath, spec: WeightSpec, manifest: Manifest, manifests: Mapping[str, Manifest]
) -> Iterator[Problem]:
    def problem(field: str, message: str) -> Problem:  # an override may name another plugin for the scheme's own spec
        return scheme.problem(path if path[-1] == "plugin" else (*path, field), f"plugin {manifest.name!r} {message}")

    if spec.format not in manifest.formats:
        owner = next((name for name, other in manifests.items() if spec.format in other.formats), None)
        hint = f"; plugin {owner!r} has it." if owner else did_you_mean(spec.format, manifest.formats) or ";"
        yield problem("format", f"has no format {spec.format!r}{hint} It has: {listing(manifest.formats)}")
        return
    if f"per_{spec.strategy}" not in manifest.capabilities:
        able = [word.removeprefix("per_") for word in manifest.capabilities if word.startswith("per_")]
        yield problem("strategy", f"does not do strategy: {spec.strategy}; it does: {listing(able)}")
    if not spec.symmetric and "zero_points" not in manifest.capabilities:
        yield problem("symmetric", "has no zero points; write symmetric: true")


def _activation_problems(
    scheme: Scheme, field: str, spec: ActivationSpec, plugins: Iterable[str], manifests: Mapping[str, Manifest]
) -> Iterator[Problem]:
    """Activations may use any installed format; how they are quantized is up to the plugins of the weights."""
    formats = [name for manifest in manifests.values() for name in manifest.formats]
    if spec.format not in formats:
        hint = did_you_mean(spec.format, formats) or ";"
        message = f"no installed plugin has a format {spec.format!r}{hint} Installed: {listing(formats)}"
        yield scheme.problem((field, "format"), message)
    prefix = "activation_per_"
    for name in plugins:
        capabilities = manifests[name].capabilities
        if prefix + spec.strategy not in capabilities:
            able = [word.removeprefix(prefix) for word in capabilities if word.startswith(prefix)]
            does = f"it does: {listing(able)}" if able else f"it quantizes no activations; write {field}: null"
            yield scheme.problem((field, "strategy"), f"plugin {name!r} does not do strategy: {spec.strategy}; {does}")


def _option_problems(scheme: Scheme, manifests: Mapping[str, Manifest]) -> list[Problem]:
    if scheme.plugin is None:
        message = "options are a plugin's, but the scheme names no plugin; add plugin, or remove them"
        return [scheme.problem(("options",), message, key=True)] if scheme.options else []
    if scheme.plugin not in manifests:
        return []
    return scheme.check_options(manifests[scheme.plugin].options_model())
