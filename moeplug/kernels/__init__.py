"""Fused-MoE kernels: pick one for a scheme, a shape and a device, and run it."""

from __future__ import annotations

from typing import Any

from moeplug.kernels.select import Device, ExpertsForward, Kernel, KernelRequest, Selection, select_kernel

__all__ = [
    "Device",
    "ExpertsForward",
    "Kernel",
    "KernelRequest",
    "Selection",
    "core_kernels",
    "decode_identity",
    "select_kernel",
]


def core_kernels() -> tuple[Kernel, ...]:
    """Return the kernels that moeplug brings, best first."""
    from moeplug.kernels.cpu import CpuKernel
    from moeplug.kernels.fused_moe import TritonKernel

    return TritonKernel(), CpuKernel()


def __getattr__(name: str) -> Any:
    if name == "decode_identity":  # triton is imported only where a decode function is wanted
        from moeplug.kernels._fused_moe import decode_identity

        return decode_identity
    raise AttributeError(f"module 'moeplug.kernels' has no attribute {name!r}")
