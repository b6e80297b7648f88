"""The CPU kernel gives the reference's numbers, and refuses what does not fit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_cases import CASES, CHANNEL, Case, StoredExperts, compare, grouped, inputs_of, request_of, run_case

from moeplug.errors import PluginError, UsageError
from moeplug.kernels import cpu
from moeplug.kernels.cpu import CpuKernel
from moeplug.moe.reference import experts_reference


@pytest.mark.parametrize("name", CASES)
def test_the_cpu_kernel_gives_the_references_numbers_twice(name):
    result = run_case(CASES[name], CpuKernel())
    assert result.ok, result


@pytest.mark.parametrize("size", [2, 8, 10])
def test_groups_too_small_for_a_tensor_core_run_on_a_cpu(size):
    spec = grouped(size, symmetric=False)
    assert run_case(Case("small-groups", H=40, I=80, gate_up=spec, down=spec), CpuKernel()).ok


def test_weights_decoded_in_many_chunks_and_tokens_run_in_parts_give_the_same_numbers(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 256)
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
