"""What `tune` is asked: a model, the ways to store its experts, and what each would take. Headers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from moeplug.api import find_device, open_source
from moeplug.checkpoint.reader import Checkpoint
from moeplug.errors import MoeplugError, RefusedError, UsageError
from moeplug.mixed.candidates import Candidate, unquantized
from moeplug.moe.layout import LayerSpec
from moeplug.pipeline import LayerPlan, Plan, plan_layer, plan_model
from moeplug.pipeline.plan import activate_plugins, gigabytes
from moeplug.registry import Registry
from moeplug.scheme import Override, Scheme

Per = Literal["layer", "expert", "projection"]


@dataclass(frozen=True)
class Option:
    """One way to store an expert: gate and up as one candidate says, down as another, or the same."""

    gate_up: Candidate
    down: Candidate

    @property
    def name(self) -> str:
        """Return the candidates' names, once where they are the same."""
        return self.gate_up.name if self.gate_up == self.down else f"{self.gate_up.name} + {self.down.name}"

    @property
    def scheme(self) -> Scheme:
        """Return the scheme that stores every expert this way."""
        if self.gate_up == self.down:
            return self.gate_up.scheme
        if self.gate_up.spec is None:
            return _with(self.down.scheme, Override(projections=("gate_up",), weights=None))
        return _with(self.gate_up.scheme, Override(projections=("down",), weights=self.down.spec))


def _with(scheme: Scheme, override: Override) -> Scheme:
    return scheme.model_copy(update={"overrides": (override,)})


@dataclass(frozen=True)
class Task:
    """A model and the options for its experts, with plans that say what fits and what it takes.

    per: for what an option is chosen as one: each layer, each expert, or each expert's gate_up and down apart.
    uniform: candidate → the plan of the whole model under it alone.
    expert_plans: (layer index, option) → the plan of a layer of one expert. exact_plans: layer index → the same,
    unquantized.
    """

    registry: Registry
    per: Per
    options: tuple[Option, ...]
    uniform: Mapping[Candidate, Plan]
    expert_plans: Mapping[tuple[int, Option], LayerPlan]
    exact_plans: Mapping[int, LayerPlan]

    @classmethod
    def open(
        cls,
        model: str | Path | None,
        candidates: Sequence[Candidate],
        *,
        registry: Registry,
        per: Per = "expert",
        device: str | torch.device | None = None,
        with_dense: bool = True,
        left_out: Callable[[str], None] | None = None,
    ) -> Task:
        """Plan the model under every option.

        with_dense: count the tensors outside the experts too, as `plan` does with runtime transformers.
        left_out: told of each candidate that does not fit the model or the device; None: such a one is an error.
        """
        found = find_device(device)
        checkpoint, family = open_source(model, registry=registry)
        uniform: dict[Candidate, Plan] = {}
        for candidate in candidates:
            scheme = candidate.scheme
            try:
                activate_plugins(scheme, registry, found)
                uniform[candidate] = plan_model(checkpoint, family, scheme, registry, found, with_dense=with_dense)
            except MoeplugError as error:
                if left_out is None:
                    raise
                left_out(f"{candidate.name} is left out: {error}")
        if not uniform:
            raise UsageError("no candidate fits this model and device; name some with --candidates")
        options = tuple(_options(tuple(uniform), per))
        layers = [layer.layer for layer in next(iter(uniform.values())).layers]
        expert_plans = {
            (layer.index, option): _plan_one_expert(layer, option.scheme, registry, found)
            for option in options
            for layer in layers
        }
        exact = unquantized().scheme
        exact_plans = {layer.index: _plan_one_expert(layer, exact, registry, found) for layer in layers}
        return cls(registry, per, options, uniform, expert_plans, exact_plans)

    @property
    def any_plan(self) -> Plan:
        """A plan of the model; layers, sources and dense tensors are the same in all."""
        return next(iter(self.uniform.values()))

    @property
    def device(self) -> torch.device:
        """Where experts are quantized and measured."""
        return self.any_plan.device

    @property
    def checkpoint(self) -> Checkpoint:
        """The opened checkpoint."""
        checkpoint = self.any_plan.checkpoint
        assert isinstance(checkpoint, Checkpoint), "open_source without dummy opens files"
        return checkpoint

    @property
    def fixed_bytes(self) -> int:
        """Return what the peak has beside the experts: dense tensors if they count, and staging at its most."""
        return max(plan.peak_bytes - plan.expert_bytes_after for plan in self.uniform.values())

    @property
    def smallest_budget(self) -> int:
        """Return the least budget that some choice fits."""
        layers = [plan.layer for plan in self.any_plan.layers]
        least = (
            layer.num_experts * min(self.expert_bytes(layer.index, option) for option in self.options)
            for layer in layers
        )
        return self.fixed_bytes + sum(least)

    def require_possible(self, budget: int) -> None:
        """Raise RefusedError where no choice fits the budget. Nothing is read for it."""
        if budget < self.smallest_budget:
            raise RefusedError(
                f"no choice fits --budget {gigabytes(budget)}: the smallest budget that one fits is "
                f"{self.smallest_budget} bytes ({gigabytes(self.smallest_budget)}), of which "
                f"{gigabytes(self.fixed_bytes)} are for all but the experts. Nothing was read. Name candidates with "
                "fewer bits, or raise the budget"
            )

    def expert_bytes(self, layer: int, option: Option) -> int:
        """Return the bytes of one expert of a layer, scales included."""
        return self.expert_plans[layer, option].bytes_after


def _plan_one_expert(layer: LayerSpec, scheme: Scheme, registry: Registry, device: torch.device) -> LayerPlan:
    return plan_layer(replace(layer, num_experts=1, experts_per_token=1), scheme, registry, device)


def _options(candidates: Sequence[Candidate], per: Per) -> list[Option]:
    if per != "projection":
        return [Option(candidate, candidate) for candidate in candidates]
    pairs = [Option(one, other) for one in candidates for other in candidates]
    # One expert has one plugin; what is unquantized goes with any.
    return [o for o in pairs if None in (o.gate_up.spec, o.down.spec) or o.gate_up.plugin == o.down.plugin]
