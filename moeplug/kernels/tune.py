"""Measure a dozen schedules for each number of tokens on the GPU at hand, and keep the fastest in a table.

`moeplug tune-kernels` calls this; nothing else does. A load, and a call, only read tables.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

import moeplug
from moeplug.errors import InputOutputError, UsageError, is_out_of_memory
from moeplug.kernels import tuned, tuning
from moeplug.kernels.fused_moe import INPUTS, TritonExperts, _Planner
from moeplug.kernels.launch import Workspace
from moeplug.kernels.schedule import Numbers, Schedule
from moeplug.kernels.select import Device, ExpertsForward
from moeplug.kernels.tuned import Key, Row, Table, table_from_rows

if TYPE_CHECKING:
    from moeplug.moe.experts import QuantizedExperts

__all__ = ["Result", "Session", "random_weights", "table_from_rows", "tunable", "tune", "tune_layer"]

TARGET_US: Final = 20_000  # of replays, in microseconds
LEAST_REPLAYS, MOST_REPLAYS = 5, 50
HOPELESS: Final = 1.5  # times the best: measured no further
ROTATED: Final = {1: 8, 8: 8, 128: 4, 512: 2}  # inputs of one graph, up to M: other experts each, so that L2 is cold

Inputs = tuple[Tensor, Tensor, Tensor]  # hidden (M, H), topk_weights (M, T), topk_ids (M, T)


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 10th and 90th percentile over a CUDA graph's replays."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Result:
    """One cell: the fastest schedule for M tokens, what the rules alone would have cost, and what was left out."""

    row: Row
    timing: Timing
    rules_us: float | None
    measured: int
    skipped: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the result in one line."""
        key, schedule, rules = self.row.key, self.row.schedule, self.rules_us
        best = "as the rules say" if rules == self.timing.median else f"{schedule.first} + {schedule.second}"
        gain = "" if rules is None else f", by the rules {rules:.1f}"
        sizes = f"E={key.E} H={key.H} I={key.I} T={key.T} {key.gate_up} M={self.row.M}"
        spread = f"{self.timing.p10:.1f} to {self.timing.p90:.1f}"
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{sizes}: {self.timing.median:.1f} µs ({spread}{gain}), {best}; {self.measured} measured{skipped}"


