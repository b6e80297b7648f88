"""nf4 is what it says: the nearest of its 16 values times the scale of 64, also where the scales have 8 bits."""

from __future__ import annotations

import pytest
import torch
from moeplug_nf4.codebook import VALUES
from moeplug_nf4.hooks import Nf4

import moeplug

E, H, I = 3, 256, 128
GROUP = 64


def weights(seed=0, experts=E, hidden=H, intermediate=I):
    g = torch.Generator().manual_seed(seed)
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=g)
    w13 *= torch.exp(torch.randn(experts, 2 * intermediate, 1, generator=g)) * 0.02
    w2 = torch.randn(experts, hidden, intermediate, generator=g) * 0.05
    return w13.to(torch.bfloat16), w2.to(torch.bfloat16)


def nearest(x):
    """float64, by exact distances: the nearest of the 16 values to each of x (...)."""
    values = torch.tensor(VALUES, dtype=torch.float64)
    return values[(x.unsqueeze(-1) - values).abs().argmin(-1)]


def scales(experts, projection, expert):
    """(N, C) float64 of one expert weight; with 8 bits, times the scale of the whole weight."""
    group = experts.groups[0]
    rows = group.ctx.layout.rows(projection, group.ctx.layer.intermediate_size)
    buffer = "w2" if projection == "down" else "w13"
    scale = getattr(group, f"{buffer}_scale")[expert, rows].double()
    if hasattr(group, f"{buffer}_global_scale"):
        scale = scale * getattr(group, f"{buffer}_global_scale")[expert, rows].double().unsqueeze(1)
    return scale


def decoded(experts, projection, expert):
    stored = experts.stored(projection, expert)
    codes = torch.stack([stored & 15, stored >> 4], -1).flatten(-2)
    values = torch.tensor(VALUES, dtype=torch.float64)[codes.long()]
    return values * scales(experts, projection, expert).repeat_interleave(GROUP, 1)


def exact(weight):
    """float64: amax of 64 as it is, the nearest value, and back."""
    groups = weight.double().unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2, keepdim=True)
    return (nearest(groups / scale) * scale).flatten(1)


def rms_error(a, b):
    return float((a - b.double()).square().mean().sqrt())


def test_the_values_are_quantiles_of_a_normal_distribution():
    """Nine of the positive half and eight of the negative one, nought in both, as QLoRA's appendix E defines them."""
    end = (1 - 1 / 32 + 1 - 1 / 30) / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)]) / positive.max()
    torch.testing.assert_close(torch.tensor(VALUES, dtype=torch.float64), values, rtol=0, atol=1e-6)
    assert torch.tensor(VALUES).double().tolist() == list(VALUES)  # every digit is a float32's


def test_rounding_is_to_the_nearest_value():
    x = torch.linspace(-1, 1, 1000)
    out, values = torch.empty(500, dtype=torch.uint8), torch.empty(1000)
    Nf4().encode(x.clone(), out)
    Nf4().decode(out, values)
    assert torch.equal(values.double(), nearest(x.double()))


def test_the_first_of_two_codes_is_the_low_nibble_and_code_7_is_nought():
    out = torch.empty(2, dtype=torch.uint8)
    Nf4().encode(torch.tensor([0.0, 1.0, -1.0, 0.08]), out)
    assert out.tolist() == [0xF7, 0x80]


def test_the_error_is_that_of_float64_arithmetic():
    w13, w2 = weights()
    experts = moeplug.quantize_experts(w13, w2, "nf4")
    for projection, weight in (("gate", w13[:, :I]), ("up", w13[:, I:]), ("down", w2)):
        for e in range(E):
            ours = rms_error(decoded(experts, projection, e), weight[e])
            assert ours <= 1.001 * rms_error(exact(weight[e]), weight[e])


def test_scales_of_8_bits_cost_little_accuracy_and_the_bytes_that_they_claim():
    w13, w2 = weights()
    plain, double = (moeplug.quantize_experts(w13, w2, name) for name in ("nf4", "nf4-dq"))
    for projection, weight in (("gate", w13[:, :I]), ("down", w2)):
        for e in range(E):
            errors = [rms_error(decoded(experts, projection, e), weight[e]) for experts in (plain, double)]
            assert errors[1] < 1.03 * errors[0]  # an e4m3 scale is off by up to 6 %, 2 % rms; the error itself is 9 %
    values = w13.numel() + w2.numel()
    rows = E * (2 * I + H)
    assert sum(tensor.nbytes for tensor in plain.groups[0].buffers()) == values // 2 + 4 * values // GROUP
    assert sum(tensor.nbytes for tensor in double.groups[0].buffers()) == values // 2 + values // GROUP + 4 * rows


