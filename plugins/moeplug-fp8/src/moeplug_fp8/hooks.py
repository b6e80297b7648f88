"""Register fp8: e4m3 bytes, as tensor cores multiply them."""

from __future__ import annotations

from typing import Any

import moeplug
from moeplug.formats import E4m3


class Fp8(E4m3):
    """The element type alone; scales and activations are the core's."""

    name = "fp8"


@moeplug.hookimpl
def moeplug_register(registry: Any) -> None:
    registry.add_format(Fp8())
