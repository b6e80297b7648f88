"""The ways to store an expert that `tune` may choose from: installed schemes, scheme files, and `none`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from moeplug.errors import MoeplugError, UsageError
from moeplug.registry import Registry
from moeplug.scheme import Scheme
from moeplug.spec import WeightSpec

NONE: Final = "none"


@dataclass(frozen=True)
class Candidate:
    """A scheme that says one thing about all expert weights. name: as the user gave it, each once in a task."""

    name: str
    scheme: Scheme = field(compare=False)

    @property
    def plugin(self) -> str | None:
        """The plugin that does it; None: unquantized."""
        return self.scheme.plugin if self.scheme.weights is not None else None

    @property
    def spec(self) -> WeightSpec | None:
        """How weights are stored; None: unquantized."""
        return self.scheme.weights


def find_candidates(names: Sequence[str], registry: Registry) -> tuple[Candidate, ...]:
    """Return the candidates of these names: installed schemes, scheme files, or `none` for unquantized.

    Raises UsageError for a scheme with overrides, and where two could not stand in one scheme: a scheme says
    `input_activations` and `intermediate` once, and has `options` for its own plugin alone.
    """
    unique = list(dict.fromkeys(name.strip() for name in names))
    if not all(unique):
        raise UsageError("--candidates names nothing; give schemes with commas between them, and none for unquantized")
    found = tuple(_candidate(name, registry) for name in unique)
    for candidate in found:
        if candidate.scheme.overrides:
            raise UsageError(f"candidate {candidate.name}: has overrides; a candidate says one thing about all experts")
    for key in ("input_activations", "intermediate"):
        _require_same(key, [candidate for candidate in found if candidate.spec is not None])
    owners = sorted({candidate.plugin or "" for candidate in found if candidate.scheme.options})
    if len(owners) > 1:
        raise UsageError(f"candidates of plugins {' and '.join(owners)} have options; a scheme has them for one plugin")
    _require_same("options", [candidate for candidate in found if candidate.plugin in owners])
    return found


def default_candidates(registry: Registry) -> tuple[Candidate, ...]:
    """Return all installed schemes that differ from one another in weights alone, and `none`."""
    names = []
    for name in registry.scheme_files():
        try:
            scheme = registry.scheme(name)
        except MoeplugError:  # `moeplug schemes` says what is wrong with it
            continue
        rest = (scheme.overrides, scheme.options, scheme.input_activations, scheme.intermediate)
        if scheme.weights is not None and not any(rest):
            names.append(name)
    return find_candidates([*names, NONE], registry)


def shared_rest(candidates: Iterable[Candidate]) -> dict[str, object]:
    """Return what a scheme of these candidates says beside weights: the activations and options that they share."""
    quantized = [candidate.scheme for candidate in candidates if candidate.spec is not None]
    rest: dict[str, object] = {}
    for scheme in quantized:
        data = scheme.model_dump(mode="json", exclude_none=True)
        rest |= {key: data[key] for key in ("input_activations", "options") if data.get(key)}
        if scheme.intermediate != scheme.input_activations:
            rest["intermediate"] = data.get("intermediate")
    return rest


def unquantized() -> Candidate:
    """Return the candidate that leaves experts as the checkpoint has them."""
    return Candidate(NONE, Scheme.from_text(f"api: 1\nname: {NONE}\nweights: null\n", NONE))


def _candidate(name: str, registry: Registry) -> Candidate:
    return unquantized() if name == NONE else Candidate(name, registry.scheme(name))


def _require_same(key: str, candidates: Sequence[Candidate]) -> None:
    """Raise UsageError unless the candidates agree in what a scheme says once, for all experts."""
    for one, other in itertools.pairwise(candidates):
        if getattr(one.scheme, key) != getattr(other.scheme, key):
            raise UsageError(
                f"candidates {one.name} and {other.name} differ in {key}, which an override cannot change: tune with "
                "one of them, then with the other"
            )
