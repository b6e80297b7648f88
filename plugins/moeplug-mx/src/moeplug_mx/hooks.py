"""Register mxfp8 and mxfp4, the element types of OCP microscaling that are built on e4m3 and e2m1."""

from __future__ import annotations

from typing import Any

import moeplug
from moeplug.formats import E2m1, E4m3


class Mxfp8(E4m3):
    """One byte a weight."""

    name = "mxfp8"


class Mxfp4(E2m1):
    """Two weights in a byte."""

    name = "mxfp4"


@moeplug.hookimpl
def moeplug_register(registry: Any) -> None:
    registry.add_format(Mxfp8())
    registry.add_format(Mxfp4())
