"""Measure loading side by side: moeplug, a plain read, a bare loop, safetensors, transformers, vLLM, memcpy.

    python benchmarks/bench_load.py --gpu --out benchmarks/results/load_gpu.json
    python benchmarks/bench_load.py --gigabytes 2.4 --out benchmarks/results/load_cpu.json
    python benchmarks/bench_load.py --cpu-smoke

Makes a Qwen3-MoE (128 experts a layer, projections of 3 MiB in bf16; H=2048, I=768) unless --checkpoint names one.
Each job runs in a process of its own, --repeat times, page cache warm; with --cold all of it again, with the files
thrown out of the page cache before each load. --minutes ends the measuring; what was measured until then is reported.

Extra memory = peak - before - what stays, of the first load: of the host (VmHWM, reset before) and of the GPU
(max_memory_allocated). The bound is max(64 MiB, 4 x the largest expert weight in bf16).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import importlib.util
import json
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
MIB = 2**20
READ_BYTES = 16 * MIB
SHARD_LAYERS = 2  # 2.4 GB a file
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "vocab_size": 4096,
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "max_position_embeddings": 4096, "rope_theta": 1e6, "bos_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
SCHEMES = ("int8", "fp8", "fp8-block", "int4-g128")
VLLM = ("fp8", "int8_per_channel_weight_only")  # its names for what it quantizes while loading


def make_checkpoint(folder: Path, layers: int, **sizes: int) -> None:
    """Write a random Qwen3-MoE in the form of its checkpoints: a tensor for each projection of each expert."""
    import torch
    from safetensors.torch import save_file

    config = CONFIG | sizes | {"num_hidden_layers": layers}
    H, I, E = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    heads, kv, D = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    noise = torch.empty(2**26 + 8191, dtype=torch.bfloat16).normal_(std=0.02)  # 134 MB: no two weights begin alike
    weight_map: dict[str, str] = {}
    place = 0

    def weight(*shape: int) -> Any:
        nonlocal place
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        place = (place + 10007) % (noise.numel() - count)
        return noise[place : place + count].view(shape).clone()

    def save(tensors: dict[str, Any], file: str) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    vocabulary = config["vocab_size"]
    outside = {"model.embed_tokens.weight": weight(vocabulary, H), "lm_head.weight": weight(vocabulary, H)}
    save(outside | {"model.norm.weight": torch.ones(H, dtype=torch.bfloat16)}, "model-outside.safetensors")
    for first in range(0, layers, SHARD_LAYERS):
        tensors: dict[str, Any] = {}
        for layer in range(first, min(first + SHARD_LAYERS, layers)):
            at = f"model.layers.{layer}."
            for name, shape in (("q", (heads * D, H)), ("k", (kv * D, H)), ("v", (kv * D, H)), ("o", (H, heads * D))):
                tensors[f"{at}self_attn.{name}_proj.weight"] = weight(*shape)
            for name, size in (("self_attn.q_norm", D), ("self_attn.k_norm", D)):
                tensors[f"{at}{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{at}{name}.weight"] = torch.ones(H, dtype=torch.bfloat16)
            tensors[f"{at}mlp.gate.weight"] = weight(E, H)
            for expert in range(E):
                for name, shape in (("gate", (I, H)), ("up", (I, H)), ("down", (H, I))):
                    tensors[f"{at}mlp.experts.{expert}.{name}_proj.weight"] = weight(*shape)
        save(tensors, f"model-layers-{first:03d}.safetensors")
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    os.sync()  # or the pages that were never written would stay when the cache is to be cold


def resident() -> int:
    """Return this process's resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """Return the peak of resident bytes since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Let the kernel count the peak from now on; some containers do not allow it, and the whole peak then counts."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def throw_out(files: list[Path]) -> None:
    """Drop the files' pages from the page cache: they are clean, so no privilege is needed."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_read(files: list[Path], threads: int) -> None:
    """Read all files into reused buffers with some threads."""
    sizes = [(file, file.stat().st_size) for file in files]
    parts = [(f, o, min(READ_BYTES, size - o)) for f, size in sizes for o in range(0, size, READ_BYTES)]
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
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def memcpy(total: int) -> Callable[[], None]:
    """Return a copy of `total` bytes between two touched buffers of 256 MiB, with all of torch's threads."""
    import torch

    source, target = (torch.ones(256 * MIB, dtype=torch.uint8) for _ in range(2))

    def copy() -> None:
        for _ in range(total // source.nbytes):
            target.copy_(source)
        target[: total % source.nbytes].copy_(source[: total % source.nbytes])

    return copy


def prepare(job: str, checkpoint: Path, files: list[Path], device: str) -> Callable[[], Any]:
    """Import everything that a job needs and return the function to measure, which returns what it leaves."""
    tool, _, what = job.partition(" ")
    if tool == "plain-read":
        return lambda: plain_read(files, int(what))
    if tool == "memcpy":
        return memcpy(sum(file.stat().st_size for file in files))
    if tool == "moeplug":
        return prepare_moeplug(checkpoint, what, device)
    if tool == "transformers":
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with torch.device("meta"):  # imports the model's code: hundreds of modules that are not the load's own
            transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(checkpoint))
        auto = transformers.AutoModelForCausalLM
        return lambda: auto.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map=device)
    if tool == "vllm":
        return prepare_vllm(checkpoint, what)
    if tool == "safetensors":
        from safetensors.torch import load_file

        return lambda: [load_file(file, device=device) for file in files]
    return lambda: bare_loop(files, device)


