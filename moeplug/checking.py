"""Check a YAML file of any of our kinds without importing a plugin."""

from __future__ import annotations

from pathlib import Path

from moeplug.checkpoint.family import Family
from moeplug.errors import SchemeError
from moeplug.manifest import Manifest, check_scheme
from moeplug.registry import Registry
from moeplug.scheme import Scheme
from moeplug.yaml_marks import load_yaml


def check_file(file: Path, kind: str | None, registry: Registry) -> str:
    """Return a line that says what the file is and that it is good; raise the error that lists its problems."""
    kind = kind or kind_of(file)
    if kind == "plugin":
        manifest = Manifest.from_file(file)
        return f"plugin '{manifest.name}' is good: formats {', '.join(manifest.formats) or 'none'}"
    if kind == "family":
        family = Family.load(file)
        return f"family '{family.name}' is good"
    scheme = Scheme.from_file(file, registry.scheme_files())
    for name in sorted(scheme.plugins()):
        registry.require(name, str(file))
    if problems := check_scheme(scheme, registry.manifests()):
        raise SchemeError("\n".join(str(problem) for problem in problems))
    return f"scheme '{scheme.name}' is good: plugin {scheme.plugin or 'none'}"


def kind_of(file: Path) -> str:
    """Return what a file is by its name and its top-level keys: plugin, family or scheme."""
    if file.name == "plugin.yaml":
        return "plugin"
    data = load_yaml(file).data
    keys = set(data) if isinstance(data, dict) else set()
    if "model_types" in keys:
        return "family"
    return "plugin" if keys & {"hooks", "schemes", "formats", "kernels", "capabilities", "needs"} else "scheme"
