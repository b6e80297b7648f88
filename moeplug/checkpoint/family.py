"""Turn a family descriptor and a config.json into the layers of a model, and say where each expert weight lies.

    family = find_family(checkpoint.config)
    sources = [s for layer in family.layers(checkpoint.config) for s in family.locate(layer, checkpoint.tensors)]
    dense = family.unclaimed(checkpoint.tensors, {source.tensor.name for source in sources})

A family is a YAML file, families/*.yaml here or one that a plugin brings; this code names none.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moeplug.checkpoint.descriptor import (
    ConfigFlag,
    ConfigInteger,
    ConfigIntegers,
    ConfigText,
    Descriptor,
    expand,
    folder_of,
    lies_in,
)
from moeplug.checkpoint.files import counted, listed, shown
from moeplug.checkpoint.locate import WEIGHT_DTYPES, WeightSource, by_piece, expected_tensors, locate
from moeplug.checkpoint.safetensors_header import TensorInfo
from moeplug.errors import CheckpointError
from moeplug.moe.layout import LayerSpec
from moeplug.problems import did_you_mean
from moeplug.validation import require_api, validate
from moeplug.yaml_marks import load_yaml

__all__ = ["Family", "Routing", "WeightSource", "by_piece", "find_family", "known_families"]

FAMILIES: Final = Path(__file__).with_name("families")
MAX_SIZE: Final = 1_000_000  # no model has more layers, experts or columns

# config.json's names of activations → ours. gelu_new is the same formula as gelu_pytorch_tanh.
ACTIVATION_NAMES: Final[Mapping[str, str]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Routing:
    """How tokens choose experts: top-k of the score, and whether the k weights are scaled to sum to one."""

    score: str
    renormalize: bool


@dataclass(frozen=True)
class Family:
    """One kind of model: how its files name and lay out experts. name: of the descriptor; source: its file."""

    name: str
    source: Path
    descriptor: Descriptor

    @classmethod
    def load(cls, path: Path) -> Family:
        """Read a descriptor; CheckpointError lists every problem in it with file, line and column."""
        document = load_yaml(path, error=CheckpointError)
        require_api(document, 1, CheckpointError, "a family descriptor")
        return cls(path.stem, path, validate(document, Descriptor, error=CheckpointError))

    @property
    def model_types(self) -> tuple[str, ...]:
        """The `model_type` values of config.json that this family serves."""
        return tuple(self.descriptor.model_types)

    def layers(self, config: Mapping[str, Any]) -> list[LayerSpec]:
        """Return the MoE blocks that config.json describes, in order.

        dtype is what config.json claims (bfloat16 where it names none); the tensors themselves decide.
        Raises CheckpointError for a missing or wrong value, an already quantized checkpoint, or no MoE block at all.
        """
        _require_unquantized(config)
        sizes = self.descriptor.sizes
        count = _integer(config, sizes.layers, "layers", 1)
        experts = _integer(config, sizes.experts, "experts", 1)
        per_token = _integer(config, sizes.experts_per_token, "experts per token", 1)
        hidden = _integer(config, sizes.hidden, "hidden size", 1)
        intermediate = _integer(config, sizes.intermediate, "intermediate size", 1)
        activation = _activation(config, self.descriptor.activation)
        if per_token > experts:
            raise CheckpointError(f"config.json: {per_token} experts per token, but only {experts} experts")
        blocks = [
            LayerSpec(
                index=index,
                name=self.experts_path(index),
                num_experts=experts,
                experts_per_token=per_token,
                hidden_size=hidden,
                intermediate_size=intermediate,
                activation=activation,
                dtype=_dtype(config),
            )
            for index in self._moe_indices(config, count)
        ]
        if not blocks:
            raise CheckpointError(f"config.json: none of the {count} layers has experts; there is nothing to quantize")
        return blocks

    def _moe_indices(self, config: Mapping[str, Any], count: int) -> list[int]:
        rule = self.descriptor.moe_layers
        period = _integer(config, rule.period, "period of MoE layers", 1)
        offset = _integer(config, rule.offset, "offset of MoE layers", -MAX_SIZE)
        first = _integer(config, rule.first, "first MoE layer", 0)
        excepted = set(_integers(config, rule.excepted))
        return [i for i in range(first, count) if (i - offset) % period == 0 and i not in excepted]

    def locate(self, layer: LayerSpec, tensors: Mapping[str, TensorInfo]) -> tuple[WeightSource, ...]:
        """Return where each (expert, projection) of a layer lies, each exactly once.

        Raises CheckpointError where one is missing, has the wrong shape or dtype, or is there in two forms.
        """
        return locate(self.descriptor.disk, layer, tensors)

    def unclaimed(self, tensors: Mapping[str, TensorInfo], claimed: Container[str]) -> tuple[TensorInfo, ...]:
        """Return the tensors outside the experts: they stay as they are. claimed: the names that `locate` found.

        Raises CheckpointError where a tensor lies among the experts and none of them claimed it: an expert too many, a
        bias, the scale of a quantized weight, or experts of a layer that config.json calls dense.
        """
        folders = {folder_of(pattern) for form in self.descriptor.disk for pattern in form.patterns}
        kept = [name for name in tensors if name not in claimed]
        stray = [name for name in kept if any(lies_in(name, folder) for folder in folders)]
        if stray:
            names = listed([shown(name) for name in stray])
            raise CheckpointError(
                f"{counted(len(stray), 'tensor')} among the experts that config.json and the family {self.name!r} "
                f"do not describe: {names}; config.json and the weights do not belong together, or the family "
                "needs a descriptor that knows them"
            )
        return tuple(tensors[name] for name in kept)

    def dummy_tensors(self, layer: LayerSpec) -> list[tuple[str, tuple[int, ...]]]:
        """Return (name, shape) of the tensors that hold a layer's experts, in the family's first form."""
        return [(tensor.name, tensor.shape) for tensor in expected_tensors(self.descriptor.disk[0], layer)]

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """Return how tokens choose experts in this model."""
        rule = self.descriptor.routing
        renormalize = rule.renormalize
        if isinstance(renormalize, ConfigFlag):
            value = _lookup(config, renormalize, "true or false")
            renormalize = _expect(isinstance(value, bool), value, renormalize, "true or false")
        return Routing(rule.score, bool(renormalize))

    def experts_path(self, layer: int) -> str:
        """Return the path of a layer's experts module in a transformers model."""
        return expand(self.descriptor.transformers.experts, layer)

    def memory_name(self, name: str) -> str:
        """Return what transformers calls a tensor in memory that has this name on disk."""
        segments = name.split(".")
        for rule in self.descriptor.transformers.rename:
            segments = _replaced(segments, rule.source.split("."), rule.to.split("."))
        return ".".join(segments)


