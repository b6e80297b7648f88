"""The model of a family descriptor: what a YAML file says about where one model type keeps its experts.

A descriptor is data. Its name patterns are texts of dotted segments, in which `{layer}` and `{expert}` each stand for
one whole segment; they are compared segment by segment and never become regular expressions.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from moeplug.moe.layout import ACTIVATIONS

LAYER, EXPERT, EXTRA = "{layer}", "{expert}", "{extra}"

MAX_SIZE: Final = 1_000_000  # no model has more columns
# Far above any model, and soon looked through: a file may claim a million, and refusing that took over 10 s.
MAX_LAYERS: Final = 1_000
MAX_EXPERTS: Final = 16_384


def expand(pattern: str, layer: int, expert: int | None = None) -> str:
    """Return the tensor name that a pattern gives for a layer and an expert."""
    values = {LAYER: str(layer), EXPERT: str(expert)}
    return ".".join(values.get(segment, segment) for segment in pattern.split("."))


def index_of(segment: str) -> int | None:
    """Return the layer or expert that a segment of a tensor name is; None where it is no number, or has 5 digits."""
    # Names are a file's text: Python makes no number of 5,000 digits, and lists are as long as a layer's number.
    return int(segment) if len(segment) <= 4 and segment.isascii() and segment.isdecimal() else None


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


def _check_ignored(pattern: str) -> str:
    _check_pattern(".".join("0" if segment == EXTRA else segment for segment in pattern.split(".")))
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
    """An integer of config.json, or a list with one for each layer.

    Of several keys (old and new names) the one that is there counts; a dotted key leads into an inner object.
    instead: a key that counts in their place where it is there and not null. length_of: keys of lists or texts whose
    length counts where no other key is there.
    """

    key: Keys
    default: StrictInt | None = None
    instead: Name | None = None
    length_of: list[Name] = Field(default_factory=list)


class ConfigIntegers(Strict):
    """A list of integers of config.json."""

    key: Keys
    default: list[StrictInt] | None = None


class ConfigNumber(Strict):
    """A number of config.json."""

    key: Keys
    default: StrictFloat | None = None


class ConfigFlag(Strict):
    """A true or false of config.json."""

    key: Keys
    default: StrictBool | None = None


class ConfigText(Strict):
    """A text of config.json. values: what its texts mean here; without, they are taken as they are."""

    key: Keys
    default: StrictStr | None = None
    values: dict[StrictStr, StrictStr] | None = None


Integer = Annotated[StrictInt, Field(ge=-MAX_SIZE, le=MAX_SIZE)] | ConfigInteger
Index = Annotated[StrictInt, Field(ge=0, le=MAX_SIZE)] | ConfigInteger
Count = Annotated[StrictInt, Field(ge=1, le=MAX_SIZE)] | ConfigInteger
Layers = Annotated[StrictInt, Field(ge=1, le=MAX_LAYERS)] | ConfigInteger
Experts = Annotated[StrictInt, Field(ge=1, le=MAX_EXPERTS)] | ConfigInteger
Number = StrictInt | StrictFloat | ConfigNumber
Flag = StrictBool | ConfigFlag


class Sizes(Strict):
    """Where config.json says how large a model is."""

    layers: Layers
    experts: Experts
    experts_per_token: Count
    hidden: Count
    intermediate: Count


class Activation(Strict):
    """An activation of gate and up together, with its numbers; see `moeplug.moe.layout.LayerSpec`."""

    name: Annotated[StrictStr, AfterValidator(_check_activation)]
    alpha: Number = 1.702
    limit: Number | None = None
    offset: Number = 1.0


class Condition(Strict):
    """config.json has this text under this key."""

    key: Name
    text: Name = Field(alias="is")


class MoeLayers(Strict):
    """Which layers are MoE blocks: the first of these that config.json has.

    listed: a key with a list of the MoE layers. kinds: keys with the kind of every layer, a list of texts or a text of
    one letter a layer, and the kind that is MoE. Otherwise layer i is one if first <= i <= last (below
    0: counted from the end), (i - offset) % period == 0, and it is not listed in `except`.
    """

    listed: Name | None = None
    kinds: list[Condition] = Field(default_factory=list)
    period: Count = 1
    offset: Integer = 0
    first: Index = 0
    last: Integer = -1
    excepted: list[StrictInt] | ConfigIntegers = Field(default_factory=list, alias="except")


class Biases(Strict):
    """The names of the experts' biases, in the form of the weights that they belong to: (E, N), or (N,) per expert."""

    gate: LayerPattern | None = None
    up: LayerPattern | None = None
    gate_up: LayerPattern | None = None
    down: LayerPattern


