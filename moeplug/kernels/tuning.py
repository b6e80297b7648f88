"""Choose a call's tiles from the shape alone: a pure function, tested without a GPU, importing neither torch nor
triton.

First a table of measured schedules is asked (`tuned.py`), then rules that give what measurements gave on an H100.
Nothing is measured here, so a call may come for the first time under CUDA graph capture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Final

from moeplug.kernels import tuned
from moeplug.kernels.schedule import (
    HOPPER,
    MOST_PAIRS_UNSORTED,
    Blocks,
    Numbers,
    Schedule,
    power_of_two_above,
    reason_against,
    result_bytes,
    shared_bytes,
    shared_memory_limit,
    tma_serves,
)
from moeplug.kernels.select import Device

__all__ = [
    "Blocks",
    "Numbers",
    "Schedule",
    "candidates",
    "choose_schedule",
    "heuristic",
    "power_of_two_above",
    "unsorted_pairs",
]

# With more pairs, sorting them costs less than every program's search (H100, Qwen3-30B, 64 pairs: 93 beside 98 µs).
FEW_PAIRS: Final = 16
ONE: Final = 8  # pairs, about one token's: up to here programs are few
FEW_TOKENS: Final = 24  # of an average expert: up to here the bytes of the weights decide
LARGE: Final = 2048  # least H and I of what "large" rules below are for
HUGE: Final = 1 << 24  # least H * I of what "huge" rules below are for: Mixtral's 4096 x 14336
LEAST_SPLIT_K: Final = 4096  # two parts of 2048 still hide their start: Mixtral's 14336, 106 beside 134 µs
MOST_CANDIDATES: Final = 11  # and one more where the best of each product are put together: a dozen
# A measured cell serves M within this factor. Cells are usually a factor 4 apart, so 2 leaves no gap. Besides, an
# average expert's tokens must fall under the same rules (see RULES), because at their borders other tiles win.
NEAR: Final = 2.0
MANY: Final = 1 << 30  # tokens of an average expert: more than any
MULTIPROCESSORS: Final = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148}

# What won on an H100: BLOCK_M x BLOCK_N x BLOCK_K, warps, stages, for the first and the second product.
# "one": at most ONE pairs. A number: for up to that many tokens of an average expert, or, the last, any number.
Rules = dict[str | int, tuple[str, str]]
RULES: Final[dict[str, Rules]] = {
    "16 bits": {
        12: ("16x64x128 g1 w4 s4 swap", "16x64x128 g1 w4 s4 swap"),
        64: ("64x128x128 g8 w8 s3", "64x128x64 g8 w4 s4 tma"),
        383: ("128x256x64 g8 w8 s4 tma", "128x256x64 g8 w8 s4 tma"),
    },
    "16 bits, large": {
        48: ("64x128x128 g8 w8 s3", "64x128x128 g8 w8 s3"),
        MANY: ("128x256x64 g8 w8 s3 tma", "128x256x64 g8 w8 s4 tma"),
    },
    "8 bits": {
        "one": ("16x64x256 g1 w4 s4 swap", "16x64x128 g1 w4 s5 swap"),
        12: ("16x64x256 g1 w4 s4 swap", "16x128x256 g1 w4 s3 swap tma"),
        64: ("64x128x128 g8 w4 s4 tma", "64x128x128 g8 w4 s4 tma"),
        383: ("128x256x128 g8 w8 s4 tma", "128x256x128 g8 w8 s4 tma"),
    },
    "8 bits, large": {
        48: ("64x128x256 g8 w8 s3", "64x128x256 g8 w8 s3"),
    },
    "8 bits, sums": {
        12: ("16x64x128 g1 w4 s5 swap", "16x64x128 g1 w4 s5 swap tma"),
        64: ("64x128x128 g8 w4 s3 tma", "64x128x128 g8 w4 s4 tma"),
        383: ("128x128x128 g8 w4 s3 tma", "128x128x128 g8 w4 s3 tma"),
    },
    "8 bits, sums, large": {
        64: ("64x128x128 g8 w4 s3 tma", "64x128x128 g8 w4 s3 tma"),
    },
    "8 bits, decoded": {
        "one": ("16x64x128 g1 w4 s5 swap", "16x64x128 g1 w4 s5 swap"),
        12: ("16x128x256 g1 w4 s3 swap", "16x64x128 g1 w4 s5 swap"),
        64: ("64x128x128 g8 w4 s3 swap", "64x128x128 g8 w4 s4 swap"),
        383: ("128x128x64 g8 w4 s4 swap", "128x128x64 g8 w4 s4 swap"),
    },
    "8 bits, decoded, huge": {
        "one": ("16x64x128 g1 w4 s5 swap", "16x128x256 g1 w8 s4"),
        12: ("16x128x256 g1 w4 s3 swap", "16x128x256 g1 w8 s4"),
    },
    "4 bits": {
        "one": ("16x128x256 g1 w4 s3 swap", "16x64x256 g1 w4 s4 swap"),
        12: ("16x128x256 g1 w4 s3 swap", "16x128x128 g1 w4 s4 swap"),
        24: ("32x64x128 g1 w4 s4 swap", "32x64x128 g1 w4 s4 swap"),
        48: ("32x64x128 g1 w4 s4 swap", "32x64x128 g1 w4 s4 swap"),
        64: ("64x128x64 g8 w4 s4 swap", "64x128x64 g8 w4 s4 swap"),
        383: ("128x256x128 g8 w8 s3 swap", "128x128x128 g8 w4 s3 swap"),
    },
    "4 bits, large": {
        "one": ("16x128x256 g1 w4 s3 swap", "16x128x256 g1 w4 s3 swap"),
        12: ("16x128x256 g1 w4 s3 swap", "16x128x256 g1 w4 s3 swap"),
    },
    "4 bits, huge": {
        "one": ("16x128x256 g1 w4 s3 swap", "16x128x128 g1 w4 s4 swap k4"),
        48: ("64x128x64 g8 w4 s4 swap", "64x128x64 g8 w4 s4 swap"),
    },
    "4 bits, small groups": {
        "one": ("16x64x256 g1 w4 s3 swap", "16x64x256 g1 w4 s3 swap"),
        12: ("16x64x256 g1 w4 s3 swap", "16x128x128 g1 w4 s4 swap"),
        64: ("64x128x64 g8 w4 s4 swap", "64x128x64 g8 w4 s4 swap"),
        383: ("128x256x128 g8 w8 s3 swap", "128x128x128 g8 w4 s3 swap"),
        767: ("256x128x128 g8 w8 s3 swap", "256x128x128 g8 w8 s3 swap"),
    },
    "4 bits, small groups, large": {
        12: ("16x64x256 g1 w4 s3 swap", "16x64x256 g1 w4 s3 swap"),
        383: ("128x128x128 g8 w4 s3 swap", "128x128x128 g8 w4 s3 swap"),
    },
    # Without tensor cores: the operands of an exact float32 product live in registers.
    "float32": {
        12: ("16x64x32 g8 w4 s2", "16x64x32 g8 w4 s2"),
        64: ("32x64x32 g8 w4 s2", "32x64x32 g8 w4 s2"),
    },
}  # fmt: skip
# Which rules hold where there are none: those of fewer tokens, with blocks of 32 up to FEW_TOKENS.
INSTEAD: Final[dict[str | int, str | int]] = {"one": 12, FEW_TOKENS: 12, 48: 64, 383: 64, 767: 383, MANY: 767}


@lru_cache(maxsize=4096)
def choose_schedule(
    M: int, T: int, E: int, H: int, I: int, gate_up: Numbers, down: Numbers, device: Device
) -> Schedule:
    """Return the launches of a call: (M, H) hidden, T of E experts each, w13 (E, 2I, H), w2 (E, H, I)."""
    return measured(M, T, E, H, I, gate_up, down, device) or heuristic(M, T, E, H, I, gate_up, down, device)


def measured(
    M: int, T: int, E: int, H: int, I: int, gate_up: Numbers, down: Numbers, device: Device
) -> Schedule | None:
    """Return the schedule of the nearest cell of the first table that has one near M, or None."""
    key, found = tuned.Key.of(T, E, H, I, gate_up, down), False
    for table in tuned.tables_for(device):
        cells = table.of(key)
        found = found or bool(cells)
        for cell in sorted(cells, key=lambda cell: max(cell.M / max(M, 1), M / cell.M)):
            schedule = _of_cell(cell, M, last=max(cell.M for cell in cells))
            if schedule and reason_against(schedule, M, T, H, I, gate_up, down, device) is None:
                return schedule
    if not found:
        _say_that_nothing_is_measured(key, device)
    return None


def _of_cell(cell: tuned.Cell, M: int, last: int) -> Schedule | None:
    """Return a cell's schedule for M tokens, or None where M is too far. Where rules end, the last cell has no end."""
    E, T = cell.key.E, cell.key.T
    rules = _tokens_class(M, T, E)
    near = max(cell.M / max(M, 1), M / cell.M) <= NEAR or (M > cell.M == last and rules == MANY)
    if not near or _tokens_class(cell.M, T, E) != rules:
        return None
    pairs = 0 if cell.sort else unsorted_pairs(M * T)
    return Schedule(pairs, cell.first, cell.second, cell.half)