def random_weights(E: int, H: int, I: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (w13 (E, 2I, H), w2 (E, H, I)) in bfloat16, whose outputs are of the size of their inputs."""
    w13 = torch.empty(E, 2 * I, H, dtype=torch.bfloat16, device=device).normal_(0, H**-0.5)
    return w13, torch.empty(E, H, I, dtype=torch.bfloat16, device=device).normal_(0, I**-0.5)


def tune_layer(layer: QuantizedExperts, T: int, M: int) -> Iterator[Result]:
    """Yield a result for each group of a layer's experts."""
    for group in layer.groups:
        yield tune(tunable(group.bound()), T, M)  # type: ignore[operator]


def tunable(forward: ExpertsForward) -> TritonExperts:
    """Return a group's bound kernel; raise UsageError where it is none that has schedules."""
    if not isinstance(forward, TritonExperts):
        raise UsageError(f"{type(forward).__name__} serves this scheme here; only moeplug's Triton kernel is tuned")
    return forward


def tune(experts: TritonExperts, T: int, M: int) -> Result:
    """Return the fastest schedule for M tokens, T experts each."""
    with torch.cuda.device(experts._operands[0].weight.device), torch.no_grad():
        return _tune(experts, T, M)


def _tune(experts: TritonExperts, T: int, M: int) -> Result:
    E, H, I = experts._E, experts._operands[1].N, experts._operands[1].K
    inputs = _inputs(M, T, E, H, experts._operands[0].weight.device)
    gate_up, down = _numbers(experts, inputs[0])
    device = experts._request.device
    timings: dict[Schedule, Timing] = {}
    skipped: list[str] = []

    def measure(schedule: Schedule, required: bool = False) -> None:
        bound = TritonExperts(experts._request, *experts._operands, schedule=schedule)
        best = min((timing.median for timing in timings.values()), default=None)
        try:
            timings[schedule] = _time(bound, inputs, best, required)
        except _Skipped as reason:
            skipped.append(f"{schedule.first} + {schedule.second}: {reason}")
        except Exception as error:  # triton's compiler and launcher raise what they like
            if "CUDA error" in str(error) or is_out_of_memory(error):
                raise
            skipped.append(f"{schedule.first} + {schedule.second}: {(str(error).splitlines() or [''])[0][:200]}")

    several = tuning.candidates(M, T, E, H, I, gate_up, down, device)
    for schedule in several:
        measure(schedule, required=schedule == several[0])
    combined = _combined(timings, several[0])
    if combined is not None and combined not in timings:
        measure(combined)
    if not timings:
        raise UsageError(f"no schedule runs for M={M}: {skipped[0] if skipped else 'none is possible'}")
    best = min(timings, key=lambda schedule: timings[schedule].median)
    rules = timings.get(several[0])
    row = Row(Key.of(T, E, H, I, gate_up, down), M, timings[best].median, best)
    return Result(row, timings[best], rules.median if rules else None, len(timings), tuple(skipped))


def _combined(timings: Mapping[Schedule, Timing], base: Schedule) -> Schedule | None:
    """Return base with the first product's best launch and the second's: candidates change one at a time."""
    alike = [s for s in timings if (s.pairs, s.first.BLOCK_M) == (base.pairs, base.first.BLOCK_M)]
    firsts = [s for s in alike if s.second == base.second and s.half == base.half]
    seconds = [s for s in alike if s.first == base.first and s.half == base.half]
    if not firsts or not seconds:
        return None
    first, second = (min(several, key=lambda s: timings[s].median) for several in (firsts, seconds))
    return replace(base, first=first.first, second=second.second)


class _Skipped(Exception):
    """A schedule is not measured: why."""


def _time(bound: TritonExperts, inputs: Sequence[Inputs], best: float | None, required: bool) -> Timing:
    """Return what a call costs on these inputs in turn, captured into one CUDA graph."""
    for arguments in inputs:
        bound(*arguments)
    torch.cuda.synchronize()
    spills = max((_spills(launch) for call in bound._calls.values() for launch in call._launches), default=0)
    if spills and not required:
        raise _Skipped(f"spills {spills} registers")
    outs = [torch.empty_like(arguments[0]) for arguments in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments, out in zip(inputs, outs, strict=True):
            bound(*arguments, out=out)
    graph.replay()
    calls = len(inputs)
    (once,) = _replays(graph, 1)
    if best is not None and once / calls > HOPELESS * best:
        return Timing(once / calls, once / calls, once / calls)
    count = int(min(MOST_REPLAYS, max(LEAST_REPLAYS, TARGET_US / once)))
    times = [replay / calls for replay in _replays(graph, count)]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[0], deciles[-1])


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Return the microseconds of each of several replays."""
    events: list[tuple[Any, Any]] = [_event_pair() for _ in range(count)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def _event_pair() -> tuple[Any, Any]:
    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)


def _spills(launch: Any) -> int:
    """Return how many registers a launched kernel's threads keep in memory; triton knows once it is loaded."""
    return int(getattr(launch._compiled, "n_spills", 0) or 0)


def _inputs(M: int, T: int, E: int, H: int, device: torch.device) -> list[Inputs]:
    """Return several inputs, with distinct random experts for each token, the same in every run."""
    generator = torch.Generator().manual_seed(M)
    count = next((ROTATED[m] for m in sorted(ROTATED) if m >= M), 1)
    several = []
    for _ in range(count):
        hidden = torch.randn(M, H, generator=generator).to(device, torch.bfloat16)
        scores, ids = torch.rand(M, E, generator=generator).topk(T, dim=1)
        weights = scores / scores.sum(1, keepdim=True)
        several.append((hidden, weights.to(device), ids.to(device, torch.int32)))
    return several


def _numbers(experts: TritonExperts, inputs: Inputs) -> tuple[Numbers, Numbers]:
    """Return what a call would choose its schedule by."""
    # The planner knows them; no launch is made of it.
    planner = _Planner(experts, Workspace(INPUTS), *inputs, torch.empty_like(inputs[0]))
    return planner._numbers(0), planner._numbers(1)


@dataclass
class Session:
    """The table of a run of `moeplug tune-kernels`, written after every cell, so that Ctrl-C keeps what is done."""

    path: Path
    device: Device
    command: str
    base: Table
    cells: list[tuned.Cell] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def open(cls, path: Path | None, device: Device, command: str) -> Session:
        """Begin: path None is the user's own table of the device. Cells that are there already stay."""
        path = path or tuned.cache_path(device.name)
        base = Table(device.name, device.compute_capability or (0, 0))
        if path.exists():
            try:
                base = tuned.read_table(path)
            except ValueError as error:
                raise InputOutputError(f"{error}; delete it, or name another file with --out") from error
        if base.device != device.name:
            raise UsageError(
                f"{path}: holds what was measured on {base.device}, not on {device.name}; use another --out"
            )
        return cls(path, device, command, base)

    def add(self, result: Result) -> None:
        """Write one more cell; a schedule chosen from now on in this process may use it."""
        self.cells.append(result.row.cell)
        tuned.write_table(self.path, self.table)
        tuned.forget()
        tuning.choose_schedule.cache_clear()

    def as_dict(self) -> dict[str, Any]:
        """Return the path, and the table as JSON has it."""
        return {"path": str(self.path), **tuned.as_dict(self.table)}

    @property
    def table(self) -> Table:
        """Return the table with this run's cells."""
        return self.base.with_cells(self.cells, self.run) if self.cells else self.base

    @property
    def run(self) -> dict[str, Any]:
        """Return how this run measures."""
        import triton

        return {
            "command": self.command,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.perf_counter() - self.started),
            "moeplug": moeplug.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        }
