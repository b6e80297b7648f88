"""The kernel that serves a request is found from data alone, and every other one says why it does not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_cases import CHANNEL, Case, grouped, request_of

from moeplug.errors import SchemeError
from moeplug.formats import Unquantized
from moeplug.kernels import Device, core_kernels, select_kernel
from moeplug.kernels.cpu import CpuKernel
from moeplug.kernels.fused_moe import TritonKernel
from moeplug.moe.layout import CONCATENATED, INTERLEAVED
from moeplug.spec import ActivationSpec, WeightSpec

H100 = Device("cuda", 0, (9, 0))


class Packed(Unquantized):
    """Two weights in one byte."""

    scaled, values_per_element = True, 2


class Undecodable(Unquantized):
    """No Triton path."""

    def triton_decode(self) -> None:
        return None


def request(device: Device = H100, **changes):
    """Return a request for int8 channel experts on a device, with changes."""
    layer = changes.pop("layer", {})
    made = replace(request_of(Case("any", H=64, I=128)), device=device, **changes)
    return replace(made, layer=replace(made.layer, **layer))


@pytest.mark.parametrize("gate_up", [CHANNEL, grouped(32), grouped(16, False), None], ids=str)
def test_triton_serves_every_core_strategy_on_a_gpu_and_plain_torch_on_a_cpu(gate_up):
    assert select_kernel(request(H100, gate_up=gate_up), core_kernels()).kernel.name == "triton-fused-moe"
    assert select_kernel(request(Device("cpu"), gate_up=gate_up), core_kernels()).kernel.name == "cpu-grouped"


REASONS = {
    "cpu": (request(Device("cpu")), "needs a CUDA device, not cpu"),
    "turing": (request(Device("cuda", 1, (7, 5))), "needs compute capability 8.0, cuda:1 has 7.5"),
    "unknown-capability": (request(Device("cuda")), "needs compute capability 8.0"),
    "input-activations": (
        request(input_activations=ActivationSpec(format="int8")),
        "only 16-bit and float32 activations",
    ),
    "intermediate": (request(intermediate=ActivationSpec(format="int8")), "only 16-bit and float32 activations"),
    "activation": (request(layer={"activation": "swish9"}), "activation 'swish9' is none of silu, gelu"),
    "packed": (request(down_format=Packed(torch.int8)), "packs 2 values into one element"),
    "no-decode": (request(gate_up_format=Undecodable(torch.int8)), "format int8 has no triton_decode"),
    "small-groups": (request(down=grouped(8)), "group_size=8 is below 16"),
    "block": (
        request(gate_up=WeightSpec(format="int8", strategy="block", block_structure=(128, 128))),
        "strategy block is none of tensor, channel, group",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_triton_kernel_says_why_it_does_not_serve(name):
    asked, reason = REASONS[name]
    found = TritonKernel().reason_against(asked)
    assert found is not None
    assert reason in found


def test_the_triton_kernel_says_that_triton_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton is not installed" in TritonKernel().reason_against(request())


@pytest.mark.parametrize("name", ["input-activations", "intermediate", "activation", "block"])
def test_the_cpu_kernel_gives_the_same_reasons(name):
    asked, reason = REASONS[name]
    assert reason in CpuKernel().reason_against(replace(asked, device=Device("cpu")))


def test_the_cpu_kernel_serves_what_has_no_triton_path():
    assert CpuKernel().reason_against(request(Device("cpu"), down_format=Packed(torch.int8), down=grouped(8))) is None


def test_no_kernel_at_all_is_an_error_with_every_reason():
    asked = request(Device("cuda", 0, (7, 5)))
    with pytest.raises(
        SchemeError, match=r"layer 3: no kernel .* on cuda:0: triton-fused-moe: .*; cpu-grouped: runs on a"
    ):
        select_kernel(asked, core_kernels())


def test_a_selection_tells_why_the_others_were_not_chosen():
    selection = select_kernel(request(), core_kernels())
    assert dict(selection.against) == {"cpu-grouped": "runs on a CPU, not on cuda:0"}
    second = select_kernel(request(Device("cpu")), [CpuKernel(), CpuKernel()])
    assert dict(second.against) == {"cpu-grouped": "cpu-grouped is preferred"}


def test_the_interpreter_is_never_chosen_for_a_user(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_kernel(request(Device("cpu")), core_kernels()).kernel.name == "cpu-grouped"


def test_each_kernel_names_the_layout_it_reads():
    assert (TritonKernel().layout, CpuKernel().layout) == (INTERLEAVED, CONCATENATED)


def test_the_host_halves_import_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import moeplug.kernels.fused_moe, moeplug.kernels.cpu, moeplug.kernels
print([kernel.name for kernel in moeplug.kernels.core_kernels()])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["['triton-fused-moe',", "'cpu-grouped']"]
