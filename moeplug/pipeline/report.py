"""Say what a load did: bytes, seconds, errors, kernels, and where everything came from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moeplug import __version__
from moeplug.moe.experts import describe
from moeplug.pipeline.builder import LayerErrors
from moeplug.pipeline.flow import Timings
from moeplug.pipeline.plan import LayerPlan, Plan
from moeplug.registry import Registry
from moeplug.writing import write_whole


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer: planned bytes, measured errors."""

    plan: LayerPlan
    errors: LayerErrors

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints of this layer. Errors are relative RMS per expert weight."""
        return self.plan.as_dict() | {
            "worst_relative_rms": self.errors.worst,
            "worst_where": self.errors.worst_where,
            "exact_error": self.errors.exact,
            "mean_relative_rms": self.errors.mean,
        }

    @property
    def weights(self) -> str:
        """Return the specs of the layer's groups, each once."""
        return ", ".join(dict.fromkeys(describe(group.ctx) for group in self.plan.groups))

    @property
    def kernels(self) -> str:
        """Return the kernels of the layer's groups, each once."""
        return ", ".join(dict.fromkeys(group.ctx.kernel.name for group in self.plan.groups))


@dataclass
class Report:
    """Everything there is to say of one load; `write` keeps it."""

    plan: Plan
    layers: tuple[LayerReport, ...]
    seconds: float
    bytes_read: int
    peak_host_bytes: int
    peak_device_bytes: int | None
    provenance: dict[str, Any]
    timings: Timings
    evaluation: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def gigabytes_per_second(self) -> float:
        """Return bytes read over seconds of the pipeline, in 10**9."""
        return self.bytes_read / 1e9 / max(self.seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """Return what `moeplug load --json` prints and the report file holds."""
        plan = self.plan.as_dict()
        return {
            "moeplug": self.provenance["moeplug"],
            **{key: plan[key] for key in plan if key != "layers"},
            "layers": [layer.as_dict() for layer in self.layers],
            "worst_relative_rms": max((layer.errors.worst for layer in self.layers), default=0.0),
            "seconds": self.seconds,
            "bytes_read": self.bytes_read,
            "gigabytes_per_second": self.gigabytes_per_second,
            "timings": self.timings.as_dict(),
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "evaluation": self.evaluation,
            "provenance": self.provenance,
            "report": None if self.path is None else str(self.path),
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON: the whole file or nothing."""
        self.path = path
        write_whole(path, json.dumps(self.as_dict(), indent=2) + "\n")


def provenance(plan: Plan, registry: Registry) -> dict[str, Any]:
    """Return what made this load: versions, distributions, hashes, device."""
    used = sorted(plan.scheme.plugins())
    return {
        "moeplug": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "plugins": [
            {"name": p.name, "distribution": p.distribution, "version": p.version, "path": str(p.path)}
            for p in registry.plugins
            if p.name in used
        ],
        "scheme": {
            "name": plan.scheme.name,
            "path": None if plan.scheme.source is None else str(plan.scheme.source.absolute()),
            "sha256": plan.scheme.sha256,
        },
        "checkpoint": {"path": str(plan.checkpoint.path), "sha256_of_headers": plan.checkpoint.fingerprint()},
        "family": {"name": plan.family.name, "path": str(plan.family.source)},
        "device": device_name(plan.device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """Return a device as people know it, for example "NVIDIA H100 80GB HBM3"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def peak_host_bytes() -> int:
    """Return the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
