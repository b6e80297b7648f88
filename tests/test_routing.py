"""Sorted pairs are a permutation, blocks cover each expert's pairs once, and sizes never depend on the ids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplug.moe.routing import block_table, max_blocks, sort_by_expert


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
@given(layers(), st.sampled_from([1, 2, 3, 16]))
def test_blocks_cover_each_experts_pairs_exactly_once(drawn, BLOCK_M):
    topk_ids, E = drawn
    routing = sort_by_expert(topk_ids, E)
    table = block_table(routing, BLOCK_M)
    covered = []
    for block, e in enumerate(table.expert.tolist()):
        if e < E:
            first_block = int(table.blocks_through[e - 1]) if e else 0
            start = int(routing.offsets[e]) + (block - first_block) * BLOCK_M
            covered += range(start, min(start + BLOCK_M, int(routing.offsets[e + 1])))
            assert covered[-1] >= start, "a block without pairs"
    assert covered == list(range(int(routing.offsets[0]), int(routing.offsets[E])))


@settings(deadline=None)
@given(layers(), st.sampled_from([1, 2, 16]))
def test_sizes_follow_from_the_shapes_alone(drawn, BLOCK_M):
    topk_ids, E = drawn
    P = topk_ids.numel()
    routing = sort_by_expert(topk_ids, E)
    table = block_table(routing, BLOCK_M)
    shapes = [routing.pairs.shape, routing.offsets.shape, table.expert.shape, table.blocks_through.shape]
    assert shapes == [(P,), (E + 1,), (max_blocks(P, E, BLOCK_M),), (E,)]
    assert [t.dtype for t in (*routing, *table)] == [torch.int64, torch.int32, torch.int32, torch.int32]


@pytest.mark.parametrize(("P", "E", "BLOCK_M", "most"), [(0, 4, 16, 0), (1, 4, 16, 1), (5, 4, 16, 4), (64, 4, 16, 7)])
def test_the_bound_on_blocks_is_reached_by_the_worst_case(P, E, BLOCK_M, most):
    assert max_blocks(P, E, BLOCK_M) == most
    spread = torch.arange(min(P, E))  # one pair for every expert, all others on expert 0, which then spills one
    ids = torch.cat([spread, torch.zeros(P - len(spread), dtype=torch.int64)]).view(-1, 1)
    assert int(block_table(sort_by_expert(ids, E), BLOCK_M).blocks_through[-1]) == most


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
    table = block_table(sort_by_expert(ids, 128), 16)
    assert table.expert.shape == (max_blocks(512, 128, 16),)
