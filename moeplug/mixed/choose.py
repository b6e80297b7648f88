"""Choose an option for every layer or expert under a budget, and say what that costs beside the uniform schemes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplug import __version__
from moeplug.mixed.candidates import Candidate
from moeplug.mixed.measure import Errors, ExpertErrors
from moeplug.mixed.solve import Way, solve
from moeplug.mixed.task import Option, Task
from moeplug.mixed.write import scheme_text
from moeplug.pipeline import Plan, plan_model
from moeplug.pipeline.plan import gigabytes, ranges
from moeplug.scheme import Scheme
from moeplug.validation import NAME_PATTERN
from moeplug.writing import write_whole


@dataclass(frozen=True)
class Uniform:
    """What one candidate costs for the whole model."""

    candidate: Candidate
    expert_bytes: int
    peak_bytes: int
    relative_rms: float

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints of it."""
        return {
            "scheme": self.candidate.name,
            "expert_bytes": self.expert_bytes,
            "peak_bytes": self.peak_bytes,
            "relative_rms": self.relative_rms,
        }


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
        """Return what each candidate alone would cost, smallest first."""
        rows = []
        for candidate, plan in self.task.uniform.items():
            error = sum(of.errors[Option(candidate, candidate)] for of in self.errors.experts)
            rows.append(Uniform(candidate, plan.expert_bytes_after, plan.peak_bytes, self.errors.relative_rms(error)))
        return sorted(rows, key=lambda row: row.expert_bytes)

    def fits(self, uniform: Uniform) -> bool:
        """Return whether one candidate for the whole model is within the budget."""
        return uniform.peak_bytes <= self.budget

    def write(self, file: Path, text: Path | None) -> Plan:
        """Write the scheme, whole or not at all, and return its plan. text: what the errors were measured on."""
        name = file.stem if re.fullmatch(NAME_PATTERN, file.stem) else "tuned"
        content = self.yaml(name, text)
        plan = self._plan(Scheme.from_text(content, str(file)))
        write_whole(file, content)
        return plan

    def yaml(self, name: str, text: Path | None) -> str:
        """Return the scheme as text."""
        return scheme_text(name, f"made by moeplug tune for {gigabytes(self.budget)}", self.picks, self._comment(text))

    def _comment(self, text: Path | None) -> str:
        before = self.task.any_plan.expert_bytes_before
        on = "the weights alone (--data-free)" if text is None else f"{self.errors.tokens:,} tokens of {text.name}"
        candidates = ", ".join(candidate.scheme.name for candidate in self.task.uniform)
        made = (
            f"Made by `moeplug tune` {__version__} for a budget of {gigabytes(self.budget)}: experts take "
            f"{gigabytes(self.expert_bytes)}, unquantized {gigabytes(before)}. Of {candidates} each "
            f"{self.task.per} has the one with which the errors of all experts' outputs are least in sum, on {on}: "
            f"{self.errors.relative_rms(self.error):.4f} of a layer's output (root mean square)"
        )
        if self.errors.unreached:
            made += f"; {self.errors.unreached} experts got no token and were judged by their weights"
        return made + "."

    def as_dict(self) -> dict[str, Any]:
        """Return what `moeplug tune --json` prints."""
        return {
            "budget": self.budget,
            "smallest_budget": self.task.smallest_budget,
            "expert_bytes": self.expert_bytes,
            "expert_bytes_before": self.task.any_plan.expert_bytes_before,
            "peak_bytes_at_most": self.task.fixed_bytes + self.expert_bytes,
            "relative_rms": self.errors.relative_rms(self.error),
            "gap": self.gap,
            "per": self.task.per,
            "tokens": self.errors.tokens,
            "data_free": self.errors.data_free,
            "experts": len(self.errors.experts),
            "experts_without_tokens": self.errors.unreached,
            "chosen": {option.name: count for option, count in self.counts.items()},
            "uniform": [row.as_dict() | {"fits": self.fits(row)} for row in self.uniforms()],
            "layers": {
                layer: {
                    option.name: ranges([e for e, o in enumerate(options) if o == option])
                    for option in dict.fromkeys(options)
                }
                for layer, options in self.picks.items()
            },
        }

    def _plan(self, scheme: Scheme) -> Plan:
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
