"""The numbers of all formats and what the core does with them, against naive loops over Python floats."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from formats import FORMATS, SPECS, blocks, grouped, quantized, scheme_of

import moeplug
from moeplug.formats import E2M1_VALUES, E4m3
from moeplug.kernels import cpu, fused_moe
from moeplug.kernels.select import Device
from moeplug.moe.layout import CONCATENATED, INTERLEAVED, PROJECTIONS, LayerSpec, in_words, interleaved
from moeplug.pipeline import plan_layer
from moeplug.quantization import (
    CHUNK_ELEMENTS,
    bytes_of_weight,
    dequantize,
    encode,
    quantize,
    reordered,
    scale_dtype,
    scale_shape,
    scale_values,
    squared_error,
)
from moeplug.registry import Registry
from moeplug.spec import ActivationSpec, WeightSpec

E, H, I = 3, 256, 128


def random_weight(B=2, N=37, K=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(torch.randn(B, N, 1, generator=generator))
    return (torch.randn(B, N, K, generator=generator) * rows * 0.02).to(torch.bfloat16)


def stored_of(weight, spec, words=False):
    fmt = FORMATS[spec.format]
    out = torch.full((*weight.shape[:2], weight.shape[2] // fmt.values_per_element), 99, dtype=fmt.storage_dtype)
    return out, quantize(weight, spec, fmt, out, words)


def nearest(values, x):
    """The value nearest to x by exact distance; of two, the one with the even index."""
    distances = [abs(v - x) for v in values]
    best = min(distances)
    return min((i % 2, i) for i, d in enumerate(distances) if d == best)[1]


# Formats


def test_e2m1_rounds_to_the_nearest_code_and_ties_to_the_even_one():
    middles = (E2M1_VALUES[1:8] + E2M1_VALUES[:7]) / 2
    below, above = (torch.nextafter(middles, torch.full((7,), end)) for end in (0.0, 9.0))
    near = torch.cat([middles, below, above])
    x = torch.cat([near, -near, torch.linspace(-6, 6, 501), torch.zeros(1)])
    out = torch.empty(x.numel() // 2, dtype=torch.uint8)
    FORMATS["mxfp4"].encode(x.clone(), out)
    decoded = torch.empty_like(x)
    FORMATS["mxfp4"].decode(out, decoded)
    magnitudes = E2M1_VALUES[:8].tolist()
    assert decoded.tolist() == [math.copysign(magnitudes[nearest(magnitudes, abs(v))], v) for v in x.tolist()]


def all_values(name):
    """Every byte that the format may store, and what they decode to."""
    fmt, stored = FORMATS[name], torch.arange(256, dtype=torch.uint8)
    stored = stored[(stored & 127) != 127] if isinstance(fmt, E4m3) else stored  # NaN is never stored
    values = torch.empty(stored.numel() * fmt.values_per_element)
    fmt.decode(stored.view(fmt.storage_dtype), values)
    return stored.view(fmt.storage_dtype), values


@pytest.mark.parametrize("name", FORMATS)
def test_every_stored_byte_decodes_to_what_encodes_back(name):
    (stored, values), fmt = all_values(name), FORMATS[name]
    again = torch.empty_like(stored)
    fmt.encode(values.clone(), again)
    assert torch.equal(again, stored)


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_is_exact_in_the_types_that_the_format_names(name):
    _, values = all_values(name)
    for dtype in FORMATS[name].exact_in:
        assert torch.equal(values.to(dtype).float(), values), dtype


# Layouts


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_word_j_of_a_run_holds_values_16_apart_lowest_bits_first(name):
    fmt = FORMATS[name]
    q = fmt.values_per_word
    values = torch.arange(128.0).view(1, 1, 128) % 15 - 7
    out = torch.empty(1, 1, 128 // fmt.values_per_element, dtype=fmt.storage_dtype)
    encode(values.clone(), fmt, out, words=True)
    words = [int.from_bytes(bytes(pair), "little") for pair in out.view(torch.uint8).view(-1, 2).tolist()]
    assert len(words) == 128 // q
    for i, word in enumerate(words):
        run, j = divmod(i, 16)
        codes = [word >> (16 // q * place) & (2 ** (16 // q) - 1) for place in range(q)]
        held = [int(v) for v in values[0, 0, 16 * q * run + j : 16 * q * (run + 1) : 16]]
        assert codes == [v + 8 if name == "int4" else v % 256 for v in held]


@pytest.mark.parametrize("q", [2, 4])
def test_words_are_a_view_whose_order_inverts(q):
    values = torch.arange(384.0).view(1, 3, 128)
    words = in_words(values, q)
    assert words.data_ptr() == values.data_ptr()
    ordered = words.flatten(2)
    again = torch.empty_like(values)
    in_words(again, q).copy_(ordered.view(words.shape))
    assert torch.equal(again, values)


@pytest.mark.parametrize("chunk", [64, 1 << 19])
@pytest.mark.parametrize("name", FORMATS)
def test_words_hold_the_plain_codes_and_the_same_scales(name, chunk, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", chunk)
    weight, spec, fmt = random_weight(), grouped(name, 32), FORMATS[name]
    plain, scales = stored_of(weight, spec)
    ordered, others = stored_of(weight, spec, words=True)
    assert not torch.equal(plain, ordered)
    assert torch.equal(reordered(ordered, fmt, True, False), plain)
    assert torch.equal(reordered(plain, fmt, False, True), ordered)
    assert reordered(plain, fmt, False, False) is plain
    assert torch.equal(scales.scale, others.scale)
    assert torch.equal(dequantize(ordered, others, fmt, None, True), dequantize(plain, scales, fmt))
    assert torch.equal(squared_error(weight, ordered, others, fmt, True), squared_error(weight, plain, scales, fmt))


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_reordering_reads_and_writes_no_row_but_its_own(name):
    plain, _ = stored_of(random_weight(), grouped(name, 32))
    buffer = torch.zeros(2, 74, plain.shape[2], dtype=plain.dtype)
    buffer[:, 1::2] = plain
    assert torch.equal(
        reordered(buffer[:, 1::2], FORMATS[name], False, True), reordered(plain, FORMATS[name], False, True)
    )


# Blocks


@pytest.mark.parametrize("chunk", [64, 1 << 19])
@pytest.mark.parametrize("structure", [(16, 32), (128, 128), (5, 48), (1, 1), (37, 250)], ids=str)
def test_a_block_scale_is_the_blocks_amax_over_the_largest_value(structure, chunk, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", chunk)
    (R, C), weight = structure, random_weight(N=37, K=250)
    weight[0, :5, :48] = 0
    out, scales = stored_of(weight, blocks("int8", R, C))
    assert scales.scale.shape == (2, -(-37 // R), -(-250 // C)) == (2, *scale_shape(blocks("int8", R, C), 37, 250))
    decoded = dequantize(out, scales, FORMATS["int8"])
    for b in range(2):
        for r in range(-(-37 // R)):
            for c in range(-(-250 // C)):
                block = (b, slice(r * R, (r + 1) * R), slice(c * C, (c + 1) * C))
                part = weight[block].float()
                scale = part.abs().max() / torch.tensor(127.0) if part.any() else torch.tensor(1.0)
                assert scales.scale[b, r, c] == scale
                assert torch.equal(out[block].float(), (part / scale).round().clamp(-127, 127))
                assert torch.equal(decoded[block], out[block].float() * scale)
    sums = squared_error(weight, out, scales, FORMATS["int8"])
    exact = (weight.double() - decoded.double()).square().sum((1, 2))
    torch.testing.assert_close(sums[:, 0], exact, rtol=1e-5, atol=0)  # float32 differences, float64 sums


def test_zero_points_are_refused_where_a_scale_serves_a_block_or_has_8_bits():
    with pytest.raises(ValueError, match="strategy: block has no zero points"):
        WeightSpec(format="int8", strategy="block", block_structure=(8, 8), symmetric=False)
    for dtype in ("float8_e8m0fnu", "float8_e4m3fn"):
        with pytest.raises(ValueError, match=f"scale_dtype: {dtype} has no zero points; write symmetric: true"):
            WeightSpec(format="int8", symmetric=False, scale_dtype=dtype)


# Scale types


EXTREMES = [0.0, 1e-45, 2.0**-149, 2.0**-130, 2.0**-127, 2.0**-126, 1.0, 2.0, math.nextafter(4.0, 0), 4.0, 6.0, 3.3e38]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "int8"])
def test_an_e8m0_scale_is_the_power_of_two_of_the_microscaling_standard(name):
    fmt = FORMATS[name]
    weight = torch.zeros(1, len(EXTREMES), 32)
    weight[0, :, 7] = torch.tensor(EXTREMES)
    weight[0, :, 9] = -torch.tensor(EXTREMES) / 3
    out, scales = stored_of(weight, grouped(name, 32, scale_dtype="float8_e8m0fnu"))
    assert scales.scale.dtype == torch.uint8
    largest = math.floor(math.log2(fmt.max_value))
    amax = weight.abs().amax(2)[0].tolist()  # as float32
    exact = [0 if a == 0 else math.frexp(a)[1] - 1 - largest for a in amax]  # frexp's mantissa is in [0.5, 1)
    assert (scales.scale[0, :, 0].int() - 127).tolist() == [min(max(e, -127), 127) for e in exact]
    assert scale_values(scales.scale)[0, :, 0].tolist() == [2.0 ** min(max(e, -127), 127) for e in exact]
    decoded = dequantize(out, scales, fmt)
    assert bool(torch.isfinite(decoded).all())
    saturated = 2.0**largest * 2 - fmt.max_value  # what lies between the largest value and the next power of two
    step = scale_values(scales.scale)[0] * max(saturated, fmt.max_value / 4)
    assert bool(((decoded - weight)[0].abs() <= step).all())


def test_nvfp4_is_a_global_scale_and_e4m3_scales_that_weights_are_encoded_with():
    weight, spec, fmt = random_weight(N=9, K=64), SPECS["nvfp4"], FORMATS["nvfp4"]
    weight[0, 0, :16] = 0
    weight[1, 3, 16:32] *= 1e-6  # below the smallest e4m3 of the global scale
    out, scales = stored_of(weight, spec)
    assert (scales.scale.dtype, scales.global_scale.shape) == (torch.float8_e4m3fn, (2, 1, 1))
    f32 = lambda x: torch.tensor(x, dtype=torch.float32)  # noqa: E731
    decoded, values = dequantize(out, scales, fmt), E2M1_VALUES[:8].tolist()
    for b in range(2):
        of_weight = weight[b].float().abs().max() / f32(448.0 * 6)
        assert scales.global_scale[b, 0, 0] == of_weight
        for n in range(9):
            for c in range(4):
                part = weight[b, n, 16 * c : 16 * c + 16].float()
                amax = part.abs().max()
                wanted = (amax / f32(6.0) / of_weight).clamp(2.0**-9, 448) if amax else f32(1.0)
                scale = wanted.to(torch.float8_e4m3fn).float()
                assert scales.scale[b, n, c].float() == scale
                product = scale * of_weight
                codes = [nearest(values, min(abs(float(x / product)), 6.0)) for x in part]
                expected = [math.copysign(values[i], x) * product for i, x in zip(codes, part, strict=True)]
                assert decoded[b, n, 16 * c : 16 * c + 16].tolist() == [float(x) for x in expected]


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("name", SPECS)
def test_extreme_weights_have_finite_scales_with_finite_reciprocals(name, magnitude):
    weight = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * magnitude
    out, scales = stored_of(weight, SPECS[name])
    assert bool(torch.isfinite(1 / scales.values(4)).all())
    assert bool(torch.isfinite(dequantize(out, scales, FORMATS[SPECS[name].format])).all())


@pytest.mark.parametrize("name", SPECS)
def test_a_weight_of_zeros_decodes_to_zeros(name):
    out, scales = stored_of(torch.zeros(1, 8, 128), SPECS[name])
    assert bool((dequantize(out, scales, FORMATS[SPECS[name].format]) == 0).all())
    assert bool((scales.values(8) == 1).all())


@pytest.mark.parametrize("name", SPECS)
def test_row_chunks_do_not_change_a_byte(name, monkeypatch):
    weight, spec = random_weight(), SPECS[name]
    out, scales = stored_of(weight, spec)
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 3 * 256)
    again, others = stored_of(weight, spec)
    assert torch.equal(out, again)
    assert torch.equal(scales.values(37), others.values(37))


@pytest.mark.parametrize("name", SPECS)
def test_weights_off_centre_come_back_with_signs_and_magnitudes(name):
    weight = random_weight(N=64).float() + 0.03
    out, scales = stored_of(weight, SPECS[name])
    decoded = dequantize(out, scales, FORMATS[SPECS[name].format])
    # Gaussian weights: 0.115 with mxfp4, 0.15 with 4-bit groups of 128, 0.027 with e4m3, below 0.01 with int8.
    assert float((decoded - weight).norm() / weight.norm()) < (0.16 if FORMATS[SPECS[name].format].bits == 4 else 0.04)


def test_bytes_count_packed_values_block_scales_and_global_scales():
    assert bytes_of_weight(SPECS["int4-g32-asym"], FORMATS["int4"], 37, 256) == 37 * 128 + 37 * 8 * (4 + 1)
    assert bytes_of_weight(blocks("fp8", 16, 100), FORMATS["fp8"], 37, 256) == 37 * 256 + 3 * 3 * 4
    assert bytes_of_weight(SPECS["mxfp4"], FORMATS["mxfp4"], 37, 256) == 37 * 128 + 37 * 8
    assert bytes_of_weight(SPECS["nvfp4"], FORMATS["nvfp4"], 37, 256) == 37 * 128 + 37 * 16 + 37 * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("words", [False, True], ids=["plain", "words"])
@pytest.mark.parametrize("name", SPECS)
def test_a_gpu_stores_the_bytes_and_scales_that_a_cpu_stores(name, words):
    weight, spec = random_weight(B=3, N=300), SPECS[name]
    fmt, (out, scales) = FORMATS[spec.format], stored_of(weight, spec, words)
    there = torch.empty_like(out, device="cuda")
    others = quantize(weight.cuda(), spec, fmt, there, words)
    assert torch.equal(there.cpu(), out)
    assert torch.equal(others.values(300).cpu(), scales.values(300))
    assert torch.equal(dequantize(there, others, fmt, None, words).cpu(), dequantize(out, scales, fmt, None, words))
    assert torch.equal(reordered(there, fmt, words, False).cpu(), reordered(out, fmt, words, False))


# Through the pipeline


def layer_weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    w13, w2 = torch.randn(E, 2 * I, H, generator=g) * 0.1, torch.randn(E, H, I, generator=g) * 0.1
    return w13.to(torch.bfloat16), w2.to(torch.bfloat16)


class OtherLayout(cpu.CpuKernel):
    """The GPU's layout on a CPU: it stores, and computes nothing."""

    def layout_for(self, request):
        return fused_moe.TritonKernel().layout_for(request)

    def bind(self, request, weights, scales):
        return lambda hidden, topk_weights, topk_ids, out=None: hidden


