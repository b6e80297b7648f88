"""mxfp8 and mxfp4 are the numbers of OCP MX v1.0, bit for bit, whatever the weights."""

from __future__ import annotations

import math

import pytest
import torch

import moeplug
from moeplug import Scheme, SchemeError
from moeplug.kernels import Device
from moeplug.quantization import quantize
from moeplug.registry import Registry

REGISTRY = Registry.discover()
REGISTRY.activate("mx", "this test")
SCHEMES = ("mxfp8", "mxfp4")
# Magnitudes by code, float64: subnormal numbers in even steps, then as many for each power of two.
ELEMENTS = {
    "mxfp8": torch.tensor(
        [m / 512 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127],
        dtype=torch.float64,
    ),
    "mxfp4": torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64),
}
LARGEST_EXPONENT = {"mxfp8": 8, "mxfp4": 2}  # of 448 and of 6


def nearest(x, values):
    """The element nearest to x, float64; of two, the one with the even code; the largest beyond it."""
    x = x.clamp(-values[-1], values[-1])
    upper = torch.searchsorted(values, x.abs())
    lower = (upper - 1).clamp(min=0)
    down, up = x.abs() - values[lower], values[upper] - x.abs()
    return torch.where((up < down) | ((up == down) & (upper % 2 == 0)), values[upper], values[lower]).copysign(x)


def of_the_standard(weight, name):
    """(exponents, decoded weight), float64: X = 2**(floor(log2(amax)) - emax) of each 32, and the nearest elements."""
    groups, scales = weight.double().view(weight.shape[0], -1, 32), []
    for amax in groups.abs().amax(2).flatten().tolist():
        exponent = math.frexp(amax)[1] - 1 - LARGEST_EXPONENT[name] if amax else 0
        scales.append(max(exponent, -127))
    exponents = torch.tensor(scales).view(weight.shape[0], -1)
    scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents).unsqueeze(2)
    return exponents, (nearest(groups / scale, ELEMENTS[name]) * scale).view(weight.shape)


def decoded(stored, scale, name):
    """What bytes (N, K or K / 2) and exponents (N, K / 32) mean, float64."""
    bits = 4 if name == "mxfp4" else 8
    codes = torch.stack([stored & 15, stored >> 4], 2).flatten(1) if bits == 4 else stored
    sign = 1 - 2 * (codes >> (bits - 1)).double()
    values = sign * ELEMENTS[name][(codes & (2 ** (bits - 1) - 1)).long()]
    return values * torch.pow(2.0, scale.double() - 127).repeat_interleave(32, 1)