def find_family(config: Mapping[str, Any], extra: Iterable[Family] = ()) -> Family:
    """Return the family of a config.json, by its model_type. extra: families that plugins brought.

    Raises CheckpointError where the type is missing or unknown, or two families claim it.
    """
    families = [*known_families(), *extra]
    types = sorted({model_type for family in families for model_type in family.model_types})
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        found = "has no model_type" if model_type is None else f"model_type is {shown(model_type)}, which is no text"
        raise CheckpointError(f"config.json: {found}; expected one of {', '.join(types)}")
    matching = [family for family in families if model_type in family.model_types]
    if len(matching) > 1:
        sources = " and ".join(str(family.source) for family in matching)
        raise CheckpointError(
            f"config.json: model_type {shown(model_type)} is claimed by {sources}; remove one of them"
        )
    if not matching:
        known = f"known: {', '.join(types)}{did_you_mean(model_type, types)}"
        raise CheckpointError(f"config.json: model_type {shown(model_type)} is not known; {known}")
    return matching[0]


@functools.cache
def known_families() -> tuple[Family, ...]:
    """Return the families that moeplug itself knows, by name."""
    return tuple(Family.load(path) for path in sorted(FAMILIES.glob("*.yaml")))


def _require_unquantized(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    raise CheckpointError(
        f"config.json: the checkpoint is already quantized (quantization_config, quant_method {shown(method)}); "
        "quantizing again would add one error to another: give the unquantized checkpoint"
    )


def _dtype(config: Mapping[str, Any]) -> str:
    claimed = str(config.get("dtype") or config.get("torch_dtype"))
    return claimed if claimed in WEIGHT_DTYPES.values() else "bfloat16"


Lookup = ConfigInteger | ConfigIntegers | ConfigFlag | ConfigText


def _keys(source: Lookup) -> list[str]:
    return [source.key] if isinstance(source.key, str) else source.key


def _lookup(config: Mapping[str, Any], source: Lookup, expected: str) -> Any:
    """Return the value of the key that is there; null counts as absent, as it does for transformers."""
    found = {key: config[key] for key in _keys(source) if config.get(key) is not None}
    if len({repr(value) for value in found.values()}) > 1:
        raise CheckpointError(f"config.json: {shown(found)}: these are names of one thing and contradict each other")
    if found:
        return next(iter(found.values()))
    if source.default is None:
        raise CheckpointError(f"config.json: has no {' or '.join(_keys(source))}, expected {expected}")
    return source.default


def _expect(right: bool, value: Any, source: Lookup, expected: str) -> Any:
    if not right:
        raise CheckpointError(f"config.json: {' or '.join(_keys(source))} is {shown(value)}, expected {expected}")
    return value


def _integer(config: Mapping[str, Any], source: int | ConfigInteger, what: str, least: int) -> int:
    if isinstance(source, int):
        return source
    expected = f"the {what}, a whole number from {least:,} to {MAX_SIZE:,}"
    value = _lookup(config, source, expected)
    right = type(value) is int and least <= value <= MAX_SIZE  # type(): true is an int to Python
    return int(_expect(right, value, source, expected))


def _integers(config: Mapping[str, Any], source: list[int] | ConfigIntegers) -> list[int]:
    if isinstance(source, list):
        return source
    expected = "a list of layer indices"
    value = _lookup(config, source, expected)
    right = isinstance(value, list) and all(type(item) is int for item in value)
    return list(_expect(right, value, source, expected))


def _activation(config: Mapping[str, Any], source: str | ConfigText) -> str:
    if isinstance(source, str):
        return source
    expected = f"one of {', '.join(ACTIVATION_NAMES)}"
    value = _lookup(config, source, expected)
    return ACTIVATION_NAMES[_expect(isinstance(value, str) and value in ACTIVATION_NAMES, value, source, expected)]


def _replaced(segments: list[str], old: list[str], new: list[str]) -> list[str]:
    """Return segments with every run that equals `old` replaced by `new`."""
    result: list[str] = []
    position = 0
    while position < len(segments):
        if segments[position : position + len(old)] == old:
            result, position = result + new, position + len(old)
        else:
            result, position = [*result, segments[position]], position + 1
    return result