@lru_cache(maxsize=256)
def _say_that_nothing_is_measured(key: tuned.Key, device: Device) -> None:
    """Say it once for a layer's sizes and numbers, whatever the number of tokens."""
    tuned.log.warning(
        "no tuned schedule for E=%d H=%d I=%d T=%d, %s, on %s: rules choose the tiles; `moeplug tune-kernels --shape "
        "%d,%d,%d,%d --scheme NAME` measures them once for all",
        key.E, key.H, key.I, key.T, key.gate_up, device.name or device, key.E, key.H, key.I, key.T,
    )  # fmt: skip


def heuristic(M: int, T: int, E: int, H: int, I: int, gate_up: Numbers, down: Numbers, device: Device) -> Schedule:
    """Return what the rules say, fitted to the shape, the numbers and the device."""
    P = M * T
    pairs = unsorted_pairs(P) if P <= FEW_PAIRS else 0
    case = "one" if P <= ONE else 12 if pairs else _tokens_case(M, T, E)
    tiles = []
    for which, (numbers, K) in enumerate(((gate_up, H), (down, I))):
        rules = _rules(numbers, H, I)
        tile = Blocks.parse(_rule(rules, case)[which])
        if tile.BLOCK_M > 128 and K % tile.BLOCK_K:  # masked: gpt-oss's 2880, 9 % slower than blocks of 128
            tile = Blocks.parse(_rule(rules, 383)[which])
        tiles.append(replace(tile, BLOCK_M=max(tile.BLOCK_M, 32)) if case == FEW_TOKENS else tile)
    BLOCK_M = min(tile.BLOCK_M for tile in tiles)
    if not _hopper(device) or gate_up.scales_sum or down.scales_sum:
        BLOCK_M = min(BLOCK_M, 128)
    first, second = (replace(tile, BLOCK_M=BLOCK_M) for tile in tiles)
    first = fitted(first, 2 * I, H, gate_up, device, halves=2)
    second = fitted(second, H, I, down, device)
    # A second body for half-empty blocks of 64 costs more than it saves, unless decoding is what it saves.
    half = BLOCK_M != 64 or gate_up.decoded or down.decoded
    return Schedule(pairs, first, _split(second, P, E, H, I, down, device), half)