@pytest.fixture
def gpu_layout(monkeypatch):
    """Have the pipeline plan a kernel that reads the GPU's layout, until it is called off."""
    kernels = [OtherLayout()]
    monkeypatch.setattr("moeplug.kernels.core_kernels", lambda: tuple(kernels))
    return lambda: kernels.__setitem__(0, cpu.CpuKernel())


ON_BOTH = {name: SPECS[name] for name in SPECS if name not in ("fp8-block",)} | {
    "blocks": blocks("fp8", 24, 50),
    "padded": grouped("int8", 96, symmetric=False).model_copy(update={"pad": True}),
}


@pytest.mark.parametrize("name", ON_BOTH)
def test_stored_gives_plain_bytes_whatever_the_layout_and_a_move_changes_no_weight(name, gpu_layout):
    there, loaded_there = (quantized(*layer_weights(seed), ON_BOTH[name]) for seed in (0, 7))
    layout = there.groups[0].ctx.layout
    assert layout == (INTERLEAVED if name == "blocks" else interleaved(True, True))
    gpu_layout()
    here = quantized(*layer_weights(), ON_BOTH[name])
    assert here.groups[0].ctx.layout == CONCATENATED
    for projection in PROJECTIONS:
        for expert in range(E):
            assert torch.equal(there.stored(projection, expert), here.stored(projection, expert))
    loaded = quantized(*layer_weights(seed=5), ON_BOTH[name])
    loaded.load_state_dict(there.state_dict())
    assert all(tensor.is_contiguous() for tensor in there.state_dict().values())  # safetensors takes no others
    loaded_there.load_state_dict(here.state_dict())
    for key, tensor in there.groups[0]._buffers.items():
        assert torch.equal(as_bytes(tensor), as_bytes(loaded_there.groups[0].get_buffer(key))), key
        assert tensor.stride() == loaded_there.groups[0].get_buffer(key).stride()
    group = there.groups[0]
    elsewhere = replace(group.ctx.request, device=Device("cuda"))  # so it says: the move below plans anew
    group.ctx = replace(group.ctx, request=elsewhere)
    there.to("cpu")
    assert group.ctx.layout == CONCATENATED
    for key, tensor in here.groups[0]._buffers.items():
        for other in (there, loaded):
            assert torch.equal(as_bytes(tensor), as_bytes(other.groups[0].get_buffer(key))), key


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)  # torch.equal knows no 8-bit floats


