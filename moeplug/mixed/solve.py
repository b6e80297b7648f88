"""Choose one option of each unit so that the errors' sum is least and the bytes' sum within a limit.

This is the multiple-choice knapsack problem. HiGHS solves it through scipy.optimize.milp and says how far below its
answer the least possible sum can be at most. 6144 units of 8 to 36 options took 1 to 70 s to the proven least on two
cores; where units are nearly alike (errors of weights alone) the proof can stop at a percent.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from moeplug.errors import RefusedError, UsageError

RELATIVE_GAP: Final = 1e-4  # errors are estimates: a ten-thousandth of their sum is not worth an hour
SECONDS: Final = 20.0  # then the best that was found is taken, and its gap reported


class Way(NamedTuple):
    """What an option costs a unit."""

    nbytes: int
    error: float


class Solution(NamedTuple):
    """Each unit's option, by index. gap: the least possible sum of errors is at most this share below."""

    picks: tuple[int, ...]
    gap: float


def solve(units: Sequence[Sequence[Way]], limit: int) -> Solution:
    """Return the picks with the least sum of errors within `limit` bytes, to RELATIVE_GAP if SECONDS suffice.

    Raises RefusedError where nothing fits.
    """
    if limit < smallest(units):
        raise RefusedError(f"the units take at least {smallest(units)} bytes; {limit} are allowed")
    allowed = limit
    while True:
        picks, gap = _milp(units, allowed)
        excess = sum(unit[pick].nbytes for unit, pick in zip(units, picks, strict=True)) - limit
        if excess <= 0:
            return Solution(picks, gap)
        allowed -= excess  # HiGHS keeps a limit to a millionth of it


def smallest(units: Sequence[Sequence[Way]]) -> int:
    """Return the fewest bytes that any choice takes."""
    return sum(min(way.nbytes for way in unit) for unit in units)


def require_solver() -> None:
    """Raise UsageError where scipy is missing: better before a model is measured than after."""
    if importlib.util.find_spec("scipy") is None:
        raise UsageError("tune needs scipy, which solves its knapsack: pip install 'moeplug[tune]'")


def _milp(units: Sequence[Sequence[Way]], limit: int) -> tuple[tuple[int, ...], float]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    starts = np.cumsum([0, *(len(unit) for unit in units)])
    unit_of = np.repeat(np.arange(len(units)), np.diff(starts))
    errors = np.array([way.error for unit in units for way in unit], dtype=np.float64)
    # What a unit takes beyond its least, in the largest step that all share: small integers, exact in float64.
    extra = np.array([way.nbytes - min(w.nbytes for w in unit) for unit in units for way in unit])
    step = math.gcd(*map(int, extra)) or 1
    one_each = csr_array((np.ones(len(errors)), (unit_of, np.arange(len(errors)))))
    result = milp(
        errors * (1e3 / max(errors.max(), 1e-300)),  # HiGHS takes differences below 1e-7 for none
        integrality=np.ones(len(errors)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((extra // step)[None], -np.inf, (limit - smallest(units)) // step),
        ],
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": SECONDS},
    )
    if result.x is None:
        raise RefusedError(f"HiGHS found no choice within {SECONDS:.0f} s: {result.message}")
    picks = [int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(starts)]
    return tuple(picks), float(result.mip_gap)
