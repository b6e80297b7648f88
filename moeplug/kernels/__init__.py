"""Fused-MoE kernels: pick one for a scheme, a shape and a device, and run it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from moeplug.kernels.select import Device, ExpertsForward, Kernel, KernelRequest, Selection, select_kernel

# Functions that a format's triton_decode returns: int8, int4 (-8 to 7), e4m3, e2m1.
DECODERS = ("decode_int8", "decode_int4", "decode_e4m3", "decode_e2m1")
ENCODERS = ("encode_int8", "encode_int4", "encode_e4m3")  # its triton_encode

__all__ = [
    "Device",
    "ExpertsForward",
    "Kernel",
    "KernelRequest",
    "Selection",
    "core_kernels",
    *DECODERS,
    *ENCODERS,
    "select_kernel",
]


def core_kernels() -> tuple[Kernel, ...]:
    """Return the kernels that moeplug brings, best first."""
    from moeplug.kernels.cpu import CpuKernel
    from moeplug.kernels.fused_moe import TritonKernel

    return TritonKernel(), CpuKernel()


def __getattr__(name: str) -> Any:
    if name in (*DECODERS, *ENCODERS):  # triton is imported only where one of its functions is wanted
        return getattr(import_module(f"moeplug.kernels.{name[:6]}"), name)
    raise AttributeError(f"module 'moeplug.kernels' has no attribute {name!r}")