@pytest.mark.parametrize("name", SPECS)
def test_the_layers_of_every_spec_are_close_to_the_weights(name):
    w13, w2 = layer_weights()
    experts = quantized(w13, w2, name)
    hidden = torch.randn(5, H, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    plain = moeplug.quantize_experts(w13, w2, moeplug.Scheme.from_text("api: 1\nname: plain\nweights: null\n"))
    arguments = (hidden, torch.ones(5, 1), torch.arange(5).view(5, 1) % E)
    a, b = experts(*arguments).double(), plain(*arguments).double()
    assert float((a - b).norm() / b.norm()) < 0.25  # three products of weights that are within 0.12


def test_the_plans_bytes_are_the_buffers_bytes():
    for name, spec in SPECS.items():
        registry, scheme = Registry.discover(), scheme_of(spec)
        moeplug.api.activate_plugins(scheme, registry, torch.device("cpu"))
        plan = plan_layer(LayerSpec(0, "layer 0", E, 2, H, I), scheme, registry, torch.device("cpu"))
        experts = moeplug.quantize_experts(*layer_weights(), scheme, registry=registry)
        assert plan.bytes_after == sum(t.nbytes for t in experts.groups[0].buffers()), name


def test_activation_formats_come_from_any_installed_plugin_and_spare_unquantized_experts():
    token = ActivationSpec(format="fp8")
    scheme = scheme_of(WeightSpec(format="int4"), token)
    registry = Registry.discover()
    moeplug.api.activate_plugins(scheme, registry, torch.device("cpu"))
    plan = plan_layer(LayerSpec(0, "layer 0", E, 2, H, I), scheme, registry, torch.device("cpu"))
    request = plan.groups[0].ctx.request
    assert (request.input_activations, request.intermediate) == (token, token)
    assert request.activation_format is request.intermediate_format
    assert request.activation_format.name == "fp8"
    down = scheme.model_copy(update={"overrides": override_of("down")})
    request = plan_layer(LayerSpec(0, "layer 0", E, 2, H, I), down, registry, torch.device("cpu")).groups[0].ctx.request
    assert (request.input_activations, request.intermediate, request.intermediate_format) == (token, None, None)


def test_the_scheme_int4_fp8_changes_no_stored_byte_and_little_of_the_result():
    weights = layer_weights()
    sixteen, eight = (moeplug.quantize_experts(*weights, name) for name in ("int4-g128", "int4-fp8"))
    assert "int4 g128, fp8 token activations" in repr(eight)
    for name in ("w13", "w2", "w13_scale", "w2_scale"):
        assert torch.equal(getattr(sixteen.groups[0], name), getattr(eight.groups[0], name))
    hidden = torch.randn(16, H, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    arguments = (hidden, torch.ones(16, 1), (torch.arange(16) % E).view(16, 1))
    out, expected = eight(*arguments).double(), sixteen(*arguments).double()
    # e4m3 rounds to 2.6 % rms; the token is rounded once and enters gate and up, the intermediate once more.
    assert 0.005 < float((out - expected).norm() / expected.norm()) < 0.08
    alone = torch.cat([eight(*(a[m : m + 1] for a in arguments)) for m in range(16)]).double()
    assert float((alone - out).norm() / out.norm()) < 2**-7  # no token's scale knows of another


def override_of(projection):
    head = "api: 1\nname: t\nplugin: int8\nweights: {format: int8}\n"
    return moeplug.Scheme.from_text(f"{head}overrides: [{{projections: [{projection}], weights: null}}]\n").overrides


def test_encode_gives_a_plugin_the_bytes_that_the_core_stores_in_every_layout():
    spec, weight = SPECS["int4-g32"], layer_weights()[0][:1, :I]
    direct = torch.empty(1, I, H // 2, dtype=torch.uint8)
    scales = quantize(weight, spec, FORMATS["int4"], direct, words=True)
    by_hand = torch.empty_like(direct)
    scaled = weight.float().view(1, I, -1, 32) / scales.scale.unsqueeze(-1)
    encode(scaled.clamp(-7, 7).flatten(2), FORMATS["int4"], by_hand, words=True)
    assert torch.equal(direct, by_hand)


def test_layouts_are_told_apart_by_name():
    layouts = [CONCATENATED, *(interleaved(w13, w2) for w13 in (False, True) for w2 in (False, True))]
    assert layouts[1] == INTERLEAVED
    assert [layout.name for layout in layouts] == [
        *("concatenated", "interleaved", "interleaved-words-w2", "interleaved-words-w13"),
        "interleaved-words-w13-w2",
    ]
    assert [(layout.words("up"), layout.words("down")) for layout in layouts[2:]] == [
        *((False, True), (True, False), (True, True))
    ]


def test_8_bit_scales_are_stored_in_a_byte():
    assert scale_dtype(SPECS["mxfp4"]) == torch.uint8
    assert scale_dtype(SPECS["nvfp4"]) == torch.float8_e4m3fn
