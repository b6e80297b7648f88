"""The Triton kernels compile for every GPU generation they claim, without a GPU, within its shared memory."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

triton = pytest.importorskip("triton", reason="triton is not installed")

from formats import FORMATS, SPECS  # noqa: E402
from kernel_cases import KINDS, Case, request_of  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from moeplug.hookspecs import StageContext  # noqa: E402
from moeplug.kernels import _fused_moe, fused_moe, weights  # noqa: E402
from moeplug.kernels.fused_moe import TritonExperts, TritonKernel  # noqa: E402
from moeplug.kernels.launch import Workspace  # noqa: E402
from moeplug.kernels.operands import operand  # noqa: E402
from moeplug.kernels.schedule import Blocks, Schedule, shared_memory_limit  # noqa: E402
from moeplug.kernels.select import Device  # noqa: E402
from moeplug.pipeline.allocate import buffer_shapes  # noqa: E402
from moeplug.pipeline.create_scales import ScaleStore  # noqa: E402
from moeplug.quantization import scale_dtype, scale_shape  # noqa: E402

pytestmark = pytest.mark.skipif(bool(_fused_moe.INTERPRETED.value), reason="TRITON_INTERPRET=1: nothing is compiled")

QWEN: dict[str, Any] = {"E": 128, "T": 8, "H": 2048, "I": 768, "dtype": "bfloat16"}
GENERATIONS = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0)}


class OtherGpu:
    """What triton asks a driver for when it compiles: the target. Its cache goes by the device's number."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._sm = capability[0] * 10 + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._sm, 32)

    def get_current_device(self) -> int:
        return self._sm

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Return a function (case, capability, schedule=None) → {kernel's name: compiled kernels}, all compiled anew."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a cached kernel would prove nothing

    def compile_call(case: Case, capability: tuple[int, int], schedule: Schedule | None = None):
        monkeypatch.setattr(triton.runtime.driver, "_active", OtherGpu(capability))
        kernels: dict[str, list[Any]] = {}
        for launch, tensors in planned(case, Device("cuda", 0, capability), schedule):
            launch._kernel.device_caches.clear()
            kernel = launch._kernel.warmup(*launch.filled(tensors), grid=launch._grid, **launch._options)
            kernels.setdefault(launch._kernel.__name__, []).append(kernel)
        return kernels

    return compile_call


def planned(case: Case, device: Device, schedule: Schedule | None):
    """Yield a call's launches with their tensors: on the meta device, so of any size."""
    kernel, request = TritonKernel(), request_of(case, Device("meta"))
    ctx = StageContext(None, request, tuple(range(case.E)), kernel, {})
    shapes, layout, scales = buffer_shapes(ctx), ctx.layout, ScaleStore(ctx).tensors
    weights = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    if case.bias:
        weights |= {f"{name}_bias": torch.empty(shape[:2], device="meta") for name, (shape, _) in shapes.items()}
    asked = replace(request, device=device)
    assert kernel.reason_against(asked) is None
    w13 = operand(asked, "w13", weights, scales, layout.w13_words)
    w2 = operand(asked, "w2", weights, scales, layout.w2_words)
    experts, workspace = TritonExperts(asked, w13, w2, schedule=schedule), Workspace(fused_moe.INPUTS)
    hidden = torch.empty(case.M, case.H, dtype=getattr(torch, case.dtype), device="meta")
    inputs = [
        hidden,
        torch.empty(case.M, case.T, device="meta"),
        torch.empty(case.M, case.T, dtype=getattr(torch, case.ids_dtype), device="meta"),
        torch.empty_like(hidden),
    ]
    launches = fused_moe._Planner(experts, workspace, *inputs).launches()
    tensors = workspace.tensors(inputs, torch.empty(workspace.nbytes, dtype=torch.uint8, device="meta"))
    yield from ((launch, tensors) for launch in launches)


def check(kernels: dict[str, list[Any]], capability: tuple[int, int], expected: set[str]) -> None:
    """Assert that just these kernels came out, to cubins whose shared memory the device has, and without atomics."""
    assert set(kernels) == expected
    limit = shared_memory_limit(Device("cuda", 0, capability))
    for kernel in (kernel for found in kernels.values() for kernel in found):
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= limit
        assert "atom" not in kernel.asm["ptx"], "an atomic would make results depend on the order of programs"


SORTED = {"prepare_kernel", "experts_kernel", "sum_kernel"}
UNSORTED = {"experts_kernel", "sum_kernel"}


def case_of(kind: str, M: int) -> Case:
    """Return a call of M tokens to a Qwen3-30B-A3B layer."""
    return Case(kind, **QWEN | {"M": M} | KINDS[kind])


def expected_of(case: Case, kernels: dict[str, list[Any]]) -> set[str]:
    """Return the kernels that a call has to launch."""
    names = SORTED if "prepare_kernel" in kernels else UNSORTED
    return names | ({"quantize_kernel"} if case.intermediate else set())


def run(compiled: Any, kind: str, M: int, capability: tuple[int, int]) -> None:
    case = case_of(kind, M)
    kernels = compiled(case, capability)
    check(kernels, capability, expected_of(case, kernels))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(("kind", "M"), [("int8", 8192), ("int4-g32-asym", 1), ("int8-w8a8", 512)])
def test_the_kernels_compile_within_shared_memory(compiled, kind, M, capability):
    run(compiled, kind, M, capability)


@pytest.mark.parametrize("name", ["int8", "fp8-tensor", "fp8-block", "int4-g128", "mxfp8"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_quantizes_weights_compiles(monkeypatch, tmp_path, generation, name):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", OtherGpu(GENERATIONS[generation]))
    spec = SPECS[name]
    fmt, (B, N, K), meta = FORMATS[spec.format], (1, 768, 2048), torch.device("meta")
    weight = torch.empty(B, N, K, dtype=torch.bfloat16, device=meta)
    stored = torch.empty(B, N, K // fmt.values_per_element, dtype=fmt.storage_dtype, device=meta)
    scale = torch.empty(B, *scale_shape(spec, N, K), dtype=scale_dtype(spec), device=meta)
    sums, peaks = torch.empty(B, N, 2, dtype=torch.float64, device=meta), torch.empty(B, dtype=torch.int32, device=meta)
    given = weight.shape, scale.shape, spec, fmt, True
    launched: list[Any] = [
        (weights._largest_magnitude, (weight.shape,), (weight, peaks)),
        *((weights._quantize, (*given, step), (weight, stored, scale, peaks, sums)) for step in (0, 16)),
    ]
    for make, given, tensors in launched:
        kinds = tuple((tensor.dtype, tensor.stride(), 0) for tensor in tensors)
        launch = make(*given, meta, kinds)
        launch._kernel.device_caches.clear()
        kernel = launch._kernel.warmup(*launch.filled(tensors), grid=launch._grid, **launch._options)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= shared_memory_limit(Device("cuda", 0, GENERATIONS[generation]))


# Schedules whose products read decoded weights from registers: the first gave errors of 0.2 on an H100 without DRAIN.
FROM_REGISTERS = {
    "int8": Blocks(128, 128, 64, 8, 4, 4, SWAP=True),
    "mxfp4": Blocks(256, 128, 128, 8, 8, 3, SWAP=True),
    "int4-g128": Blocks(16, 128, 256, 1, 4, 3, SWAP=True),
}


def running_at_the_end_of_a_step(ptx: str) -> list[int]:
    """Return how many products may still run where a stretch of code with products ends, for each such stretch."""
    stretches = [part for part in re.split(r"^\$L__BB\w+:", ptx, flags=re.M) if "wgmma.mma_async" in part]
    waits = [re.findall(r"wgmma\.(mma_async|wait_group\.sync\.aligned (\d+))", part)[-1] for part in stretches]
    return [-1 if what == "mma_async" else int(count) for what, count in waits]


@pytest.mark.parametrize("kind", FROM_REGISTERS)
def test_no_product_still_reads_registers_when_a_step_ends(compiled, kind):
    blocks = FROM_REGISTERS[kind]
    kernels = compiled(case_of(kind, 8192), (9, 0), Schedule(0, blocks, blocks))["experts_kernel"]
    for kernel in kernels:
        running = running_at_the_end_of_a_step(kernel.asm["ptx"])
        assert running
        assert set(running) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 64, 512, 8192])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_kind_of_launch_compiles_within_shared_memory(compiled, generation, kind, M):
    capability = GENERATIONS[generation]
    if reason := TritonKernel().reason_against(request_of(case_of(kind, M), Device("cuda", 0, capability))):
        assert "needs compute capability 8.9" in reason.replace("need ", "needs ")
        pytest.skip(reason)
    run(compiled, kind, M, capability)
