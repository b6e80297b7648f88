"""The numbers: scales, stored values and errors, against float64 arithmetic written out here."""

from __future__ import annotations

import math

import pytest
import torch

from moeplug import SchemeError
from moeplug.formats import NumberFormat, Unquantized
from moeplug.quantization import (
    CHUNK_ELEMENTS,
    Scales,
    absolute_maximum,
    bytes_of_weight,
    dequantize,
    quantize,
    scale_shape,
    squared_error,
)
from moeplug.spec import WeightSpec


class Signed(NumberFormat):
    """A format of the test's own: signed bytes."""

    name = "signed"
    storage_dtype = torch.int8
    bits = 8
    max_value = 127.0
    asymmetric_range = (-128.0, 127.0)

    def encode(self, scaled, out):
        out.copy_(scaled.round_())

    def decode(self, stored, out):
        out.copy_(stored)


SPECS = {
    "tensor": WeightSpec(format="signed", strategy="tensor"),
    "channel": WeightSpec(format="signed", strategy="channel"),
    "channel_asymmetric": WeightSpec(format="signed", strategy="channel", symmetric=False),
    "g32": WeightSpec(format="signed", strategy="group", group_size=32),
    "g64_asymmetric": WeightSpec(format="signed", strategy="group", group_size=64, symmetric=False),
    "g32_full": WeightSpec(format="signed", strategy="group", group_size=32, range="full"),
    "g128_bf16_scales": WeightSpec(format="signed", strategy="group", group_size=128, scale_dtype="bfloat16"),
}