def prepare_vllm(checkpoint: Path, quantization: str) -> Callable[[], Any]:
    """Return vLLM's own load, quantizing as it reads, after all that it does before."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.workspace import init_workspace_manager

    config = EngineArgs(
        model=str(checkpoint), dtype="bfloat16", quantization=quantization, enforce_eager=True, max_model_len=1024,
        skip_tokenizer_init=True, attention_backend="TRITON_ATTN",
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        torch.cuda.set_device(0)
        init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, backend="nccl")
        ensure_model_parallel_initialized(1, 1)
        init_workspace_manager(torch.device("cuda:0"))

    def load() -> Any:
        with set_current_vllm_config(config):
            return get_model(vllm_config=config)

    return load


def bare_loop(files: list[Path], device: str) -> list[Any]:
    """Read runs of tensors with 6 threads, copy each to the device, and quantize its experts' rows to int8 there.

    What one writes in an afternoon: no checks, no errors measured, no layout for a kernel, and all in one process.
    """
    import torch

    cuda = device.startswith("cuda")
    runs = [run for file in files for run in runs_of(file)]
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    full: queue.SimpleQueue[Any] = queue.SimpleQueue()
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(8):
        free.put(torch.empty(max(nbytes for _, _, nbytes, _ in runs), dtype=torch.uint8, pin_memory=cuda))
    for run in runs:
        todo.put(run)

    def read() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                run = todo.get_nowait()
                buffer = free.get()
                with run[0].open("rb", buffering=0) as opened:
                    opened.seek(run[1])
                    opened.readinto(memoryview(buffer.numpy())[: run[2]])
                full.put((run, buffer))

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    kept, copying = [], collections.deque[Any]()
    for _ in runs:
        (_, _, nbytes, tensors), buffer = full.get()
        content = buffer[:nbytes].to(device, non_blocking=True, copy=True)
        if cuda:
            event = torch.cuda.Event()
            event.record()
            copying.append((event, buffer))
            while len(copying) > 2:
                copying[0][0].synchronize()
                free.put(copying.popleft()[1])
        else:
            free.put(buffer)
        for name, start, shape in tensors:
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            weight = content[start : start + 2 * count].view(torch.bfloat16).view(shape)
            if ".experts." in name:
                scale = weight.abs().amax(1, keepdim=True).float().clamp_min(1e-8) / 127
                kept += [(weight / scale).round_().to(torch.int8), scale]
            else:
                kept.append(weight.clone())
    for thread in threads:
        thread.join()
    return kept


def runs_of(file: Path) -> list[tuple[Path, int, int, list[tuple[str, int, tuple[int, ...]]]]]:
    """Return (file, offset, bytes, [(name, start, shape)]) of neighbouring tensors, up to 64 MiB together."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    runs: list[tuple[Path, int, int, list[tuple[str, int, tuple[int, ...]]]]] = []
    begin = end = -1
    inside: list[tuple[str, int, tuple[int, ...]]] = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, stop = entry["data_offsets"]
        if not inside or stop - begin > 64 * MIB:
            runs += [(file, 8 + length + begin, end - begin, inside)] if inside else []
            begin, inside = first, []
        inside.append((name, first - begin, tuple(entry["shape"])))
        end = stop
    return [*runs, (file, 8 + length + begin, end - begin, inside)]


