"""Sorted pairs are a permutation, grouped by expert, and sizes never depend on the ids."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplug.moe.routing import sort_by_expert


@st.composite
def layers(draw) -> tuple[torch.Tensor, int]:
    """Draw (topk_ids (M, T), E), ids out of range and repeated ones included."""
    M, T, E = draw(st.integers(0, 40)), draw(st.integers(0, 5)), draw(st.integers(1, 12))
    ids = draw(st.lists(st.integers(-3, E + 3) | st.integers(-(2**31), 2**31 - 1), min_size=M * T, max_size=M * T))
    return torch.tensor(ids, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).view(M, T), E


@settings(deadline=None)
@given(layers())
def test_pairs_are_a_permutation_grouped_by_expert_in_their_own_order(drawn):
    topk_ids, E = drawn
    routing = sort_by_expert(topk_ids, E)
    flat = topk_ids.flatten().tolist()
    assert sorted(routing.pairs.tolist()) == list(range(len(flat)))
    for e in range(E):
        of_expert = routing.pairs[routing.offsets[e] : routing.offsets[e + 1]].tolist()
        assert of_expert == [p for p, i in enumerate(flat) if i == e]


@settings(deadline=None)
@given(layers())
def test_sizes_follow_from_the_shapes_alone(drawn):
    topk_ids, E = drawn
    routing = sort_by_expert(topk_ids, E)
    assert [routing.pairs.shape, routing.offsets.shape] == [(topk_ids.numel(),), (E + 1,)]
    assert [routing.pairs.dtype, routing.offsets.dtype] == [torch.int64, torch.int32]


def test_strided_ids_sort_like_contiguous_ones():
    ids = torch.randint(-1, 6, (4, 9), generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(sort_by_expert(ids.T, 5), sort_by_expert(ids.T.contiguous(), 5), strict=True):
        assert torch.equal(mine, theirs)


def test_more_than_1024_experts_sort():
    ids = torch.arange(3000).flip(0).view(-1, 2)
    assert sort_by_expert(ids, 3000).pairs.tolist() == list(range(2999, -1, -1))


def test_no_operation_waits_for_the_device():
    """On the meta device nothing has a value, so an operation that needs one cannot run."""
    ids = torch.empty(64, 8, dtype=torch.int64, device="meta")
    assert sort_by_expert(ids, 128).offsets.shape == (129,)
