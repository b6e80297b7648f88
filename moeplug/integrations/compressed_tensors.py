"""Bring stored values and scales into the tensors, and a scheme into the words, of compressed-tensors.

    form = compression(spec, fmt, activations)      # "pack-quantized", or SchemeError where it has no words for it
    tensors = pack(stored, scales, fmt, form)       # {"weight_packed": (N, K / 8) int32, "weight_scale": (N, K / 128)}
    weight = unpack(tensors, spec, fmt, form, K)    # (N, K) float32

This module needs torch alone: the library compressed-tensors only checks it, in tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from moeplug.errors import SchemeError
from moeplug.formats import NumberFormat
from moeplug.hookspecs import StageContext
from moeplug.moe.layout import Projection
from moeplug.quantization import E4M3, E8M0, Scales, decode, groups, row_chunks, scale_values
from moeplug.scratch import scratch
from moeplug.spec import ActivationSpec, WeightSpec

FP4: Final = ("mxfp4-pack-quantized", "nvfp4-pack-quantized")
E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; the fourth bit is the sign


def compression(spec: WeightSpec, fmt: NumberFormat, activations: ActivationSpec | None) -> str:
    """Return compressed-tensors' name of how such weights are stored; SchemeError where it has none."""
    called = (fmt.compressed_tensors or {}).get("type"), (fmt.compressed_tensors or {}).get("num_bits")
    scaled = (spec.strategy, spec.group_size, spec.scale_dtype)
    if called == ("int", 8) and activations is not None and not spec.scale_dtype.startswith("float8"):
        return "int-quantized"
    if called in (("int", 4), ("int", 8)) and activations is None and not spec.scale_dtype.startswith("float8"):
        return "pack-quantized"
    if called == ("float", 8) and not spec.scale_dtype.startswith("float8"):
        return "float-quantized"
    if called == ("float", 8) and scaled == ("group", 32, E8M0):
        return "mxfp8-quantized"
    if called == ("float", 4) and scaled == ("group", 32, E8M0):
        return "mxfp4-pack-quantized"
    if called == ("float", 4) and scaled == ("group", 16, E4M3):
        return "nvfp4-pack-quantized"
    with_activations = "" if activations is None else f" with {activations.describe()} activations"
    raise SchemeError(
        f"compressed-tensors has no words for {spec.describe()}, scale_dtype: {spec.scale_dtype}{with_activations}; "
        "use --format moeplug"
    )


def weight_arguments(spec: WeightSpec, fmt: NumberFormat, form: str) -> dict[str, Any]:
    """Return the `weights` of a config group."""
    arguments: dict[str, Any] = {
        **(fmt.compressed_tensors or {}),
        "strategy": "tensor_group" if form.startswith("nvfp4") else spec.strategy,
        "symmetric": spec.symmetric,
        "dynamic": False,
    }
    if spec.group_size is not None:
        arguments["group_size"] = spec.group_size
    if spec.block_structure is not None:
        arguments["block_structure"] = list(spec.block_structure)
    if spec.scale_dtype.startswith("float8"):
        arguments["scale_dtype"] = "torch.uint8" if spec.scale_dtype == E8M0 else "torch.float8_e4m3fn"
    return arguments


def activation_arguments(spec: ActivationSpec, fmt: NumberFormat) -> dict[str, Any]:
    """Return the `input_activations` of a config group; SchemeError where compressed-tensors has no words for it."""
    if fmt.compressed_tensors is None:
        raise SchemeError(f"compressed-tensors has no words for {spec.describe()} activations; use --format moeplug")
    size = {} if spec.group_size is None else {"group_size": spec.group_size}
    return {**fmt.compressed_tensors, "strategy": spec.strategy, "symmetric": True, "dynamic": True, **size}


