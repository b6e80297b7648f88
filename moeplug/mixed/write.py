"""Write down which expert is stored how as a scheme, as one writes it by hand: a rule, and exceptions in ranges."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from moeplug.mixed.candidates import Candidate, shared_rest
from moeplug.mixed.task import Option
from moeplug.pipeline.plan import ranges
from moeplug.scheme import WeightGroup, yaml_line

Picks = Mapping[int, Sequence[Option]]  # layer index → an option for each expert
GROUPS: tuple[WeightGroup, ...] = ("gate_up", "down")


class Rule(NamedTuple):
    """Some experts of some layers, stored as a candidate. experts None: all that no later rule takes."""

    layers: tuple[int, ...]
    experts: tuple[int, ...] | None
    candidate: Candidate


def scheme_text(name: str, description: str, picks: Picks, comment: str) -> str:
    """Return the YAML of the scheme that stores every expert as picked."""
    chosen = [of_group(option, group) for options in picks.values() for option in options for group in GROUPS]
    # Options are for the scheme's own plugin alone, so its own weights are of that plugin too.
    owner = next((candidate.plugin for candidate in chosen if candidate.scheme.options), None)
    base = Counter(c for c in chosen if owner is None or c.plugin in (owner, None)).most_common(1)[0][0]
    plugin = owner or base.plugin or next((c.plugin for c in chosen if c.plugin is not None), None)
    lines = [*textwrap.wrap(comment, 110, initial_indent="# ", subsequent_indent="# "), "api: 1", f"name: {name}"]
    lines.append(f"description: {yaml_line(description)}")
    lines += [f"plugin: {plugin}"] if plugin is not None else []
    lines += ["", _weights(base)]
    lines += [f"{key}: {yaml_line(value)}" for key, value in shared_rest(set(chosen)).items()]
    rules = list(_rules(picks, base))
    if rules:
        lines += ["", "overrides:"]
    for rule, groups in rules:
        lines += _override(rule, groups, plugin)
    return "\n".join(lines) + "\n"


def of_group(option: Option, group: WeightGroup) -> Candidate:
    """Return how an option stores gate and up, or down."""
    return option.gate_up if group == "gate_up" else option.down


def _rules(picks: Picks, base: Candidate) -> Iterator[tuple[Rule, tuple[WeightGroup, ...]]]:
    """Yield the exceptions from base, those of whole layers first: of two that match, the last wins."""
    by_group = {group: _rules_of(group, picks, base) for group in GROUPS}
    for level in (0, 1):
        rules = {rule for group in GROUPS for rule in by_group[group][level]}
        both = {rule: tuple(group for group in GROUPS if rule in by_group[group][level]) for rule in rules}
        yield from sorted(both.items(), key=lambda item: (item[0].layers, item[0].experts or (), item[1]))


def _rules_of(group: WeightGroup, picks: Picks, base: Candidate) -> tuple[list[Rule], list[Rule]]:
    """Return the rules for whole layers, and those for experts that differ from their layer; equal ones joined."""
    whole: dict[Candidate, list[int]] = defaultdict(list)
    single: dict[tuple[Candidate, tuple[int, ...]], list[int]] = defaultdict(list)
    for layer, options in picks.items():
        experts: dict[Candidate, list[int]] = defaultdict(list)
        for expert, option in enumerate(options):
            experts[of_group(option, group)].append(expert)
        most = max(experts, key=lambda candidate: (len(experts[candidate]), candidate == base))
        if most != base:
            whole[most].append(layer)
        for candidate, ids in experts.items():
            if candidate != most:
                single[candidate, tuple(ids)].append(layer)
    return (
        [Rule(tuple(layers), None, candidate) for candidate, layers in whole.items()],
        [Rule(tuple(layers), ids, candidate) for (candidate, ids), layers in single.items()],
    )


def _override(rule: Rule, groups: tuple[WeightGroup, ...], plugin: str | None) -> list[str]:
    fields = [f'layers: "{ranges(rule.layers)}"']
    if rule.experts is not None:
        fields.append(f'experts: "{ranges(rule.experts)}"')
    if groups != GROUPS:
        fields.append(f"projections: [{', '.join(groups)}]")
    if rule.candidate.plugin not in (None, plugin):
        fields.append(f"plugin: {rule.candidate.plugin}")
    fields.append(_weights(rule.candidate))
    return [f"  - {fields[0]}", *(f"    {field}" for field in fields[1:])]


def _weights(candidate: Candidate) -> str:
    if candidate.spec is None:
        return "weights: null   # unquantized"
    data = {"format": candidate.spec.format, "strategy": candidate.spec.strategy}
    data |= candidate.spec.model_dump(mode="json", exclude_defaults=True)
    return f"weights: {yaml_line(data)}   # {candidate.scheme.name}"
