"""Remember, in a file to commit, that a plugin's GPU tests passed: where, when and with which versions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Attestation:
    """One run of the GPU tests. versions: of moeplug, the plugin's distribution, torch and triton."""

    plugin: str
    passed: int
    date: str
    gpu: str
    versions: dict[str, str]

    @classmethod
    def of_this_machine(cls, plugin: str, passed: int) -> Attestation:
        """Return what a run that just ended on this machine's first GPU says."""
        import torch

        today = datetime.now().date().isoformat()
        return cls(plugin, passed, today, torch.cuda.get_device_name(0), versions_of(plugin))

    def write(self, file: Path) -> None:
        """Write it, beside those of other plugins in the same file; a file that cannot be read is replaced."""
        try:
            others = json.loads(file.read_text()) if file.exists() else {}
        except ValueError:
            others = {}
        file.write_text(json.dumps({**others, self.plugin: asdict(self)}, indent=2, sort_keys=True) + "\n")


def versions_of(plugin: str) -> dict[str, str]:
    """Return the installed versions that a plugin's results depend on."""
    from moeplug.registry import Registry

    distribution = next((p.distribution for p in Registry.discover().plugins if p.name == plugin), plugin)
    found = {}
    for name in ("moeplug", distribution, "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_age(file: Path, plugin: str, today: str | None = None) -> str:
    """Return a line about what a file attests: how old it is, on which GPU, and which versions differ from here."""
    try:
        attested = json.loads(file.read_text()).get(plugin) if file.exists() else None
        if attested is None:
            return f"no GPU run is attested; on a GPU, `pytest --moeplug-attest` writes {file.name}"
        return _described(Attestation(**attested), datetime.fromisoformat(today) if today else datetime.now())
    except (ValueError, TypeError, AttributeError) as error:
        return f"{file} cannot be read: {type(error).__name__}: {error}"


def _described(attested: Attestation, now: datetime) -> str:
    here, then = versions_of(attested.plugin), datetime.fromisoformat(attested.date)
    other = [
        f"{name} {was} (here {here.get(name)})" for name, was in attested.versions.items() if here.get(name) != was
    ]
    against = f"but with {', '.join(other)}" if other else "with the versions that are installed here"
    days = (now - then).days
    return f"attested {attested.date}, {days} days ago, on {attested.gpu}: {attested.passed} passed, {against}"
