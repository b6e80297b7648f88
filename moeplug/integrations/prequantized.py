"""Recognise a checkpoint that is quantized already, and read its stored values and scales: four ways of others.

compressed-tensors, 8-bit integers and floats   weight (N, K), weight_scale (N, C), weight_zero_point
compressed-tensors, packed integers of 4 bits   weight_packed (N, K / 8) int32, and the same
fp8, in blocks (`weight_block_size`)            weight (N, K) e4m3, weight_scale_inv (N / 128, K / 128)
mxfp4, as gpt-oss is published                  NAME_blocks (E, N, K / 32, 16), NAME_scales (E, N, K / 32)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from moeplug.checkpoint.encoded import Encoding, Part
from moeplug.checkpoint.files import shown
from moeplug.errors import CheckpointError
from moeplug.quantization import E8M0, Scales
from moeplug.registry import Registry
from moeplug.spec import WeightSpec

FLOATS: Final = ("F32", "BF16", "F16")
# compressed-tensors' (type, num_bits) → the format that stores the same values.
FORMATS: Final[Mapping[tuple[str, int], str]] = {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "fp8"}
FORMS: Final = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
STRATEGIES: Final = ("tensor", "channel", "group", "block")


def encoding_of(config: Mapping[str, Any], registry: Registry) -> Encoding | None:
    """Return how a checkpoint's experts are quantized, None where they are not.

    Raises CheckpointError for a way that is not read, or a format that no installed plugin brings.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    try:
        made = _made(method, quantization)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("quantization_config", *first["loc"])))
        raise CheckpointError(
            f"config.json: {shown(where)}: {first['msg']}; found {shown(first['input'])}, which no quantized "
            "checkpoint that is read has: download config.json again, or give the unquantized checkpoint"
        ) from error
    if made is None:
        raise CheckpointError(
            f"config.json: the checkpoint is already quantized (quantization_config, quant_method {shown(method)}), in "
            "a way that is not read; read are compressed-tensors (int8, int4, fp8), fp8 in blocks, and mxfp4 as "
            "gpt-oss has it: give the unquantized checkpoint"
        )
    _activate(made, registry)
    return made


def _made(method: Any, quantization: Any) -> Encoding | None:
    """Return the encoding of a quantization_config, None where it is another; ValidationError where it is wrong."""
    if method == "compressed-tensors":
        return _compressed_tensors(_Config.model_validate(quantization))
    if method == "fp8" and quantization.get("weight_block_size"):
        return Fp8Blocks(quantization["weight_block_size"])
    return Mxfp4Blocks() if method == "mxfp4" else None


class _Arguments(BaseModel):
    """What compressed-tensors says of weights, as far as it is read; other keys are passed over."""

    model_config = ConfigDict(frozen=True, strict=True)

    type: str = ""
    num_bits: int = 0
    strategy: str | None = None
    group_size: int | None = None
    block_structure: list[int] | None = None
    symmetric: bool = True
    dynamic: bool | str = False
    actorder: bool | str | None = None


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    weights: _Arguments | None = None
    format: str | None = None


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    config_groups: dict[str, _Group] | None = None
    format: str | None = None


def _activate(encoding: Encoding, registry: Registry) -> None:
    """Activate the plugin that brings the format, and check that it does."""
    name, label = encoding.spec.format, f"a checkpoint in {encoding.label}"
    for plugin, manifest in registry.manifests().items():
        if name in manifest.formats:
            registry.activate(plugin, label)
            return
    raise CheckpointError(f"config.json: {label} needs number format {name!r}, which no installed plugin brings")


def _compressed_tensors(quantization: _Config) -> Encoding | None:
    """Return what compressed-tensors' config says, None where it says something else than one readable group."""
    groups = list((quantization.config_groups or {}).values())
    weights = [group.weights for group in groups]
    arguments = weights[0] if weights else None
    if arguments is None or any(other != arguments for other in weights) or arguments.dynamic:
        return None
    form = groups[0].format or quantization.format
    name = FORMATS.get((arguments.type, arguments.num_bits))
    if name is None or form not in FORMS or arguments.strategy not in STRATEGIES or arguments.actorder:
        return None
    spec = WeightSpec.model_validate(
        {
            "format": name,
            "strategy": arguments.strategy,
            "group_size": arguments.group_size if arguments.strategy == "group" else None,
            "block_structure": arguments.block_structure,
            "symmetric": arguments.symmetric,
        }
    )
    return Packed(spec) if form == "pack-quantized" else Plain(spec)


