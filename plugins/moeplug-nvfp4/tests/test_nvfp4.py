"""nvfp4 is what it says: e2m1 numbers, under e4m3 scales that the weights were encoded with, whatever the weights."""

from __future__ import annotations

import pytest
import torch

import moeplug
from moeplug import Scheme, SchemeError
from moeplug.kernels import Device
from moeplug.quantization import quantize
from moeplug.registry import Registry

REGISTRY = Registry.discover()
REGISTRY.activate("nvfp4", "this test")
NVFP4, SPEC = REGISTRY.format("nvfp4"), REGISTRY.scheme("nvfp4").weights
# Magnitudes by code, float64: subnormal numbers in even steps, then as many for each power of two.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.tensor(
    [m / 512 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127], dtype=torch.float64
)


def nearest(x, values):
    """The number nearest to x, float64; of two, the one with the even code; the largest beyond it."""
    x = x.clamp(-values[-1], values[-1])
    upper = torch.searchsorted(values, x.abs())
    lower = (upper - 1).clamp(min=0)
    down, up = x.abs() - values[lower], values[upper] - x.abs()
    return torch.where((up < down) | ((up == down) & (upper % 2 == 0)), values[upper], values[lower]).copysign(x)


def of_float64(weight):
    """Weight (N, K) by the rule, in float64: a global scale amax / (448 * 6), e4m3 scales amax / 6 of it, e2m1."""
    groups = weight.double().view(weight.shape[0], -1, 16)
    of_weight = groups.abs().max() / (448 * 6)
    wanted = groups.abs().amax(2, keepdim=True) / 6 / of_weight
    scale = nearest(wanted.clamp(min=2**-9), E4M3) * of_weight
    return (nearest(groups / scale, E2M1) * scale).view(weight.shape)


def decoded(stored, scale, global_scale):
    """What bytes (N, K / 2), scales (N, K / 16) and a global scale, one or (N,), mean, float64."""
    codes = torch.stack([stored & 15, stored >> 4], 2).flatten(1)
    values = (1 - 2 * (codes >> 3).double()) * E2M1[(codes & 7).long()]
    return values * (scale.double() * global_scale.double().view(-1, 1)).repeat_interleave(16, 1)


def quantized(weight):
    """(what weight (N, K) decodes to in float64, its Scales)"""
    out = torch.empty(1, weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)
    scales = quantize(weight[None], SPEC, NVFP4, out)
    return decoded(out[0], scales.scale[0], scales.global_scale[0]), scales


def random_weight(N, K, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(N, K, generator=g) * torch.exp(torch.randn(N, 1, generator=g)) * 0.02).to(torch.bfloat16)


def rms(x):
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize(("N", "K"), [(64, 256), (37, 400), (1, 16), (131, 48)], ids=str)
def test_the_error_is_that_of_float64_arithmetic(N, K):
    weight = random_weight(N, K)
    assert rms(quantized(weight)[0] - weight) <= 1.001 * rms(of_float64(weight) - weight)


def test_the_error_on_gaussian_weights_is_what_the_readme_says():
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    assert 0.09 < rms(quantized(weight)[0] - weight) / rms(weight) < 0.1


def test_numbers_in_the_middle_of_two_go_to_the_even_code():
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    # 6 × 448 as the largest weight makes the global scale 1, and 6 the scale of these groups 1.
    weight = torch.tensor([[6.0 * 448, *[0.0] * 15], [*middles, *[-m for m in middles], 6.0, 0.0]])
    assert quantized(weight)[0][1, :14].tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4]


