"""Measure loading: throughput beside a plain read and a memcpy, and memory beyond the finished model.

    python benchmarks/bench_load.py --out benchmarks/results/load_cpu.json
    python benchmarks/bench_load.py --device cuda --out benchmarks/results/load_gpu.json

Makes a Qwen3-MoE checkpoint with transformers (2.4 GB in bf16: 2 layers of 128 experts, H=2048, I=768) unless
--checkpoint names one, then runs each job in a process of its own, page cache warm, jobs in turn, --repeat times.

Extra memory = peak - before - what stays, of host (VmHWM, reset before the job) and GPU (max_memory_allocated).
The bound is max(64 MiB, 4 x the largest expert weight in bf16).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

GIB = 2**30
MIB = 2**20
READ_BYTES = 16 * MIB


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write a random Qwen3-MoE of 128 experts per layer through transformers' own save_pretrained."""
    import torch
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=4096, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")


def resident() -> int:
    """Return this process's resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """Return the peak of resident bytes since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Let the kernel count the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def plain_read(files: list[Path], threads: int) -> float:
    """Return seconds to pread all files into reused buffers with some threads."""
    parts = [
        (f, o, min(READ_BYTES, f.stat().st_size - o)) for f in files for o in range(0, f.stat().st_size, READ_BYTES)
    ]
    todo, lock = iter(parts), threading.Lock()

    def work() -> None:
        buffer, open_files = memoryview(bytearray(READ_BYTES)), {}
        while True:
            with lock:
                part = next(todo, None)
            if part is None:
                break
            file, offset, length = part
            if file not in open_files:
                open_files[file] = os.open(file, os.O_RDONLY)
            os.preadv(open_files[file], [buffer[:length]], offset)
        for descriptor in open_files.values():
            os.close(descriptor)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


def memcpy(total: int) -> float:
    """Return seconds to copy `total` bytes between two touched 256 MiB buffers, with all of torch's threads."""
    import torch

    source, target = (torch.ones(256 * MIB, dtype=torch.uint8) for _ in range(2))
    started = time.perf_counter()
    for _ in range(max(1, total // source.nbytes)):
        target.copy_(source)
    return (time.perf_counter() - started) * total / (max(1, total // source.nbytes) * source.nbytes)


def run_job(job: str, checkpoint: Path, device: str) -> dict[str, Any]:
    """Run one job in this process and return seconds and memory."""
    import torch

    files = sorted(checkpoint.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    if job.startswith("plain read"):
        return {"seconds": plain_read(files, int(job.split()[2])), "bytes": total}
    if job == "memcpy":
        return {"seconds": memcpy(total), "bytes": total}
    load = prepare(job, checkpoint, device)
    warm_up(device)
    cuda = device.startswith("cuda")
    reset_peak()
    before = resident()
    gpu_before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    kept = load()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak, after = peak_resident(), resident()
    stays = sum({t.data_ptr(): t.nbytes for t in tensors_of(kept)}.values())
    host_stays = 0 if cuda else stays
    result = {
        "seconds": seconds, "bytes": total, "stays": stays, "host_peak_minus_before": peak - before,
        "host_after_minus_before": after - before, "host_extra": peak - before - host_stays,
    }  # fmt: skip
    if cuda:
        result["gpu_extra"] = torch.cuda.max_memory_allocated() - gpu_before - stays
    return result


def prepare(job: str, checkpoint: Path, device: str) -> Any:
    """Import everything a job needs and return the function to measure."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.device("meta"):  # imports the model's code: hundreds of modules that are not the load's own
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(checkpoint))
    tool, _, scheme = job.partition(" ")
    if tool == "moeplug":
        import moeplug
        import moeplug.integrations.transformers
        from moeplug.registry import Registry

        registry = Registry.discover()
        small = torch.randn(2, 256, 128, device=device), torch.randn(2, 128, 128, device=device)
        moeplug.quantize_experts(*small, scheme, registry=registry)  # imports and first calls are not the load's own
        return lambda: moeplug.load(checkpoint, scheme, device=device, runtime="transformers", registry=registry).model
    more: dict[str, Any] = {}
    if scheme == "fp8":
        more["quantization_config"] = transformers.FineGrainedFP8Config()
    auto = transformers.AutoModelForCausalLM
    return lambda: auto.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map=device, **more)


def warm_up(device: str) -> None:
    """Start torch's threads, and the GPU, before memory is counted."""
    import torch

    x = torch.randn(512, 512, device=device)
    (x @ x).sum().item()


def tensors_of(model: Any) -> Any:
    """Yield every parameter and buffer."""
    yield from model.parameters()
    yield from model.buffers()


def largest_expert_weight(checkpoint: Path) -> int:
    """Return the bytes of the largest projection of one expert in bf16."""
    config = json.loads((checkpoint / "config.json").read_text())
    return 2 * config["hidden_size"] * config["moe_intermediate_size"]


def main() -> None:
    """Make the checkpoint, run every job in turn, and print and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--layers", type=int, default=2, help="of the checkpoint that is made; 1.2 GB each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(run_job(args.job, args.checkpoint, args.device)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        if args.checkpoint is None:
            args.checkpoint = Path(temporary)
            make_checkpoint(args.checkpoint, args.layers)
        report(args, measure(args))


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return each job's runs, in turn, each in a process of its own."""
    jobs = ["plain read 1", "plain read 8" if args.device != "cpu" else "plain read 2", "memcpy"]
    jobs += ["moeplug int8", "moeplug int8-g128", "transformers bf16"]
    if args.device != "cpu":
        jobs.append("transformers fp8")
    runs: dict[str, list[dict[str, Any]]] = {job: [] for job in jobs}
    for _ in range(args.repeat):
        for job in jobs:
            command = [sys.executable, __file__, "--job", job, "--checkpoint", str(args.checkpoint)]
            done = subprocess.run([*command, "--device", args.device], capture_output=True, text=True)
            if done.returncode:
                print(f"{job}: failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                continue
            runs[job].append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table of medians and write everything as JSON."""
    import torch

    bound = max(64 * MIB, 4 * largest_expert_weight(args.checkpoint))
    print(f"{'job':20} {'s':>7} {'GB/s':>6} {'spread':>13} {'stays MiB':>10} {'host extra':>11} {'GPU extra':>10}")
    for job, results in runs.items():
        if not results:
            continue
        rates = sorted(r["bytes"] / 1e9 / r["seconds"] for r in results)
        middle = {k: statistics.median(r[k] for r in results) for k in results[0]}
        memory = [f"{middle[k] / MIB:.0f}" if k in middle else "-" for k in ("stays", "host_extra", "gpu_extra")]
        spread = f"{rates[0]:.2f}-{rates[-1]:.2f}"
        print(
            f"{job:20} {middle['seconds']:7.2f} {statistics.median(rates):6.2f} {spread:>13} "
            f"{memory[0]:>10} {memory[1]:>11} {memory[2]:>10}"
        )
    print(f"bound on extra memory: {bound / MIB:.0f} MiB")
    if args.out is None:
        return
    gpu = torch.cuda.get_device_name() if args.device != "cpu" else None
    document = {
        "command": " ".join(["python", "benchmarks/bench_load.py", *sys.argv[1:]]), "gpu": gpu,
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "python": platform.python_version(), "bound_bytes": bound, "runs": runs,
    }  # fmt: skip
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
