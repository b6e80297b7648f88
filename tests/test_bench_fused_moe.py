"""The benchmark of the kernels: it runs without a GPU, reads the peers' harness, and its sums are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import formats
import pytest
import torch

from moeplug.moe.reference import experts_reference

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "bench_fused_moe.py"
sys.path.insert(0, str(SCRIPT.parent))

import bench_fused_moe as bench  # noqa: E402
import peers_adapter  # noqa: E402
import plot_fused_moe as plots  # noqa: E402


def cell(peer, us, *, scheme="int8_w8a16", M=1, shape="olmoe", limit_us=10.0, **more):
    times = {"graph": us * 1e-6, "eager": 2 * us * 1e-6, "limit": limit_us * 1e-6}
    return {
        "shape": shape, "scheme": scheme, "peer": peer, "M": M, "bound": "mem", "bytes": 3e7, "flops": 1e8, "ok": True,
        **times, **more,
    }  # fmt: skip


CELLS = [
    cell("moeplug", 20),
    cell("vllm", 30),
    cell("marlin", 25),
    cell("wrong", 5, ok=False),
    cell("moeplug", 50, M=512, limit_us=25),
    cell("vllm", 40, M=512, limit_us=25, bound="math"),
    cell("moeplug", 12, scheme="mxfp4_w4a16"),
    cell("moeplug", 16, scheme="mxfp4_w4a16", M=8192),
    cell("tk_ogs", 40, scheme="mxfp4_w4a16", M=32),
    {"shape": "olmoe", "scheme": "fp8_block", "peer": "*", "M": None, "skip": "no multiple of 128"},
    cell("failed", 1) | {"graph": None, "eager": None, "error": "no"},
]


@pytest.fixture
def harness(tmp_path):
    """What the peers' harness writes, with fields that nobody needs."""
    path = tmp_path / "peers.json"
    data = {"argv": ["--m", "1"], "device": "H100", "physical": {"bw": 3e12, "bf16": 7e14, "note": "x"}, "notes": ["n"]}
    path.write_text(json.dumps(data | {"cells": [c | {"trace": "long", "R": 4} for c in CELLS]}))
    return path


def test_the_fastest_right_peer_is_the_one_compared_with(harness):
    pair = plots.pairs(plots.read(harness).cells)["olmoe", "int8_w8a16", 1]
    assert pair.peer["peer"] == "marlin"
    assert pair.ratio == pytest.approx(1.25)


def test_the_summary_counts_what_it_says(harness):
    numbers = dict(plots.summary(plots.read(harness)))
    assert numbers["cells measured / with a peer"] == "4 / 2"
    assert numbers["cells lost (slower than the fastest peer by more than 3%)"] == "1"
    assert numbers["cells where only a peer has a right result / where ours is wrong"] == "1 / 0"
    assert numbers["fastest peer / ours, geometric mean"] == "1.00 (2 cells)"  # 1.25 and 0.8
    assert numbers["ours / limit, M=1, without 4-bit weights"] == "2.00 (1 cells)"
    assert numbers["ours / limit, M=1, 4-bit weights"] == "1.20 (1 cells)"
    assert numbers["ours / limit, M=8192, all"] == "1.60 (1 cells)"
    assert numbers["ours / limit, 4-bit weights and int8 W8A16, M≥512"] == "1.79 (2 cells)"  # 2.0 and 1.6
    assert numbers["eager / graph, M≤32"] == "2.00 (2 cells)"


def test_a_reduced_file_gives_the_same_tables(harness, tmp_path):
    run = plots.read(harness)
    plots.reduce(run, tmp_path / "small.json")
    small = plots.read(tmp_path / "small.json")
    assert plots.markdown(small) == plots.markdown(run)
    assert "trace" not in (tmp_path / "small.json").read_text()
    assert [set(c) for c in small.cells] == [set(plots.FIELDS)] * len(run.cells)


def test_markdown_marks_what_is_lost_and_names_the_winner(harness):
    text = plots.markdown(plots.read(harness))
    assert "| olmoe | 20 (2.00) 1.25 marlin | " in text
    assert "50 (2.00) **0.80** vllm" in text
    assert "Lost, fastest peer / ours: int8_w8a16 olmoe M=512 (0.80, vllm)." in text
    assert "- (tk_ogs 40)" in text


def test_plots_are_small_files(harness, tmp_path):
    pytest.importorskip("matplotlib")
    files = plots.plot(plots.read(harness), tmp_path / "kernels.png")
    assert [file.name for file in files] == ["kernels.png", "kernels-ratio.png"]
    assert all(1000 < file.stat().st_size < 200_000 for file in files)


def test_the_benchmark_runs_without_a_gpu(tmp_path):
    out, reduced = tmp_path / "out.json", tmp_path / "reduced.json"
    command = [sys.executable, SCRIPT, "--cpu-smoke", "--peers", "torch", "--out", out, "--reduce", reduced]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(out.read_text())["cells"]
    assert {(c["scheme"], c["peer"]) for c in cells} == {
        ("bf16", "moeplug"), ("bf16", "torch"), ("int8", "moeplug"), ("int8-w8a8", "moeplug")
    }  # fmt: skip
    assert all(c["ok"] and c["eager"] > 0 for c in cells)
    assert "| fastest bf16 peer / ours | M=1 | M=5 |" in done.stdout
    assert [c["M"] for c in plots.read(reduced).cells] == [c["M"] for c in cells]


@pytest.mark.parametrize("name", formats.SPECS)
def test_the_stored_weights_that_cells_are_held_to_are_the_kernels(name):
    shape = bench.Shape("test", 3, 256, 128, 2)
    experts = formats.quantized(*shape.weights(torch.device("cpu")), name)
    (hidden, weights, ids), *_ = shape.inputs(5, torch.device("cpu"))
    expected = experts_reference(hidden.float(), weights, ids, bench.StoredWeights(experts))
    assert bench._error(experts(hidden.float(), weights, ids), expected) < 1e-5  # float32 sums in another order


@pytest.mark.parametrize("scheme", peers_adapter.SCHEMES)
def test_the_contestant_in_a_harness_of_peers_gives_the_experts_output(scheme):
    generator = torch.Generator().manual_seed(3)
    E, H, I, M, T = 4, 128, 128, 5, 2
    w13 = (torch.randn(E, 2 * I, H, generator=generator) / H**0.5).to(torch.bfloat16)
    w2 = (torch.randn(E, H, I, generator=generator) / I**0.5).to(torch.bfloat16)
    hidden = torch.randn(M, H, generator=generator).to(torch.bfloat16)
    ids = torch.rand(M, E, generator=generator).argsort(1)[:, :T].to(torch.int32)
    weights = torch.rand(M, T, generator=generator)
    contestant = peers_adapter.make(scheme, w13, w2)
    experts = [(w13[e, :I].float(), w13[e, I:].float(), w2[e].float()) for e in range(E)]
    expected = experts_reference(hidden, weights, ids, experts, out_dtype=torch.float32)
    error = (contestant(hidden, weights, ids).float() - expected).norm() / expected.norm()
    # What quantizing costs, not what the kernel does: 4 bits 0.2, 8-bit floats for weights and activations 0.06.
    assert error < (0.3 if "w4" in scheme else 0.1)
    assert contestant.prepare is None  # a CPU has nothing to tune