def unsorted_pairs(P: int) -> int:
    """Return Schedule.pairs for P pairs where each program finds its own; 0 where there are too many for that."""
    return max(power_of_two_above(P), 16) if P <= MOST_PAIRS_UNSORTED else 0


def _tokens_class(M: int, T: int, E: int) -> str | int:
    """Return which cells of a table may serve: of an average expert's tokens where tiles are of about one size."""
    if M * T <= FEW_PAIRS:
        return "few"
    case = _tokens_case(M, T, E)
    return FEW_TOKENS if case <= FEW_TOKENS else 64 if case <= 64 else 383 if case == 383 else MANY


def _tokens_case(M: int, T: int, E: int) -> int:
    """Return which rules hold for an average expert's tokens: borders lie between what was measured."""
    tokens = M * T / max(min(M * T, E), 1)
    return next(most for most in (12, FEW_TOKENS, 48, 64, 383, 767, MANY) if tokens <= most)


def _class(numbers: Numbers) -> str:
    """Return which rules hold for what is multiplied."""
    if numbers.dot_bytes == 4:
        return "float32"
    if numbers.dot_bytes == 1:
        return "8 bits, sums" if numbers.scales_sum or numbers.decoded else "8 bits"
    if not numbers.decoded:
        return "16 bits"
    if numbers.weight_bits > 4:
        return "8 bits, decoded"
    return "4 bits, small groups" if numbers.group_size and numbers.group_size < 64 else "4 bits"