def test_weights_are_encoded_with_the_scales_that_are_stored():
    w13, w2 = weights()
    experts = moeplug.quantize_experts(w13, w2, "nf4-dq")
    scale = scales(experts, "down", 0).repeat_interleave(GROUP, 1)
    expected = nearest((w2[0].double() / scale).clamp(-1, 1)) * scale
    assert float((decoded(experts, "down", 0) == expected).double().mean()) > 0.999  # but for float32's quotients


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
def test_a_forward_is_that_of_the_decoded_weights_in_float64(name):
    experts = moeplug.quantize_experts(*weights(), name)
    hidden = torch.randn(5, H, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1], [2, 0], [1, 1], [-1, 2], [0, 2]])
    ours = experts(hidden, torch.full((5, 2), 0.5), ids).double()
    expected = torch.zeros(5, H, dtype=torch.float64)
    for m, t in ((m, t) for m in range(5) for t in range(2) if ids[m, t] >= 0):
        gate, up, down = (decoded(experts, p, int(ids[m, t])) for p in ("gate", "up", "down"))
        x = hidden[m].double()
        expected[m] += 0.5 * down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1e-30, 1e6, 3e38], ids=str)
def test_extreme_weights_stay_finite_and_zeros_stay_zeros(name, magnitude):
    w2 = torch.randn(1, H, I, generator=torch.Generator().manual_seed(2)).clamp(-1, 1) * magnitude
    w2[0, :7] = 0
    experts = moeplug.quantize_experts(torch.zeros(1, 2 * I, H), w2, name)
    values = decoded(experts, "down", 0)
    assert bool(torch.isfinite(values.float()).all())
    assert not values[:7].any()
    assert bool(torch.isfinite(1 / scales(experts, "down", 0).float()).all())
    if magnitude in (1e-30, 1e6):
        assert rms_error(values / magnitude, w2[0].double() / magnitude) < 0.1


@pytest.mark.parametrize(
    ("experts", "hidden", "intermediate"), [(1, 64, 64), (512, 64, 64), (2, 192, 320)],
    ids=["one_expert", "512_experts", "sizes_of_3_and_5_groups"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
def test_layers_of_any_size_are_close_to_their_weights(experts, hidden, intermediate, name):
    w13, w2 = weights(3, experts, hidden, intermediate)
    layer = moeplug.quantize_experts(w13, w2, name)
    for e in (0, experts - 1):
        assert rms_error(decoded(layer, "down", e), w2[e]) < 0.11 * float(w2[e].double().square().mean().sqrt())


def test_an_odd_number_of_rows_is_served():
    w13, w2 = weights(4, 2, 64, 37)
    text = "{format: nf4, strategy: group, group_size: 64}\noverrides: [{projections: [down], weights: null}]\n"
    layer = moeplug.quantize_experts(
        w13, w2, moeplug.Scheme.from_text(f"api: 1\nname: t\nplugin: nf4\nweights: {text}")
    )
    assert rms_error(decoded(layer, "up", 1), w13[1, 37:]) <= 1.001 * rms_error(exact(w13[1, 37:]), w13[1, 37:])


def test_a_size_that_64_does_not_divide_is_refused_with_a_group_that_does():
    with pytest.raises(moeplug.SchemeError, match="K=96 is not a multiple of group_size=64; 32 divides it"):
        moeplug.quantize_experts(*weights(0, 1, 96, 64), "nf4")


def test_zero_points_are_refused():
    text = "weights: {format: nf4, strategy: group, group_size: 64, symmetric: false}\n"
    with pytest.raises(moeplug.SchemeError, match="plugin 'nf4' has no zero points; write symmetric: true"):
        moeplug.quantize_experts(*weights(), moeplug.Scheme.from_text(f"api: 1\nname: t\nplugin: nf4\n{text}"))


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
def test_the_demo_model_stays_close(name):
    from moeplug import evaluation
    from moeplug.api import demo_checkpoint
    from moeplug.integrations.transformers import reference_model, tokenizer_of

    ids = evaluation.encode_file(tokenizer_of(demo_checkpoint()), demo_checkpoint().parent / "heldout.txt", 4096)
    reference = evaluation.score_text(reference_model(demo_checkpoint(), torch.device("cpu")), ids)
    loaded = moeplug.load(None, name, device="cpu", runtime="transformers")
    result = evaluation.compare(reference, evaluation.score_text(loaded.model, ids))
    assert 0.99 < result["perplexity_ratio"] < 1.02
    assert result["top1_agreement"] > 0.92