def quantized(weight, name):
    """(what weight (N, K) decodes to in float64, its exponents)"""
    fmt, spec = REGISTRY.format(name), REGISTRY.scheme(name).weights
    out = torch.empty(1, weight.shape[0], weight.shape[1] // fmt.values_per_element, dtype=torch.uint8)
    scale = quantize(weight[None], spec, fmt, out).scale[0]
    return decoded(out[0], scale, name), scale.int() - 127


def random_weight(N, K, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(N, K, generator=g) * torch.exp(torch.randn(N, 1, generator=g)) * 0.02).to(torch.bfloat16)


def rms(x):
    return float(x.double().square().mean().sqrt())


RAMP = torch.linspace(-1, 1, 32)
WEIGHTS = {
    "odd-N": random_weight(37, 256),
    "one-group": random_weight(1, 32),
    "zeros": torch.zeros(1, 64),
    "denormal": torch.cat([RAMP * 1e-40, RAMP * 1e-44])[None],
    "six-sigma-outlier": torch.cat([random_weight(1, 95)[0].float() * 0.1, torch.tensor([0.6])])[None],
    "beyond-float16": torch.cat([RAMP * 1e6, RAMP * 1e30])[None],
    "largest-float32": (RAMP * 3.4e38)[None],
    "ties": torch.tensor([[4.0, *[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -0.25, -0.75, -1.25, -2.5] * 3, 0.0]]),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_stored_weights_are_those_of_the_standard_in_float64_arithmetic(kind, name):
    found, exponents = quantized(WEIGHTS[kind], name)
    expected_exponents, expected = of_the_standard(WEIGHTS[kind], name)
    assert torch.equal(exponents.long(), expected_exponents)
    assert torch.equal(found, expected)
    assert kind != "zeros" or (not found.any() and not exponents.any())


@pytest.mark.parametrize(("name", "largest"), [("mxfp8", 448.0), ("mxfp4", 6.0)])
def test_what_lies_between_the_largest_element_and_the_next_power_of_two_saturates(name, largest):
    beyond = torch.full((1, 32), 2.0 ** (LARGEST_EXPONENT[name] + 1) * 0.999)
    beyond[0, 1::2] *= -1
    found, exponents = quantized(beyond, name)
    assert exponents.tolist() == [[0]]
    assert found.tolist() == [[largest, -largest] * 16]


@pytest.mark.parametrize(("name", "least", "most"), [("mxfp8", 0.027, 0.031), ("mxfp4", 0.11, 0.12)])
def test_the_error_on_gaussian_weights_is_what_the_readme_says(name, least, most):
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    assert least < rms(quantized(weight, name)[0] - weight) / rms(weight) < most


def experts_of(scheme, E, size=64):
    w13 = random_weight(E * 2 * size, size).view(E, 2 * size, size) * 10
    w2 = random_weight(E * size, size, 1).view(E, size, size) * 10
    return moeplug.quantize_experts(w13, w2, scheme)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("E", [1, 512])
def test_the_experts_compute_what_the_numbers_say_on_a_cpu(name, E):
    experts = experts_of(name, E)
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([0, E - 1, E // 2, 0, E // 3, E - 1]).view(6, 1)
    out, group = experts(hidden, torch.ones(6, 1), ids), experts.groups[0]
    for m, e in enumerate(ids[:, 0].tolist()):
        scale = dict(zip(("gate", "up"), group.w13_scale[e].chunk(2), strict=True)) | {"down": group.w2_scale[e]}
        gate, up, down = (decoded(experts.stored(p, e), scale[p], name) for p in ("gate", "up", "down"))
        x = hidden[m : m + 1].double()
        expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        assert rms(out[m] - expected[0]) < 1e-5 * rms(expected)  # sums in float32


HEAD = """
api: 1
name: t
plugin: mx
weights: {{format: {}, strategy: group, group_size: 32, scale_dtype: float8_e8m0fnu}}
"""
ACTIVATIONS = HEAD + "input_activations: {{format: mxfp8, strategy: token}}\n"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_may_quantize_activations_per_token_too(name):
    eight, sixteen = experts_of(Scheme.from_text(ACTIVATIONS.format(name)), 3), experts_of(name, 3)
    hidden = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    arguments = (hidden, torch.ones(16, 1), (torch.arange(16) % 3).view(16, 1))
    out, expected = eight(*arguments).double(), sixteen(*arguments).double()
    assert 0.01 < rms(out - expected) / rms(expected) < 0.08  # 0.026 a rounding, of x and twice of h


@pytest.mark.parametrize("name", SCHEMES)
def test_gpus_without_fp8_serve_16_bit_activations_and_refuse_8_bit_ones(name, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("moeplug.api.find_device", lambda device: torch.device("cuda", 0))

    def kernel(scheme, capability):
        monkeypatch.setattr("moeplug.pipeline.plan.device_of", lambda device: Device("cuda", 0, capability))
        return moeplug.plan(scheme=scheme).layers[0].groups[0].ctx.kernel.name

    eight = Scheme.from_text(ACTIVATIONS.format(name))
    assert kernel(name, (8, 0)) == kernel(eight, (8, 9)) == "triton-fused-moe"
    with pytest.raises(SchemeError, match=r"fp8 activations need compute capability 8\.9, cuda:0 has 8\.0"):
        kernel(eight, (8, 0))


@pytest.mark.parametrize(("K", "hint"), [(48, "16 divides it, or use"), (40, "use")])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_size_that_32_does_not_divide_is_refused_with_what_does(name, K, hint):
    w13, w2 = random_weight(128, K)[None], random_weight(K, 64)[None]
    with pytest.raises(
        SchemeError, match=f"K={K} is not a multiple of group_size=32; {hint} pad: true, or strategy: channel"
    ):
        moeplug.quantize_experts(w13, w2, name)
    text = HEAD.format(name).replace("strategy: group, group_size: 32", "strategy: channel")
    assert moeplug.quantize_experts(w13, w2, Scheme.from_text(text)).groups[0].w2_scale.shape == (1, K, 1)


@pytest.fixture(scope="module")
def reference_score():
    from moeplug import evaluation
    from moeplug.api import demo_checkpoint
    from moeplug.integrations.transformers import reference_model, tokenizer_of

    ids = evaluation.encode_file(tokenizer_of(demo_checkpoint()), demo_checkpoint().parent / "heldout.txt", 8192)
    return ids, evaluation.score_text(reference_model(demo_checkpoint(), torch.device("cpu")), ids)


@pytest.mark.parametrize(("name", "ratio", "agreement"), [("mxfp8", 1.005, 0.965), ("mxfp4", 1.025, 0.91)])
def test_the_demo_models_perplexity_changes_little(name, ratio, agreement, reference_score):
    from moeplug import evaluation

    ids, reference = reference_score
    loaded = moeplug.load(None, name, device="cpu", runtime="transformers")
    result = evaluation.compare(reference, evaluation.score_text(loaded.model, ids))
    assert 0.99 < result["perplexity_ratio"] < ratio
    assert result["top1_agreement"] > agreement
