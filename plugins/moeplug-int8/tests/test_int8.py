"""int8 is what it says: nearest integers, the error of float64 arithmetic, and a demo model that hardly changes."""

from __future__ import annotations

import pytest
import torch

import moeplug
from moeplug import Scheme

E, H, I = 3, 256, 128


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.exp(torch.randn(E, 2 * I, 1, generator=g))
    w13 = torch.randn(E, 2 * I, H, generator=g) * rows * 0.02
    return w13.to(torch.bfloat16), (torch.randn(E, H, I, generator=g) * 0.05).to(torch.bfloat16)


def decoded(experts, projection, expert, group_size):
    group = experts.groups[0]
    name = "w2" if projection == "down" else "w13"
    rows = group.ctx.layout.rows(projection, I)
    scale = getattr(group, f"{name}_scale")[expert, rows].double().repeat_interleave(group_size, 1)
    zero = getattr(group, f"{name}_zero_point", None)
    zero = 0 if zero is None else zero[expert, rows].double().repeat_interleave(group_size, 1)
    return (experts.stored(projection, expert).double() - zero) * scale


def exact_per_channel(weight):
    """float64: amax / 127, rounded to nearest, and back."""
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    return (weight.double() / scale).round().clamp(-127, 127) * scale


def rms_error(a, b):
    return float((a - b.double()).square().mean().sqrt())


def test_per_channel_error_is_that_of_float64_arithmetic():
    w13, w2 = weights()
    experts = moeplug.quantize_experts(w13, w2, "int8")
    for projection, weight in (("gate", w13[:, :I]), ("up", w13[:, I:]), ("down", w2)):
        for e in range(E):
            ours = rms_error(decoded(experts, projection, e, weight.shape[2]), weight[e])
            assert ours <= 1.001 * rms_error(exact_per_channel(weight[e]), weight[e])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_keep_every_weight_within_half_a_step(group_size, symmetric):
    scheme = Scheme.from_text(
        "api: 1\nname: t\nplugin: int8\n"
        f"weights: {{format: int8, strategy: group, group_size: {group_size}, symmetric: {str(symmetric).lower()}}}\n"
    )
    w13, w2 = weights()
    experts = moeplug.quantize_experts(w13, w2, scheme)
    for e in range(E):
        step = experts.groups[0].w2_scale[e].double().repeat_interleave(group_size, 1)
        off = (decoded(experts, "down", e, group_size) - w2[e].double()).abs()
        # Half a step, and float32's rounding of the quotient near a tie. With zero points, a value at an end of the
        # range may be clamped by up to half a step more, because the zero point itself was rounded.
        assert bool((off <= step * (0.501 if symmetric else 1.001)).all())


def test_smaller_groups_and_zero_points_reduce_the_error():
    w13, w2 = weights()
    errors = {}
    for name, group_size in (("int8", I), ("int8-g128", 128), ("int8-g64", 64), ("int8-g32", 32)):
        experts = moeplug.quantize_experts(w13, w2 + 0.02, name)
        errors[name] = sum(rms_error(decoded(experts, "down", e, group_size), (w2 + 0.02)[e]) for e in range(E))
    assert errors["int8-g32"] < errors["int8-g64"] < errors["int8-g128"] == pytest.approx(errors["int8"])
    asymmetric = moeplug.quantize_experts(w13, w2 + 0.02, "int8-g128-asym")
    assert sum(rms_error(decoded(asymmetric, "down", e, 128), (w2 + 0.02)[e]) for e in range(E)) < errors["int8-g128"]


@pytest.fixture(scope="module")
def reference_score():
    from moeplug import evaluation
    from moeplug.api import demo_checkpoint
    from moeplug.integrations.transformers import reference_model, tokenizer_of

    ids = evaluation.encode_file(tokenizer_of(demo_checkpoint()), demo_checkpoint().parent / "heldout.txt")
    return ids, evaluation.score_text(reference_model(demo_checkpoint(), torch.device("cpu")), ids)


@pytest.mark.parametrize("scheme", ["int8", "int8-g128"])
def test_the_demo_models_perplexity_hardly_changes(scheme, reference_score):
    from moeplug import evaluation

    ids, reference = reference_score
    loaded = moeplug.load(None, scheme, device="cpu", runtime="transformers")
    result = evaluation.compare(reference, evaluation.score_text(loaded.model, ids))
    assert 0.99 < result["perplexity_ratio"] <= 1.002
    assert result["top1_agreement"] > 0.98


def test_activations_in_8_bits_change_no_stored_byte_and_little_of_the_result():
    w13, w2 = weights()
    hidden = torch.randn(16, H, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    arguments = (hidden, torch.ones(16, 1), (torch.arange(16) % E).view(16, 1))
    sixteen, eight = (moeplug.quantize_experts(w13, w2, name) for name in ("int8", "int8-w8a8"))
    assert "int8 channel, int8 token activations" in repr(eight)
    for name in ("w13", "w2", "w13_scale", "w2_scale"):
        assert torch.equal(getattr(sixteen.groups[0], name), getattr(eight.groups[0], name))
    out, expected = eight(*arguments).double(), sixteen(*arguments).double()
    # A rounded token is about 0.7 % of its rms off (amax of 256 normal values is 3 deviations), the intermediate twice.
    assert 0.001 < float((out - expected).norm() / expected.norm()) < 0.03
    alone = torch.cat([eight(*(a[m : m + 1] for a in arguments)) for m in range(16)]).double()
    assert float((alone - out).norm() / out.norm()) < 2**-7  # no token's scale knows of another