class DiskForm(Strict):
    """One way in which files of this family hold the experts: a tensor per expert weight, or stacked ones per layer.

    Per expert: `{expert}` is in every name. Stacked, per layer: gate (E, I, H), up (E, I, H) and down (E, H, I), or
    gate_up (E, 2I, H) and down. Experts without a gate have up and down.
    transposed: rows and columns of a stacked expert weight are exchanged, (E, H, 2I) and (E, I, H); a list names the
    projections that are; by_shape: some files are and some are not, and shapes tell. flat: a stacked tensor has two
    dimensions, (E * rows, columns). interleaved: gate and up alternate along 2I instead of standing one after the
    other. first: which of them begins.
    """

    gate: LayerPattern | None = None
    up: LayerPattern | None = None
    gate_up: LayerPattern | None = None
    down: LayerPattern
    bias: Biases | None = None
    transposed: StrictBool | Literal["by_shape"] | list[Literal["gate", "up", "gate_up", "down"]] = False
    flat: StrictBool = False
    interleaved: StrictBool = False
    first: Literal["gate", "up"] = "gate"

    @property
    def weights(self) -> dict[str, str]:
        """The name patterns of the weights by what they hold: gate, up, gate_up, down."""
        return _given(self)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The name patterns of this form."""
        return (*self.weights.values(), *(_given(self.bias).values() if self.bias else ()))

    @property
    def stacked(self) -> bool:
        """Whether a tensor holds all experts of a layer."""
        return EXPERT not in self.down

    def is_transposed(self, part: str) -> bool:
        """Return whether a stacked tensor has rows and columns exchanged; not asked where shapes tell."""
        return part in self.transposed if isinstance(self.transposed, list) else self.transposed is True

    @model_validator(mode="after")
    def _check(self) -> DiskForm:
        if len(set(self.patterns)) != len(self.patterns):
            raise ValueError("two projections have the same name")
        if self.gate_up is not None and (self.gate is not None or self.up is not None):
            raise ValueError("gate_up already holds gate and up; remove gate and up")
        if self.gate_up is None and self.up is None:
            raise ValueError("give gate, up and down, or gate_up and down, or up and down (experts without a gate)")
        if self.bias is not None and set(_given(self.bias)) != set(self.weights):
            raise ValueError(f"bias: expected the keys of the weights, {', '.join(self.weights)}")
        if any((EXPERT in pattern) != (EXPERT in self.down) for pattern in self.patterns):
            raise ValueError(f"{EXPERT} is in every name of a tensor per expert, and in none of a stacked tensor")
        if not self.stacked and self.model_fields_set & {"transposed", "flat"}:
            raise ValueError("transposed and flat are for stacked tensors")
        if self.gate_up is None and self.model_fields_set & {"interleaved", "first"}:
            raise ValueError("interleaved and first are for gate_up, which holds both")
        return self


def _given(names: DiskForm | Biases) -> dict[str, str]:
    found = {part: getattr(names, part) for part in ("gate", "up", "gate_up", "down")}
    return {part: pattern for part, pattern in found.items() if pattern is not None}


class Groups(Strict):
    """Experts are chosen from the best groups alone. when: groups count only there."""

    count: Count
    kept: Count
    score: Literal["max", "top2_sum"]
    when: Condition | None = None


class RoutingRule(Strict):
    """How tokens choose experts; `moeplug.moe.router.RouterSpec` has the formulas.

    weight, bias: the router's tensors, logits = x @ weight.T + bias. correction: the tensor that is added to scores for
    the choice alone. expert_scale: a factor for each expert's weights. All names are those on disk.
    """

    weight: LayerPattern
    bias: LayerPattern | None = None
    correction: LayerPattern | None = None
    expert_scale: LayerPattern | None = None
    score: Literal["softmax", "sigmoid", "softmax_of_chosen", "sparsemixer"]
    groups: Groups | None = None
    renormalize: Flag = False
    epsilon: Number = 0.0
    least_sum: Number = 0.0
    norm: Number = 1
    scale: Number = 1.0
    jitter: Number = 0.0
    weight_on_input: StrictBool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The name patterns of the router's tensors: they stay in the checkpoint's precision."""
        return tuple(p for p in (self.weight, self.bias, self.correction, self.expert_scale) if p is not None)


