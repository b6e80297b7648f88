"""Every word of 16 bits through a format's Triton decode function, on a GPU or under the interpreter."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeplug.formats import NumberFormat


@triton.jit
def _decode_kernel(
    words_ptr,                                        # (65536,)    uint16
    out_ptr,                                          # (PLACES, 65536) float32, written
    DTYPE: tl.constexpr, PLACES: tl.constexpr, decode: tl.constexpr,
):  # fmt: skip
    """Grid (64,): decode 1024 words."""
    offs = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    values = decode(tl.load(words_ptr + offs), DTYPE)
    for place in tl.static_range(PLACES):
        value = values[place].to(tl.float32).to(DTYPE).to(tl.float32)
        tl.store(out_ptr + place * 65536 + offs, value)


def decoded_and_expected(fmt: NumberFormat, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return what all words decode to, multiplied as dtype, and what fmt says: (q, 65536) float32 each."""
    words = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    q = fmt.values_per_word
    out = torch.empty(q, 65536, device=device)
    name = {torch.float8_e4m3fn: "float8e4nv"}.get(dtype, str(dtype).removeprefix("torch."))
    _decode_kernel[(64,)](words.to(device), out, getattr(tl, name), q, fmt.triton_decode(), enable_fp_fusion=True)
    stored = words.view(torch.uint8).view(fmt.storage_dtype).view(65536, -1)
    expected = torch.empty(65536, q)
    fmt.decode(stored, expected)
    return out.cpu(), expected.to(dtype).float().T
