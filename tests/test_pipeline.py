"""Plan and load: what is known before a byte is read, what is refused, and what a load leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import helpers
import pytest
import torch

import moeplug
from moeplug import CheckpointError, RefusedError, Scheme, SchemeError, UsageError
from moeplug.api import find_device
from moeplug.pipeline import run
from moeplug.pipeline.plan import Plan, gigabytes, ranges
from moeplug.registry import Registry

GATE = "model.layers.0.mlp.experts.3.gate_proj.weight"


def test_the_plan_knows_the_bytes_that_the_load_then_has(tiny_checkpoint):
    for scheme in ("int8", "int8-g32", Scheme.from_text("api: 1\nname: plain\nweights: null\n")):
        planned = moeplug.plan(tiny_checkpoint("qwen3_moe"), scheme, device="cpu")
        loaded = moeplug.load(tiny_checkpoint("qwen3_moe"), scheme, device="cpu")
        assert planned.expert_bytes_after == sum(layer.nbytes for layer in loaded.layers.values())
        experts = [t for t in planned.checkpoint.tensors.values() if ".experts." in t.name]
        assert planned.expert_bytes_before == sum(t.nbytes for t in experts)
        assert planned.dense_bytes == planned.checkpoint.total_bytes - planned.expert_bytes_before


def test_the_plan_claims_every_expert_weight_once(tiny_checkpoint):
    planned = moeplug.plan(tiny_checkpoint("qwen3_moe"), "int8", device="cpu")
    claimed = [(source.layer, source.expert, source.projection) for source in planned.sources]
    assert len(claimed) == len(set(claimed)) == 2 * 8 * 3
    assert [layer.layer.index for layer in planned.layers] == [0, 2]


def test_the_plan_says_which_kernel_and_why_not_the_others(tiny_checkpoint):
    group = moeplug.plan(tiny_checkpoint("qwen3_moe"), "int8", device="cpu").as_dict()["layers"][0]["groups"][0]
    assert group["kernel"] == "cpu-grouped"
    assert group["kernels_not_chosen"] == {"triton-fused-moe": "needs a CUDA device, not cpu"}


def test_planning_reads_no_weight(tiny_checkpoint, tmp_path):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    path = folder / "model.safetensors"
    header, data = helpers.read_header(path)
    helpers.write_raw(path, header, b"\xff" * len(data))  # every bfloat16 is NaN now
    moeplug.plan(folder, "int8", device="cpu")
    with pytest.raises(CheckpointError, match="nan at row 0, column 0"):
        moeplug.load(folder, "int8", device="cpu")


def test_a_budget_is_refused_before_reading(tiny_checkpoint):
    needed = moeplug.plan(tiny_checkpoint("qwen3_moe"), "int8", device="cpu").peak_bytes
    moeplug.plan(tiny_checkpoint("qwen3_moe"), "int8", device="cpu", budget=needed)
    with pytest.raises(RefusedError, match=r"--budget allows .* Nothing was read"):
        moeplug.load(tiny_checkpoint("qwen3_moe"), "int8", device="cpu", budget=needed - 1)


def test_dense_weights_count_against_the_budget_when_they_are_loaded(tiny_checkpoint):
    alone = moeplug.plan(tiny_checkpoint("qwen3_moe"), "int8", device="cpu")
    whole = moeplug.plan(tiny_checkpoint("qwen3_moe"), "int8", device="cpu", runtime="transformers")
    assert whole.peak_bytes - alone.peak_bytes == alone.dense_bytes > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_names_file_and_tensor(tiny_checkpoint, tmp_path, bad):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)

    def spoil(tensors):
        tensors[GATE][5, 6] = bad

    helpers.edit_tensors(folder / "model.safetensors", spoil)
    threads = threading.active_count()
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {GATE}: layer 0, expert 3, gate: {bad} at row 5"):
        moeplug.load(folder, "int8", device="cpu")
    assert threading.active_count() == threads


def test_a_dense_tensor_that_is_not_finite_is_named(tiny_checkpoint, tmp_path):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)

    def spoil(tensors):
        tensors["model.norm.weight"][3] = math.nan

    helpers.edit_tensors(folder / "model.safetensors", spoil)
    moeplug.load(folder, "int8", device="cpu")  # does not read it
    with pytest.raises(CheckpointError, match=r"model.safetensors: model.norm.weight: holds NaN or an infinity"):
        moeplug.load(folder, "int8", device="cpu", runtime="transformers")


def test_a_dense_dtype_that_torch_does_not_have_is_refused_by_the_plan(tiny_checkpoint, tmp_path):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)

    def change(header):
        header["model.norm.weight"]["dtype"] = "F8_E4M3FNUZ"
        header["model.norm.weight"]["shape"] = [128]

    helpers.edit_header(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match="F8_E4M3FNUZ"):
        moeplug.plan(folder, "int8", device="cpu", runtime="transformers")


MEMORY = """
import json, pathlib, sys
import torch, moeplug
from moeplug.registry import Registry

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

