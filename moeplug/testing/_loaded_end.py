"""A loop whose end the kernel loads, as moeplug's kernels have: not every interpreter of triton can run one."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def loop_kernel(
    end_ptr,    # (1,) int32
    count_ptr,  # (1,) int32, written
):  # fmt: skip
    """Grid (1,): count to end."""
    count = 0
    for _ in range(tl.load(end_ptr)):
        count += 1
    tl.store(count_ptr, count)
