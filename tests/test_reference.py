"""The reference is the formula, its rounding points are where its docstring says, and transformers agrees."""

from __future__ import annotations

import math

import pytest
import torch

from moeplug.moe.layout import ACTIVATIONS
from moeplug.moe.reference import ACTIVATION_FUNCTIONS, ExpertWeights, experts_reference

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
}


def by_hand(hidden, topk_weights, topk_ids, experts, activation):
    """The formula of moeplug.moe.layout as scalar loops in Python floats."""
    act, out = SCALAR_ACTIVATIONS[activation], torch.zeros(hidden.shape, dtype=torch.float64)
    for m in range(hidden.shape[0]):
        for t in range(topk_ids.shape[1]):
            e = int(topk_ids[m, t])
            if 0 <= e < len(experts):
                gate, up, down = (w.tolist() for w in experts[e])
                x = hidden[m].tolist()
                h = [act(_dot(gate[i], x)) * _dot(up[i], x) for i in range(len(gate))]
                y = [_dot(row, h) for row in down]
                out[m] += float(topk_weights[m, t]) * torch.tensor(y, dtype=torch.float64)
    return out


def _dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_the_formula(activation):
    hidden, topk_weights, topk_ids, experts = layer()
    out = experts_reference(hidden, topk_weights, topk_ids, experts, activation=activation)
    # float64 sums of 12 terms in another order: a few units of 2**-53 of values near 30.
    torch.testing.assert_close(out, by_hand(*layer(), activation), rtol=1e-12, atol=1e-12)


def test_every_activation_of_a_layer_has_a_function():
    assert set(ACTIVATION_FUNCTIONS) == set(ACTIVATIONS)


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
            gate, up, down = experts[int(topk_ids[m, t])]
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
