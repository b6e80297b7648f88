"""The formats of all plugins, two that live beside the tests, and specs that use them: what the core is held to.

from formats import FORMATS, SPECS, quantized
experts = quantized(w13, w2, "nvfp4", device="cuda")
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import moeplug
from moeplug.formats import Nibbles, NumberFormat
from moeplug.manifest import CAPABILITIES, Manifest
from moeplug.moe.experts import QuantizedExperts
from moeplug.registry import Plugin, Registration, Registry
from moeplug.scheme import Scheme
from moeplug.spec import ActivationSpec, WeightSpec

sys.path += map(str, Path(__file__).parents[1].glob("plugins/*/src"))  # where they are not installed

from moeplug_fp8.hooks import Fp8
from moeplug_int8.hooks import Int8
from moeplug_mx.hooks import Mxfp4, Mxfp8
from moeplug_nvfp4.hooks import Nvfp4

FLOATS: Final = (torch.bfloat16, torch.float16, torch.float32)


class Int4(Nibbles):
    """Integers of -8 to 7, stored as 0 to 15; zero points lie in -8 to 7 too."""

    name = "int4"
    max_value = 7.0
    asymmetric_range = (-8.0, 7.0)
    exact_in = (*FLOATS, torch.float8_e4m3fn, torch.int8)

    def encode(self, scaled: Tensor, out: Tensor) -> None:
        self.pack(scaled.round() + 8, out)

    def decode(self, stored: Tensor, out: Tensor) -> None:
        self.unpack(stored, torch.arange(-8.0, 8.0), out)

    def triton_decode(self) -> Any:
        from moeplug.kernels.decode import decode_int4

        return decode_int4


NF4: Final = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


class Nf4(Nibbles):
    """NormalFloat4 (QLoRA, arXiv 2305.14314), the 16 values of bitsandbytes; only float32 holds them exactly."""

    name = "nf4"
    max_value = 1.0
    exact_in = (torch.float32,)

    def encode(self, scaled: Tensor, out: Tensor) -> None:
        self.pack(torch.bucketize(scaled.contiguous(), ((NF4[1:] + NF4[:-1]) / 2).to(scaled.device)), out)

    def decode(self, stored: Tensor, out: Tensor) -> None:
        self.unpack(stored, NF4, out)

    def triton_decode(self) -> Any:
        from moeplug.kernels.decode import decode_nf4

        return decode_nf4


FORMATS: Final[dict[str, NumberFormat]] = {
    fmt.name: fmt for fmt in (Int8(), Fp8(), Mxfp8(), Int4(), Mxfp4(), Nvfp4(), Nf4())
}
PLUGIN_OF: Final = {"int8": "int8", "fp8": "fp8", "mxfp8": "mx", "mxfp4": "mx", "nvfp4": "nvfp4"}  # of each format
BESIDE_THE_TESTS: Final = {name: fmt for name, fmt in FORMATS.items() if name not in PLUGIN_OF}


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

MANIFEST: Final = f"""
api: 1
name: beside-the-tests
hooks: formats
formats: [{", ".join(BESIDE_THE_TESTS)}]
capabilities: [{", ".join(CAPABILITIES)}]
"""


def registry() -> Registry:
    """Return the installed plugins and one, in memory, that has the formats of this file alone."""
    plugin = Plugin("beside-the-tests", "active", "", "tests", "0", None, Manifest.from_text(MANIFEST))
    found = Registry([*Registry.discover().plugins, plugin])
    found._active[plugin.name] = Registration(plugin)
    for fmt in BESIDE_THE_TESTS.values():
        found._active[plugin.name].add_format(fmt)
    return found


def scheme_of(
    weights: WeightSpec, input_activations: ActivationSpec | None = None, intermediate: ActivationSpec | None = None
) -> Scheme:
    """Return a scheme of these specs."""
    specs = {"weights": weights, "input_activations": input_activations, "intermediate": intermediate}
    data = {key: spec.model_dump(mode="json", exclude_none=True) for key, spec in specs.items() if spec is not None}
    plugin = PLUGIN_OF.get(weights.format, "beside-the-tests")
    return Scheme.from_data({"api": 1, "name": "test", "plugin": plugin, **data})


def quantized(w13: Tensor, w2: Tensor, name: str | WeightSpec, device: str = "cpu") -> QuantizedExperts:
    """Return experts of w13 (E, 2I, H) and w2 (E, H, I) under one of SPECS, or a spec of one's own."""
    spec = SPECS[name] if isinstance(name, str) else name
    return moeplug.quantize_experts(w13.to(device), w2.to(device), scheme_of(spec), registry=registry())