registry = Registry.discover()
moeplug.quantize_experts(torch.randn(2, 128, 64), torch.randn(2, 64, 64), sys.argv[2], registry=registry)
planned = moeplug.plan(sys.argv[1], sys.argv[2], device="cpu", dummy=True, registry=registry)
next(planned.checkpoint.stream([planned.sources[0].piece], [memoryview(bytearray(1 << 22))] * 2))  # makes its numbers
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
loaded = moeplug.load(sys.argv[1], sys.argv[2], device="cpu", dummy=True, registry=registry)
stays = sum(layer.nbytes for layer in loaded.layers.values())
print(json.dumps([status("VmHWM") - before, stays, planned.transient_bytes]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("scheme", ["int8", "int8-g32"])
def test_loading_on_a_cpu_needs_little_more_than_what_stays(tmp_path, scheme):
    """64 experts of 3 MiB each, 604 MB: the bound is 64 MiB, a layer's scales in group 32 alone are 38 MB."""
    helpers.write_wide_config(tmp_path)
    command = [sys.executable, "-c", MEMORY, str(tmp_path), scheme]
    peak, stays, planned = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert stays > 200 * 2**20
    assert planned <= 64 * 2**20
    assert peak - stays <= 64 * 2**20


def test_loads_that_overlap_give_the_process_its_threads_back(tiny_checkpoint):
    model, threads = tiny_checkpoint("olmoe"), torch.get_num_threads()
    torch.set_num_threads(2)
    started, errors = threading.Barrier(2, timeout=60), []

    def load():
        first = iter([started.wait])
        try:
            progress = lambda done, total: next(first, lambda: None)()  # noqa: E731
            moeplug.load(model, "int8", device="cpu", progress=progress)
        except BaseException as error:
            started.abort()
            errors.append(error)

    try:
        workers = [threading.Thread(target=load) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
        assert errors == []
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_an_override_that_selects_nothing_is_refused_with_its_line(tiny_checkpoint):
    text = "api: 1\nname: t\nplugin: int8\nweights: {format: int8}\noverrides:\n"
    scheme = Scheme.from_text(
        text + '  - {layers: "0", weights: null}\n  - {layers: "1,7", weights: null}\n', "my.yaml"
    )
    with pytest.raises(
        SchemeError, match=r"my.yaml:7:\d+: overrides.1 selects nothing: .* layers 0,2 with experts 0-7"
    ):
        moeplug.plan(tiny_checkpoint("qwen3_moe"), scheme, device="cpu")


def test_a_group_size_that_does_not_divide_is_refused_with_its_line(tiny_checkpoint, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("api: 1\nname: t\nplugin: int8\nweights:\n  format: int8\n  strategy: group\n  group_size: 64\n")
    message = r"my.yaml:7:\d+: layer 0, down: K=96 is not a multiple of group_size=64; 32 divides it"
    with pytest.raises(SchemeError, match=message):
        moeplug.plan(tiny_checkpoint("qwen3_moe"), str(file), device="cpu")


def test_a_scheme_that_asks_for_more_than_its_plugin_declares_is_refused():
    scheme = Scheme.from_text(
        "api: 1\nname: t\nplugin: int8\nweights: {format: int8, strategy: block, block_structure: [128, 128]}\n"
    )
    with pytest.raises(SchemeError, match="plugin 'int8' does not do strategy: block"):
        moeplug.plan(None, scheme, device="cpu", dummy=True)


def test_dummy_weights_run_the_same_pipeline(tiny_checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_checkpoint("jamba") / "config.json").read_bytes())
    loaded = moeplug.load(tmp_path, "int8-g32", device="cpu", dummy=True)
    assert list(loaded.layers) == [1, 3]
    assert 0.001 < loaded.report.as_dict()["worst_relative_rms"] < 0.02
    hidden = torch.randn(3, 64)
    out = loaded.layers[1](hidden, torch.ones(3, 2), torch.tensor([[0, 1], [2, 3], [1, 1]]))
    assert bool(torch.isfinite(out).all())
    assert float(out.norm()) > 0


def test_dummy_weights_have_no_runtime(tiny_checkpoint):
    with pytest.raises(UsageError, match="a dummy load has no runtime"):
        moeplug.load(tiny_checkpoint("jamba"), "int8", dummy=True, runtime="transformers")


def test_progress_ends_at_the_total(tiny_checkpoint):
    steps = []
    moeplug.load(
        tiny_checkpoint("olmoe"), "int8", device="cpu", progress=lambda done, total: steps.append((done, total))
    )
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] > 0


def test_an_interrupt_leaves_no_thread_and_no_file_open(tiny_checkpoint):
    def interrupt(done, total):
        raise KeyboardInterrupt

    open_files = len(list(Path("/proc/self/fd").iterdir()))
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        moeplug.load(tiny_checkpoint("olmoe"), "int8", device="cpu", progress=interrupt)
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_the_report_holds_the_provenance(tiny_checkpoint, tmp_path):
    loaded = moeplug.load(tiny_checkpoint("qwen3_moe"), "int8", device="cpu")
    loaded.report.write(tmp_path / "deep" / "report.json")
    report = json.loads((tmp_path / "deep" / "report.json").read_text())
    provenance = report["provenance"]
    assert provenance["plugins"][0]["distribution"] == "moeplug-int8"
    assert provenance["scheme"]["sha256"] == Scheme.from_file(provenance["scheme"]["path"]).sha256
    assert len(provenance["checkpoint"]["sha256_of_headers"]) == 64
    assert provenance["torch"] == torch.__version__
    assert report["report"] == str(tmp_path / "deep" / "report.json")
    assert report["bytes_read"] == sum(report[key] for key in ("expert_bytes_before",))
    assert [layer["layer"] for layer in report["layers"]] == [0, 2]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.json"]


def test_two_loads_give_the_same_bytes(tiny_checkpoint):
    one, other = (moeplug.load(tiny_checkpoint("mixtral"), "int8-g32", device="cpu").layers for _ in range(2))
    for index, experts in one.items():
        for name, tensor in experts.state_dict().items():
            assert torch.equal(tensor, other[index].state_dict()[name]), name


def test_the_checkpoints_own_dtype_counts_not_the_one_config_json_claims(tiny_checkpoint, tmp_path):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    helpers.edit_json(folder / "config.json", lambda config: config.update(dtype="float32"))
    planned = moeplug.plan(folder, Scheme.from_text("api: 1\nname: plain\nweights: null\n"), device="cpu")
    assert planned.layers[0].layer.dtype == "bfloat16"


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", "cpu:x"])
def test_an_unknown_device_is_a_usage_error(device):
    with pytest.raises(UsageError, match="device"):
        find_device(device)


def test_ranges_are_written_as_schemes_write_them():
    assert ranges([0, 1, 2, 3, 9]) == "0-3,9"
    assert ranges([5]) == "5"
    assert ranges([]) == ""


def test_sizes_are_decimal():
    assert [gigabytes(n) for n in (12, 1500, 2.5e6, 20e9)] == ["12 B", "1.50 kB", "2.50 MB", "20.00 GB"]


def test_a_dense_tensor_of_wide_numbers_larger_than_a_buffer_comes_whole(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "read_buffer_bytes", property(lambda plan: 12_294))  # an expert weight and 6 bytes
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    wide = torch.randn(64, 64, dtype=torch.float64)
    name = "model.layers.0.self_attn.q_proj.weight"
    helpers.edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: wide}))
    registry = Registry.discover()
    planned = moeplug.plan(folder, "int8", device="cpu", registry=registry)
    result = run(dataclasses.replace(planned, with_dense=True), registry)  # a model of transformers computes in no such
    assert torch.equal(result.dense[name], wide)


