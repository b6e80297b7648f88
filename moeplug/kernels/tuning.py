"""Choose a kernel's block sizes from the shape alone: a pure function, tested without a GPU, importing neither torch
nor triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from moeplug.kernels.select import Device

# Bytes of shared memory that one program may use (CUDA programming guide, table of compute capabilities).
SHARED_BYTES: Final = {(8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448}
LEAST_SHARED_BYTES: Final = 101_376  # every other device since (8, 0)
LEAST_BLOCK_K: Final = 16  # of a 16-bit tl.dot


@dataclass(frozen=True)
class Blocks:
    """One product's launch: tile sizes, blocks that share a column tile in L2, warps and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ElementBytes:
    """Bytes of one element: stored weights, activations as read, and what the tensor cores multiply."""

    weight: int
    activation: int
    dot: int


def shared_memory_limit(device: Device) -> int:
    """Return the bytes of shared memory that one program may use on a device."""
    return SHARED_BYTES.get(device.compute_capability or (0, 0), LEAST_SHARED_BYTES)


def shared_bytes(blocks: Blocks, sizes: ElementBytes, device: Device) -> int:
    """Return an upper estimate of a program's shared memory: pipelined tiles, converted tiles, the epilogue.

    Before Hopper mma.sync reads registers, so a converted tile needs none and one stage less is in flight.
    """
    tile_x, tile_w = blocks.BLOCK_M * blocks.BLOCK_K, blocks.BLOCK_N * blocks.BLOCK_K
    in_flight = tile_x * sizes.activation + tile_w * sizes.weight
    loop = (blocks.num_stages - 1) * in_flight
    if (device.compute_capability or (0, 0)) >= (9, 0):
        loop += in_flight
        loop += tile_w * sizes.dot if sizes.weight != sizes.dot else 0
        loop += tile_x * sizes.dot if sizes.activation != sizes.dot else 0
    return max(loop, blocks.BLOCK_M * blocks.BLOCK_N * 4)


def block_m(M: int, E: int, T: int) -> int:
    """Return BLOCK_M, the same for both products of a call because they share one table of blocks.

    The power of two at or above the tokens of an average expert: below it blocks are cut up, above it rows are wasted.
    """
    pairs = max(M * T, 1)
    return min(max(_power_of_two_above(-(-pairs // min(pairs, E))), 16), 128)


@lru_cache(maxsize=4096)
def choose_blocks(
    M: int,
    E: int,
    T: int,
    N: int,
    K: int,
    device: Device,
    sizes: ElementBytes = ElementBytes(weight=2, activation=2, dot=2),
    group_size: int | None = None,
) -> Blocks:
    """Return the launch of a product (tokens of E experts, K) @ (K, N), within the device's shared memory.

    group_size: weights along K that share a scale; None: all of a row. BLOCK_K divides it, or steps over it are masked.
    """
    BLOCK_M = block_m(M, E, T)
    if sizes.dot == 4:  # no tensor cores: operands of an exact float32 product live in registers
        blocks = Blocks(min(BLOCK_M, 32), 64, 32, 8, 4, 2)
    elif BLOCK_M <= 32:  # bound by weight bytes: long rows of K in flight, one row of blocks per weight tile
        blocks = Blocks(BLOCK_M, 64 if BLOCK_M == 16 else 128, 128, 1, 4, 4)
    elif BLOCK_M == 64:
        blocks = Blocks(64, 128, 64, 4, 4, 4)
    elif sizes.weight == sizes.dot:  # 592 TFLOP/s on Mixtral 8192 in bf16; nothing is converted between load and dot
        blocks = Blocks(128, 256, 64, 8, 8, 3)
    else:  # a converted tile takes registers: 128 x 256 spills
        blocks = Blocks(128, 128, 64, 8, 8, 4)
    blocks = replace(
        blocks,
        BLOCK_N=min(blocks.BLOCK_N, max(_power_of_two_above(N), 16)),
        BLOCK_K=_block_k(blocks.BLOCK_K, group_size or K),
    )
    return _within(blocks, sizes, device)


def _block_k(wanted: int, group: int) -> int:
    """Return BLOCK_K for groups along K: a power of two that divides the group, else one that covers it, masked."""
    dividing = group & -group
    if dividing >= min(wanted, 64):
        return min(wanted, dividing)
    return min(wanted, max(_power_of_two_above(group), LEAST_BLOCK_K))


def _within(blocks: Blocks, sizes: ElementBytes, device: Device) -> Blocks:
    """Return blocks with fewer stages, then with smaller tiles, until a program's shared memory fits."""
    while shared_bytes(blocks, sizes, device) > shared_memory_limit(device):
        if blocks.num_stages > 2:
            blocks = replace(blocks, num_stages=blocks.num_stages - 1)
        elif blocks.BLOCK_N > 64:
            blocks = replace(blocks, BLOCK_N=blocks.BLOCK_N // 2)
        else:
            blocks = replace(blocks, BLOCK_K=blocks.BLOCK_K // 2)
    return blocks


def _power_of_two_above(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
