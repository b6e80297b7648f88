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
    b0, b1, b2, b3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    n0, n1, n2, n3 = (
        tl.where(b0, V[1], V[0]),
        tl.where(b0, V[3], V[2]),
        tl.where(b0, V[5], V[4]),
        tl.where(b0, V[7], V[6]),
    )
    p0, p1 = tl.where(b0, V[9], V[8]), tl.where(b0, V[11], V[10])
    p2, p3 = tl.where(b0, V[13], V[12]), tl.where(b0, V[15], V[14])
    negative = tl.where(b2, tl.where(b1, n3, n2), tl.where(b1, n1, n0))
    positive = tl.where(b2, tl.where(b1, p3, p2), tl.where(b1, p1, p0))
    return tl.where(b3, positive, negative).to(tl.float32)