def prepare_moeplug(checkpoint: Path, scheme: str, device: str) -> Callable[[], Any]:
    """Return a load of the experts (the other weights are some percent), after first calls that are not its own."""
    import torch

    import moeplug
    from moeplug.registry import Registry

    registry = Registry.discover()
    config = json.loads((checkpoint / "config.json").read_text())
    H, I = config["hidden_size"], config["moe_intermediate_size"]
    few = torch.randn(2, 2 * I, H, device=device).bfloat16(), torch.randn(2, H, I, device=device).bfloat16()
    moeplug.quantize_experts(*few, scheme, registry=registry)
    return lambda: moeplug.load(checkpoint, scheme, device=device, registry=registry)


def warm_up(device: str) -> None:
    """Start torch's threads, and the GPU with its copies from pinned memory, before memory is counted."""
    import torch

    x = torch.randn(512, 512, device=device)
    (x @ x).sum().item()
    if device.startswith("cuda"):
        torch.empty(1 << 20, pin_memory=True).to(device, non_blocking=True).sum().item()


def tensors_of(kept: Any) -> Any:
    """Yield every tensor that a job left."""
    if hasattr(kept, "layers"):
        for layer in kept.layers.values():
            yield from layer.buffers()
    elif hasattr(kept, "parameters"):
        yield from kept.parameters()
        yield from kept.buffers()
    else:
        for thing in kept or ():
            yield from thing.values() if isinstance(thing, dict) else [thing]


def run_job(job: str, checkpoint: Path, device: str, cold: bool, repeat: int) -> list[dict[str, Any]]:
    """Run one job in this process and return seconds and, of the first time, memory."""
    files = sorted(checkpoint.glob("*.safetensors"))
    load = prepare(job, checkpoint, files, device)
    cuda = device.startswith("cuda") and not job.startswith(("plain-read", "memcpy"))
    if not job.startswith("plain-read"):
        warm_up(device if cuda else "cpu")
    first, *others = [run_once(load, files, cuda, cold) for _ in range(repeat)]
    memory = ("stays", "host_extra", "gpu_extra")
    return [first, *({key: run[key] for key in run if key not in memory} for run in others)]


def run_once(load: Callable[[], Any], files: list[Path], cuda: bool, cold: bool) -> dict[str, Any]:
    """Load, and let go of what was loaded."""
    gc.collect()  # what the load before left in cycles
    if cold:
        throw_out(files)
    reset_peak()
    before = resident()
    if cuda:
        import torch

        torch.cuda.synchronize()
        gpu_before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    kept = load()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = peak_resident()
    report = getattr(kept, "report", None)
    # moeplug here reads the experts alone, so its rate is that of the bytes it read.
    read = sum(file.stat().st_size for file in files) if report is None else report.bytes_read
    stays = sum({t.data_ptr(): t.nbytes for t in tensors_of(kept)}.values())
    result = {"seconds": seconds, "bytes": read, "stays": stays, "host_extra": peak - before - (0 if cuda else stays)}
    if cuda:
        result["gpu_extra"] = torch.cuda.max_memory_allocated() - gpu_before - stays
    if report is not None:
        result["timings"] = report.timings.as_dict()
    return result


