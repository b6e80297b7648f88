"""The CPU kernel gives the reference's numbers, and refuses what does not fit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_cases import (
    ALL_CASES,
    CASES,
    CHANNEL,
    Case,
    StoredExperts,
    compare,
    grouped,
    inputs_of,
    request_of,
    run_case,
)

from moeplug.errors import PluginError, UsageError
from moeplug.kernels import cpu, cpu_products
from moeplug.kernels.cpu import CpuKernel
from moeplug.kernels.operands import operand
from moeplug.moe.reference import experts_reference


@pytest.mark.parametrize("name", ALL_CASES)
def test_the_cpu_kernel_gives_the_references_numbers_twice(name):
    result = run_case(ALL_CASES[name], CpuKernel())
    assert result.ok, result


@pytest.mark.parametrize("name", CASES)
def test_experts_one_after_another_give_the_numbers_of_pairs_together(name, monkeypatch):
    monkeypatch.setattr(cpu_products, "MOST_GATHERED", -1)
    result = run_case(CASES[name], CpuKernel())
    assert result.ok, result


# The tolerance of each way. Products rounded to bfloat16 move gate, up, and with them the rounding of the intermediate:
# half a unit more each, which for large weights averages out (see `cpu_products`) and for these small ones does not.
WAYS = {"packed": 2.0, "digits": 1.0, "bfloat16": 2.0, "float32": 1.0}


def only(way, monkeypatch):
    """Let products go one way wherever it serves at all."""
    for name in ("LEAST_ROUNDED", "LEAST_DIGITS"):
        monkeypatch.setattr(cpu_products, name, 0)
    monkeypatch.setattr(cpu_products, "MOST_GATHERED", -1)
    monkeypatch.setattr(cpu_products, "PACKED_TOKENS", 1000)
    for name, ways in (
        ("has_packed_product", ("packed",)),
        ("has_integer_product", ("digits",)),
        ("has_bfloat16_product", ("bfloat16",)),
    ):
        monkeypatch.setattr(cpu_products, name, lambda served=way in ways: served)


@pytest.mark.parametrize("ids", ["distinct", "hostile"])
@pytest.mark.parametrize("M", [1, 9, 140])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_multiply_gives_the_references_numbers(way, M, ids, monkeypatch):
    if way == "packed" and not cpu_products.has_packed_product():
        pytest.skip("torch has no vectorized torch._weight_int8pack_mm for this CPU")
    only(way, monkeypatch)
    for scale_dtype in ("float32", "bfloat16"):
        spec = CHANNEL.model_copy(update={"scale_dtype": scale_dtype})
        case = Case(way, M=M, T=3, E=5, H=192, I=128, gate_up=spec, down=spec, dtype="bfloat16", ids=ids)
        request = request_of(case)
        experts = StoredExperts(CpuKernel(), request, case.E)
        gate_up = cpu_products.Product(operand(request, "w13", experts.weights, experts.scales), may_round=True)
        assert gate_up.way(torch.bfloat16, M) == way
        result = run_case(case, CpuKernel(), slack=WAYS[way])
        assert result.ok, result


def test_digits_are_good_enough_for_float16(monkeypatch):
    only("digits", monkeypatch)
    assert run_case(Case("float16", M=9, H=192, I=128, dtype="float16"), CpuKernel()).ok


def test_a_second_product_is_never_rounded(monkeypatch):
    only("packed", monkeypatch)
    request = request_of(Case("down", H=192, I=128))
    experts = StoredExperts(CpuKernel(), request, 3)
    down = cpu_products.Product(operand(request, "w2", experts.weights, experts.scales), may_round=False)
    assert down.way(torch.bfloat16, 1) == "float32"


@pytest.mark.parametrize("offset", [1, 16, 64])
def test_only_aligned_rows_take_the_packed_product(offset, monkeypatch):
    only("packed", monkeypatch)
    monkeypatch.setattr(cpu_products, "has_packed_product", lambda: True)
    request = request_of(Case("aligned", H=192, I=128))
    experts = StoredExperts(CpuKernel(), request, 3)
    w13 = experts.weights["w13"]
    memory = torch.zeros(w13.numel() + 128, dtype=torch.int8)
    start = -memory.data_ptr() % 64 + offset
    moved = memory[start : start + w13.numel()].view(w13.shape).copy_(w13)
    bound = cpu_products.Product(operand(request, "w13", {"w13": moved}, experts.scales), may_round=True)
    assert bound.packed == (offset == 64)


def test_digits_and_unit_give_back_numbers_near_a_rows_largest_exactly():
    x = torch.randn(50, 64).bfloat16()
    x[0], x[1, 0], x[2, 3] = 0, torch.finfo(torch.bfloat16).max, torch.inf
    digits, unit = cpu_products.split_into_digits(x)
    back = unit * (128 * digits[:, 0].float() + digits[:, 1])
    assert back[2].isnan().all()
    x, back = x.float()[[0, 1, *range(3, 50)]], back[[0, 1, *range(3, 50)]]
    largest = x.abs().amax(1, keepdim=True)
    near = x.abs() >= largest / 64
    assert torch.equal(back[near], x[near])
    assert ((back - x).abs() <= largest * 2.0**-14).all()


def test_a_pair_without_expert_adds_nothing_even_with_a_weight_of_nan():
    case = Case("nobody", M=5, T=2)
    request = request_of(case)
    experts = StoredExperts(CpuKernel(), request, case.E)
    hidden, topk_weights, topk_ids = inputs_of(case)
    topk_ids[:, 1] = -1
    topk_weights[:, 1] = torch.nan
    forward = CpuKernel().bind(request, experts.weights, experts.scales)
    alone = forward(hidden, topk_weights[:, :1], topk_ids[:, :1])
    for m in (slice(None), slice(1)):  # one token has a way of its own
        out = forward(hidden[m], topk_weights[m], topk_ids[m])
        assert compare(out, alone[m].float(), hidden.dtype, repeats=True).ok


@pytest.mark.parametrize("size", [2, 8, 10])
def test_groups_too_small_for_a_tensor_core_run_on_a_cpu(size):
    spec = grouped(size, symmetric=False)
    assert run_case(Case("small-groups", H=40, I=80, gate_up=spec, down=spec), CpuKernel()).ok


def test_weights_decoded_in_many_chunks_and_tokens_run_in_parts_give_the_same_numbers(monkeypatch):
    monkeypatch.setattr(cpu_products, "CHUNK_BYTES", {torch.bfloat16: 512, torch.float32: 1024})
    monkeypatch.setattr(cpu, "CONTRIBUTION_BYTES", 1)
    monkeypatch.setattr(cpu, "LEAST_TOKENS_PER_PART", 4)
    case = Case("in-parts", M=11, H=40, I=24, gate_up=grouped(20, False), ids="hostile", strided=True)
    assert run_case(case, CpuKernel()).ok


@pytest.mark.parametrize("position", ["first", "last"])
def test_a_token_of_nan_harms_no_other_token(position):
    case = Case("nan", M=6, T=3)
    request = request_of(case)
    experts = StoredExperts(CpuKernel(), request, case.E)
    hidden, topk_weights, topk_ids = inputs_of(case)
    poisoned = hidden.clone()
    row = 0 if position == "first" else -1
    poisoned[row] = torch.nan
    forward = CpuKernel().bind(request, experts.weights, experts.scales)
    others = [m for m in range(case.M) if m != row % case.M]
    clean, dirty = (forward(x, topk_weights, topk_ids) for x in (hidden, poisoned))
    assert dirty[row].isnan().all()
    # Not bit for bit: a product of several rows may sum NaN rows and others in one order or the other.
    assert compare(dirty[others], clean[others].float(), hidden.dtype, repeats=True).ok


def test_the_weights_may_be_a_view_of_a_larger_buffer():
    case = Case("view")
    request = request_of(case)
    experts = StoredExperts(CpuKernel(), request, case.E)
    views = {name: torch.cat([w, w], dim=1)[:, : w.shape[1]] for name, w in experts.weights.items()}
    inputs = inputs_of(case)
    forwards = [CpuKernel().bind(request, weights, experts.scales) for weights in (experts.weights, views)]
    assert torch.equal(*(forward(*inputs) for forward in forwards))


def test_a_tensor_scale_may_be_expanded_instead_of_copied():
    case = CASES["int8-tensor-float32"]
    request = request_of(case)
    experts = StoredExperts(CpuKernel(), request, case.E)
    gate = experts.scales["w2_scale"][:, :1].expand(-1, case.H, -1)
    forward = CpuKernel().bind(request, experts.weights, experts.scales | {"w2_scale": gate})
    inputs = inputs_of(case)
    expected = experts_reference(*inputs, experts, out_dtype=torch.float32)
    assert compare(forward(*inputs), expected, inputs[0].dtype, repeats=True).ok


WRONG_CALLS = {
    "hidden-of-another-size": (lambda h, w, i: (h[:, 1:], w, i, None), r"hidden is \(4, 39\).*expected \(M, 40\)"),
    "hidden-of-float64": (lambda h, w, i: (h.double(), w, i, None), "hidden is .* of torch.float64; expected"),
    "ids-of-fewer-tokens": (lambda h, w, i: (h, w, i[1:], None), r"topk_ids is \(3, 2\).*expected \(4, T\)"),
    "ids-of-float": (lambda h, w, i: (h, w, i.float(), None), "topk_ids is .* of torch.float32; expected"),
    "weights-of-another-T": (lambda h, w, i: (h, w[:, 1:], i, None), r"topk_weights is \(4, 1\).*expected \(4, 2\)"),
    "out-of-another-size": (lambda h, w, i: (h, w, i, h[1:]), r"out is \(3, 40\).*expected \(4, 40\)"),
    "out-of-another-dtype": (
        lambda h, w, i: (h, w, i, h.bfloat16()),
        "out is .*bfloat16; expected .*float32",
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_argument_is_named_with_what_was_expected(name):
    change, message = WRONG_CALLS[name]
    case = Case(name)
    request = request_of(case)
    experts = StoredExperts(CpuKernel(), request, case.E)
    hidden, topk_weights, topk_ids, out = change(*inputs_of(case))
    with pytest.raises(UsageError, match=message):
        CpuKernel().bind(request, experts.weights, experts.scales)(hidden, topk_weights, topk_ids, out=out)


WRONG_BUFFERS = {
    "a-scale-is-missing": ("w2_scale", None, r"layer 3: stage create_scales left no 'w2_scale', only w13_scale"),
    "a-scale-has-another-shape": ("w13_scale", lambda t: t[:, 1:], r"w13_scale is \(3, 47, 1\).*expected \(3, 48, 1\)"),
    "w2-has-another-shape": ("w2", lambda t: t[:, :, 1:], r"w2 is \(3, 40, 23\).*expected \(3, 40, 24\) of torch.int8"),
    "w13-has-another-dtype": ("w13", lambda t: t.short(), r"w13 is .* of torch.int16; expected .* of torch.int8"),
    "rows-are-strided": ("w13", lambda t: t.repeat(1, 1, 2)[:, :, ::2], r"w13: rows must be contiguous"),
}


@pytest.mark.parametrize("name", WRONG_BUFFERS)
def test_a_wrong_buffer_is_named_at_set_up(name):
    buffer, change, message = WRONG_BUFFERS[name]
    case = Case(name)
    request = request_of(case)
    experts = StoredExperts(CpuKernel(), request, case.E)
    weights, scales = dict(experts.weights), dict(experts.scales)
    holder = weights if buffer in weights else scales
    tensor = holder.pop(buffer)
    if change:
        holder[buffer] = change(tensor)
    with pytest.raises(PluginError, match=message):
        CpuKernel().bind(request, weights, scales)


@pytest.mark.parametrize(
    ("name", "buffer", "message"),
    [
        ("nvfp4-bfloat16", "w13_global_scale", "left no 'w13_global_scale'"),
        ("fp8-block-32x48", "w2_scale", r"w2_scale is \(3, 2, 3\).*expected \(3, 3, 3\)"),
        ("epilogue-bias", "w13_bias", r"w13_bias is \(3, 73\).*expected \(3, 74\)"),
    ],
)
def test_a_wrong_scale_or_bias_is_named_at_set_up(name, buffer, message):
    case = ALL_CASES[name]
    request = request_of(case)
    experts = StoredExperts(CpuKernel(), request, case.E, bias=case.bias)
    given = {**experts.weights, **experts.scales}
    tensor = given.pop(buffer)
    if "left no" not in message:
        given[buffer] = tensor[:, 1:]
    with pytest.raises(PluginError, match=message):
        CpuKernel().bind(request, given, given)


def test_a_missing_zero_point_is_named_at_set_up():
    case = Case("asymmetric", gate_up=replace_symmetry(CHANNEL))
    request = request_of(case)
    experts = StoredExperts(CpuKernel(), request, case.E)
    scales = {name: tensor for name, tensor in experts.scales.items() if "zero" not in name}
    with pytest.raises(PluginError, match="left no 'w13_zero_point'"):
        CpuKernel().bind(request, experts.weights, scales)


def replace_symmetry(spec):
    """Return spec with zero points."""
    return spec.model_copy(update={"symmetric": False})


def test_grad_mode_makes_no_difference():
    case = replace(Case("grad"), dtype="float32")
    request = request_of(case)
    experts = StoredExperts(CpuKernel(), request, case.E)
    hidden, topk_weights, topk_ids = inputs_of(case)
    out = CpuKernel().bind(request, experts.weights, experts.scales)(hidden.requires_grad_(), topk_weights, topk_ids)
    assert not out.requires_grad
