"""Say who answers each stage, which kernel each layer gets, why not another, and what other devices would get."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from moeplug import __version__
from moeplug.checkpoint.dummy import DummyCheckpoint
from moeplug.checkpoint.encoded import Encoding
from moeplug.checkpoint.family import Family
from moeplug.checkpoint.reader import Checkpoint
from moeplug.hookspecs import STAGE_HOOKS
from moeplug.kernels.select import Device, judge_kernels
from moeplug.moe.layout import LayerSpec
from moeplug.pipeline.plan import (
    WantedGroup,
    check_overrides,
    locate_layers,
    ranges,
    reason_against_device,
    wanted_groups,
)
from moeplug.registry import Registry
from moeplug.scheme import Scheme

# Devices that nobody needs to have: what kernels ask of one is its compute capability.
OTHER_DEVICES = (
    Device("cpu"),
    Device("cuda", 0, (8, 0), "A100"),
    Device("cuda", 0, (8, 9), "L40S, RTX 4090"),
    Device("cuda", 0, (9, 0), "H100, H200"),
    Device("cuda", 0, (10, 0), "B200"),
)
CORE = {"plugin": None, "distribution": "moeplug", "version": __version__}


@dataclass(frozen=True)
class Explanation:
    """What `moeplug explain` prints; `as_dict` is its JSON."""

    model: str
    family: Family
    scheme: Scheme
    device: Device
    layers: tuple[tuple[LayerSpec, tuple[WantedGroup, ...]], ...]
    registry: Registry

    def as_dict(self) -> dict[str, Any]:
        """Return everything there is to say, as plain data."""
        others = [device for device in OTHER_DEVICES if _same_for_kernels(device) != _same_for_kernels(self.device)]
        return {
            "model": self.model,
            "model_type": self.family.name,
            "scheme": {
                "name": self.scheme.name,
                "path": None if self.scheme.source is None else str(self.scheme.source),
                "sha256": self.scheme.sha256,
            },
            "device": str(self.device),
            "formats": self._formats(),
            "stages": self._stages(),
            "observers": {"on": list(self.registry.observers), "installed": self._installed_observers()},
            "layers": self._kernels(self.device),
            "elsewhere": [_described(device) | {"layers": self._kernels(device)} for device in others],
        }

    def _formats(self) -> list[dict[str, Any]]:
        """Return the plugins' number formats that the layers use, and whose they are."""
        requests = [group.request for _, groups in self.layers for group in groups]
        used = {r.gate_up.format for r in requests if r.gate_up} | {r.down.format for r in requests if r.down}
        used |= {fmt.name for r in requests for fmt in (r.activation_format, r.intermediate_format) if fmt is not None}
        return [
            {"format": name, **self._owner(plugin), "class": _place(type(self.registry.format(name)))}
            for plugin, manifest in sorted(self.registry.manifests().items())
            for name in manifest.formats
            if name in used
        ]

    def _stages(self) -> list[dict[str, Any]]:
        """Return who answers each stage, for each plugin of the scheme, and the wrappers around it."""
        plugins = sorted({group.plugin for _, groups in self.layers for group in groups}, key=str)
        return [
            {
                "stage": hook.removeprefix("moeplug_"),
                "answered_by": [self._provider(hook.removeprefix("moeplug_"), plugin) for plugin in plugins],
                "watched_by": self._watchers(hook.removeprefix("moeplug_")),
            }
            for hook in STAGE_HOOKS
        ]

    def _provider(self, stage: str, plugin: str | None) -> dict[str, Any]:
        """Return who answers for a plugin's groups. The core answers, too, where the plugin's function returns None."""
        for found in self.registry.implementations(stage, plugin):
            if found.plugin == plugin and not found.wraps:
                return {"groups_of": plugin, **self._owner(plugin), "function": found.place}
        return {"groups_of": plugin, **CORE, "function": None}

    def _watchers(self, stage: str) -> list[dict[str, Any]]:
        found = self.registry.implementations(stage, None)
        return [self._owner(one.plugin) | {"function": one.place} for one in found if one.wraps]

    def _owner(self, plugin: str | None) -> dict[str, Any]:
        if plugin is None:
            return CORE
        shipped = self.registry.usable()[plugin]
        return {"plugin": plugin, "distribution": shipped.distribution, "version": shipped.version}

    def _installed_observers(self) -> list[str]:
        return [name for name, manifest in self.registry.manifests().items() if manifest.kind == "observer"]

    def _kernels(self, device: Device) -> list[dict[str, Any]]:
        """Return the layers that are alike together: their groups, with the kernel of each and the other reasons."""
        alike: dict[str, tuple[list[int], dict[str, Any]]] = {}
        for layer, groups in self.layers:
            said = {"sizes": _sizes(layer), "groups": [self._choice(group, device) for group in groups]}
            indices, _ = alike.setdefault(json.dumps(said), ([], said))
            indices.append(layer.index)
        return [{"layers": ranges(indices)} | said for indices, said in alike.values()]

    def _choice(self, group: WantedGroup, device: Device) -> dict[str, Any]:
        """Return a group's kernel on a device, None where none serves it, and the reason against every other."""
        request = replace(group.request, device=device)
        chosen, against = judge_kernels(request, self.registry.kernels(group.plugin))
        refused = None if group.plugin is None else reason_against_device(self.registry.usable()[group.plugin], device)
        if refused is not None:
            chosen, against = None, ()
        own = chosen is not None and self.registry.brings_kernel(group.plugin, chosen.name)
        return {
            "experts": ranges(group.experts),
            "weights": request.describe(),
            "plugin": group.plugin,
            "kernel": None if chosen is None else chosen.name,
            "kernel_of": None if chosen is None else self._owner(group.plugin if own else None),
            "layout": None if chosen is None else chosen.layout_for(request).name,
            "refused": refused,
            "kernels_not_chosen": dict(against),
        }


def explain_model(
    checkpoint: Checkpoint | DummyCheckpoint,
    family: Family,
    scheme: Scheme,
    registry: Registry,
    device: Device,
    encoding: Encoding | None = None,
) -> Explanation:
    """Return the explanation of a load; the scheme's plugins have to be active. encoding: as in `plan_model`."""
    layers, _ = locate_layers(checkpoint, family, encoding)
    check_overrides(scheme, layers)
    groups = tuple((layer, tuple(wanted_groups(layer, scheme, registry, device))) for layer in layers)
    return Explanation(str(checkpoint.path), family, scheme, device, groups, registry)


def _place(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _sizes(layer: LayerSpec) -> str:
    sizes = f"E={layer.num_experts} H={layer.hidden_size} I={layer.intermediate_size} T={layer.experts_per_token}"
    return f"{sizes} {layer.activation} {layer.dtype}"


def _same_for_kernels(device: Device) -> tuple[str, tuple[int, int] | None]:
    return device.type, device.compute_capability


def _described(device: Device) -> dict[str, Any]:
    capability = None if device.compute_capability is None else "{}.{}".format(*device.compute_capability)
    return {"device": device.type, "compute_capability": capability, "for_example": device.name or None}