class Plain(Encoding):
    """compressed-tensors' unpacked forms."""

    ignored = (".weight_shape", ".weight_g_idx", ".input_scale")

    def __init__(self, spec: WeightSpec) -> None:
        self.spec, self.label = spec, f"compressed-tensors {spec.describe()}"

    def parts(self, N: int, K: int) -> dict[str, Part]:
        """Return weight, scale and zero point."""
        stored = ("F8_E4M3",) if self.spec.format == "fp8" else ("I8",)
        found = {"weight": Part("weight", stored, (N, K)), "scale": Part("weight_scale", FLOATS, self._scales(N, K))}
        if not self.spec.symmetric:
            found["zero_point"] = Part("weight_zero_point", ("I8",), self._scales(N, K))
        return found

    def values(self, parts: Mapping[str, Tensor], K: int) -> tuple[Tensor, Scales]:
        """Return the stored numbers as they are."""
        return parts["weight"].float().unsqueeze(0), self._made(parts, parts.get("zero_point"))

    def _made(self, parts: Mapping[str, Tensor], zero_point: Tensor | None) -> Scales:
        zero_point = None if zero_point is None else zero_point.unsqueeze(0)
        return Scales(parts["scale"].unsqueeze(0), zero_point, None, self.spec.block_structure)

    def _scales(self, N: int, K: int) -> tuple[int, int]:
        rows = 1 if self.spec.strategy == "tensor" else -(-N // self.spec.scale_rows)
        return rows, -(-K // self.spec.columns(K))


class Packed(Plain):
    """compressed-tensors' integers of 4 or 8 bits in int32, lowest bits first, stored plus half their range."""

    def parts(self, N: int, K: int) -> dict[str, Part]:
        """Return weight, scale and zero point; zero points are packed along N."""
        found = super().parts(N, K)
        found["weight"] = Part("weight_packed", ("I32",), (N, -(-K // self._per_word)))
        if "zero_point" in found:
            shape = found["zero_point"].shape
            found["zero_point"] = Part("weight_zero_point", ("I32",), (-(-shape[0] // self._per_word), shape[1]))
        return found

    def values(self, parts: Mapping[str, Tensor], K: int) -> tuple[Tensor, Scales]:
        """Unpack the integers."""
        zero_point = parts.get("zero_point")
        if zero_point is not None:
            zero_point = self._unpacked(zero_point.T)[:, : parts["scale"].shape[0]].T.to(torch.int8)
        values = self._unpacked(parts["weight"])[:, :K].float()
        return values.unsqueeze(0), self._made(parts, zero_point)

    @property
    def _per_word(self) -> int:
        return 4 if self.spec.format == "int8" else 8

    def _unpacked(self, words: Tensor) -> Tensor:
        """Return (rows, values) int32 of (rows, words) int32."""
        bits = 32 // self._per_word
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        codes = (words.contiguous().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return codes.flatten(1) - (1 << (bits - 1))


class Fp8Blocks(Encoding):
    """e4m3 weights with a float32 scale for a block, which multiplies although it is called weight_scale_inv."""

    ignored = (".input_scale", ".activation_scale")

    def __init__(self, block: Any) -> None:
        self.spec = WeightSpec.model_validate({"format": "fp8", "strategy": "block", "block_structure": block})
        self.label = "fp8 in blocks of {} x {}".format(*self.spec.block_structure or ())

    def parts(self, N: int, K: int) -> dict[str, Part]:
        """Return weight and scale."""
        assert self.spec.block_structure is not None
        rows, columns = self.spec.block_structure
        scale = Part("weight_scale_inv", FLOATS, (-(-N // rows), -(-K // columns)))
        return {"weight": Part("weight", ("F8_E4M3",), (N, K)), "scale": scale}

    def values(self, parts: Mapping[str, Tensor], K: int) -> tuple[Tensor, Scales]:
        """Return the stored numbers as they are."""
        scales = Scales(parts["scale"].unsqueeze(0), None, None, self.spec.block_structure)
        return parts["weight"].float().unsqueeze(0), scales


class Mxfp4Blocks(Encoding):
    """gpt-oss's own form: stacked, not transposed; 32 values of e2m1 in 16 bytes, an exponent byte for each 32."""

    label = "mxfp4 blocks"
    spec = WeightSpec(format="mxfp4", strategy="group", group_size=32, scale_dtype=E8M0)
    # What codes of four bits mean: sign, two bits of exponent, one of fraction.
    E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

    def parts(self, N: int, K: int) -> dict[str, Part]:
        """Return blocks and scales."""
        return {"weight": Part("_blocks", ("U8",), (N, K // 2)), "scale": Part("_scales", ("U8",), (N, K // 32))}

    def stacked_shape(self, part: Part, experts: int) -> tuple[int, ...]:
        """Return (E, N, K / 32, 16) for blocks."""
        rows, columns = part.shape
        return (experts, rows, columns // 16, 16) if part.suffix == "_blocks" else (experts, rows, columns)

    def values(self, parts: Mapping[str, Tensor], K: int) -> tuple[Tensor, Scales]:
        """Return the values of the codes; the first of two is in a byte's low half."""
        codes = torch.stack([parts["weight"] & 15, parts["weight"] >> 4], dim=-1).flatten(1)
        values = torch.tensor(self.E2M1, device=codes.device)[codes.int()]
        return values.unsqueeze(0), Scales(parts["scale"].unsqueeze(0))
