"""Block sizes are powers of two that fit the device, for any shape, without torch or triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplug.kernels.select import Device
from moeplug.kernels.tuning import ElementBytes, block_m, choose_blocks, shared_bytes, shared_memory_limit

H100 = Device("cuda", 0, (9, 0))
DEVICES = [Device("cuda", 0, capability) for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (99, 0))]
SIZES = [ElementBytes(w, a, d) for w, a, d in ((1, 2, 2), (2, 2, 2), (1, 4, 4), (4, 2, 4), (2, 4, 4), (2, 2, 4))]


@given(
    M=st.integers(1, 100_000), E=st.integers(1, 2048), T=st.integers(1, 16), N=st.integers(1, 40_000),
    K=st.integers(1, 20_000), device=st.sampled_from(DEVICES), sizes=st.sampled_from(SIZES),
    group_size=st.none() | st.integers(16, 512),
)  # fmt: skip
def test_any_shape_gives_a_launch_that_triton_accepts_and_the_device_holds(M, E, T, N, K, device, sizes, group_size):
    blocks = choose_blocks(M, E, T, N, K, device, sizes, group_size)
    for size in (blocks.BLOCK_M, blocks.BLOCK_N, blocks.BLOCK_K, blocks.num_warps):
        assert size & (size - 1) == 0
    assert min(blocks.BLOCK_M, blocks.BLOCK_N, blocks.BLOCK_K) >= 16  # the least that a 16-bit tl.dot takes
    assert blocks.GROUP_M >= 1
    assert blocks.num_stages >= 2
    assert shared_bytes(blocks, sizes, device) <= shared_memory_limit(device)


@pytest.mark.parametrize(
    ("M", "E", "T", "expected"),
    [(1, 128, 8, 16), (512, 128, 8, 32), (8192, 128, 8, 128), (1, 1, 1, 16), (10**6, 8, 2, 128), (0, 8, 2, 16)],
)
def test_blocks_grow_with_the_tokens_of_an_average_expert(M, E, T, expected):
    assert block_m(M, E, T) == expected


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 1024])
@pytest.mark.parametrize("M", [1, 8192])
def test_a_usual_group_size_needs_no_masked_step(M, group_size):
    assert group_size % choose_blocks(M, 128, 8, 1536, 2048, H100, SIZES[0], group_size).BLOCK_K == 0


@pytest.mark.parametrize(("group_size", "BLOCK_K"), [(16, 16), (20, 32), (48, 64), (96, 128), (160, 128)])
def test_an_odd_group_size_is_covered_by_few_masked_steps(group_size, BLOCK_K):
    assert choose_blocks(1, 128, 8, 1536, 480, H100, SIZES[0], group_size).BLOCK_K == BLOCK_K


@pytest.mark.parametrize("K", [64, 768, 1856, 2880, 7168])
def test_a_K_of_whole_64s_needs_no_masked_step(K):
    assert all(K % choose_blocks(M, 128, 8, 1536, K, H100).BLOCK_K == 0 for M in (1, 64, 8192))


def test_both_products_of_a_call_share_one_table_of_blocks():
    pairs = [
        (choose_blocks(M, 128, 8, 1536, 2048, H100), choose_blocks(M, 128, 8, 2048, 768, H100)) for M in (1, 512, 8192)
    ]
    assert all(first.BLOCK_M == second.BLOCK_M for first, second in pairs)


def test_tuning_imports_neither_torch_nor_triton():
    code = "import moeplug.kernels.tuning, sys; assert not {'torch', 'triton'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
