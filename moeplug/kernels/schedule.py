"""Say what a launch is made of, and which launches a shape, its numbers and a device allow: pure Python, no GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from moeplug.kernels.select import Device

# Bytes of shared memory that one program may use (CUDA programming guide, table of compute capabilities).
SHARED_BYTES: Final = {(8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448}
LEAST_SHARED_BYTES: Final = 101_376  # every other device since (8, 0)
HOPPER: Final = (9, 0)  # and later: the tensor memory accelerator
MOST_PAIRS_UNSORTED: Final = 128  # each program reads all ids
LEAST_SWAPPED: Final = 64  # BLOCK_N with SWAP: rows of the left operand of Hopper's wgmma
EXTRA_BYTES: Final = 1024  # scales on their way, barriers of TMA and of Blackwell: up to 512 seen in compiled kernels
MAX_BOX: Final = 256  # rows that one TMA copy takes

_BLOCKS = re.compile(
    r"(?P<BLOCK_M>\d{1,4})x(?P<BLOCK_N>\d{1,4})x(?P<BLOCK_K>\d{1,4}) g(?P<GROUP_M>\d{1,3}) w(?P<num_warps>\d{1,2})"
    r" s(?P<num_stages>\d{1,2})(?P<SWAP> swap)?(?P<TMA> tma)?(?: k(?P<SPLIT_K>\d{1,2}))?(?: r(?P<maxnreg>\d{1,3}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Blocks:
    """One product's launch: tile sizes, blocks that share a column tile in L2, warps and pipeline stages.

    SWAP: weights are the left operand of the tensor cores' product. SPLIT_K: parts of K, each with a partial of
    its own. TMA: weights are copied by the tensor memory accelerator. maxnreg: of a thread's registers; 0: any number.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    SWAP: bool = False
    SPLIT_K: int = 1
    TMA: bool = False
    maxnreg: int = 0

    def __str__(self) -> str:
        """Return what `parse` reads, for example "64x128x128 g8 w4 s3 swap tma k2"."""
        words = [f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K} g{self.GROUP_M} w{self.num_warps} s{self.num_stages}"]
        words += ["swap"] * self.SWAP + ["tma"] * self.TMA
        words += [f"k{self.SPLIT_K}"] * (self.SPLIT_K > 1) + [f"r{self.maxnreg}"] * (self.maxnreg > 0)
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> Blocks:
        """Return Blocks of what `str` gave; raise ValueError for anything else."""
        match = _BLOCKS.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not like '64x128x128 g8 w4 s3 swap tma k2'")
        numbers = {name: int(value) for name, value in match.groupdict().items() if value and value.strip().isdigit()}
        return cls(**numbers, SWAP=bool(match["SWAP"]), TMA=bool(match["TMA"]))


@dataclass(frozen=True)
class Schedule:
    """A call's launches. pairs: 0 where pairs are sorted by expert first; else a power of two, at least P.

    Both products share BLOCK_M, because they share one table of blocks. half: a block of at most BLOCK_M / 2 pairs
    takes half the work, for a second body of the kernel.
    """

    pairs: int
    first: Blocks
    second: Blocks
    half: bool = True


