"""Import one module right after another, whenever that comes, so that importing moeplug imports nothing heavy."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(awaited: str, then: str) -> None:
    """Import `then` now if `awaited` is imported already, else as soon as somebody imports it."""
    if awaited in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _Waiting(awaited, then))


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the awaited module's own loader import `then` once the module is there."""

    def __init__(self, awaited: str, then: str) -> None:
        self._awaited, self._then = awaited, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._awaited or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute, then = spec.loader, spec.loader.exec_module, self._then

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(then)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
