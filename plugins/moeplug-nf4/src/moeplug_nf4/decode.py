"""Decode nf4 inside moeplug's GPU kernel: a lookup among 16 constants, as selections over the bits of a code."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from moeplug_nf4.codebook import VALUES

V: tl.constexpr = tl.constexpr(VALUES)


@triton.jit
def decode_nf4(words, DTYPE: tl.constexpr):
    """Return four tiles of values, float32. words: uint16, each four codes, the first in the lowest bits."""
    return (_value(words & 15), _value((words >> 4) & 15), _value((words >> 8) & 15), _value(words >> 12))


@triton.jit
def _value(code):
    """Return V[code], float32: each bit of a code, the lowest first, halves the values that are left."""
    bit = (code & 1) != 0
    v0, v2 = tl.where(bit, V[1], V[0]), tl.where(bit, V[3], V[2])
    v4, v6 = tl.where(bit, V[5], V[4]), tl.where(bit, V[7], V[6])
    v8, v10 = tl.where(bit, V[9], V[8]), tl.where(bit, V[11], V[10])
    v12, v14 = tl.where(bit, V[13], V[12]), tl.where(bit, V[15], V[14])
    bit = (code & 2) != 0
    v0, v4, v8, v12 = tl.where(bit, v2, v0), tl.where(bit, v6, v4), tl.where(bit, v10, v8), tl.where(bit, v14, v12)
    bit = (code & 4) != 0
    v0, v8 = tl.where(bit, v4, v0), tl.where(bit, v12, v8)
    return tl.where((code & 8) != 0, v8, v0).to(tl.float32)
