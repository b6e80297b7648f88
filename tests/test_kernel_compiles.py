"""The Triton kernels compile for every GPU generation they claim, without a GPU, within its shared memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from moeplug.kernels import _fused_moe  # noqa: E402
from moeplug.kernels.select import Device  # noqa: E402
from moeplug.kernels.tuning import ElementBytes, choose_blocks, shared_memory_limit  # noqa: E402

pytestmark = pytest.mark.skipif(_fused_moe.INTERPRETED, reason="TRITON_INTERPRET=1: there is nothing to compile")

BYTES = {"i8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
TYPES = {"bf16": _fused_moe.tl.bfloat16, "fp16": _fused_moe.tl.float16, "fp32": _fused_moe.tl.float32}


@dataclass(frozen=True)
class Launch:
    """One product of a Qwen3-30B-A3B layer (E=128, T=8, H=2048, I=768): M tokens, types as triton names them."""

    M: int
    hidden: str = "bf16"
    weight: str = "i8"
    scale: str | None = "fp32"
    zero_point: bool = False
    group_size: int | None = None
    activation: str = "silu"

    def __str__(self) -> str:
        words = [f"M{self.M}", self.hidden, self.weight, f"g{self.group_size}" if self.group_size else "channel"]
        return "-".join([*words, "asymmetric"] if self.zero_point else words)


def compiled(launch: Launch, capability: tuple[int, int], product: str):
    """Compile gate_up_kernel or down_kernel as the launcher would launch it; return triton's CompiledKernel."""
    kernel = getattr(_fused_moe, f"{product}_kernel")
    N, K = (1536, 2048) if product == "gate_up" else (2048, 768)
    K = K // 96 * 96 if launch.group_size == 48 else K
    group = launch.group_size or K
    sizes = ElementBytes(BYTES[launch.weight], BYTES[launch.hidden], BYTES[launch.hidden])
    blocks = choose_blocks(launch.M, 128, 8, N, K, Device("cuda", 0, capability), sizes, launch.group_size)
    constants = {"E": 128, "T": 8, "N": N, "K": K, "GROUP": group, "DOT_DTYPE": TYPES[launch.hidden]}
    constants |= {k: v for k, v in asdict(blocks).items() if k.isupper()}
    constants |= {"decode": _fused_moe.decode_identity, "ACTIVATION": launch.activation, "stride_xk": 1}
    if launch.scale is None:
        constants["scale_ptr"] = None
    if not launch.zero_point:
        constants["zero_ptr"] = None
    signature, attributes = _signature(kernel, launch, constants)
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32), options=options)


def _signature(kernel, launch: Launch, constants: dict) -> tuple[dict, dict]:
    """Return triton's types by parameter, and what is divisible by 16: pointers, and strides of whole rows."""
    pointers = {"x_ptr": launch.hidden, "w_ptr": launch.weight, "scale_ptr": launch.scale, "zero_ptr": "i8"}
    pointers |= {"topk_weight_ptr": "fp32", "pairs_ptr": "i64"}
    pointers["out_ptr"] = launch.hidden if kernel is _fused_moe.gate_up_kernel else "fp32"
    odd = {"num_blocks", "stride_tm", "stride_tt", "stride_zc", "stride_sc"}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{pointers.get(name, 'i32')}" if name.endswith("_ptr") else "i32"
        if name not in odd:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, attributes


def check(launch: Launch, capability: tuple[int, int], product: str) -> None:
    """Assert that a launch compiles to a cubin whose shared memory the device has."""
    kernel = compiled(launch, capability, product)
    assert kernel.asm["cubin"]
    assert 0 < kernel.metadata.shared <= shared_memory_limit(Device("cuda", 0, capability))
    assert "atom" not in kernel.asm["ptx"], "an atomic would make results depend on the order of programs"


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch) -> None:
    """Compile in earnest: a cached kernel would prove nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("product", ["gate_up", "down"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def test_the_kernel_compiles_within_shared_memory(capability, product):
    check(Launch(M=8192), capability, product)


def test_the_last_sum_compiles():
    kernel = _fused_moe.sum_kernel
    constants = {"E": 128, "T": 8, "N": 2048, "BLOCK_N": 1024, "stride_on": 1, "stride_it": 1}
    signature = {n: "constexpr" if n in constants else "i32" for n in kernel.arg_names}
    signature |= {"partial_ptr": "*fp32", "ids_ptr": "*i32", "out_ptr": "*bf16"}
    source = ASTSource(kernel, signature, constants, {(0,): [["tt.divisibility", 16]]})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True}).asm["cubin"]


ALL = [
    *(Launch(M, weight=w, scale=s) for M in (1, 64, 512, 1024, 8192) for w, s in (("i8", "fp32"), ("bf16", None))),
    *(Launch(M, group_size=g, zero_point=g == 64, scale="bf16") for M in (1, 8192) for g in (32, 64, 128)),
    Launch(64, group_size=48, zero_point=True, scale="fp16"),
    Launch(1, "fp16", zero_point=True),
    Launch(1, "fp32", activation="gelu"),
    Launch(8192, "fp32", activation="relu"),
    Launch(8192, "fp16", "fp16", None, activation="gelu_tanh"),
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)], ids=["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("product", ["gate_up", "down"])
@pytest.mark.parametrize("launch", ALL, ids=str)
def test_every_kind_of_launch_compiles_within_shared_memory(capability, product, launch):
    check(launch, capability, product)
