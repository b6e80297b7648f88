"""Measure what `moeplug tune` gains: mixed and uniform schemes of the same bytes, perplexity and divergence.

    python benchmarks/bench_tune.py --out benchmarks/results/tune_demo.json
    python benchmarks/bench_tune.py --model olmoe/checkpoint --text olmoe/heldout.txt --out tune_olmoe.json

The first third of the text is what tune measures on, the rest is what models are scored on, in windows of 512. For
every uniform scheme, tune gets a budget of exactly its bytes; it may take less. Divergence is the mean of
KL(unquantized || quantized) over the tokens, in nats: it sees differences that perplexity on a short text does not.

A model that is small enough for this: all logits of the unquantized one are kept (tokens x vocabulary x 4 bytes).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moeplug
from moeplug import Scheme, evaluation, mixed
from moeplug.api import demo_checkpoint
from moeplug.registry import Registry

CANDIDATES = "mxfp4,int4-g128,int4-g128-asym,nvfp4,int4-g32,nf4,int8,none"
WINDOW = 512


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
        self._exact = self._of(mixed.unquantized().scheme)

    def _of(self, scheme: Scheme | Path) -> Tensor:
        loaded = moeplug.load(self._model, scheme, device="cpu", runtime="transformers", registry=self._registry)
        return log_probabilities(loaded.model, self._ids)

    def __call__(self, scheme: Scheme | Path) -> dict[str, float]:
        found = self._of(scheme)
        nll = -found.gather(1, self._targets).double().mean()
        divergence = (self._exact.exp() * (self._exact - found)).sum(1).double().mean()
        return {"perplexity": float(nll.exp()), "divergence": float(divergence)}

    @property
    def perplexity(self) -> float:
        """The unquantized model's."""
        return float((-self._exact.gather(1, self._targets).double().mean()).exp())


def run(model: Path, ids: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Return all scores: of each uniform scheme, and of what tune makes of its bytes."""
    registry = Registry.discover()
    candidates = mixed.find_candidates(names, registry)
    tasks = {
        per: mixed.Task.open(model, candidates, registry=registry, per=per, device="cpu")
        for per in ("layer", "expert", "projection")
    }
    measuring, scoring = ids[: len(ids) // 3], ids[len(ids) // 3 :]
    loaded = moeplug.load(model, mixed.unquantized().scheme, device="cpu", runtime="transformers", registry=registry)
    samples = mixed.capture(loaded, measuring)
    print("measuring", flush=True)
    started = time.perf_counter()
    errors = mixed.measure(tasks["projection"], samples)  # its options are the others' too
    seconds = time.perf_counter() - started
    ways = {per: (task, errors) for per, task in tasks.items()}
    ways["expert, data-free"] = (tasks["expert"], mixed.measure(tasks["expert"], None))
    scores = Scores(model, scoring, registry)
    rows = []
    for uniform in mixed.choose(tasks["expert"], errors, 1 << 62).uniforms():
        if uniform.option.gate_up.spec is None:
            continue
        row = {**uniform.as_dict(), **scores(uniform.option.scheme), "mixed": {}}
        budget = tasks["expert"].fixed_bytes + uniform.expert_bytes
        for way, (task, measured) in ways.items():
            row["mixed"][way] = mix(task, measured, budget, scores)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {
        "model": model.name if model != demo_checkpoint() else "demo",
        "candidates": list(names),
        "tokens_measured_on": len(measuring),
        "tokens_scored": len(scoring),
        "experts_without_tokens": errors.unreached,
        "seconds_measuring_per_projection": round(seconds, 1),
        "perplexity_unquantized": scores.perplexity,
        "rows": rows,
        "machine": {"cpus": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()},
    }


def mix(task: mixed.Task, errors: mixed.Errors, budget: int, scores: Scores) -> dict[str, Any]:
    """Return the score of tune's scheme, loaded from the file that it writes."""
    choice = mixed.choose(task, errors, budget)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mixed.yaml"
        choice.write(file, None)
        found = scores(file)
    data = choice.as_dict()
    kept = {key: data[key] for key in ("expert_bytes", "relative_rms", "gap", "chosen")}
    return kept | found | {"groups": sum(len(set(options)) for options in choice.picks.values())}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown: divergence in thousandths of a nat, then perplexity."""
    ways = list(result["rows"][0]["mixed"])
    lines = [f"| bytes of | uniform | {' | '.join(ways)} |", "|---" * (len(ways) + 2) + "|"]
    for row in result["rows"]:
        cells = [row, *(row["mixed"][way] for way in ways)]
        shown = [f"{1000 * cell['divergence']:.2f} / {cell['perplexity']:.4f}" for cell in cells]
        lines.append(f"| {row['scheme']}, {row['expert_bytes'] / 1e6:.3f} MB | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo_checkpoint(), help="a checkpoint folder; default: the demo")
    parser.add_argument("--text", type=Path, default=demo_checkpoint().parent / "heldout.txt")
    parser.add_argument("--candidates", default=CANDIDATES)
    parser.add_argument("--max-tokens", type=int, default=12288)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ids = evaluation.encode_file(evaluation.load_tokenizer(args.model), args.text, args.max_tokens)
    result = run(args.model, ids, args.candidates.split(","))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
