"""The model of a family descriptor: what a YAML file says about where one model type keeps its experts.

A descriptor is data. Its name patterns are texts of dotted segments, in which `{layer}` and `{expert}` each stand for
one whole segment; they are compared segment by segment and never become regular expressions.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from moeplug.moe.layout import ACTIVATIONS

LAYER, EXPERT = "{layer}", "{expert}"


def expand(pattern: str, layer: int, expert: int | None = None) -> str:
    """Return the tensor name that a pattern gives for a layer and an expert."""
    values = {LAYER: str(layer), EXPERT: str(expert)}
    return ".".join(values.get(segment, segment) for segment in pattern.split("."))


def folder_of(pattern: str) -> tuple[str, ...]:
    """Return the segments of the place where a layer's experts lie: all before `{expert}`, else before the last."""
    segments = tuple(pattern.split("."))
    return segments[: segments.index(EXPERT)] if EXPERT in segments else segments[:-1]


def lies_in(name: str, folder: tuple[str, ...]) -> bool:
    """Return whether a tensor name lies in a folder of segments, in any layer."""
    segments = name.split(".")
    if len(segments) <= len(folder):
        return False
    return all(wanted in (LAYER, found) for wanted, found in zip(folder, segments, strict=False))


def _check_pattern(pattern: str) -> str:
    segments = pattern.split(".")
    if not all(segments) or not pattern.isprintable():
        raise ValueError("a tensor name has dotted, printable, non-empty segments")
    for segment in segments:
        if ("{" in segment or "}" in segment) and segment not in (LAYER, EXPERT):
            raise ValueError(f"{segment!r}: only {LAYER} and {EXPERT} are filled in, each as a whole segment")
    if segments.count(LAYER) > 1 or segments.count(EXPERT) > 1:
        raise ValueError(f"{LAYER} and {EXPERT} may be there once")
    return pattern


def _check_layer_pattern(pattern: str) -> str:
    if LAYER not in pattern:
        raise ValueError(f"{LAYER} is missing")
    return pattern


def _check_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return name


Name = Annotated[StrictStr, Field(min_length=1)]
Segments = Annotated[StrictStr, AfterValidator(_check_pattern)]
LayerPattern = Annotated[Segments, AfterValidator(_check_layer_pattern)]
Keys = Name | Annotated[list[Name], Field(min_length=1)]


class Strict(BaseModel):
    """Unknown keys are errors, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConfigInteger(Strict):
    """An integer of config.json. Of several keys (old and new names) the one that is there counts."""

    key: Keys
    default: StrictInt | None = None


class ConfigIntegers(Strict):
    """A list of integers of config.json."""

    key: Keys
    default: list[StrictInt] | None = None


class ConfigFlag(Strict):
    """A true or false of config.json."""

    key: Keys
    default: StrictBool | None = None


class ConfigText(Strict):
    """A text of config.json."""

    key: Keys
    default: StrictStr | None = None


Integer = StrictInt | ConfigInteger


class Sizes(Strict):
    """Where config.json says how large a model is."""

    layers: Integer
    experts: Integer
    experts_per_token: Integer
    hidden: Integer
    intermediate: Integer


class MoeLayers(Strict):
    """Layer i is an MoE block if i >= first, (i - offset) % period == 0, and it is not listed in `except`."""

    period: Integer = 1
    offset: Integer = 0
    first: Integer = 0
    excepted: list[StrictInt] | ConfigIntegers = Field(default_factory=list, alias="except")


class DiskForm(Strict):
    """One way in which files of this family hold the experts: a tensor per expert weight, or fused ones per layer.

    Fused, per layer: gate_up (E, 2I, H) and down (E, H, I); transposed: (E, H, 2I) and (E, I, H). interleaved: gate and
    up alternate along 2I instead of standing one after the other. first: which of them begins.
    """

    gate: LayerPattern | None = None
    up: LayerPattern | None = None
    gate_up: LayerPattern | None = None
    down: LayerPattern
    transposed: StrictBool = False
    interleaved: StrictBool = False
    first: Literal["gate", "up"] = "gate"

    @property
    def patterns(self) -> tuple[str, ...]:
        """The name patterns of this form."""
        return tuple(pattern for pattern in (self.gate, self.up, self.gate_up, self.down) if pattern)

    @model_validator(mode="after")
    def _check(self) -> DiskForm:
        if len(set(self.patterns)) != len(self.patterns):
            raise ValueError("two projections have the same name")
        if self.gate_up is None:
            if self.gate is None or self.up is None:
                raise ValueError("give gate, up and down (a tensor per expert), or gate_up and down (fused)")
            if self.model_fields_set & {"transposed", "interleaved", "first"}:
                raise ValueError("transposed, interleaved and first are for fused tensors (gate_up and down)")
        elif self.gate is not None or self.up is not None:
            raise ValueError("gate_up already holds gate and up; remove gate and up")
        if any((EXPERT in pattern) != (self.gate_up is None) for pattern in self.patterns):
            raise ValueError(f"{EXPERT} is in every name of a tensor per expert, and in none of a fused tensor")
        return self


class RoutingRule(Strict):
    """How tokens choose experts: top-k of `score`, and whether the k weights are scaled to sum to one."""

    score: Literal["softmax"]
    renormalize: StrictBool | ConfigFlag


class Rename(Strict):
    """Segments of a name on disk, and what they are called in memory."""

    source: Segments = Field(alias="from")
    to: Segments


class TransformersNames(Strict):
    """Where transformers keeps a layer's experts module, and names that differ between disk and memory."""

    experts: LayerPattern
    rename: list[Rename] = Field(default_factory=list)


class Descriptor(Strict):
    """A whole descriptor file; see families/*.yaml."""

    api: Literal[1]
    model_types: Annotated[list[Name], Field(min_length=1)]
    sizes: Sizes
    activation: Annotated[StrictStr, AfterValidator(_check_activation)] | ConfigText
    moe_layers: MoeLayers = Field(default_factory=MoeLayers)
    disk: Annotated[list[DiskForm], Field(min_length=1)]
    routing: RoutingRule
    keep: list[Segments] = Field(default_factory=list)
    transformers: TransformersNames

    @model_validator(mode="after")
    def _check(self) -> Descriptor:
        patterns = [pattern for form in self.disk for pattern in form.patterns]
        twice = sorted({pattern for pattern in patterns if patterns.count(pattern) > 1})
        if twice:
            raise ValueError(f"disk: {twice[0]} is in two forms, so which one a file has could not be told")
        return self
