"""The reference is the formula, its rounding points are where its docstring says, and transformers agrees."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from formats import FORMATS

from moeplug.formats import Unquantized
from moeplug.kernels.select import Device, KernelRequest
from moeplug.moe.activations import ACTIVATION_FUNCTIONS, fake_quantized, quantize_activations
from moeplug.moe.layout import ACTIVATIONS, LayerSpec
from moeplug.moe.reference import ExpertWeights, experts_reference
from moeplug.spec import ActivationSpec

M, T, E, H, I = 7, 3, 5, 12, 10


def layer(dtype: torch.dtype = torch.float64, seed: int = 0):
    """Return (hidden, topk_weights, topk_ids, experts) of a small layer; ids distinct per token."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, H, generator=g, dtype=torch.float64)
    experts = [
        ExpertWeights(*(torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((I, H), (I, H), (H, I))))
        for _ in range(E)
    ]
    ids = torch.rand(M, E, generator=g).argsort(1)[:, :T]
    return hidden, torch.rand(M, T, generator=g), ids, experts


SCALAR_ACTIVATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "none": lambda x: x,
}


def by_hand(hidden, topk_weights, topk_ids, experts, activation):
    """The formula of moeplug.moe.layout as scalar loops in Python floats."""
    act, out = SCALAR_ACTIVATIONS[activation], torch.zeros(hidden.shape, dtype=torch.float64)
    for m in range(hidden.shape[0]):
        for t in range(topk_ids.shape[1]):
            e = int(topk_ids[m, t])
            if 0 <= e < len(experts):
                gate, up, down = (w.tolist() for w in experts[e][:3])
                x = hidden[m].tolist()
                h = [act(_dot(gate[i], x)) * _dot(up[i], x) for i in range(len(gate))]
                y = [_dot(row, h) for row in down]
                out[m] += float(topk_weights[m, t]) * torch.tensor(y, dtype=torch.float64)
    return out


def _dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("activation", SCALAR_ACTIVATIONS)
def test_the_reference_is_the_formula(activation):
    hidden, topk_weights, topk_ids, experts = layer()
    out = experts_reference(hidden, topk_weights, topk_ids, experts, activation=activation)
    # float64 sums of 12 terms in another order: a few units of 2**-53 of values near 30.
    torch.testing.assert_close(out, by_hand(*layer(), activation), rtol=1e-12, atol=1e-12)


def test_every_activation_of_a_layer_has_a_function():
    assert {*ACTIVATION_FUNCTIONS, "swiglu_clamped"} == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_out_of_range_contribute_nothing_and_repeated_ids_count_twice(dtype):
    hidden, topk_weights, topk_ids, experts = layer()
    topk_ids = topk_ids.to(dtype)
    topk_ids[0], topk_ids[1, 0], topk_ids[2, 1] = -1, E, torch.iinfo(dtype).max
    topk_ids[3] = 2
    out = experts_reference(hidden, topk_weights, topk_ids, experts)
    torch.testing.assert_close(out, by_hand(hidden, topk_weights, topk_ids, experts, "silu"), rtol=1e-12, atol=1e-12)
    assert torch.equal(out[0], torch.zeros(H, dtype=torch.float64))