def test_a_load_says_where_its_time_went(tiny_checkpoint):
    report = moeplug.load(tiny_checkpoint("qwen3_moe"), "int8", device="cpu").report
    timings = report.as_dict()["timings"]
    assert timings["weights"] == 2 * 8 * 3
    assert timings["bounded_by"] in ("disk", "quantize", "Python")
    assert timings["gpu_copy"] is None
    parts = [timings[name] for name in ("read", "waited_for_reads", "check", "quantize", "error", "other")]
    assert all(0 <= part <= timings["seconds"] * max(timings["workers"], timings["readers"]) for part in parts)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_threads_changes_no_byte(tiny_checkpoint, monkeypatch, workers):
    monkeypatch.setattr(Plan, "workers", property(lambda plan: workers))
    monkeypatch.setattr(Plan, "readers", property(lambda plan: workers))
    path = tiny_checkpoint("qwen3_moe", shards=3)
    loaded = moeplug.load(path, "int8-g32", device="cpu", runtime="transformers")
    alone = moeplug.load(tiny_checkpoint("qwen3_moe"), "int8-g32", device="cpu", runtime="transformers")
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.report.layers[0].errors == alone.report.layers[0].errors


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_in_any_thread_ends_the_load_and_every_thread(tiny_checkpoint, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(Plan, "workers", property(lambda plan: workers))
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)

    def spoil(tensors):
        for tensor in tensors.values():
            tensor.view(-1)[0] = math.nan

    helpers.edit_tensors(folder / "model.safetensors", spoil)
    threads = threading.active_count()
    with pytest.raises(CheckpointError, match="nan at row 0, column 0"):
        moeplug.load(folder, "int8", device="cpu")
    assert threading.active_count() == threads