class SharedExpert(Strict):
    """Experts that every token passes; they stay as they are. path: where, on disk. gate: its gate's tensor, if any."""

    path: LayerPattern
    gate: LayerPattern | None = None


class Rename(Strict):
    """Segments of a name on disk, and what they are called in memory."""

    source: Segments = Field(alias="from")
    to: Segments


class Join(Strict):
    """Tensors that are several on disk and one in memory, one after the other along their first dimension."""

    source: Annotated[list[LayerPattern], Field(min_length=2, alias="from")]
    to: LayerPattern


class ReplacedBlock(Strict):
    """An MoE block of transformers whose own forward cannot call experts as moeplug has them: it is replaced.

    path: the block. router: its linear router, shared: its shared expert, both as they are, named within the block.
    returns_logits: the block returns (output, router logits).
    """

    path: LayerPattern
    router: Name
    shared: Name | None = None
    returns_logits: StrictBool = False


class TransformersNames(Strict):
    """Where transformers keeps a layer's experts module, and names that differ between disk and memory.

    experts: of several paths the first that a model has.
    """

    experts: LayerPattern | Annotated[list[LayerPattern], Field(min_length=1)]
    rename: list[Rename] = Field(default_factory=list)
    join: list[Join] = Field(default_factory=list)
    block: ReplacedBlock | None = None


class Descriptor(Strict):
    """A whole descriptor file; see families/*.yaml and docs/families.md.

    section: an object of config.json that describes the language model, where there is one. gated: false: experts have
    no gate. ignore: what a published checkpoint holds and no model loads, by the first segments of its names; `{extra}`
    stands for a layer after the last. tiny: what config.json needs, beside small sizes, for the proof's tiny model.
    """

    api: Literal[1]
    model_types: Annotated[list[Name], Field(min_length=1)]
    section: Name | None = None
    sizes: Sizes
    activation: Annotated[StrictStr, AfterValidator(_check_activation)] | Activation | ConfigText
    gated: StrictBool = True
    moe_layers: MoeLayers = Field(default_factory=MoeLayers)
    disk: Annotated[list[DiskForm], Field(min_length=1)]
    routing: RoutingRule
    shared: SharedExpert | None = None
    keep: list[Segments] = Field(default_factory=list)
    ignore: list[Annotated[StrictStr, AfterValidator(_check_ignored)]] = Field(default_factory=list)
    transformers: TransformersNames
    tiny: dict[StrictStr, Any] = Field(default_factory=dict)
    unproven: StrictBool = False

    @property
    def kept(self) -> tuple[str, ...]:
        """The name patterns of a block's tensors that no scheme may quantize."""
        gate = self.shared.gate if self.shared else None
        return (*self.routing.tensors, *([gate] if gate else []), *self.keep)

    @model_validator(mode="after")
    def _check(self) -> Descriptor:
        patterns = [pattern for form in self.disk for pattern in form.patterns]
        twice = sorted({pattern for pattern in patterns if patterns.count(pattern) > 1})
        if twice:
            raise ValueError(f"disk: {twice[0]} is in two forms, so which one a file has could not be told")
        wrong = [form.down for form in self.disk if self.gated != ("gate" in form.weights or "gate_up" in form.weights)]
        if wrong:
            raise ValueError(f"disk: the form of {wrong[0]} {'lacks' if self.gated else 'has'} a gate; see gated")
        return self
