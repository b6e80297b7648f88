"""The Triton kernels give the reference's numbers, shown on a CPU by triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("triton", reason="triton is not installed")

from interpreter_cases import CHECKS, DECODES, ENCODES, QUICK, SLOW

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(900)  # the first test waits for one process that runs all cases


def run(names: list[str]) -> dict[str, dict]:
    """Run cases in one process with TRITON_INTERPRET=1; return {name: errors}."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(ROOT / "tests/interpreter_cases.py"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """What every quick case gave."""
    return run([*DECODES, *ENCODES, *CHECKS, *QUICK])


@pytest.fixture(scope="module")
def slow_results() -> dict[str, dict]:
    """What every other case gave."""
    return run(SLOW)


@pytest.mark.parametrize("name", DECODES)
def test_every_word_decodes_to_what_the_format_says(results, name):
    assert results[name]["ok"], results[name].get("error")


@pytest.mark.parametrize("name", ENCODES)
def test_weights_are_quantized_to_the_bytes_of_the_reference(results, name):
    assert results[name]["ok"], results[name].get("error")


@pytest.mark.parametrize("name", QUICK)
def test_the_triton_kernel_gives_the_references_numbers_twice(results, name):
    assert results[name]["ok"], results[name].get("error") or results[name]


def test_a_token_of_nan_harms_no_other_token(results):
    assert results["nan-token"]["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_triton_kernel_gives_the_references_numbers_twice_for_every_variation(slow_results, name):
    assert slow_results[name]["ok"], slow_results[name].get("error") or slow_results[name]


def test_groups_larger_than_a_tile_are_left_to_torch():
    from interpreter_cases import FORMATS

    from moeplug.kernels import weights
    from moeplug.spec import WeightSpec

    out = torch.empty(1, 4, 8192, dtype=torch.int8)
    for size, served in ((weights.TILE, True), (2 * weights.TILE, False)):
        spec = WeightSpec(format="int8", strategy="group", group_size=size)
        assert weights.serves(spec, FORMATS["int8"], out) is served
