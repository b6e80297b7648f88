"""What each installed scheme costs the demo checkpoint, on a CPU: bytes, errors, perplexity, loading.

    python benchmarks/bench_schemes.py --out schemes.json            every installed scheme
    python benchmarks/bench_schemes.py --readme README.md            the same, and write the table between its marks

Errors are relative: rms(decoded - weight) / rms(weight), the mean over expert weights, and rms(difference / output)
of a layer's routed experts, pooled over layers, on the hidden states of the first tokens of the demo's held-out text.
Perplexity and agreement are over all of that text, beside transformers' own model in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

import moeplug
from moeplug import Scheme, evaluation
from moeplug.api import demo_checkpoint
from moeplug.integrations.transformers import reference_model, tokenizer_of
from moeplug.mixed.capture import Sample, capture
from moeplug.registry import Registry

PLAIN: Final = "api: 1\nname: unquantized\nweights: null\n"
TOKENS_CAPTURED: Final = 2048
LOADS: Final = 3  # the median counts: the demo is small, and one load takes a tenth of a second
BEGIN, END = "<!-- bench_schemes.py: begin -->", "<!-- bench_schemes.py: end -->"


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", help="names, with commas between them; left out: all that are installed")
    parser.add_argument("--tokens", type=int, help="of the held-out text; left out: all")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--readme", type=Path, help="replace the table in this file")
    arguments = parser.parse_args()
    registry = Registry.discover()
    names = arguments.schemes.split(",") if arguments.schemes else sorted(registry.scheme_files())
    rows = measure(names, registry, arguments.tokens)
    result = {"torch": torch.__version__, "command": " ".join(["python", *sys.argv]), "rows": rows}
    print(table(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.readme:
        write_table(arguments.readme, rows)


def measure(names: list[str], registry: Registry, tokens: int | None = None) -> list[dict[str, Any]]:
    """Return a row for no scheme and one for each name, the fewest bytes first."""
    text = demo_checkpoint().parent / "heldout.txt"
    ids = evaluation.encode_file(tokenizer_of(demo_checkpoint()), text, tokens)
    reference = evaluation.score_text(reference_model(demo_checkpoint(), torch.device("cpu")), ids)
    plain = moeplug.load(None, Scheme.from_text(PLAIN), device="cpu", runtime="transformers")
    samples = capture(plain, ids[:TOKENS_CAPTURED])
    rows = []
    for name in names:
        load = partial(moeplug.load, None, name, device="cpu", runtime="transformers", registry=registry)
        loads = [load() for _ in range(LOADS)]
        exact = load(exact_error=True)  # apart from those that are timed: all rows' errors take time
        plan, report = exact.report.plan, exact.report
        sizes = [layer.layer for layer in plan.layers]
        weights = sum(3 * layer.num_experts * layer.hidden_size * layer.intermediate_size for layer in sizes)
        compared = evaluation.compare(reference, evaluation.score_text(exact.model, ids))
        rows.append({
            "scheme": name,
            "bytes_per_weight": plan.expert_bytes_after / weights,
            "weight_error": statistics.fmean(layer.errors.mean for layer in report.layers),
            "output_error": output_error(plain, exact, samples),
            "perplexity_ratio": compared["perplexity_ratio"],
            "top1_agreement": compared["top1_agreement"],
            "gigabytes_per_second": statistics.median(timed.report.gigabytes_per_second for timed in loads),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["bytes_per_weight"], row["weight_error"]))


@torch.inference_mode()
def output_error(plain: Any, loaded: Any, samples: dict[int, Sample]) -> float:
    """Return ||experts(x) - unquantized experts(x)|| / ||unquantized experts(x)|| over all layers' samples."""
    difference, size = 0.0, 0.0
    for index, (hidden, topk_ids, topk_weights) in samples.items():
        expected = plain.layers[index](hidden, topk_ids, topk_weights).double()
        difference += float((loaded.layers[index](hidden, topk_ids, topk_weights).double() - expected).square().sum())
        size += float(expected.square().sum())
    return float((difference / size) ** 0.5)


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a markdown table."""
    lines = [
        "| scheme | bytes a weight | weight error | output error | perplexity | top-1 agreement | load, CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (
            f"{row['bytes_per_weight']:.3f}",
            f"{row['weight_error']:.4f}",
            f"{row['output_error']:.4f}",
            f"× {row['perplexity_ratio']:.4f}",
            f"{row['top1_agreement']:.2%}",
            f"{row['gigabytes_per_second']:.2f} GB/s",
        )
        lines.append(f"| {' | '.join((row['scheme'], *numbers))} |")
    return "\n".join(lines)


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """Replace what stands between the marks in a file."""
    before, _, rest = file.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    file.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    main()
