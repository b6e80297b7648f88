"""moeplug loads Mixture-of-Experts checkpoints and quantizes the experts while it reads them.

Importing moeplug is light: torch, triton and pydantic are imported by the names below when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moeplug.errors import (
    CheckpointError,
    InputOutputError,
    MoeplugError,
    PluginError,
    RefusedError,
    SchemeError,
    UsageError,
    VerificationError,
)
from moeplug.when_imported import when_imported

if TYPE_CHECKING:
    from moeplug.api import Loaded, export, load, plan, quantize_experts, reload
    from moeplug.formats import NumberFormat
    from moeplug.hookspecs import LoadEvent, StageContext, hookimpl
    from moeplug.moe.experts import QuantizedExperts
    from moeplug.quantization import Scales
    from moeplug.scheme import Scheme
    from moeplug.verifying import verify

__version__ = "0.1.0"

when_imported("transformers.quantizers.auto", "moeplug.integrations.transformers_quantizer")

_LAZY = {
    "LoadEvent": "moeplug.hookspecs",
    "Loaded": "moeplug.api",
    "NumberFormat": "moeplug.formats",
    "QuantizedExperts": "moeplug.moe.experts",
    "Scales": "moeplug.quantization",
    "Scheme": "moeplug.scheme",
    "StageContext": "moeplug.hookspecs",
    "export": "moeplug.api",
    "hookimpl": "moeplug.hookspecs",
    "load": "moeplug.api",
    "plan": "moeplug.api",
    "quantize_experts": "moeplug.api",
    "reload": "moeplug.api",
    "verify": "moeplug.verifying",
}

__all__ = [
    "CheckpointError",
    "InputOutputError",
    "LoadEvent",
    "Loaded",
    "MoeplugError",
    "NumberFormat",
    "PluginError",
    "QuantizedExperts",
    "RefusedError",
    "Scales",
    "Scheme",
    "SchemeError",
    "StageContext",
    "UsageError",
    "VerificationError",
    "__version__",
    "export",
    "hookimpl",
    "load",
    "plan",
    "quantize_experts",
    "reload",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'moeplug' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