class CompressedTensors:
    """See `moeplug.exporting.PerExpertForm`."""

    def __init__(self, contexts: Iterable[StageContext]) -> None:
        self._groups: dict[str, dict[str, Any]] = {}
        self._members: dict[str, dict[Projection, list[int]]] = {}
        self._forms: dict[tuple[WeightSpec, ActivationSpec | None], str] = {}
        for ctx in contexts:
            for projection in ctx.layer.projections:
                self._add(ctx, projection)
        if not self._groups:
            raise SchemeError("the scheme quantizes nothing; there is nothing to export")

    def _add(self, ctx: StageContext, projection: Projection) -> None:
        spec, fmt, activations = ctx.spec(projection), ctx.format(projection), _activations(ctx, projection)
        if spec is None:
            return
        form = compression(spec, fmt, activations)
        K = ctx.layer.weight_shape(projection)[1]
        if spec.group_size and K % spec.group_size:
            raise SchemeError(
                f"layer {ctx.layer.index}, {projection}: K={K} is not a multiple of group_size={spec.group_size}, and "
                "compressed-tensors has no shorter last group; use --format moeplug"
            )
        self._forms[spec, activations] = form
        group: dict[str, Any] = {"weights": weight_arguments(spec, fmt, form), "input_activations": None}
        if activations is not None:
            request = ctx.request
            activation_format = request.intermediate_format if projection == "down" else request.activation_format
            assert activation_format is not None
            group["input_activations"] = activation_arguments(activations, activation_format)
        group |= {"output_activations": None, "format": form}
        key = json.dumps(group, sort_keys=True)
        self._groups[key] = group
        self._members.setdefault(key, {}).setdefault(projection, []).append(ctx.layer.index)

    def pack(self, ctx: StageContext, projection: Projection, stored: Tensor, scales: Scales) -> dict[str, Tensor]:
        """Return the tensors of one expert weight."""
        spec = ctx.spec(projection)
        assert spec is not None
        return pack(stored, scales, ctx.format(projection), self._forms[spec, _activations(ctx, projection)])

    def unpack(self, ctx: StageContext, projection: Projection, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight (N, K) float32 that such tensors stand for."""
        spec, (_, K) = ctx.spec(projection), ctx.layer.weight_shape(projection)
        assert spec is not None
        form = self._forms[spec, _activations(ctx, projection)]
        return unpack(tensors, spec, ctx.format(projection), form, K)

    def quantization_config(
        self, module: Callable[[Projection, Sequence[int]], str], ignore: list[str]
    ) -> dict[str, Any]:
        """Return `quantization_config`. One group takes every Linear that is not ignored; several name theirs."""
        groups = {}
        for number, (key, group) in enumerate(self._groups.items()):
            named = [module(projection, layers) for projection, layers in self._members[key].items()]
            groups[f"group_{number}"] = {"targets": ["Linear"] if len(self._groups) == 1 else named, **group}
        forms = sorted({group["format"] for group in self._groups.values()})
        return {
            "quant_method": "compressed-tensors",
            "format": forms[0] if len(forms) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def readers(self) -> tuple[str, ...]:
        """Return who reads it: transformers as tried, the others by their source."""
        kinds = {_kind(spec, activations, form) for (spec, activations), form in self._forms.items()}
        if len(kinds) > 1 or len(self._groups) > 1:
            return ("compressed-tensors: yes", "vLLM, SGLang, transformers: weights of several kinds were not tried")
        return ("compressed-tensors: yes", *READERS.get(kinds.pop(), ("vLLM, SGLang, transformers: not tried",)))


def _activations(ctx: StageContext, projection: Projection) -> ActivationSpec | None:
    return ctx.request.intermediate if projection == "down" else ctx.request.input_activations


def _kind(spec: WeightSpec, activations: ActivationSpec | None, form: str) -> tuple[str, str, bool, str]:
    return form, spec.strategy, spec.symmetric, "" if activations is None else activations.strategy


SERVERS: Final = "vLLM 0.33, SGLang 0.5.23: yes, by their source"
FAILS: Final = "transformers 5.17: no, a RuntimeError"
READERS: Final[dict[tuple[str, str, bool, str], tuple[str, ...]]] = {
    ("float-quantized", "channel", True, "token"): (SERVERS, "transformers 5.17: yes, decompressed to bfloat16"),
    ("float-quantized", "block", True, "group"): (SERVERS, FAILS),
    ("int-quantized", "channel", True, "token"): (
        "vLLM 0.33: yes, by its source",
        "SGLang 0.5.23: only with --quantization w8a8_int8, by its source",
        FAILS,
    ),
    ("pack-quantized", "group", True, ""): (
        SERVERS,
        "transformers 5.17: yes, decompressed to the scales' type",
    ),
    ("pack-quantized", "group", False, ""): (FAILS, "vLLM, SGLang: not tried"),
    ("mxfp4-pack-quantized", "group", True, ""): (
        "transformers 5.17: yes, decompressed to bfloat16",
        "vLLM, SGLang: not tried",
    ),
    ("mxfp8-quantized", "group", True, ""): (FAILS, "vLLM, SGLang: not tried"),
    ("nvfp4-pack-quantized", "group", True, ""): (
        SERVERS,
        "transformers 5.17: LOADS IT SILENTLY WRONG: it drops weight_global_scale",
    ),
}


def pack(stored: Tensor, scales: Scales, fmt: NumberFormat, form: str) -> dict[str, Tensor]:
    """Return the tensors of one expert weight, by the last part of their names.

    stored: (N, K / values_per_element), layout undone. scales: of this weight alone, (1, R, C).
    """
    assert scales.scale is not None
    tensors: dict[str, Tensor] = {}
    if form == "pack-quantized":
        tensors["weight_packed"] = _in_int32(_values(stored, fmt, torch.int8), int(fmt.bits))
        tensors["weight_shape"] = torch.tensor([stored.shape[0], stored.shape[1] * fmt.values_per_element])
    elif form in FP4:
        tensors["weight_packed"] = _in_nibbles(_values(stored, fmt, torch.uint8))
    else:
        tensors["weight"] = _values(stored, fmt, torch.int8 if form == "int-quantized" else torch.float8_e4m3fn)
    tensors["weight_scale"] = scales.scale[0] if scales.scale.numel() > 1 else scales.scale.view(1)
    if scales.global_scale is not None:
        tensors["weight_global_scale"] = 1 / scales.global_scale.view(1)  # readers divide by it
    if scales.zero_point is not None:
        zero_point = scales.zero_point[0].to(torch.int8)
        packed = form == "pack-quantized"
        tensors["weight_zero_point"] = _in_int32(zero_point.T, int(fmt.bits)).T if packed else zero_point
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unpack(tensors: Mapping[str, Tensor], spec: WeightSpec, fmt: NumberFormat, form: str, K: int) -> Tensor:
    """Return (N, K) float32: what the tensors of one expert weight stand for."""
    bits, zero_point = int(fmt.bits), tensors.get("weight_zero_point")
    if form == "pack-quantized":
        values = _from_int32(tensors["weight_packed"], bits)[:, :K].float()
        if zero_point is not None:
            zero_point = _from_int32(zero_point.T, bits)[:, : values.shape[0]].T
    elif form in FP4:
        codes = _from_nibbles(tensors["weight_packed"])
        values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)[codes.int()]
    else:
        values = tensors["weight"].float()
    scale = scale_values(tensors["weight_scale"])
    scale = scale.view(1, 1) if scale.dim() == 1 else scale
    if "weight_global_scale" in tensors:
        scale = scale / tensors["weight_global_scale"]
    scale = scale.repeat_interleave(spec.scale_rows, 0)[: values.shape[0]]
    for part, columns in groups(values, spec.columns(K)):
        if zero_point is not None:
            part -= zero_point[:, columns, None].float()
        part *= scale[:, columns, None]
    return values


def _values(stored: Tensor, fmt: NumberFormat, dtype: torch.dtype) -> Tensor:
    """Return (N, K): the stored values in a dtype that holds them exactly; torch.uint8 takes codes of e2m1."""
    out = torch.empty(stored.shape[0], stored.shape[1] * fmt.values_per_element, dtype=dtype, device=stored.device)
    magnitudes = torch.tensor(E2M1, device=stored.device)
    for _, rows in row_chunks(out[None]):
        values = scratch("values", out[rows].shape, out.device)
        decode(stored[rows][None], fmt, values[None])
        is_e2m1 = dtype == torch.uint8
        out[rows] = torch.searchsorted(magnitudes, values.abs()) + 8 * torch.signbit(values) if is_e2m1 else values
    return out


def _in_int32(values: Tensor, bits: int) -> Tensor:
    """Return (rows, ceil(columns * bits / 32)) int32 of signed values of 4 or 8 bits, offset, the lowest bits first."""
    codes = (values.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    packed = codes if bits == 8 else _in_nibbles(codes)
    return packed.flatten().view(torch.int32).view(packed.shape[0], -1)


def _from_int32(packed: Tensor, bits: int) -> Tensor:
    """Return (rows, columns * 32 / bits) int16: the inverse of `_in_int32`, padding included."""
    stored = packed.flatten().view(torch.uint8).view(packed.shape[0], -1)
    return (stored if bits == 8 else _from_nibbles(stored)).to(torch.int16) - (1 << bits - 1)


def _in_nibbles(codes: Tensor) -> Tensor:
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _from_nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
