"""What moeplug exports, tensor by tensor, beside what compressed-tensors' own compressor makes of the same weights.

Given float32 weights, all bytes agree, except:
- a group of zeros has scale 1 here and a tiny one there, and no scale here is below 2**-126: see `same_scales`;
- mxfp4, mxfp8: scales here follow OCP (floor), there the exponent is rounded; with their scales all bytes agree;
- nvfp4: the effective scale is `scale * global` here and `scale / global` there, so exact ties may round to the other
  neighbour;
- with zero points, a group of zeros has zero point -8 here and 0 there, where it comes from 0 / 0;
- -0.0 is 0.0 there, since it adds a zero point of 0.

Given bfloat16 weights, compressed-tensors computes scales and quotients in bfloat16; moeplug in float32, always.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from formats import FORMATS
from interop_cases import case, edge_weights
from torch import Tensor

from moeplug import SchemeError
from moeplug.integrations.compressed_tensors import (
    _from_int32,
    activation_arguments,
    compression,
    pack,
    unpack,
    weight_arguments,
)
from moeplug.quantization import Scales, dequantize, encode, groups, quantize, range_of
from moeplug.spec import ActivationSpec

LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Preset:
    """A preset of compressed-tensors and the spec that says the same here."""

    name: str
    spec: str
    changes: dict[str, object] = field(default_factory=dict)
    activations: ActivationSpec | None = None


PRESETS = [
    Preset("W8A8", "int8", {"range": "full"}, ActivationSpec(format="int8")),
    Preset("W8A16", "int8", {"range": "full", "strategy": "group", "group_size": 128}),
    Preset("W4A16", "int4-g128", {"range": "full"}),
    Preset("W4A16_ASYM", "int4-g128-asym"),
    Preset("FP8_DYNAMIC", "fp8-channel", {}, ActivationSpec(format="fp8")),
    Preset("FP8_BLOCK", "fp8-block", {}, ActivationSpec(format="fp8", strategy="group", group_size=128)),
    Preset("MXFP4A16", "mxfp4"),
    Preset("MXFP8A16", "mxfp8"),
    Preset("NVFP4A16", "nvfp4"),
]
SAME_SCALES = [preset for preset in PRESETS if not preset.name.startswith("MXFP")]


def presets(chosen=PRESETS):
    return pytest.mark.parametrize("preset", chosen, ids=[preset.name for preset in chosen])


def grouped(weight: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Return weights with those that share a scale along the last axis."""
    arguments = scheme.weights
    if arguments.strategy == "block":
        rows, columns = arguments.block_structure
        N, K = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -K % columns, 0, -N % rows))
        blocks = padded.view(padded.shape[0] // rows, rows, -1, columns)
        return blocks.transpose(1, 2).flatten(2)
    return weight.unflatten(1, (-1, arguments.group_size or weight.shape[1]))


def theirs(weight: Tensor, preset: Preset) -> dict[str, Tensor]:
    """Return what compressed-tensors makes of a weight, in the weight's own dtype."""
    scheme = preset_name_to_scheme(preset.name, ["Linear"])
    parts, state = grouped(weight, scheme), {"weight": weight}
    if scheme.weights.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
    state["weight_scale"], state["weight_zero_point"] = calculate_qparams(
        parts.amin(-1), parts.amax(-1), scheme.weights, state.get("weight_global_scale")
    )
    return compressor(preset).compress(state, scheme)


def compressor(preset: Preset) -> type[BaseCompressor]:
    form = infer_module_format(torch.nn.Linear, preset_name_to_scheme(preset.name, ["Linear"]))
    return BaseCompressor.get_value_from_registry(form.value)


def ours(weight: Tensor, preset: Preset, scales: Scales | None = None) -> dict[str, Tensor]:
    """Return what moeplug exports of a weight; scales: these, instead of its own."""
    spec, fmt = case(preset.spec, **preset.changes)
    N, K = weight.shape
    stored = torch.empty(1, N, K // fmt.values_per_element, dtype=fmt.storage_dtype)
    if scales is None:
        scales = quantize(weight[None], spec, fmt, stored)
    else:
        scaled = weight[None].to(torch.float32, copy=True)
        for values, columns in groups(scaled, spec.columns(K)):
            values /= scales.values(N)[..., columns, None]
            if scales.zero_point is not None:
                values += scales.zero_point[..., columns, None].float()
        encode(scaled.clamp_(*range_of(spec, fmt)), fmt, stored)
    return pack(stored[0], scales, fmt, compression(spec, fmt, preset.activations))


def decoded(tensors: dict[str, Tensor], preset: Preset, K: int) -> Tensor:
    spec, fmt = case(preset.spec, **preset.changes)
    return unpack(tensors, spec, fmt, compression(spec, fmt, preset.activations), K)


def same_scales(found: Tensor, expected: Tensor, amax: Tensor) -> bool:
    """Whether scales agree wherever there is a magnitude, and are 1 or the least normal number elsewhere."""
    normal = expected.float() >= LEAST
    zeros = torch.equal(found[amax == 0].float(), torch.ones(int((amax == 0).sum())))
    return zeros and torch.equal(found[normal & (amax > 0)].float(), expected[normal & (amax > 0)].float())


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def ordinary(shape: tuple[int, int] = (256, 512)) -> Tensor:
    """Return the weights that both libraries say they can store: no subnormal row, no row of -0.0."""
    weight = edge_weights(shape)
    weight[-2], weight[-8] = weight[0], weight[1]
    return weight


@presets()
@pytest.mark.parametrize("shape", [(256, 512), (200, 384)], ids=str)
def test_names_shapes_and_dtypes_are_those_of_compressed_tensors(preset, shape):
    expected, found = theirs(ordinary(shape), preset), ours(ordinary(shape), preset)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }


@presets(SAME_SCALES)
@pytest.mark.parametrize("shape", [(256, 512), (200, 384)], ids=str)
def test_the_scales_are_those_of_compressed_tensors(preset, shape):
    weight = ordinary(shape)
    if preset.name == "NVFP4A16":
        weight[-4] = weight[2]  # 1e7 times the others: under one global scale they all would vanish
    amax = grouped(weight, preset_name_to_scheme(preset.name, ["Linear"])).abs().amax(-1)
    found, expected = ours(weight, preset), theirs(weight, preset)
    assert same_scales(found["weight_scale"], expected["weight_scale"], amax)
    if "weight_zero_point" in expected:
        zero_points = [_from_int32(t["weight_zero_point"].T, 4).T[: shape[0]] for t in (found, expected)]
        assert torch.equal(zero_points[0][amax > 0], zero_points[1][amax > 0])
    if "weight_global_scale" in expected:
        torch.testing.assert_close(found["weight_global_scale"], expected["weight_global_scale"], rtol=2e-7, atol=0)


@presets(PRESETS[:-1])
@pytest.mark.parametrize("shape", [(256, 512), (200, 384)], ids=str)
def test_the_bytes_are_those_of_compressed_tensors_under_its_scales(preset, shape):
    weight = ordinary(shape)
    expected = theirs(weight, preset)
    if preset in SAME_SCALES:
        found = ours(weight, preset)
    else:
        found = ours(weight, preset, Scales(expected["weight_scale"][None]))
    values = "weight" if "weight" in expected else "weight_packed"
    rows = slice(-6 if "weight_zero_point" in expected else None)  # without groups of zeros
    assert torch.equal(bits(found[values])[rows], bits(expected[values])[rows])
    assert bits(found[values]).unique().numel() > 10


def test_nvfp4_codes_differ_at_exact_ties_alone():
    preset, weight = PRESETS[-1], ordinary()
    weight[-4] = weight[2]
    expected, found = theirs(weight, preset), ours(weight, preset)
    differing = (decoded(found, preset, 512) - decoded(expected, preset, 512)).abs() > 1e-6 * weight.abs()
    assert 0 < differing.float().mean() < 0.01
    middle = (decoded(found, preset, 512) + decoded(expected, preset, 512)).double() / 2
    torch.testing.assert_close(middle[differing], weight.double()[differing], rtol=1e-6, atol=0)


@presets()
def test_zeros_subnormals_and_negative_zeros_come_out_as_near_as_from_compressed_tensors(preset):
    weight = edge_weights((256, 512))
    found = decoded(ours(weight, preset), preset, 512)
    assert bool(torch.isfinite(found).all())
    assert bool((found[[-1, -8]] == 0).all())
    error, peers = (
        abs(t - weight).double().max(1).values for t in (found, decoded(theirs(weight, preset), preset, 512))
    )
    assert error[-2] <= peers[-2] or error[-2] < LEAST


@presets(SAME_SCALES)
def test_of_bfloat16_weights_our_error_is_the_smaller(preset):
    """Both against float64: compressed-tensors computes scale and quotient in bfloat16, moeplug in float32."""
    weight = ordinary((250, 512))[:240].bfloat16()  # without the rows of trouble
    exact = weight.double()
    errors = [
        float((decoded(t, preset, 512).double() - exact).norm()) for t in (ours(weight, preset), theirs(weight, preset))
    ]
    assert errors[0] <= errors[1] * 1.0001
    if preset.name in ("W8A8", "W8A16"):
        assert errors[0] < 0.95 * errors[1]


@presets()
def test_compressed_tensors_reads_our_tensors_as_we_do(preset):
    weight = edge_weights((200, 384))
    weight[-4] = weight[2]
    tensors, scheme = ours(weight, preset), preset_name_to_scheme(preset.name, ["Linear"])
    read = compressor(preset).decompress(dict(tensors), scheme)["weight"]
    expected = decoded(tensors, preset, 384)
    if read.dtype == torch.bfloat16:  # its fp4 and MX readers compute in bfloat16: scale, then product
        torch.testing.assert_close(read.float(), expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(read, expected)


@presets()
def test_unpack_undoes_pack(preset):
    weight = edge_weights((200, 384))
    spec, fmt = case(preset.spec, **preset.changes)
    stored = torch.empty(1, 200, 384 // fmt.values_per_element, dtype=fmt.storage_dtype)
    expected = dequantize(stored, quantize(weight[None], spec, fmt, stored), fmt)[0]
    found = decoded(ours(weight, preset), preset, 384)
    if preset.name == "NVFP4A16":  # the global scale is stored as its reciprocal
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)
    else:
        assert torch.equal(found, expected)


@presets()
def test_the_arguments_are_those_of_the_preset(preset):
    spec, fmt = case(preset.spec, **preset.changes)
    scheme = preset_name_to_scheme(preset.name, ["Linear"])
    form = compression(spec, fmt, preset.activations)
    assert form == infer_module_format(torch.nn.Linear, scheme).value
    said = {"targets": ["Linear"], "weights": weight_arguments(spec, fmt, form)}
    if preset.activations is not None:
        said["input_activations"] = activation_arguments(preset.activations, FORMATS[preset.activations.format])
    assert QuantizationScheme.model_validate(said).model_dump(exclude=DEFAULTS) == scheme.model_dump(exclude=DEFAULTS)


# What only makers of scales read.
DEFAULTS = {"weights": {"observer", "observer_kwargs", "zp_dtype"}, "input_activations": {"observer", "zp_dtype"}}


@pytest.mark.parametrize(
    ("name", "changes"), [("nf4", {}), ("mxfp4", {"group_size": 64}), ("mxfp4", {"scale_dtype": "float32"})]
)
def test_what_compressed_tensors_has_no_words_for_is_refused(name, changes):
    with pytest.raises(SchemeError, match="compressed-tensors has no words for"):
        compression(*case(name, **changes), None)


def test_a_width_that_does_not_fill_the_last_word_is_padded():
    for preset in PRESETS[1:4]:
        spec, fmt = case(preset.spec, **{**preset.changes, "strategy": "channel", "group_size": None})
        weight = edge_weights((24, 20))
        stored = torch.empty(1, 24, 20 // fmt.values_per_element, dtype=fmt.storage_dtype)
        scales = quantize(weight[None], spec, fmt, stored)
        tensors = pack(stored[0], scales, fmt, "pack-quantized")
        scheme = preset_name_to_scheme(preset.name, ["Linear"])
        arguments = scheme.weights.model_copy(update={"strategy": "channel", "group_size": None})
        scheme = scheme.model_copy(update={"weights": arguments})
        read = compressor(preset).decompress(dict(tensors), scheme)["weight"]
        assert torch.equal(read, dequantize(stored, scales, fmt)[0])