def write_one_layer(folder, hidden, intermediate, experts):
    config = helpers.TINY_CONFIGS["qwen3_moe"] | {
        "model_type": "qwen3_moe",
        "mlp_only_layers": [],
        "hidden_act": "silu",
    }
    config |= {"hidden_size": hidden, "moe_intermediate_size": intermediate, "num_experts": experts}
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


@pytest.mark.parametrize("scheme", ["int8", "int8-g32"])
def test_a_sampled_error_is_within_5_percent_of_the_exact_one(tmp_path, scheme):
    write_one_layer(tmp_path, 768, 1536, 4)
    sampled = moeplug.load(tmp_path, scheme, device="cpu", dummy=True).report.layers[0].errors
    exact = moeplug.load(tmp_path, scheme, device="cpu", dummy=True, exact_error=True).report.layers[0].errors
    assert exact.exact
    assert not sampled.exact
    assert sampled.mean == pytest.approx(exact.mean, rel=0.05)  # 48 rows of 768: 1 % apart as a rule


def test_a_scheme_that_says_accept_is_held_to_the_exact_error(tmp_path):
    write_one_layer(tmp_path, 768, 1536, 2)
    text = "api: 1\nname: t\nplugin: int8\nweights: {format: int8}\naccept: {relative_rms: 0.5}\n"
    loaded = moeplug.load(tmp_path, Scheme.from_text(text), device="cpu", dummy=True)
    assert loaded.report.layers[0].errors.exact


@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 32), (2048, 768), (4096, 14336)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("cores", [1, 2, 16, 128])
def test_the_memory_of_a_load_is_within_the_allowance(tmp_path, monkeypatch, hidden, intermediate, device, cores):
    write_one_layer(tmp_path, hidden, intermediate, 2)
    monkeypatch.setattr("moeplug.pipeline.plan.usable_cores", lambda: cores)
    planned = moeplug.plan(tmp_path, "int8", device="cpu", dummy=True)
    planned = dataclasses.replace(planned, device=torch.device(device))
    allowance = max(64 << 20, 4 * 2 * hidden * intermediate)
    assert planned.transient_bytes <= allowance
    assert planned.read_buffers >= 2
    assert planned.read_buffers * planned.read_buffer_bytes <= allowance
