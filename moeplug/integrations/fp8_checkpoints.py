"""The form of DeepSeek's fp8 checkpoints, `quant_method: fp8`: e4m3 weights, a float32 scale for 128 x 128 of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from torch import Tensor

from moeplug.errors import SchemeError
from moeplug.hookspecs import StageContext
from moeplug.integrations.compressed_tensors import compression, pack, unpack
from moeplug.moe.layout import Projection
from moeplug.quantization import Scales

BLOCK: Final = (128, 128)


class Fp8Checkpoints:
    """See `moeplug.exporting.PerExpertForm`."""

    def __init__(self, contexts: Iterable[StageContext]) -> None:
        for ctx in contexts:
            for projection in ctx.layer.projections:
                _check(ctx, projection)

    def pack(self, ctx: StageContext, projection: Projection, stored: Tensor, scales: Scales) -> dict[str, Tensor]:
        """Return `weight` (N, K) e4m3 and `weight_scale_inv` (N / 128, K / 128), which multiplies."""
        assert scales.scale is not None
        tensors = pack(stored, scales, ctx.format(projection), "float-quantized")
        return {"weight": tensors["weight"], "weight_scale_inv": scales.scale[0].contiguous()}

    def unpack(self, ctx: StageContext, projection: Projection, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight (N, K) float32 that such tensors stand for."""
        spec, (_, K) = ctx.spec(projection), ctx.layer.weight_shape(projection)
        assert spec is not None
        named = {"weight": tensors["weight"], "weight_scale": tensors["weight_scale_inv"]}
        return unpack(named, spec, ctx.format(projection), "float-quantized", K)

    def quantization_config(self, module: Callable[..., str], ignore: list[str]) -> dict[str, Any]:
        """Return `quantization_config`."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
            "modules_to_not_convert": ignore,
        }

    def readers(self) -> tuple[str, ...]:
        """Return who reads it."""
        return ("vLLM 0.33, SGLang 0.5.23: yes, by their source", "transformers 5.17: yes, tried")


def _check(ctx: StageContext, projection: Projection) -> None:
    spec = ctx.spec(projection)
    activations = ctx.request.intermediate if projection == "down" else ctx.request.input_activations
    if spec is None:
        return
    fits = spec.block_structure == BLOCK and spec.scale_dtype == "float32"
    if activations is not None:
        fits = fits and activations.group_size == BLOCK[1] and activations.format == spec.format
    if not fits or compression(spec, ctx.format(projection), activations) != "float-quantized":
        given = spec.describe() + (f" with {activations.describe()} activations" if activations else "")
        raise SchemeError(
            f"--format fp8 has words for fp8 weights in blocks of 128 x 128 with float32 scales alone; found {given}; "
            "use --format compressed-tensors, or --format moeplug"
        )
