"""Draft a family descriptor for a model type that nobody described, from tensor names, shapes and config.json.

What a draft says of names and sizes was seen; which of two matrices is the gate, and how tokens choose experts, is a
guess that only numbers prove. So a draft says `unproven: true`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import yaml

from moeplug.checkpoint.config_values import value_at
from moeplug.checkpoint.descriptor import EXPERT, LAYER, MAX_LAYERS, index_of
from moeplug.checkpoint.safetensors_header import TensorInfo

# What published checkpoints call the parts of an expert.
PARTS: Final[Mapping[str, str]] = {
    "gate_proj": "gate", "w1": "gate", "gate": "gate", "linear": "gate",
    "up_proj": "up", "w3": "up", "v1": "up", "up": "up", "linear_v": "up",
    "down_proj": "down", "w2": "down", "down": "down", "linear_1": "down", "output_linear": "down",
    "gate_up_proj": "gate_up", "w13": "gate_up", "input_linear": "gate_up",
}  # fmt: skip
SIZES: Final[Mapping[str, Sequence[str]]] = {
    "layers": ("num_hidden_layers", "n_layers", "num_layers"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": (
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"
    ),
    "hidden": ("hidden_size", "d_model"),
    "intermediate": ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size"),
}  # fmt: skip
ACTIVATION_KEYS: Final = ("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function")


def draft(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return a descriptor as YAML text; None where no tensor looks like an expert's."""
    patterns = _patterns(tensors)
    weights = {part: found for part, found in patterns.items() if not part.startswith("bias ")}
    if "down" not in weights or not ("up" in weights or "gate_up" in weights):
        return None
    layers = sorted({layer for _, found in weights.values() for layer in found})
    section = next((key for key in ("text_config", "language_config") if isinstance(config.get(key), dict)), None)
    values = {**config, **config[section]} if section else dict(config)
    block = weights["down"][0].split(".experts")[0]
    data: dict[str, Any] = {"api": 1, "unproven": True, "model_types": [str(config.get("model_type"))]}
    if section:
        data["section"] = section
    data["sizes"] = {name: {"key": _key(values, keys)} for name, keys in SIZES.items()}
    data["activation"] = {"key": _key(values, ACTIVATION_KEYS)} if _has(values, ACTIVATION_KEYS) else "silu"
    if "gate" not in weights and "gate_up" not in weights:
        data["gated"] = False
    if rule := _layer_rule(layers, values):
        data["moe_layers"] = rule
    form = {part: pattern for part, (pattern, _) in weights.items()}
    biases = {part.removeprefix("bias "): name for part, (name, _) in patterns.items() if part.startswith("bias ")}
    data["disk"] = [form | ({"bias": biases} if biases else {}) | _orientation(weights, values, tensors)]
    data["routing"] = _routing(block, values, tensors)
    if shared := _shared(block, tensors):
        data["shared"] = shared
    data["transformers"] = {"experts": _folder(weights["down"][0])}
    return HEADER + yaml.safe_dump(data, sort_keys=False, width=120)


HEADER: Final = """\
# A draft, made from tensor names and config.json. Unproven: gate and up, interleaving, transposition, the activation
# and the routing rule are guesses. Prove it: moeplug family-check MODEL_TYPE --family FILE; then delete `unproven`.
"""


def _patterns(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, set[int]]]:
    """Return part → (the name pattern that most tensors of this part have, its layers); "bias gate" for a bias."""
    counted: dict[str, Counter[str]] = {}
    layers: dict[str, set[int]] = {}
    for name in tensors:
        for part, pattern, layer in _readings(name):
            counted.setdefault(part, Counter())[pattern] += 1
            layers.setdefault(pattern, set()).add(layer)
    common = {part: patterns.most_common(1)[0][0] for part, patterns in counted.items()}
    return {part: (pattern, layers[pattern]) for part, pattern in common.items()}


