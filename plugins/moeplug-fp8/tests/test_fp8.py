"""fp8 is what it says: the nearest e4m3 numbers, whatever the weights; and refused where no tensor core takes them."""

from __future__ import annotations

import pytest
import torch

import moeplug
from moeplug import SchemeError
from moeplug.kernels import Device
from moeplug.quantization import quantize
from moeplug.registry import Registry

REGISTRY = Registry.discover()
REGISTRY.activate("fp8", "this test")
FP8 = REGISTRY.format("fp8")
SCHEMES = ("fp8", "fp8-tensor", "fp8-block", "fp8-w8a16")
# By code: subnormal numbers in steps of 2**-9, then eight numbers for each power of two. Code 127 would be NaN.
E4M3 = torch.tensor([m / 512 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127])
E4M3 = E4M3.double()


def nearest(x):
    """The e4m3 numbers nearest to x, float64; of two, the one with the even code; 448 beyond it."""
    upper = torch.searchsorted(E4M3, x.abs().clamp(max=448))
    lower = (upper - 1).clamp(min=0)
    down, up = x.abs() - E4M3[lower], E4M3[upper] - x.abs()
    return torch.where((up < down) | ((up == down) & (upper % 2 == 0)), E4M3[upper], E4M3[lower]).copysign(x)


def spread(scale, spec, N, K):
    """Scales (R, C) as a factor for each of (N, K) weights, float64."""
    rows = N if scale.shape[0] == 1 else spec.scale_rows
    return scale.double().repeat_interleave(rows, 0)[:N].repeat_interleave(spec.columns(K), 1)[:, :K]


def decoded(stored, scale, spec):
    values = E4M3[(stored & 127).long()].where(stored < 128, -E4M3[(stored & 127).long()])
    return values * spread(scale, spec, *stored.shape)


def quantized(weight, scheme):
    """(what weight (N, K) decodes to in float64, its scales, its spec)"""
    spec, out = REGISTRY.scheme(scheme).weights, torch.empty(1, *weight.shape, dtype=torch.uint8)
    scale = quantize(weight[None], spec, FP8, out).scale[0]
    return decoded(out[0], scale, spec), scale, spec


def of_float64(weight, spec):
    """amax / 448 of each row, block or tensor, rounded to the nearest number and back, all in float64."""
    (N, K), w = weight.shape, weight.double()
    rows, columns = N if spec.strategy == "tensor" else spec.scale_rows, spec.columns(K)
    scale = torch.stack([torch.stack([b.abs().amax() for b in r.split(columns, 1)]) for r in w.split(rows)]) / 448
    spread_scale = spread(scale, spec, N, K)
    return nearest(w / spread_scale) * spread_scale


def random_weight(N, K, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(N, K, generator=g) * torch.exp(torch.randn(N, 1, generator=g)) * 0.02).to(torch.bfloat16)


def rms(x):
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("N", "K"), [(64, 256), (37, 384), (131, 200), (1, 1)], ids=str)
def test_the_error_is_that_of_float64_arithmetic(scheme, N, K):
    weight = random_weight(N, K)
    found, _, spec = quantized(weight, scheme)
    exact = rms(of_float64(weight, spec) - weight.double())
    assert rms(found - weight.double()) <= 1.001 * exact + 2**-24 * rms(weight)  # one weight alone has no error


