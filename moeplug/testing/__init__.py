"""The conformance kit: what a plugin's schemes, formats and hooks are held to, in one class.

from moeplug.testing import SchemeConformance

class TestMine(SchemeConformance):
    plugin = "mine"

pytest needs nothing else: no conftest, no option. Importing this package imports neither torch nor pytest; the names
below do when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplug.testing.conformance import SchemeConformance, since_api

__all__ = ["SchemeConformance", "since_api"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moeplug.testing' has no attribute {name!r}")
    return getattr(importlib.import_module("moeplug.testing.conformance"), name)
