"""Look values up in a config.json as a descriptor says where they are; whatever is missing or wrong is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from moeplug.checkpoint.descriptor import (
    MAX_SIZE,
    Activation,
    Condition,
    ConfigFlag,
    ConfigInteger,
    ConfigIntegers,
    ConfigNumber,
    ConfigText,
)
from moeplug.checkpoint.files import shown
from moeplug.errors import CheckpointError
from moeplug.moe.layout import ACTIVATIONS

# config.json's names of activations → ours. gelu_new is the same formula as gelu_pytorch_tanh.
ACTIVATION_NAMES: Final[Mapping[str, str]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
Lookup = ConfigInteger | ConfigIntegers | ConfigFlag | ConfigText | ConfigNumber
ACTIVATION_NUMBERS: Final = ("alpha", "limit", "offset")


def section_of(config: Mapping[str, Any], section: str | None) -> dict[str, Any]:
    """Return config.json with an inner object's values in front of its own, if it has that object."""
    inner = config.get(section) if section else None
    return {**config, **inner} if isinstance(inner, dict) else dict(config)


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, None where it is not there; a dotted key leads into inner objects."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def integer(
    config: Mapping[str, Any],
    source: int | ConfigInteger,
    what: str,
    least: int,
    layer: int = 0,
    most: int = MAX_SIZE,
) -> int:
    """Return a whole number; layer: which one of a list with one for each layer."""
    if isinstance(source, int):
        return source
    if source.instead is not None and value_at(config, source.instead) is not None:
        source = ConfigInteger(key=source.instead)
    expected = f"the {what}, a whole number from {least:,} to {most:,}"
    lengths = [len(found) for key in source.length_of if isinstance(found := value_at(config, key), list | str)]
    if lengths:
        source = source.model_copy(update={"default": lengths[0]})
    value = _lookup(config, source, expected)
    if isinstance(value, list) and layer < len(value):
        value = value[layer]
    right = type(value) is int and least <= value <= most  # type(): true is an int to Python
    return int(_expect(right, value, source, expected))


def integers(config: Mapping[str, Any], source: list[int] | ConfigIntegers) -> list[int]:
    """Return a list of whole numbers."""
    if isinstance(source, list):
        return source
    expected = "a list of layer indices"
    value = _lookup(config, source, expected)
    right = isinstance(value, list) and all(type(item) is int for item in value)
    return list(_expect(right, value, source, expected))


def number(config: Mapping[str, Any], source: float | ConfigNumber, what: str) -> float:
    """Return a finite number."""
    if not isinstance(source, ConfigNumber):
        return float(source)
    expected = f"the {what}, a finite number"
    value = _lookup(config, source, expected)
    right = type(value) in (int, float) and math.isfinite(value)
    return float(_expect(right, value, source, expected))


def flag(config: Mapping[str, Any], source: bool | ConfigFlag) -> bool:
    """Return true or false."""
    if isinstance(source, bool):
        return source
    value = _lookup(config, source, "true or false")
    return bool(_expect(isinstance(value, bool), value, source, "true or false"))


def holds(config: Mapping[str, Any], condition: Condition | None) -> bool:
    """Return whether config.json has the text that a condition asks for; no condition holds."""
    return condition is None or value_at(config, condition.key) == condition.text


def activation(config: Mapping[str, Any], source: str | Activation | ConfigText) -> dict[str, Any]:
    """Return the fields of a LayerSpec that say what the activation is."""
    if isinstance(source, str):
        return {"activation": source}
    if isinstance(source, Activation):
        given = {name: getattr(source, name) for name in ACTIVATION_NUMBERS}
        numbers = {name: number(config, value, name) for name, value in given.items() if value is not None}
        return {"activation": source.name} | {f"activation_{name}": value for name, value in numbers.items()}
    meanings = source.values or ACTIVATION_NAMES
    expected = f"one of {', '.join(meanings)}"
    value = _lookup(config, source, expected)
    name = meanings[_expect(isinstance(value, str) and value in meanings, value, source, expected)]
    _expect(name in ACTIVATIONS, name, source, f"one of {', '.join(ACTIVATIONS)}")
    return {"activation": name}


def kinds_of_layers(config: Mapping[str, Any], kinds: list[Condition]) -> list[bool] | None:
    """Return whether each layer is of the MoE kind, by the first of these keys that is there; None: none is."""
    for kind in kinds:
        value = value_at(config, kind.key)
        if value is None:
            continue
        if not isinstance(value, str | list):
            raise CheckpointError(f"config.json: {kind.key} is {shown(value)}, expected the kind of every layer")
        return [item == kind.text for item in value]
    return None


def _keys(source: Lookup) -> list[str]:
    return [source.key] if isinstance(source.key, str) else source.key


def _lookup(config: Mapping[str, Any], source: Lookup, expected: str) -> Any:
    """Return the value of the key that is there; null counts as absent, as it does for transformers."""
    values = {key: value_at(config, key) for key in _keys(source)}
    found = {key: value for key, value in values.items() if value is not None}
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