def jobs_of(device: str) -> list[str]:
    """Return what to measure, what matters most first."""
    cores = len(os.sched_getaffinity(0))
    jobs = ["plain-read 8", "bare-loop int8", *(f"moeplug {scheme}" for scheme in SCHEMES), "memcpy"]
    jobs += [f"plain-read {count}" for count in sorted({1, cores} - {8})]
    jobs += ["safetensors load_file", "transformers bf16"]
    if device.startswith("cuda") and importlib.util.find_spec("vllm"):
        jobs += [f"vllm {quantization}" for quantization in VLLM]
    try:
        import accelerate  # noqa: F401  # transformers needs it to load to a device
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"transformers bf16 is left out: {error}", file=sys.stderr)
        jobs.remove("transformers bf16")
    return jobs


def measure(args: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """Run every job, each in a process of its own, until all are done or the time is up."""
    results: list[dict[str, Any]] = []
    skipped = []
    try:
        for state in ["warm", "cold"] if args.cold else ["warm"]:
            if state == "warm":
                plain_read(sorted(args.checkpoint.glob("*.safetensors")), 8)
            for job in jobs_of(args.device):
                if state == "cold" and job == "memcpy":
                    continue
                if time.monotonic() > deadline:
                    skipped.append(f"{job} ({state})")
                    continue
                runs = run_apart(args, job, state)
                if job.startswith("vllm"):  # it loads once in a process
                    runs += [run for _ in range(args.repeat - 1) for run in run_apart(args, job, state)]
                results += [{"job": job, "cache": state, **run} for run in runs]
    except KeyboardInterrupt:
        print("interrupted: what was measured until now is reported", file=sys.stderr)
    if skipped:
        print(f"not measured within {args.minutes} minutes: {', '.join(skipped)}", file=sys.stderr)
    return results


def run_apart(args: argparse.Namespace, job: str, state: str) -> list[dict[str, Any]]:
    """Return one job's results, or what went wrong."""
    command = [sys.executable, __file__, "--job", job, "--checkpoint", str(args.checkpoint), "--device", args.device]
    command += ["--repeat", str(1 if job.startswith("vllm") else args.repeat), *(["--cold"] if state == "cold" else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        print(f"{job}, {state}: failed: took more than 180 s", file=sys.stderr)
        return [{"failed": "took more than 180 s"}]
    if done.returncode:
        print(f"{job}, {state}: failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return [{"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}]
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    rates = " ".join(f"{r['bytes'] / 1e9 / r['seconds']:.2f}" for r in results)
    print(f"{job:24} {state}  {rates} GB/s", file=sys.stderr, flush=True)
    return results


def python_per_weight(device: str) -> dict[str, Any]:
    """Load 18,432 expert weights (48 layers of 128 experts) of 64 x 64 generated numbers: what is left is Python."""
    import moeplug
    from moeplug.registry import Registry

    registry = Registry.discover()
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG | {"num_hidden_layers": 48, "hidden_size": 64, "moe_intermediate_size": 64}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        planned_at = time.perf_counter()
        moeplug.plan(folder, "int8", device=device, dummy=True, registry=registry)
        plan_seconds = time.perf_counter() - planned_at
        for _ in range(2):  # the first compiles what a GPU runs
            report = moeplug.load(folder, "int8", device=device, dummy=True, registry=registry).report
    weights = report.timings.weights
    return {"weights": weights, "plan_seconds": plan_seconds, "us_per_weight": 1e6 * report.seconds / weights,
            "timings": report.timings.as_dict()}  # fmt: skip


def largest_expert_weight(checkpoint: Path) -> int:
    """Return the bytes of the largest projection of one expert in bf16."""
    config = json.loads((checkpoint / "config.json").read_text())
    return 2 * int(config["hidden_size"]) * int(config["moe_intermediate_size"])


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the medians of each job and cache state, with the lowest and the highest rate."""
    rows = []
    for job, cache in dict.fromkeys((r["job"], r["cache"]) for r in results):
        of_job = [r for r in results if (r["job"], r["cache"]) == (job, cache) and "failed" not in r]
        if not of_job:
            continue
        rates = sorted(r["bytes"] / 1e9 / r["seconds"] for r in of_job)
        row = {"job": job, "cache": cache, "runs": len(of_job), "gb_per_s": statistics.median(rates)}
        row |= {"lowest": rates[0], "highest": rates[-1]}
        row |= {key: of_job[0][key] for key in ("stays", "host_extra", "gpu_extra") if key in of_job[0]}
        if "timings" in of_job[0]:
            row["bounded_by"] = statistics.mode(r["timings"]["bounded_by"] for r in of_job)
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]], bound: int) -> None:
    """Print the medians, and what they are of the plain read and of memcpy."""
    rates = {(row["job"], row["cache"]): row["gb_per_s"] for row in rows}
    print(f"{'job':24} {'cache':5} {'GB/s':>6} {'spread':>13} {'of read':>8} {'of memcpy':>9} "
          f"{'stays MiB':>10} {'host extra':>11} {'GPU extra':>10}  bounded by")  # fmt: skip
    for row in rows:
        job, cache = row["job"], row["cache"]
        best_read = max(rate for (name, state), rate in rates.items() if name.startswith("plain") and state == cache)
        copy = rates.get(("memcpy", "warm"))
        memory = [f"{row[k] / MIB:.0f}" if k in row else "-" for k in ("stays", "host_extra", "gpu_extra")]
        print(
            f"{job:24} {cache:5} {row['gb_per_s']:6.2f} {row['lowest']:6.2f}-{row['highest']:<6.2f} "
            f"{row['gb_per_s'] / best_read:8.2f} {row['gb_per_s'] / copy if copy else 0:9.3f} "
            f"{memory[0]:>10} {memory[1]:>11} {memory[2]:>10}  {row.get('bounded_by', '')}"
        )
    print(f"bound on extra memory: {bound / MIB:.0f} MiB, host and device each")


def report(args: argparse.Namespace, results: list[dict[str, Any]], small: dict[str, Any]) -> None:
    """Print a table of medians and write everything as JSON."""
    import torch

    bound = max(64 * MIB, 4 * largest_expert_weight(args.checkpoint))
    rows = summary(results)
    print_table(rows, bound)
    print(f"{small['weights']:,} weights of 64 x 64: {small['us_per_weight']:.0f} us each; "
          f"the plan took {small['plan_seconds']:.2f} s")  # fmt: skip
    if args.out is None:
        return
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
    command = " ".join(["python", "benchmarks/bench_load.py", *sys.argv[1:]])
    document = {
        "command": command, "gpu": gpu, "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "python": platform.python_version(),
        "bound_bytes": bound, "medians": rows, "small_weights": small, "runs": results,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a Qwen3-MoE in bf16; default: one is made")
    parser.add_argument("--gigabytes", type=float, default=8.5, help="of the checkpoint that is made; layers have 1.2")
    parser.add_argument("--folder", type=Path, help="where to make it; default: the temporary folder")
    parser.add_argument("--gpu", action="store_true", help="same as --device cuda --cold")
    parser.add_argument("--cpu-smoke", action="store_true", help="a tiny checkpoint, once: does everything run?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cold", action="store_true", help="also with the files out of the page cache")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0, help="when to stop measuring")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gpu:
        args.device, args.cold = "cuda", True
    if args.cpu_smoke:
        args.repeat, args.cold = 1, True
    return args


def main() -> None:
    """Make the checkpoint, run every job in turn, and print and write the medians."""
    args = parse()
    if args.job:
        print(json.dumps(run_job(args.job, args.checkpoint, args.device, args.cold, args.repeat)))
        return
    deadline = time.monotonic() + 60 * args.minutes
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # ends the measuring, as Ctrl-C does: the rest is reported
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        if args.checkpoint is None:
            args.checkpoint = Path(temporary)
            if args.cpu_smoke:
                sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4, "head_dim": 64}
                make_checkpoint(args.checkpoint, 2, **sizes)
            else:
                make_checkpoint(args.checkpoint, max(1, round(args.gigabytes / 1.21)))
        results = measure(args, deadline)
        report(args, results, python_per_weight(args.device))


if __name__ == "__main__":
    main()
