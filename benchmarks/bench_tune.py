"""Measure what `moeplug tune` gains: mixed and uniform schemes of the same bytes, perplexity and divergence.

    python benchmarks/bench_tune.py --out benchmarks/results/tune_demo.json
    python benchmarks/bench_tune.py --model olmoe/checkpoint --text olmoe/heldout.txt --out tune_olmoe.json

tune measures on every sixth window of 512 tokens, and models are scored on the others. Budgets are the bytes of every
uniform scheme, and three in the widest gap between two of them. Beside what tune makes of a budget stands the uniform
scheme of least divergence that fits it, and the mean difference of the two in nats a token with its standard error.
Divergence is the mean of KL(unquantized || quantized), in nats: it sees what perplexity loses in noise.

A model that is small enough for this: all logits of the unquantized one are kept (tokens x vocabulary x 4 bytes).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moeplug
from moeplug import Scheme, evaluation, mixed
from moeplug.api import demo_checkpoint
from moeplug.registry import Registry

CANDIDATES = "mxfp4,int4-g128,int4-g128-asym,nvfp4,int4-g32,nf4,int8,none"
WINDOW = 512
MEASURE_EVERY = 6  # the text changes from prose to code half way: one end would not be like the other


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Return (tokens, vocabulary) float32: what the model expects at each token but a window's first."""
    windows = [part for part in ids.split(WINDOW) if len(part) > 1]
    return torch.cat([model(w[None], use_cache=False).logits[0, :-1].float().log_softmax(-1) for w in windows])


class Scores:
    """Scores schemes against the unquantized model on a text."""

    def __init__(self, model: Path, ids: Tensor, registry: Registry) -> None:
        self._model, self._ids, self._registry = model, ids, registry
        self._targets = torch.cat([part[1:] for part in ids.split(WINDOW)])[:, None]
        self._exact = self._log_probabilities(mixed.unquantized().scheme)
        self._scored: dict[str, Score] = {}

    def __call__(self, scheme: Scheme) -> Score:
        if scheme.sha256 not in self._scored:
            found = self._log_probabilities(scheme)
            divergence = (self._exact.exp() * (self._exact - found)).sum(1).double().mean()
            self._scored[scheme.sha256] = Score(self._nats(found), float(divergence))
        return self._scored[scheme.sha256]

    @property
    def exact(self) -> Score:
        """The unquantized model's."""
        return Score(self._nats(self._exact), 0.0)

    def _log_probabilities(self, scheme: Scheme) -> Tensor:
        loaded = moeplug.load(self._model, scheme, device="cpu", runtime="transformers", registry=self._registry)
        return log_probabilities(loaded.model, self._ids)

    def _nats(self, found: Tensor) -> Tensor:
        return -found.gather(1, self._targets)[:, 0].double()


class Score(NamedTuple):
    """nats: (tokens,) negative log likelihood. divergence: mean KL, in nats."""

    nats: Tensor
    divergence: float

    def as_dict(self) -> dict[str, float]:
        return {"perplexity": float(self.nats.mean().exp()), "divergence": self.divergence}