def _rules(numbers: Numbers, H: int, I: int) -> list[Rules]:
    """Return the rules for what is multiplied and the size of an expert, the most special ones first."""
    name, sizes = _class(numbers), [", huge"] * (H * I >= HUGE) + [", large"] * (min(H, I) >= LARGE)
    return [RULES[name + size] for size in (*sizes, "") if name + size in RULES]


def _rule(rules: list[Rules], case: str | int) -> tuple[str, str]:
    """Return a case's rule: the most special one, or that of another case."""
    while True:
        for those in rules:
            if case in those:
                return those[case]
        case = INSTEAD[case]


def _programs(P: int, E: int, N: int, BLOCK_N: int) -> int:
    """Return how many programs have work: the tiles along N of all experts that may have tokens, a block each."""
    return min(P, E) * -(-N // BLOCK_N)


def _multiprocessors(device: Device) -> int:
    return MULTIPROCESSORS.get(device.compute_capability or (0, 0), 108)


def _hopper(device: Device) -> bool:
    """Return whether accumulating tensor cores read shared memory: wgmma, and what followed it."""
    return (device.compute_capability or (0, 0)) >= HOPPER


def _split(blocks: Blocks, P: int, E: int, N: int, K: int, numbers: Numbers, device: Device) -> Blocks:
    """Return blocks that share K, in two unless the rules say more, where it is long and there are fewer programs than
    multiprocessors."""
    few = P <= FEW_PAIRS and _programs(P, E, N, blocks.BLOCK_N) <= _multiprocessors(device)
    parts = max(blocks.SPLIT_K, 2) if few and K >= LEAST_SPLIT_K else 1
    while any(K % (parts * n) for n in (blocks.BLOCK_K, numbers.group_size, numbers.x_group) if n) and parts > 1:
        parts //= 2
    return replace(blocks, SPLIT_K=parts)


def fitted(blocks: Blocks, N: int, K: int, numbers: Numbers, device: Device, halves: int = 1) -> Blocks:
    """Return blocks that fit (N, K) weights, their numbers and the device. halves: 2 where rows are gate and up."""
    BLOCK_N = min(blocks.BLOCK_N, max(power_of_two_above(N), 16))
    if numbers.scale_rows % 64 == 0:  # a tile's columns lie in one block of scales
        BLOCK_N = min(BLOCK_N, halves * (numbers.scale_rows & -numbers.scale_rows))
    if blocks.BLOCK_M >= 128 and numbers.decoded and (numbers.scales_sum or not _hopper(device)):
        # Registers: of a second accumulator, or, before wgmma, of operands (sm_80, 4 bits: 560 bytes a thread spilled).
        blocks, BLOCK_N = replace(blocks, num_warps=8), min(BLOCK_N, 128)
    if blocks.BLOCK_M >= 128 and not _hopper(device):
        blocks = replace(blocks, BLOCK_K=min(blocks.BLOCK_K, 64))
    blocks = replace(
        blocks,
        BLOCK_N=BLOCK_N,
        BLOCK_K=_block_k(blocks.BLOCK_K, K, numbers),
        SWAP=blocks.SWAP and BLOCK_N >= 64,
        TMA=blocks.TMA and tma_serves(K, numbers, device) and not numbers.decoded,
    )
    return _within(blocks, numbers, device)


def _block_k(wanted: int, K: int, numbers: Numbers) -> int:
    """Return BLOCK_K: a power of two that lies in a group, or holds whole groups; masked where groups allow neither."""
    least = numbers.least_block_k
    steps = [step for step in _halving(wanted, least) if _lies(step, numbers)]
    if not steps:  # odd groups, covered by few masked steps: 48 by 64
        groups = [group for group in (numbers.group_size, numbers.x_group) if group]
        return max(min([wanted, *map(power_of_two_above, groups)]), least)
    return min(steps[0], max(power_of_two_above(K), least))  # a masked last step costs less than short steps do


def _halving(most: int, least: int) -> Iterator[int]:
    """Yield most, most / 2 and so on down to least."""
    step = max(most, least)
    while step >= least:
        yield step
        step //= 2


def _lies(step: int, numbers: Numbers) -> bool:
    """Return whether steps of this length lie in groups, or hold whole ones where the scales multiply weights."""
    G, X = numbers.group_size, numbers.x_group
    if X and X % step:
        return False
    if not G or G % step == 0:
        return not G or step >= min(G, 64)
    return not numbers.scales_sum and step % G == 0


def _within(blocks: Blocks, numbers: Numbers, device: Device) -> Blocks:
    """Return blocks with a narrower tile, fewer stages or shorter steps, until a program's shared memory fits."""
    limit = shared_memory_limit(device)
    while shared_bytes(blocks, numbers, numbers.dot_bytes, device) > limit:
        result_fits = result_bytes(blocks, numbers) <= limit
        if result_fits and blocks.num_stages > 2:
            blocks = replace(blocks, num_stages=blocks.num_stages - 1)
        elif blocks.BLOCK_N > 64:
            blocks = replace(blocks, BLOCK_N=blocks.BLOCK_N // 2)
        else:
            blocks = replace(blocks, BLOCK_K=blocks.BLOCK_K // 2)
    return blocks


def candidates(
    M: int, T: int, E: int, H: int, I: int, gate_up: Numbers, down: Numbers, device: Device
) -> list[Schedule]:
    """Return a few schedules to be measured: what the rules say, then what is near, one product at a time."""
    base = heuristic(M, T, E, H, I, gate_up, down, device)
    found = [base]
    for schedule in _near(base, M, T, E, H, I, gate_up, down, device):
        fits = reason_against(schedule, M, T, H, I, gate_up, down, device) is None
        if fits and schedule not in found:
            found.append(schedule)
    return found[:MOST_CANDIDATES]


def _near(
    base: Schedule, M: int, T: int, E: int, H: int, I: int, gate_up: Numbers, down: Numbers, device: Device
) -> Iterable[Schedule]:
    """Yield the rules' schedules for half and twice the tokens, then variations, the first product's in turn with
    the second's, likeliest first."""
    if not base.pairs:
        if base.first.BLOCK_M >= 64:
            yield replace(base, half=not base.half)
        for tokens in (M // 4, M * 4):
            other = heuristic(tokens, T, E, H, I, gate_up, down, device)
            if other.first.BLOCK_M != base.first.BLOCK_M and not other.pairs:
                yield other
    for first, second in zip(_variations(base.first), _variations(base.second), strict=True):
        yield replace(base, first=fitted(first, 2 * I, H, gate_up, device, halves=2))
        yield replace(base, second=fitted(second, H, I, down, device))


def _variations(blocks: Blocks) -> list[Blocks]:
    """Return variations of one product's launch; `fitted` undoes what cannot be."""
    split = 1 if blocks.SPLIT_K > 1 else 2
    small = blocks.BLOCK_M <= 32
    return [
        replace(blocks, BLOCK_N=blocks.BLOCK_N * 2 if blocks.BLOCK_N <= 64 else blocks.BLOCK_N // 2),
        replace(blocks, TMA=not blocks.TMA),
        replace(blocks, num_stages=blocks.num_stages - 1),
        replace(blocks, BLOCK_K=blocks.BLOCK_K * 2 if small else blocks.BLOCK_K // 2),
        replace(blocks, SWAP=not blocks.SWAP),
        replace(blocks, num_stages=blocks.num_stages + 1),
        replace(blocks, SPLIT_K=split) if small else replace(blocks, num_warps=12 - blocks.num_warps),
        replace(blocks, BLOCK_K=blocks.BLOCK_K // 2 if small else blocks.BLOCK_K * 2),
    ]