def random_weight(B=2, N=37, K=256, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(torch.randn(B, N, 1, generator=generator))
    return (torch.randn(B, N, K, generator=generator) * rows * 0.02).to(dtype)


def stored_of(weight, spec):
    out = torch.full(weight.shape, 99, dtype=torch.int8)
    return out, quantize(weight, spec, Signed(), out)


def relative_rms(weight, decoded):
    return float((weight.double() - decoded.double()).norm() / weight.double().norm())


def in_float64(weight, spec):
    """The same quantization in float64, but for the rounding of scales to scale_dtype."""
    B, N, K = weight.shape
    R, C = scale_shape(spec, N, K)
    grouped = weight.double().reshape(B, R, N // R, C, K // C)
    dtype = getattr(torch, spec.scale_dtype)
    if spec.symmetric:
        full = spec.range == "full"
        scale = (grouped.abs().amax((2, 4), keepdim=True) / (127.5 if full else 127)).to(dtype).double()
        return ((grouped / scale).round().clamp(-128 if full else -127, 127) * scale).reshape(B, N, K)
    low, high = grouped.amin((2, 4), keepdim=True).clamp(max=0), grouped.amax((2, 4), keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).to(dtype).double()
    zero = (-128 - low / scale).round().clamp(-128, 127)
    return (((grouped / scale + zero).round().clamp(-128, 127) - zero) * scale).reshape(B, N, K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_error_is_that_of_float64_arithmetic_rounded_to_nearest(spec, dtype):
    weight = random_weight(dtype=dtype)
    out, scales = stored_of(weight, spec)
    ours = relative_rms(weight, dequantize(out, scales, Signed()))
    exact = relative_rms(weight, in_float64(weight, spec))
    assert ours <= 1.001 * exact
    assert ours > 0


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_scales_have_the_shape_and_the_dtype_that_the_spec_says(spec):
    weight = random_weight()
    _, scales = stored_of(weight, spec)
    assert scales.scale.shape == (2, *scale_shape(spec, 37, 256))
    assert scales.scale.dtype == getattr(torch, spec.scale_dtype)
    assert (scales.zero_point is None) == spec.symmetric
    assert bool((scales.scale > 0).all())


def test_symmetric_values_stay_within_the_symmetric_range():
    spec = WeightSpec(format="signed", scale_dtype="bfloat16")  # rounding a scale down pushes values past 127
    out, _ = stored_of(random_weight(B=8, N=64), spec)
    assert out.min() == -127
    assert out.max() == 127


def test_the_full_range_has_a_smaller_step_and_uses_the_lowest_value():
    weight = random_weight(B=4, N=64)
    (half, coarse), (full, fine) = (
        stored_of(weight, SPECS["g32"].model_copy(update={"range": r})) for r in ("symmetric", "full")
    )
    assert (int(half.min()), int(full.min()), int(full.max())) == (-127, -128, 127)
    torch.testing.assert_close(fine.scale, coarse.scale * 127 / 127.5, rtol=1e-6, atol=0)


def test_the_full_range_is_refused_where_a_format_has_none():
    class Unsigned(Signed):
        asymmetric_range = (0.0, 255.0)

    for fmt in (Unsigned(), Unquantized(torch.bfloat16)):
        with pytest.raises(SchemeError, match="leave range: full out"):
            quantize(random_weight(), SPECS["g32_full"], fmt, torch.empty(2, 37, 256, dtype=torch.int8))


@pytest.mark.parametrize(
    "field", [{"symmetric": False}, {"scale_dtype": "float8_e8m0fnu", "strategy": "group", "group_size": 32}]
)
def test_the_full_range_is_refused_where_it_means_nothing(field):
    with pytest.raises(ValueError, match="leave range out"):
        WeightSpec(format="signed", range="full", **field)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_weight_of_zeros_decodes_to_zeros_and_finite_scales(spec):
    weight = torch.zeros(1, 8, 256, dtype=torch.bfloat16)
    out, scales = stored_of(weight, spec)
    assert bool((dequantize(out, scales, Signed()) == 0).all())
    assert bool((scales.scale == 1).all())


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("spec", [SPECS["channel"], SPECS["g64_asymmetric"], SPECS["tensor"]], ids=str)
def test_extreme_magnitudes_give_finite_scales_and_finite_reciprocals(spec, magnitude):
    weight = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * magnitude
    out, scales = stored_of(weight, spec)
    assert bool(torch.isfinite(scales.scale).all())
    assert bool(torch.isfinite(1 / scales.scale).all())
    assert bool(torch.isfinite(dequantize(out, scales, Signed())).all())


@pytest.mark.parametrize("magnitude", [1e-45, 1e-30, 1e-7, 1e-5])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_a_scale_of_16_bits_never_becomes_zero_or_a_number_without_a_reciprocal(scale_dtype, magnitude):
    """1e-7 / 127 is 0 in float16, and 1 / 2**-24 is beyond its largest number."""
    weight = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * magnitude
    for symmetric in (True, False):
        spec = WeightSpec(
            format="signed", strategy="group", group_size=32, scale_dtype=scale_dtype, symmetric=symmetric
        )
        out, scales = stored_of(weight, spec)
        assert bool((scales.scale > 0).all())
        assert bool(torch.isfinite(1 / scales.scale).all())
        assert bool(torch.isfinite(dequantize(out, scales, Signed())).all())


def test_a_scale_beyond_its_dtype_is_refused_not_stored_as_infinity():
    weight = torch.full((1, 2, 64), 3e38)
    with pytest.raises(SchemeError, match="scale_dtype: float16; use scale_dtype: float32"):
        stored_of(weight, WeightSpec(format="signed", scale_dtype="float16"))


def test_row_chunks_do_not_change_a_byte(monkeypatch):
    weight = random_weight()
    whole = {name: stored_of(weight, spec) for name, spec in SPECS.items()}
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 3 * 256)
    for name, spec in SPECS.items():
        out, scales = stored_of(weight, spec)
        assert torch.equal(out, whole[name][0]), name
        assert torch.equal(scales.scale, whole[name][1].scale), name


def test_a_strided_view_is_filled_as_a_contiguous_one_is():
    weight, spec = random_weight(), SPECS["g32"]
    buffer = torch.full((2, 74, 256), 99, dtype=torch.int8)
    quantize(weight, spec, Signed(), buffer[:, 1::2])
    assert torch.equal(buffer[:, 1::2], stored_of(weight, spec)[0])
    assert bool((buffer[:, ::2] == 99).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_bitwise_amax_equals_the_arithmetic_one_and_keeps_nan_and_infinity(dtype):
    weight = random_weight(dtype=dtype)
    assert torch.equal(absolute_maximum(weight, -1), weight.float().abs().amax(-1))
    for bad in (math.nan, math.inf, -math.inf):
        weight[1, 5, 7] = bad
        peaks = absolute_maximum(weight, -1)
        assert not math.isfinite(peaks[1, 5])
        assert torch.isfinite(peaks).sum() == peaks.numel() - 1


def test_a_group_that_does_not_divide_names_one_that_does():
    with pytest.raises(SchemeError, match=r"K=192 is not a multiple of group_size=128; 64 divides it"):
        stored_of(random_weight(K=192), SPECS["g128_bf16_scales"])


@pytest.mark.parametrize("K", [200, 129, 128, 127, 1])
@pytest.mark.parametrize("name", ["g128_bf16_scales", "g32", "g64_asymmetric"])
def test_padded_groups_store_what_zeros_at_the_end_of_rows_would(name, K, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 5 * 200)
    weight, spec = random_weight(K=K) + (0.01 if "asymmetric" in name else 0), SPECS[name]
    G = spec.group_size
    filled = torch.nn.functional.pad(weight, (0, -K % G))
    expected, of_filled = stored_of(filled, spec)
    padded = spec.model_copy(update={"pad": True})
    out, scales = stored_of(weight, padded)
    assert torch.equal(out, expected[..., :K])
    assert torch.equal(scales.scale, of_filled.scale)
    assert spec.symmetric or torch.equal(scales.zero_point, of_filled.zero_point)
    assert torch.equal(dequantize(out, scales, Signed()), dequantize(expected, of_filled, Signed())[..., :K])
    assert bytes_of_weight(padded, Signed(), 37, K) * 2 == out.nbytes + sum(
        tensor.nbytes for tensor in (scales.scale, scales.zero_point) if tensor is not None
    )
    exact = (weight.double() - dequantize(out, scales, Signed()).double()).square().sum((1, 2))
    torch.testing.assert_close(squared_error(weight, out, scales, Signed())[:, 0], exact, rtol=1e-4, atol=0)


def test_the_squared_error_is_the_error_of_what_is_stored():
    weight, spec = random_weight(), SPECS["g64_asymmetric"]
    out, scales = stored_of(weight, spec)
    sums = squared_error(weight, out, scales, Signed())
    exact = (weight.double() - dequantize(out, scales, Signed()).double()).square().sum((1, 2))
    torch.testing.assert_close(sums[:, 0], exact, rtol=1e-5, atol=0)  # float32 differences, float64 sums
    torch.testing.assert_close(sums[:, 1], weight.double().square().sum((1, 2)), rtol=1e-6, atol=0)


def test_unquantized_weights_have_no_error_and_no_scales():
    weight, fmt = random_weight(), Unquantized(torch.bfloat16)
    out = torch.empty_like(weight)
    fmt.encode(weight, out)
    assert bool((squared_error(weight, out, Scales(), fmt)[:, 0] == 0).all())
    assert bytes_of_weight(None, fmt, 37, 256) == weight[0].nbytes


def test_bytes_count_values_scales_and_zero_points():
    assert bytes_of_weight(SPECS["channel"], Signed(), 37, 256) == 37 * 256 + 37 * 4
    assert bytes_of_weight(SPECS["g64_asymmetric"], Signed(), 37, 256) == 37 * 256 + 37 * 4 * (4 + 1)
