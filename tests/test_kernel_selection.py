"""The kernel that serves a request is found from data alone, and every other one says why it does not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from formats import FORMATS, SPECS, blocks
from kernel_cases import CHANNEL, TOKEN, Case, grouped, request_of

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


class Undecodable(Packed):
    """No Triton path."""

    values_per_element = 1


class Triple(Packed):
    """Three weights in one element."""

    values_per_element = 3


def request(device: Device = H100, **changes):
    """Return a request for int8 channel experts on a device, with changes."""
    layer = changes.pop("layer", {})
    made = replace(request_of(Case("any", H=64, I=128)), device=device, **changes)
    return replace(made, layer=replace(made.layer, **layer))


@pytest.mark.parametrize("gate_up", [CHANNEL, grouped(32), grouped(16, False), None], ids=str)
def test_triton_serves_every_core_strategy_on_a_gpu_and_plain_torch_on_a_cpu(gate_up):
    assert select_kernel(request(H100, gate_up=gate_up), core_kernels()).kernel.name == "triton-fused-moe"
    assert select_kernel(request(Device("cpu"), gate_up=gate_up), core_kernels()).kernel.name == "cpu-grouped"


SPECS_48 = WeightSpec(format="int4", strategy="group", group_size=48)
INT8_INPUT = {"activation_format": FORMATS["int8"]}
REASONS = {
    "cpu": (request(Device("cpu")), "needs a CUDA device, not cpu"),
    "turing": (request(Device("cuda", 1, (7, 5))), "needs compute capability 8.0, cuda:1 has 7.5"),
    "unknown-capability": (request(Device("cuda")), "needs compute capability 8.0"),
    "tensor-activations": (
        request(input_activations=ActivationSpec(format="int8", strategy="tensor")),
        "input_activations: a scale for all tokens makes a token's result depend on its batch; use strategy: token",
    ),
    "ragged-activations": (
        request(intermediate=ActivationSpec(format="int8", strategy="group", group_size=48)),
        "intermediate: K=128 is not a multiple of group_size=48; 32 divides it, or use strategy: token",
    ),
    "activation": (request(layer={"activation": "swish9"}), "activation 'swish9' is none of silu, gelu"),
    "three-in-one": (request(down_format=Triple(torch.int8)), "packs 3 values into one element; 1 and 2 are served"),
    "packed-K": (
        request(layer={"hidden_size": 96}, gate_up=WeightSpec(format="int4"), gate_up_format=FORMATS["int4"]),
        "packed format int4: K=96 is not a multiple of 64; use a format of 8 bits, or weights: null",
    ),
    "packed-groups": (
        request(layer={"hidden_size": 192}, gate_up=SPECS_48, gate_up_format=FORMATS["int4"]),
        "packed format int4: group_size=48 is not 16, 32 or a multiple of 64; use one of them",
    ),
    "activation-groups": (
        request(input_activations=ActivationSpec(format="int8", strategy="group", group_size=16), **INT8_INPUT),
        "activations: group_size=16 is no power of two from 32 on; use one, or strategy: token",
    ),
    "activation-groups-across-weight-groups": (
        request(
            layer={"hidden_size": 192},
            gate_up=grouped(96),
            input_activations=ActivationSpec(format="int8", strategy="group", group_size=64),
            **INT8_INPUT,
        ),
        "activations: group_size=64 and 96 of the weights: one must divide the other",
    ),
    "fp8-activations-before-ada": (
        request(
            Device("cuda", 0, (8, 0)),
            input_activations=ActivationSpec(format="fp8"),
            gate_up_format=FORMATS["fp8"],
            activation_format=FORMATS["fp8"],
        ),
        "fp8 activations need compute capability 8.9, cuda:0 has 8.0; leave them in 16 bits, as fp8-w8a16 does",
    ),
    "fp8-scales-before-ada": (
        request(Device("cuda", 0, (8, 0)), gate_up=SPECS["nvfp4"], gate_up_format=FORMATS["nvfp4"]),
        "scale_dtype float8_e4m3fn needs compute capability 8.9, cuda:0 has 8.0",
    ),
    "inexact-activations": (
        request(input_activations=ActivationSpec(format="fp8"), activation_format=FORMATS["fp8"]),
        "weights of format int8 are not exact as torch.float8_e4m3fn, the activations' type",
    ),
    "no-decode": (request(gate_up_format=Undecodable(torch.int8)), "format int8 has no triton_decode"),
    "small-groups": (request(down=grouped(8)), "group_size=8 is below 16"),
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


@pytest.mark.parametrize("name", ["tensor-activations", "ragged-activations", "activation"])
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
    assert CpuKernel().layout_for(request(Device("cpu"))) == CONCATENATED


def words_of(spec, H, activations=None):
    """Return whether the GPU's layout has words in w13, for weights under spec with K=H."""
    fmt = Unquantized(torch.bfloat16) if spec is None else FORMATS[spec.format]
    of_activations = None if activations is None else FORMATS[activations.format]
    asked = request(
        layer={"hidden_size": H},
        gate_up=spec,
        gate_up_format=fmt,
        input_activations=activations,
        activation_format=of_activations,
    )
    layout = TritonKernel().layout_for(asked)
    assert layout.w2_words  # int8, K=128
    return layout.w13_words


@pytest.mark.parametrize(
    ("spec", "K", "activations", "words"),
    [
        (None, 64, None, False),
        (CHANNEL, 64, None, True),
        (CHANNEL, 48, None, False),  # rows of bytes, not of whole words
        (CHANNEL, 64, TOKEN["int8"], False),  # the tensor cores take the bytes as they lie
        (WeightSpec(format="int8", symmetric=False), 64, TOKEN["int8"], True),  # minus a zero point they have nine bits
        (grouped(16), 64, None, True),
        (grouped(32), 64, None, True),
        (grouped(48), 96, None, False),
        (grouped(96), 96, None, True),
        (WeightSpec(format="fp8"), 64, TOKEN["fp8"], False),
        (blocks("fp8", 64, 128), 160, None, True),
        (SPECS["mxfp4"], 64, None, True),
        (SPECS["mxfp4"], 64, TOKEN["fp8"], True),
        (WeightSpec(format="int4"), 64, TOKEN["int8"], True),
        (WeightSpec(format="int4"), 96, None, False),  # refused
    ],
    ids=str,
)
def test_decoded_weights_lie_in_words_where_a_step_over_k_can_be_whole_runs(spec, K, activations, words):
    assert words_of(spec, K, activations) == words


def test_the_host_halves_import_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import moeplug.kernels.fused_moe, moeplug.kernels.cpu, moeplug.kernels
print([kernel.name for kernel in moeplug.kernels.core_kernels()])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["['triton-fused-moe',", "'cpu-grouped']"]