HOSTILE = {
    "zeros": torch.zeros(128),
    "denormal": torch.linspace(-1, 1, 128) * 1e-40,
    "six-sigma-outlier": torch.cat([random_weight(1, 127)[0].float() * 0.1, torch.tensor([0.6])]),
    "beyond-float16": torch.linspace(-1e6, 1e6, 128),
    "largest-float32": torch.linspace(-1, 1, 128) * 3.4e38,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_weight_comes_back_within_half_a_step_of_a_float(name):
    weight = HOSTILE[name][None]
    for scheme in SCHEMES:
        found, scale, spec = quantized(weight, scheme)
        # Three bits of mantissa: half a step is at most 2**-4 of the number, or of the subnormal numbers' 2**-9. The
        # thousandth is float32's rounding of the scale where it is a subnormal number itself.
        bound = torch.maximum(weight.double().abs() / 16, spread(scale, spec, 1, 128) / 1024) * 1.001
        assert bool(((found - weight.double()).abs() <= bound).all())
        assert bool(torch.isfinite(1 / scale).all())
    assert name != "zeros" or (not found.any() and bool((scale == 1).all()))


def test_values_beyond_the_largest_saturate_and_nan_stays_nan():
    from moeplug.moe.activations import quantize_activations  # what a CPU does to tokens
    from moeplug.spec import ActivationSpec

    tokens = torch.tensor([[1e30, -1e30, 1e29, 0], [1.0, float("nan"), 2, 3]])
    found, _ = quantize_activations(tokens, ActivationSpec(format="fp8"), FP8)
    assert found[0].tolist() == [0x7E, 0xFE, 0x63, 0]  # 448, -448, 44.8 → 44
    assert found[1, 1] & 127 == 127


def test_gate_and_up_do_not_share_a_tensor_scale():
    w13, w2 = random_weight(64, 64)[None].float(), random_weight(64, 32)[None].float()
    w13[:, 32:] *= 1e6
    experts = moeplug.quantize_experts(w13, w2, "fp8-tensor")
    scales = experts.groups[0].w13_scale[0, :, 0]
    for projection, rows in (("gate", slice(0, 32)), ("up", slice(32, 64))):
        spec = experts.groups[0].ctx.spec(projection)
        found = decoded(experts.stored(projection, 0), scales[rows][:1, None], spec)
        assert len(scales[rows].unique()) == 1
        assert rms(found - w13[0, rows].double()) < 0.03 * rms(w13[0, rows])


def fake_quantized(x, spec):
    """What the reference makes of a token: amax / 448 of it, or of each group, and the nearest numbers; float64."""
    if spec is None:
        return x
    groups = x.view(x.shape[0], -1, spec.group_size or x.shape[1])
    scale = groups.abs().amax(2, keepdim=True) / 448
    return (nearest(groups / scale) * scale).view_as(x)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("E", [1, 512])
def test_the_experts_compute_what_the_numbers_say_on_a_cpu(scheme, E):
    size = 128 if scheme == "fp8-block" else 40
    w13 = random_weight(E * 2 * size, size).view(E, 2 * size, size) * 10
    w2 = random_weight(E * size, size, 1).view(E, size, size) * 10
    experts = moeplug.quantize_experts(w13, w2, scheme)
    hidden = torch.randn(6, size, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([0, E - 1, E // 2, 0, E // 3, E - 1]).view(6, 1)
    out = experts(hidden, torch.ones(6, 1), ids)
    group, request = experts.groups[0], experts.groups[0].ctx.request
    for m, e in enumerate(ids[:, 0].tolist()):
        scale = dict(zip(("gate", "up"), group.w13_scale[e].chunk(2), strict=True)) | {"down": group.w2_scale[e]}
        spec = group.ctx.spec("gate")
        gate, up, down = (decoded(experts.stored(p, e), scale[p], spec) for p in ("gate", "up", "down"))
        x = fake_quantized(hidden[m : m + 1].double(), request.input_activations)
        h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        expected = fake_quantized(h, request.intermediate) @ down.T
        # float32 sums; where h is quantized, a value near the middle of two numbers may come out as the other one,
        # 1/8 off, of `size` values.
        assert rms(out[m] - expected[0]) < (1e-5 if request.intermediate is None else 0.02) * rms(expected)


def test_activations_in_8_bits_change_no_stored_byte_and_a_token_does_not_depend_on_its_batch():
    w13, w2 = random_weight(3 * 256, 128).view(3, 256, 128), random_weight(3 * 128, 128, 1).view(3, 128, 128)
    eight, sixteen = (moeplug.quantize_experts(w13, w2, name) for name in ("fp8", "fp8-w8a16"))
    assert "fp8 channel, fp8 token activations" in repr(eight)
    for name in ("w13", "w2", "w13_scale", "w2_scale"):
        assert torch.equal(getattr(eight.groups[0], name), getattr(sixteen.groups[0], name))
    hidden = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    arguments = (hidden, torch.ones(16, 1), (torch.arange(16) % 3).view(16, 1))
    out, expected = eight(*arguments).double(), sixteen(*arguments).double()
    assert 0.01 < float((out - expected).norm() / expected.norm()) < 0.08  # 0.026 a rounding, of x and twice of h
    alone = torch.cat([eight(*(a[m : m + 1] for a in arguments)) for m in range(16)]).double()
    assert float((alone - out).norm() / out.norm()) < 2**-7


def test_activation_groups_that_do_not_divide_are_refused_with_the_next_that_do():
    w13, w2 = random_weight(256, 192)[None], random_weight(192, 128)[None]
    with pytest.raises(SchemeError, match="K=192 is not a multiple of group_size=128; 64 divides it, or use strategy"):
        moeplug.quantize_experts(w13, w2, "fp8-block")


@pytest.fixture
def planned_for(monkeypatch):
    """A function that plans the demo checkpoint for a GPU of some compute capability, which need not be there."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("moeplug.api.find_device", lambda device: torch.device("cuda", 0))

    def plan(scheme, capability):
        monkeypatch.setattr("moeplug.pipeline.plan.device_of", lambda device: Device("cuda", 0, capability))
        return moeplug.plan(scheme=scheme).layers[0].groups[0].ctx.kernel.name

    return plan


@pytest.mark.parametrize("scheme", ["fp8", "fp8-tensor", "fp8-block"])
def test_without_fp8_tensor_cores_a_plan_is_refused_and_names_the_scheme_that_does(scheme, planned_for):
    with pytest.raises(SchemeError, match=r"compute capability 8\.9, cuda:0 has 8\.0; .* as fp8-w8a16 does"):
        planned_for(scheme, (8, 0))
    assert planned_for("fp8-w8a16", (8, 0)) == planned_for(scheme, (8, 9)) == "triton-fused-moe"


@pytest.fixture(scope="module")
def reference_score():
    from moeplug import evaluation
    from moeplug.api import demo_checkpoint
    from moeplug.integrations.transformers import reference_model, tokenizer_of

    ids = evaluation.encode_file(tokenizer_of(demo_checkpoint()), demo_checkpoint().parent / "heldout.txt", 8192)
    return ids, evaluation.score_text(reference_model(demo_checkpoint(), torch.device("cpu")), ids)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_demo_models_perplexity_hardly_changes(scheme, reference_score):
    from moeplug import evaluation

    ids, reference = reference_score
    loaded = moeplug.load(None, scheme, device="cpu", runtime="transformers")
    result = evaluation.compare(reference, evaluation.score_text(loaded.model, ids))
    assert 0.99 < result["perplexity_ratio"] < 1.005
    assert result["top1_agreement"] > 0.96