@pytest.mark.parametrize(("tokens", "choices"), [(0, T), (M, 0), (0, 0)], ids=["M=0", "T=0", "both"])
def test_nothing_to_do_gives_zeros_of_the_right_shape(tokens, choices):
    hidden, topk_weights, topk_ids, experts = layer()
    out = experts_reference(hidden[:tokens], topk_weights[:tokens, :choices], topk_ids[:tokens, :choices], experts)
    assert torch.equal(out, torch.zeros(tokens, H, dtype=hidden.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_hidden_rounds_the_intermediate_and_the_output_and_nothing_else(dtype):
    hidden, topk_weights, topk_ids, experts = layer(torch.float32)
    hidden = hidden.to(dtype)
    expected = torch.zeros(M, H)
    for t in range(T):
        for m in range(M):
            gate, up, down = experts[int(topk_ids[m, t])][:3]
            h = torch.nn.functional.silu(gate @ hidden[m].float()) * (up @ hidden[m].float())
            expected[m] += topk_weights[m, t] * (down @ h.to(dtype).float())
    unrounded = experts_reference(hidden, topk_weights, topk_ids, experts, out_dtype=torch.float32)
    # float32 sums of 12 terms in another order. An unrounded h would differ by 2**-9 and fail.
    torch.testing.assert_close(unrounded, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(experts_reference(hidden, topk_weights, topk_ids, experts), unrounded.to(dtype))


def test_float32_hidden_rounds_nothing_so_float64_weights_give_float64_numbers():
    hidden, topk_weights, topk_ids, experts = layer()
    hidden = hidden.float()
    out = experts_reference(hidden, topk_weights, topk_ids, experts, out_dtype=torch.float64)
    exact = by_hand(hidden.double(), topk_weights, topk_ids, experts, "silu")
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)


def test_the_sum_runs_over_T_in_order():
    # 2**24 + 1 + 1 is 2**24 in float32 from the left, 2**24 + 2 from the right.
    experts = [ExpertWeights(torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), v)) for v in (2.0**24, 1.0)]
    ones = torch.ones(1, 3)
    results = [
        experts_reference(torch.ones(1, 1), ones, torch.tensor([ids]), experts, activation="relu").item()
        for ids in ([0, 1, 1], [1, 1, 0])
    ]
    assert results == [2.0**24, 2.0**24 + 2]


def test_each_expert_with_tokens_is_asked_for_once_and_no_other():
    hidden, topk_weights, topk_ids, experts = layer()
    asked = []

    class Lazy(list):
        def __getitem__(self, e):
            asked.append(e)
            return super().__getitem__(e)

    experts_reference(hidden, topk_weights, topk_ids % 3, Lazy(experts))
    assert sorted(asked[1:]) == [0, 1, 2]  # the first look at experts[0] only learns the weights' dtype


def test_transformers_agrees_in_float32():
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe", reason="transformers is missing")
    config = modeling.Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=T)
    config._experts_implementation = "eager"
    theirs = modeling.Qwen3MoeExperts(config)
    hidden, topk_weights, topk_ids, experts = layer(torch.float32)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(torch.stack([torch.cat([w.gate, w.up]) for w in experts]))
        theirs.down_proj.copy_(torch.stack([w.down for w in experts]))
        expected = theirs(hidden.float(), topk_ids, topk_weights)
    out = experts_reference(hidden.float(), topk_weights, topk_ids, experts)
    # float32: they sum over experts in ascending order, the reference over T.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# Quantized activations, biases and router weights


def request_of(layer_changes=None, **changes):
    """What a kernel is asked for: nothing quantized unless changes say so."""
    layer = replace(LayerSpec(0, "layer 0", E, T, H, I), **layer_changes or {})
    plain = Unquantized(torch.float32)
    request = KernelRequest(layer, Device("cpu"), None, None, plain, plain)
    return replace(request, **changes)


def f32(value):
    """The float32 nearest to a Python float."""
    return float(torch.tensor(value, dtype=torch.float32))


def quantized_by_hand(x, group_size, max_value, rounded):
    """Float32 steps in Python floats: amax / max_value, x / scale, rounded, times the scale."""
    out = []
    for row in x.tolist():
        result = []
        for start in range(0, len(row), group_size):
            part = row[start : start + group_size]
            scale = f32(max(map(abs, part)) / max_value) or 1.0
            result += [f32(rounded(min(max(f32(v / scale), -max_value), max_value)) * scale) for v in part]
        out.append(result)
    return torch.tensor(out)