RAMP = torch.linspace(-1, 1, 16)
HOSTILE = {
    "zeros": torch.zeros(64),
    "a-group-of-zeros": torch.cat([RAMP, torch.zeros(16)]),
    "denormal": torch.cat([RAMP * 1e-40, RAMP * 1e-41]),
    "six-sigma-outlier": torch.cat([random_weight(1, 127)[0].float() * 0.1, torch.tensor([0.6])]),
    "beyond-float16": torch.cat([RAMP * 1e6, RAMP * 1e5]),
    "largest-float32": torch.cat([RAMP * 3.4e38, RAMP * 1e38]),
    "groups-far-apart": torch.cat([RAMP, RAMP * 1e-3, RAMP * 1e-5, RAMP * 1e-9]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_weight_comes_back_within_a_step_of_its_scale(name):
    weight = HOSTILE[name][None]
    found, scales = quantized(weight)
    scale = (scales.scale[0].double() * scales.global_scale[0].double()).repeat_interleave(16, 1)
    # Elements are at most 2 apart, 4 and 6; a scale that e4m3 rounded down by 1/16 saturates what is 6.375 of it.
    assert bool(((found - weight.double()).abs() <= scale * 1.001).all())
    assert bool(torch.isfinite(1 / (scales.scale.float() * scales.global_scale)).all())
    assert not found[weight == 0].any()
    assert name != "zeros" or bool((scales.scale.float() * scales.global_scale == 1).all())


def experts_of(E, size=64):
    w13 = random_weight(E * 2 * size, size).view(E, 2 * size, size) * 10
    w2 = random_weight(E * size, size, 1).view(E, size, size) * 10
    return moeplug.quantize_experts(w13, w2, "nvfp4")


@pytest.mark.parametrize("E", [1, 512])
def test_the_experts_compute_what_the_numbers_say_on_a_cpu(E):
    experts = experts_of(E)
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([0, E - 1, E // 2, 0, E // 3, E - 1]).view(6, 1)
    out, group = experts(hidden, torch.ones(6, 1), ids), experts.groups[0]
    for m, e in enumerate(ids[:, 0].tolist()):
        scales = [(group.w13_scale[e], group.w13_global_scale[e]), (group.w2_scale[e], group.w2_global_scale[e])]
        gate_up = torch.cat([experts.stored("gate", e), experts.stored("up", e)])
        gate, up = decoded(gate_up, *scales[0]).chunk(2)
        x = hidden[m : m + 1].double()
        h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        expected = h @ decoded(experts.stored("down", e), *scales[1]).T
        assert rms(out[m] - expected[0]) < 1e-5 * rms(expected)  # sums in float32


def test_gate_and_up_have_a_global_scale_each():
    w13 = random_weight(64, 64)[None].float()
    w13[:, 32:] *= 1e6
    scales = moeplug.quantize_experts(w13, random_weight(64, 32)[None].float(), "nvfp4").groups[0].w13_global_scale[0]
    assert scales.tolist() == [scales[0]] * 32 + [scales[-1]] * 32
    assert scales[-1] > 1e5 * scales[0]


@pytest.mark.parametrize("K", [40, 72])
def test_a_size_that_16_does_not_divide_is_refused_and_a_scale_per_row_serves_it(K):
    w13, w2 = random_weight(128, K)[None], random_weight(K, 64)[None]
    with pytest.raises(
        SchemeError, match=f"K={K} is not a multiple of group_size=16; use pad: true, or strategy: channel"
    ):
        moeplug.quantize_experts(w13, w2, "nvfp4")
    text = "api: 1\nname: t\nplugin: nvfp4\nweights: {format: nvfp4, strategy: channel, scale_dtype: float8_e4m3fn}\n"
    assert moeplug.quantize_experts(w13, w2, Scheme.from_text(text)).groups[0].w2_scale.shape == (1, K, 1)


def test_activations_are_left_alone_and_a_scheme_that_asks_for_them_is_refused():
    text = "api: 1\nname: t\nextends: nvfp4\ninput_activations: {format: nvfp4, strategy: token}\n"
    with pytest.raises(SchemeError, match="plugin 'nvfp4' does not do strategy: token; it quantizes no activations"):
        moeplug.plan(scheme=Scheme.from_text(text, installed=REGISTRY.scheme_files()), device="cpu")


def test_a_gpu_without_8_bit_floats_is_refused(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("moeplug.api.find_device", lambda device: torch.device("cuda", 0))

    def kernel(capability):
        monkeypatch.setattr("moeplug.pipeline.plan.device_of", lambda device: Device("cuda", 0, capability))
        return moeplug.plan(scheme="nvfp4").layers[0].groups[0].ctx.kernel.name

    assert kernel((8, 9)) == "triton-fused-moe"
    with pytest.raises(SchemeError, match=r"float8_e4m3fn needs compute capability 8\.9, cuda:0 has 8\.0"):
        kernel((8, 0))


def test_the_demo_models_perplexity_changes_little():
    from moeplug import evaluation
    from moeplug.api import demo_checkpoint
    from moeplug.integrations.transformers import reference_model, tokenizer_of

    ids = evaluation.encode_file(tokenizer_of(demo_checkpoint()), demo_checkpoint().parent / "heldout.txt", 8192)
    reference = evaluation.score_text(reference_model(demo_checkpoint(), torch.device("cpu")), ids)
    loaded = moeplug.load(None, "nvfp4", device="cpu", runtime="transformers")
    result = evaluation.compare(reference, evaluation.score_text(loaded.model, ids))
    assert 0.99 < result["perplexity_ratio"] < 1.015
    assert result["top1_agreement"] > 0.93
