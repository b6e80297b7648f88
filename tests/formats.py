"""The number formats of all plugins, and specs that use them: what the core is held to.

from formats import FORMATS, SPECS, quantized
experts = quantized(w13, w2, "nvfp4", device="cuda")
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from torch import Tensor

import moeplug
from moeplug.formats import NumberFormat
from moeplug.moe.experts import QuantizedExperts
from moeplug.scheme import Scheme
from moeplug.spec import ActivationSpec, WeightSpec

sys.path += map(str, Path(__file__).parents[1].glob("plugins/*/src"))  # where they are not installed

from moeplug_fp8.hooks import Fp8
from moeplug_int4.hooks import Int4
from moeplug_int8.hooks import Int8
from moeplug_mx.hooks import Mxfp4, Mxfp8
from moeplug_nf4.hooks import Nf4
from moeplug_nvfp4.hooks import Nvfp4

FORMATS: Final[dict[str, NumberFormat]] = {
    fmt.name: fmt for fmt in (Int8(), Fp8(), Mxfp8(), Int4(), Mxfp4(), Nvfp4(), Nf4())
}
PLUGIN_OF: Final = {name: name for name in FORMATS} | {"mxfp8": "mx", "mxfp4": "mx"}


def grouped(fmt: str, group_size: int, symmetric: bool = True, scale_dtype: str = "float32") -> WeightSpec:
    """Return a spec with a scale for every group_size weights along K."""
    return WeightSpec(format=fmt, strategy="group", group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)


def blocks(fmt: str, rows: int, columns: int) -> WeightSpec:
    """Return a spec with a scale for every block of (rows, columns)."""
    return WeightSpec(format=fmt, strategy="block", block_structure=(rows, columns))


SPECS: Final[dict[str, WeightSpec]] = {
    "int8": WeightSpec(format="int8"),
    "fp8-tensor": WeightSpec(format="fp8", strategy="tensor"),
    "fp8-channel": WeightSpec(format="fp8"),
    "fp8-block": blocks("fp8", 128, 128),
    **{f"int4-g{g}": grouped("int4", g) for g in (32, 64, 128)},
    **{f"int4-g{g}-asym": grouped("int4", g, symmetric=False) for g in (32, 64, 128)},
    "mxfp4": grouped("mxfp4", 32, scale_dtype="float8_e8m0fnu"),
    "mxfp8": grouped("mxfp8", 32, scale_dtype="float8_e8m0fnu"),
    "nvfp4": grouped("nvfp4", 16, scale_dtype="float8_e4m3fn"),
    "nf4": grouped("nf4", 64),
}


def scheme_of(
    weights: WeightSpec, input_activations: ActivationSpec | None = None, intermediate: ActivationSpec | None = None
) -> Scheme:
    """Return a scheme of these specs."""
    specs = {"weights": weights, "input_activations": input_activations, "intermediate": intermediate}
    data = {key: spec.model_dump(mode="json", exclude_none=True) for key, spec in specs.items() if spec is not None}
    plugin = PLUGIN_OF[weights.format]
    return Scheme.from_data({"api": 1, "name": "test", "plugin": plugin, **data})


def quantized(w13: Tensor, w2: Tensor, name: str | WeightSpec, device: str = "cpu") -> QuantizedExperts:
    """Return experts of w13 (E, 2I, H) and w2 (E, H, I) under one of SPECS, or a spec of one's own."""
    spec = SPECS[name] if isinstance(name, str) else name
    return moeplug.quantize_experts(w13.to(device), w2.to(device), scheme_of(spec))
