"""Measure experts on a CPU beside transformers' own: tokens per second of generation, and one forward of M tokens.

    python benchmarks/bench_cpu.py --out benchmarks/results/cpu_demo.json
    python benchmarks/bench_cpu.py --size qwen3 --out benchmarks/results/cpu_qwen3.json

Makes a Qwen3-MoE with random weights through transformers (demo: 5 layers of 8 experts, H=256, I=128, T=2; qwen3:
2 layers of 128 experts, H=2048, I=768, T=8, 2.4 GB in bfloat16), loads it four times and runs all in one process, in
turn, --repeat times. The experts' share of the time is what passes in the forward of the layers' experts modules.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import moeplug

SIZES: dict[str, dict[str, Any]] = {
    "demo": {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 128,
        "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8,
        "num_experts_per_tok": 2, "tie_word_embeddings": True,
    },
    "qwen3": {
        "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8,
    },
}  # fmt: skip
UNQUANTIZED = "api: 1\nname: unquantized\nplugin: int8\nweights: null\n"
TRANSFORMERS = ("eager", "grouped_mm")
PROMPT_TOKENS = 16


def make_checkpoint(folder: Path, size: str) -> None:
    """Write a random Qwen3-MoE through transformers' own save_pretrained."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES[size], norm_topk_prob=True, eos_token_id=0, bos_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def load_models(folder: Path) -> dict[str, Any]:
    """Return every model that is compared, by name."""
    scheme = folder / "unquantized.yaml"
    scheme.write_text(UNQUANTIZED)
    models: dict[str, Any] = {}
    for name in TRANSFORMERS:
        models[f"transformers {name}"] = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, experts_implementation=name
        ).eval()
    for name, source in (("int8", "int8"), ("bfloat16", str(scheme))):
        models[f"moeplug {name}"] = moeplug.load(folder, source, device="cpu", runtime="transformers").model
    return models


def experts_of(model: Any) -> list[Any]:
    """Return the experts module of every layer."""
    return [layer.mlp.experts for layer in model.model.layers]


@contextlib.contextmanager
def clock(modules: list[Any]) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds spent in these modules' forwards so far."""
    started, total = [0.0], [0.0]

    def before(*_: Any) -> None:
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        total[0] += time.perf_counter() - started[0]

    hooks = [h for m in modules for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        yield lambda: total[0]
    finally:
        for hook in hooks:
            hook.remove()


def generate(model: Any, tokens: int) -> dict[str, float]:
    """Generate greedily and return seconds, and those of the experts, without the prompt's own forward."""
    prompt = torch.arange(1, PROMPT_TOKENS + 1).unsqueeze(0)
    with torch.inference_mode(), clock(experts_of(model)) as in_experts:
        logits, cache = _step(model, prompt, None)
        seconds_before, experts_before = time.perf_counter(), in_experts()
        for _ in range(tokens):
            logits, cache = _step(model, logits.argmax(-1, keepdim=True), cache)
        seconds = time.perf_counter() - seconds_before
        return {"tokens_per_s": tokens / seconds, "seconds": seconds, "experts_s": in_experts() - experts_before}


def _step(model: Any, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    output = model(ids, past_key_values=cache, use_cache=True)
    return output.logits[:, -1], output.past_key_values


def forward_ms(models: dict[str, Any], M: int, repeat: int) -> dict[str, list[float]]:
    """Return the milliseconds of one experts module on M random tokens, all models in turn on the same inputs."""
    config = next(iter(models.values())).config
    times: dict[str, list[float]] = {name: [] for name in models}
    for run in range(-2, repeat):
        generator = torch.Generator().manual_seed(run + 2)
        hidden = torch.randn(M, config.hidden_size, generator=generator).bfloat16()
        weights, ids = torch.rand(M, config.num_experts, generator=generator).topk(config.num_experts_per_tok)
        weights = (weights / weights.sum(1, keepdim=True)).bfloat16()
        for name, model in models.items():
            experts = experts_of(model)[run % 2]
            started = time.perf_counter()
            with torch.inference_mode():
                experts(hidden, ids, weights)
            if run >= 0:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def spread(values: list[float]) -> str:
    """Return "median (lowest to highest)"."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(generations: dict[str, list[dict[str, float]]], forwards: dict[int, dict[str, list[float]]]) -> None:
    """Print medians with their spread, and how many times as fast as transformers' best each is."""
    best = min(statistics.median(r["experts_s"] for r in generations[f"transformers {n}"]) for n in TRANSFORMERS)
    print(f"{'generation':26} tokens/s, experts' share, experts' time as a part of transformers' best")
    for name, runs in generations.items():
        share = statistics.median(r["experts_s"] / r["seconds"] for r in runs)
        ratio = best / statistics.median(r["experts_s"] for r in runs)
        print(f"{name:26} {spread([r['tokens_per_s'] for r in runs])}, {share:.0%}, {ratio:.2f} x as fast")
    for M, times in forwards.items():
        best = min(statistics.median(times[f"transformers {name}"]) for name in TRANSFORMERS)
        print(f"experts, M={M}: ms")
        for name, values in times.items():
            print(f"{name:26} {spread(values)}, {best / statistics.median(values):.2f} x as fast")


def main() -> None:
    """Make the checkpoint, load and run all models in turn, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate in a run")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--forwards", type=int, nargs="*", default=[1, 8, 64, 512], help="M of single forwards")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        make_checkpoint(Path(temporary), args.size)
        models = load_models(Path(temporary))
    for model in models.values():
        generate(model, 4)
    generations: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(args.repeat):
        for name, model in models.items():
            generations[name].append(generate(model, args.tokens))
    forwards = {M: forward_ms(models, M, 3 * args.repeat) for M in args.forwards}
    report(generations, forwards)
    if args.out:
        document = {
            "command": " ".join(["python", "benchmarks/bench_cpu.py", *sys.argv[1:]]), "size": SIZES[args.size],
            "cpu": platform.processor() or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
            "generations": generations, "forward_ms": forwards,
        }  # fmt: skip
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