def run(model: Path, ids: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Return the scores of every uniform scheme, and of what tune makes of each budget."""
    registry = Registry.discover()
    candidates = mixed.find_candidates(names, registry)
    tasks = {
        per: mixed.Task.open(model, candidates, registry=registry, per=per, device="cpu")
        for per in ("layer", "expert", "projection")
    }
    loaded = moeplug.load(model, mixed.unquantized().scheme, device="cpu", runtime="transformers", registry=registry)
    windows = ids.split(WINDOW)
    measuring = torch.cat(windows[::MEASURE_EVERY])
    scoring = torch.cat([window for number, window in enumerate(windows) if number % MEASURE_EVERY])
    samples = mixed.capture(loaded, measuring)
    errors = mixed.measure(tasks["projection"], samples)  # its options are the others' too
    ways = {per: (task, errors) for per, task in tasks.items()}
    ways["expert, data-free"] = (tasks["expert"], mixed.measure(tasks["expert"], None))
    scores = Scores(model, scoring, registry)
    everything = mixed.choose(tasks["expert"], errors, 1 << 62).uniforms()
    uniforms = [(u, scores(u.candidate.scheme)) for u in everything if u.candidate.spec is not None]
    rows = []
    for label, expert_bytes in budgets([u for u, _ in uniforms]):
        fitting = [(u, score) for u, score in uniforms if u.expert_bytes <= expert_bytes]
        best, best_score = min(fitting, key=lambda pair: pair[1].divergence)
        row: dict[str, Any] = {"budget": label, "expert_bytes": expert_bytes, "best_uniform": best.candidate.name}
        row |= best_score.as_dict()
        for way, (task, measured) in ways.items():
            row[way] = mix(task, measured, task.fixed_bytes + expert_bytes, scores, best_score)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {
        "model": loaded.model.config.model_type,
        "candidates": list(names),
        "tokens_measured_on": len(measuring),
        "tokens_scored": len(scoring),
        "experts": len(errors.experts),
        "experts_without_tokens": errors.unreached,
        "unquantized": scores.exact.as_dict(),
        "uniform": [u.as_dict() | score.as_dict() for u, score in uniforms],
        "budgets": rows,
        "machine": {"cpus": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()},
    }


def budgets(uniforms: Sequence[Any]) -> list[tuple[str, int]]:
    """Return (label, expert bytes): of each uniform scheme, and three within the widest gap between two of them."""
    by_bytes = {u.expert_bytes: f"of {u.candidate.name}" for u in uniforms}
    sizes = sorted(by_bytes)
    low, high = max(itertools.pairwise(sizes), key=lambda pair: pair[1] / pair[0])
    for quarter in (1, 2, 3):
        by_bytes[low + (high - low) * quarter // 4] = "between"
    return [(by_bytes[size], size) for size in sorted(by_bytes)]


def mix(task: mixed.Task, errors: mixed.Errors, budget: int, scores: Scores, uniform: Score) -> dict[str, Any]:
    """Return the score of tune's scheme, loaded from the file that it writes."""
    choice = mixed.choose(task, errors, budget)
    with tempfile.TemporaryDirectory() as folder:
        choice.write(Path(folder) / "mixed.yaml", None)
        score = scores(Scheme.from_file(Path(folder) / "mixed.yaml"))
    data = choice.as_dict()
    kept = {key: data[key] for key in ("expert_bytes", "relative_rms", "gap", "chosen")}
    saved = uniform.nats - score.nats
    kept |= {"nats_saved": float(saved.mean()), "standard_error": float(saved.std() / len(saved) ** 0.5)}
    return kept | score.as_dict() | {"groups": sum(len(set(options)) for options in choice.picks.values())}


def table(result: dict[str, Any]) -> str:
    """Return the budgets as Markdown: divergence in thousandths of a nat, then perplexity."""
    ways = ("layer", "expert", "projection", "expert, data-free")
    lines = [f"| budget | best uniform | {' | '.join(f'per {way}' for way in ways)} |", "|---" * 6 + "|"]
    for row in result["budgets"]:
        shown = [f"{1000 * c['divergence']:.2f} / {c['perplexity']:.3f}" for c in (row, *(row[way] for way in ways))]
        shown[0] = f"{row['best_uniform']} {shown[0]}"
        lines.append(f"| {row['expert_bytes'] / 1e6:.3f} MB {row['budget']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo_checkpoint(), help="a checkpoint folder; default: the demo")
    parser.add_argument("--text", type=Path, default=demo_checkpoint().parent / "heldout.txt")
    parser.add_argument("--candidates", default=CANDIDATES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ids = evaluation.encode_file(evaluation.load_tokenizer(args.model), args.text)
    result = run(args.model, ids, args.candidates.split(","))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
