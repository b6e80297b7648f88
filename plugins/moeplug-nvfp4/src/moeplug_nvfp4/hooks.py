"""Register nvfp4: e2m1, two weights in a byte, for scales that are e4m3 themselves."""

from __future__ import annotations

from typing import Any

import moeplug
from moeplug.formats import E2m1


class Nvfp4(E2m1):
    """The element type alone; the core keeps e4m3 scales beside a global one (scale_dtype: float8_e4m3fn)."""

    name = "nvfp4"


@moeplug.hookimpl
def moeplug_register(registry: Any) -> None:
    registry.add_format(Nvfp4())