def _readings(name: str) -> Iterator[tuple[str, str, int]]:
    """Yield (part, pattern, layer) where a tensor's name looks like an expert's."""
    segments = name.split(".")
    numbers = [i for i, segment in enumerate(segments) if index_of(segment) is not None]
    is_expert = any(re.fullmatch(r"(local_|routed_)?experts?", segment) for segment in segments)
    words = [segment for segment in segments if segment not in ("weight", "bias")]
    last, is_bias = words[-1], segments[-1] == "bias" or words[-1].endswith("_bias")
    part = PARTS.get(last.removesuffix("_bias"))
    stacked = last in ("input_linear", "output_linear") or (is_expert and len(numbers) == 1)
    if part is None or not numbers or not (stacked or (is_expert and len(numbers) == 2)):
        return
    pattern = list(segments)
    pattern[numbers[0]] = LAYER
    if not stacked:
        pattern[numbers[1]] = EXPERT
    yield ("bias " if is_bias else "") + part, ".".join(pattern), int(segments[numbers[0]])


def _key(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((key for key in keys if value_at(values, key) is not None), keys[0])


def _has(values: Mapping[str, Any], keys: Sequence[str]) -> bool:
    return any(value_at(values, key) is not None for key in keys)


def _layer_rule(layers: Sequence[int], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the simplest rule that gives these layers of those that config.json counts."""
    count = value_at(values, _key(values, SIZES["layers"]))
    known = isinstance(count, int) and max(layers) < count <= MAX_LAYERS
    every = list(range(count if known else max(layers) + 1))
    if list(layers) == every:
        return {}
    if list(layers) == every[layers[0] :]:
        return {"first": layers[0]}
    step = layers[1] - layers[0] if len(layers) > 1 else len(every)
    if list(layers) == every[layers[0] :: step]:
        return {"period": step, "offset": layers[0]}
    return {"except": [layer for layer in every if layer not in layers]}


def _orientation(
    weights: Mapping[str, tuple[str, set[int]]], values: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """Return `transposed` where a stacked tensor's shape shows it: hidden size where rows of gate and up should be."""
    part = "gate_up" if "gate_up" in weights else "up"
    pattern, layers = weights[part]
    found = tensors.get(pattern.replace(LAYER, str(min(layers))).replace(EXPERT, "0"))
    shape = () if found is None else found.shape
    hidden = value_at(values, _key(values, SIZES["hidden"]))
    return {"transposed": True} if len(shape) == 3 and shape[1] == hidden != shape[2] else {}


def _routing(block: str, values: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return the router's tensors, found by their shapes in the block, and the usual rule for what is there."""
    experts = value_at(values, _key(values, SIZES["experts"]))
    folder = block.split(".")
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        segments = name.split(".")
        inside = len(segments) > len(folder) and all(w in (LAYER, s) for w, s in zip(folder, segments, strict=False))
        if not inside or "expert" in segments[len(folder) : -1] or "experts" in segments[len(folder) : -1]:
            continue
        pattern = ".".join([*folder, *segments[len(folder) :]])
        if len(tensor.shape) == 2 and tensor.shape[0] == experts and {"gate", "router"} & set(segments):
            found.setdefault("weight", pattern)
        elif tensor.shape in ((experts,), (1, experts)):
            own = segments[-1] == "bias"
            found.setdefault("bias" if own else "correction", pattern)
    rule: dict[str, Any] = {"weight": f"{block}.gate.weight"} | found
    rule["score"] = "sigmoid" if "correction" in found else "softmax"
    if value_at(values, "n_group") is not None:
        rule["groups"] = {"count": {"key": "n_group"}, "kept": {"key": "topk_group"}, "score": "top2_sum"}
    rule["renormalize"] = {"key": "norm_topk_prob", "default": True}
    if value_at(values, "routed_scaling_factor") is not None:
        rule["scale"] = {"key": "routed_scaling_factor"}
    return rule


def _shared(block: str, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return where a shared expert of the block lies, and its gate."""
    folder, shared = block.split("."), {}
    for name in tensors:
        segments = name.split(".")
        inside = all(w in (LAYER, s) for w, s in zip(folder, segments, strict=False))
        own = segments[len(folder)] if inside and len(segments) > len(folder) + 1 else ""
        if own.startswith("shared"):
            key = "gate" if own.endswith("_gate") else "path"
            shared[key] = ".".join([*folder, own, "weight"] if key == "gate" else [*folder, own])
    return shared if "path" in shared else {}


def _folder(pattern: str) -> str:
    segments = pattern.split(".")
    if EXPERT in segments:
        return ".".join(segments[: segments.index(EXPERT)])
    return ".".join(segments[:-2] if segments[-1] == "weight" else segments[:-1])
