"""Choose an option for every layer or expert under a budget, and say what that costs beside the uniform schemes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeplug import __version__
from moeplug.mixed.measure import Errors, ExpertErrors
from moeplug.mixed.solve import Way, solve
from moeplug.mixed.task import Option, Task
from moeplug.mixed.write import scheme_text
from moeplug.pipeline import Plan, plan_model
from moeplug.pipeline.plan import gigabytes
from moeplug.scheme import Scheme


@dataclass(frozen=True)
class Uniform:
    """What one option costs for the whole model."""

    option: Option
    expert_bytes: int
    peak_bytes: int
    error: float


@dataclass(frozen=True)
class Choice:
    """Which expert is stored how. picks: layer index → an option for each expert. gap: as `solve` proves it."""

    task: Task
    errors: Errors
    budget: int
    picks: Mapping[int, Sequence[Option]]
    gap: float

    @property
    def error(self) -> float:
        """The sum of the experts' errors."""
        return sum(of.errors[self.picks[of.layer][of.expert]] for of in self.errors.experts)

    @property
    def expert_bytes(self) -> int:
        """The bytes of all experts, scales included."""
        return sum(self.task.expert_bytes(layer, o) for layer, options in self.picks.items() for o in options)

    @property
    def counts(self) -> dict[Option, int]:
        """How many experts each option has, most first."""
        return dict(Counter(option for options in self.picks.values() for option in options).most_common())

    def uniforms(self) -> list[Uniform]:
        """Return what each option alone would cost, smallest first."""
        experts = self.errors.experts
        rows = [
            Uniform(option, plan.expert_bytes_after, plan.peak_bytes, sum(of.errors[option] for of in experts))
            for option, plan in self.task.uniform.items()
        ]
        return sorted(rows, key=lambda row: row.expert_bytes)

    def yaml(self, name: str, how: str) -> str:
        """Return the scheme as text. how: what its first comment says of the errors' origin."""
        most = next(iter(self.counts)).name
        comment = (
            f"Made by `moeplug tune` {__version__} for a budget of {gigabytes(self.budget)}: experts take "
            f"{gigabytes(self.expert_bytes)} of {gigabytes(self.task.any_plan.expert_bytes_before)} unquantized. {how}"
        )
        return scheme_text(name, f"mixed by moeplug tune, {most} most", self.picks, comment)

    def plan(self, scheme: Scheme) -> Plan:
        """Return the plan of the finished scheme, held to the budget."""
        any_plan, task = self.task.any_plan, self.task
        plan = plan_model(
            task.checkpoint, any_plan.family, scheme, task.registry, task.device, with_dense=any_plan.with_dense,
            budget=self.budget,
        )  # fmt: skip
        assert plan.expert_bytes_after == self.expert_bytes, "the scheme says what was chosen"
        return plan


def choose(task: Task, errors: Errors, budget: int) -> Choice:
    """Return the choice of least error whose peak is within the budget; RefusedError where there is none."""
    task.require_possible(budget)
    units = _units(task, errors)
    ways = [[_way(task, unit, option) for option in task.options] for unit in units]
    solution = solve(ways, budget - task.fixed_bytes)
    picks: dict[int, list[Option]] = {
        plan.layer.index: [task.options[0]] * plan.layer.num_experts for plan in task.any_plan.layers
    }
    for unit, pick in zip(units, solution.picks, strict=True):
        for expert in unit:
            picks[expert.layer][expert.expert] = task.options[pick]
    return Choice(task, errors, budget, picks, solution.gap)


def _units(task: Task, errors: Errors) -> list[list[ExpertErrors]]:
    """Return what is chosen for as one: each layer's experts, or each expert."""
    units: dict[tuple[int, int], list[ExpertErrors]] = {}
    for expert in errors.experts:
        units.setdefault((expert.layer, 0 if task.per == "layer" else expert.expert), []).append(expert)
    return list(units.values())


def _way(task: Task, unit: Sequence[ExpertErrors], option: Option) -> Way:
    return Way(
        sum(task.expert_bytes(expert.layer, option) for expert in unit), sum(expert.errors[option] for expert in unit)
    )