@dataclass(frozen=True)
class Numbers:
    """What a product multiplies, as far as tiles depend on it.

    weight_bits: of a stored weight. dot: "bfloat16", "float16", "float32", "int8" or "float8_e4m3fn".
    group_size: weights along K that share a scale, None for all of a row.
    sum_scaled: a group's scale cannot multiply the weights, because it is not exact in `dot`, so it multiplies the sum
    of each step. With 8-bit `dot` that is so in any case.
    scale_rows: rows of weights that share a scale (128 of 128 x 128 blocks). x_group: activations along K that share
    a scale, None for all of a row or unquantized ones. in_bytes: weights are decoded byte by byte, not as 16-bit words,
    and pass through shared memory once more on their way to where they are multiplied.
    """

    weight_bits: int
    dot: str
    group_size: int | None = None
    sum_scaled: bool = False
    scale_rows: int = 1
    x_group: int | None = None
    in_bytes: bool = False

    @property
    def dot_bytes(self) -> int:
        """Return the bytes of one element that the tensor cores take."""
        return {"float32": 4, "int8": 1, "float8_e4m3fn": 1}.get(self.dot, 2)

    @property
    def decoded(self) -> bool:
        """Return whether stored weights are turned into something else before they are multiplied."""
        return self.weight_bits != 8 * self.dot_bytes

    @property
    def scales_sum(self) -> bool:
        """Return whether a scale multiplies the sum of each step over K."""
        grouped = self.group_size is not None and (self.sum_scaled or self.dot_bytes != 2)
        return grouped or self.x_group is not None

    @property
    def least_block_k(self) -> int:
        """Return the least BLOCK_K: of tl.dot, and of 16-bit words that hold values 16 apart."""
        of_dot = 32 if self.dot_bytes == 1 else 16
        return max(of_dot, 256 // self.weight_bits if self.decoded and self.weight_bits <= 8 else 0)

    @property
    def kind(self) -> str:
        """Return a name for all numbers of the same speed: bfloat16 is as fast as float16, but int8 not as fp8.

        For example "w4 g32 x16": weights of 4 bits with a scale per 32, multiplied in 16 bits.
        """
        words = [f"w{self.weight_bits}"]
        if self.group_size:
            words.append(f"g{self.group_size}" if self.scale_rows == 1 else f"b{self.scale_rows}x{self.group_size}")
        words += ["sum"] * (self.scales_sum and self.dot_bytes == 2)
        dot = {"int8": "xi8", "float8_e4m3fn": "xf8"}.get(self.dot, f"x{8 * self.dot_bytes}")
        return " ".join([*words, f"{dot} g{self.x_group}" if self.x_group else dot])


def shared_memory_limit(device: Device) -> int:
    """Return the bytes of shared memory that one program may use on a device."""
    return SHARED_BYTES.get(device.compute_capability or (0, 0), LEAST_SHARED_BYTES)


def shared_bytes(blocks: Blocks, numbers: Numbers, activation_bytes: int, device: Device) -> int:
    """Return an upper estimate of a program's shared memory: pipelined tiles, converted tiles, the epilogue.

    From Hopper on, products of at least 64 rows are wgmma, which reads shared memory: a converted right operand needs a
    tile of its own, and one stage more is in flight. mma.sync, of smaller ones and before Hopper, reads registers.
    """
    tile_x, tile_w = blocks.BLOCK_M * blocks.BLOCK_K, blocks.BLOCK_N * blocks.BLOCK_K
    in_flight = tile_x * activation_bytes + tile_w * numbers.weight_bits // 8
    loop = (blocks.num_stages - 1) * in_flight + (tile_w * numbers.dot_bytes if numbers.in_bytes else 0)
    rows = blocks.BLOCK_N if blocks.SWAP else blocks.BLOCK_M
    if rows >= LEAST_SWAPPED and (device.compute_capability or (0, 0)) >= HOPPER:
        loop += in_flight
        if not blocks.SWAP and numbers.decoded:
            loop += tile_w * numbers.dot_bytes
        if activation_bytes != numbers.dot_bytes:
            loop += tile_x * numbers.dot_bytes
    return max(loop + EXTRA_BYTES, result_bytes(blocks, numbers))


def result_bytes(blocks: Blocks, numbers: Numbers) -> int:
    """Return an upper estimate of the shared memory that a finished tile needs to change its layout."""
    last_tile = blocks.BLOCK_N * blocks.BLOCK_K * numbers.weight_bits // 8  # not always given back by then
    return blocks.BLOCK_M * blocks.BLOCK_N * 4 + last_tile + EXTRA_BYTES


def reason_against(
    schedule: Schedule, M: int, T: int, H: int, I: int, gate_up: Numbers, down: Numbers, device: Device
) -> str | None:
    """Return why a call of these sizes cannot be launched so, in one line, or None if it can."""
    first, second, pairs = schedule.first, schedule.second, schedule.pairs
    if first.BLOCK_M != second.BLOCK_M:
        return f"BLOCK_M {first.BLOCK_M} and {second.BLOCK_M}: both products share one table of blocks"
    if pairs and (pairs < M * T or pairs > MOST_PAIRS_UNSORTED or not _power_of_two(pairs)):
        return f"pairs={pairs} does not hold {M * T} pairs, or is no power of two up to {MOST_PAIRS_UNSORTED}"
    if first.SPLIT_K != 1:
        return "SPLIT_K of the first product: its activation needs whole sums"
    for blocks, K, numbers, halves in ((first, H, gate_up, 2), (second, I, down, 1)):
        reason = _reason_against_blocks(blocks, K, numbers, device, halves)
        if reason:
            return f"{blocks}: {reason}"
    return None


def _reason_against_blocks(blocks: Blocks, K: int, numbers: Numbers, device: Device, halves: int) -> str | None:
    sizes = (blocks.BLOCK_M, blocks.BLOCK_N, blocks.BLOCK_K, blocks.num_warps, blocks.SPLIT_K)
    if not all(map(_power_of_two, sizes)) or blocks.GROUP_M < 1 or not 1 <= blocks.num_stages <= 8:
        return "sizes are powers of two, GROUP_M at least 1, stages 1 to 8"
    least = numbers.least_block_k
    if min(blocks.BLOCK_M, blocks.BLOCK_N) < 16 or least > blocks.BLOCK_K or blocks.num_warps > 16:
        return f"BLOCK_M and BLOCK_N are at least 16, BLOCK_K {least}, warps at most 16"
    if blocks.SWAP and blocks.BLOCK_N < LEAST_SWAPPED:
        return f"SWAP needs BLOCK_N of at least {LEAST_SWAPPED}"
    if blocks.SPLIT_K > 1 and any(K % (blocks.SPLIT_K * n) for n in _periods(blocks, numbers)):
        return f"K={K} in {blocks.SPLIT_K} parts would not be whole steps and groups"
    reason = _reason_against_step(blocks.BLOCK_K, numbers)
    if reason:
        return reason
    columns = blocks.BLOCK_N // halves
    if numbers.scale_rows % 64 == 0 and numbers.scale_rows % columns:
        return f"{columns} columns do not lie in a block of {numbers.scale_rows} rows"
    return _reason_against_tma(blocks, K, numbers, device) or _reason_against_memory(blocks, numbers, device)


def _reason_against_step(BLOCK_K: int, numbers: Numbers) -> str | None:
    """A step lies in a group, or holds whole ones, or masks what is beyond: the last where no step of 64 divides it."""
    G, X = numbers.group_size, numbers.x_group
    masked = G is not None and G % BLOCK_K != 0 and G % min(64, power_of_two_above(G)) != 0
    whole = G is None or G % BLOCK_K == 0 or (BLOCK_K % G == 0 and not numbers.scales_sum)
    if not whole and not masked and not (G and numbers.least_block_k > G):
        return f"a step of {BLOCK_K} does not lie in a group of {G}"
    if X and X % BLOCK_K and not (masked and G and X % G == 0):
        return f"a step of {BLOCK_K} does not lie in a group of {X} activations"
    return None


def _reason_against_tma(blocks: Blocks, K: int, numbers: Numbers, device: Device) -> str | None:
    if blocks.TMA and not tma_serves(K, numbers, device):
        return "TMA needs compute capability 9.0, rows of whole 16 bytes, and tensor cores"
    if blocks.TMA and blocks.BLOCK_N > MAX_BOX:
        return f"TMA copies at most {MAX_BOX} rows"
    return None


def tma_serves(K: int, numbers: Numbers, device: Device) -> bool:
    """Return whether weights of K columns can be copied by the tensor memory accelerator."""
    if (device.compute_capability or (0, 0)) < HOPPER or numbers.dot_bytes == 4:
        return False
    return K * numbers.weight_bits % 128 == 0


def _reason_against_memory(blocks: Blocks, numbers: Numbers, device: Device) -> str | None:
    needed, limit = shared_bytes(blocks, numbers, numbers.dot_bytes, device), shared_memory_limit(device)
    return f"about {needed} bytes of shared memory, a program has {limit}" if needed > limit else None


def _periods(blocks: Blocks, numbers: Numbers) -> list[int]:
    """Return what a part of K has to be a multiple of."""
    return [blocks.BLOCK_K, *(group for group in (numbers.group_size, numbers.x_group) if group)]


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def power_of_two_above(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