ROUNDED = {"int8": (127.0, round), "fp8": (448.0, lambda v: float(torch.tensor(v).to(torch.float8_e4m3fn)))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [None, 4], ids=["token", "g4"])
@pytest.mark.parametrize("name", ROUNDED)
def test_an_activation_is_its_rounded_quotient_times_the_scale_of_its_token_or_group(name, group_size, dtype):
    spec = ActivationSpec(format=name, strategy="group" if group_size else "token", group_size=group_size)
    x = (torch.randn(6, H, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    x[2], x[3, :4] = 0, 1e-45
    found = fake_quantized(x, spec, FORMATS[name])
    assert found.dtype == torch.float32
    assert torch.equal(found, quantized_by_hand(x, group_size or H, *ROUNDED[name]))
    q, scale = quantize_activations(x, spec, FORMATS[name])
    assert (q.shape, scale.shape) == ((6, H), (6, H // (group_size or H)))
    assert q.dtype == FORMATS[name].storage_dtype
    assert bool((scale[2] == 1).all())


def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other():
    x = torch.randn(3, H)
    x[1, 2] = math.nan
    clean = torch.cat([x[:1], x[2:]])
    found = fake_quantized(x, ActivationSpec(format="int8"), FORMATS["int8"])
    assert bool(found[1].isnan().all())
    assert torch.equal(found[[0, 2]], fake_quantized(clean, ActivationSpec(format="int8"), FORMATS["int8"]))


@pytest.mark.parametrize("group_size", [None, 2], ids=["token", "g2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_input_is_quantized_directly_and_the_intermediate_after_it_was_rounded(dtype, group_size):
    spec = ActivationSpec(format="int8", strategy="group" if group_size else "token", group_size=group_size)
    both = {"input_activations": spec, "intermediate": spec}
    both |= {"activation_format": FORMATS["int8"], "intermediate_format": FORMATS["int8"]}
    hidden, topk_weights, topk_ids, experts = layer()
    hidden = hidden.to(dtype)
    expected = torch.zeros(M, H, dtype=torch.float64)
    x = quantized_by_hand(hidden, group_size or H, 127.0, round).double()
    for m in range(M):
        for t in range(T):
            gate, up, down = experts[int(topk_ids[m, t])][:3]
            h = (torch.nn.functional.silu(gate @ x[m]) * (up @ x[m])).to(dtype)
            h = quantized_by_hand(h.view(1, I), group_size or I, 127.0, round)[0].double()
            expected[m] += topk_weights[m, t].double() * (down @ h)
    out = experts_reference(
        hidden, topk_weights, topk_ids, experts, request=request_of(**both), out_dtype=torch.float64
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)  # float64 sums in another order


CLAMPED = {"activation": "swiglu_clamped", "activation_alpha": 1.3, "activation_limit": 0.7, "activation_offset": 0.5}
PARAMETERS = {"silu": {}, "clamped": CLAMPED, "swiglu": {"activation": "swiglu_clamped"}}


@pytest.mark.parametrize("on_input", [False, True], ids=["weight_on_output", "weight_on_input"])
@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("activation", PARAMETERS.values(), ids=PARAMETERS)
def test_biases_come_before_the_activation_and_router_weights_before_both_or_last(activation, biased, on_input):
    hidden, topk_weights, topk_ids, experts = layer()
    g = torch.Generator().manual_seed(3)
    if biased:
        experts = [ExpertWeights(*w[:3], *(torch.randn(n, generator=g) for n in (I, I, H))) for w in experts]
    expected = torch.zeros(M, H, dtype=torch.float64)
    for m in range(M):
        for t in range(T):
            w, weight = experts[int(topk_ids[m, t])], float(topk_weights[m, t])
            first, last = (weight, 1.0) if on_input else (1.0, weight)
            gate, up = first * (w.gate @ hidden[m]), first * (w.up @ hidden[m])
            if biased:
                gate, up = gate + w.gate_bias.double(), up + w.up_bias.double()
            pairs = zip(gate.tolist(), up.tolist(), strict=True)
            y = w.down @ torch.tensor([gated_by_hand(g, u, activation) for g, u in pairs], dtype=torch.float64)
            expected[m] += last * (y + w.down_bias.double() if biased else y)
    request = request_of(activation | {"router_weight_on_input": on_input})
    out = experts_reference(hidden, topk_weights, topk_ids, experts, request=request)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def gated_by_hand(gate, up, parameters):
    if not parameters:
        return SCALAR_ACTIVATIONS["silu"](gate) * up
    limit = parameters.get("activation_limit", math.inf)
    gate, up = min(gate, limit), min(max(up, -limit), limit)
    alpha, offset = parameters.get("activation_alpha", 1.702), parameters.get("activation_offset", 1.0)
    return gate / (1 + math.exp(-alpha * gate)) * (up + offset)
