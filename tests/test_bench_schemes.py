"""The README's table of schemes is what the benchmark measured, and has every installed scheme."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_schemes  # noqa: E402

RESULTS = json.loads((ROOT / "benchmarks/results/schemes_cpu.json").read_text())


def test_the_readme_shows_the_committed_results():
    assert bench_schemes.table(RESULTS["rows"]) in (ROOT / "README.md").read_text()


def test_every_shipped_scheme_is_measured_fewest_bytes_first():
    assert {row["scheme"] for row in RESULTS["rows"]} == {path.stem for path in (ROOT / "schemes").glob("*.yaml")}
    sizes = [row["bytes_per_weight"] for row in RESULTS["rows"]]
    assert sizes == sorted(sizes)


def test_the_benchmark_measures_a_scheme(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/bench_schemes.py", "--schemes", "int8", "--tokens", "300"]
    subprocess.run([*command, "--out", tmp_path / "out.json"], check=True, capture_output=True, cwd=ROOT)
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    committed = next(row for row in RESULTS["rows"] if row["scheme"] == "int8")
    assert row["bytes_per_weight"] == committed["bytes_per_weight"]
    assert abs(row["weight_error"] / committed["weight_error"] - 1) < 1e-3
    assert 0.005 < row["output_error"] < 0.02
