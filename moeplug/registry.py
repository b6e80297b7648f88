"""Find plugins, read what they declare without importing them, and import the one that a scheme names.

States of a plugin, as `moeplug plugins` lists them:
    active        its plugin.yaml is good; its code is imported when a scheme names it
    broken        plugin.yaml or the code does not load; the reason says why
    incompatible  written for another `api:` than this moeplug speaks
    conflict      two distributions declare the same plugin, format, kernel, scheme or family
    blocked       ruled out by --disable or MOEPLUG_PLUGINS
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pluggy

from moeplug import hookspecs
from moeplug.checkpoint.family import Family, find_family, known_families
from moeplug.errors import MoeplugError, PluginError, UsageError, is_out_of_memory
from moeplug.manifest import IncompatibleApi, Manifest
from moeplug.problems import did_you_mean
from moeplug.scheme import Scheme, find_scheme

if TYPE_CHECKING:
    from moeplug.formats import NumberFormat
    from moeplug.hookspecs import LoadEvent, StageContext
    from moeplug.kernels.select import Kernel

ENTRY_POINT_GROUP = "moeplug"
State = Literal["active", "broken", "incompatible", "conflict", "blocked"]


@dataclass(frozen=True)
class Plugin:
    """One installed plugin: who ships it, what it declares, and whether it can be used."""

    name: str
    state: State
    reason: str
    distribution: str
    version: str
    path: Path | None
    manifest: Manifest | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """Return how errors name it, for example `plugin 'int8' (moeplug-int8 0.1.0)`."""
        return f"plugin '{self.name}' ({self.distribution} {self.version})"

    def scheme_files(self) -> dict[str, Path]:
        """Return the schemes it ships: name → file."""
        return self._files(None if self.manifest is None else self.manifest.schemes)

    def family_files(self) -> dict[str, Path]:
        """Return the family descriptors it ships: name → file."""
        return self._files(None if self.manifest is None else self.manifest.families)

    def _files(self, folder: str | None) -> dict[str, Path]:
        if self.path is None or folder is None:
            return {}
        return {file.stem: file for file in sorted((self.path.parent / folder).glob("*.yaml"))}

    def as_dict(self) -> dict[str, Any]:
        """Return what `moeplug plugins --json` prints."""
        manifest = self.manifest
        return {
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "distribution": self.distribution,
            "version": self.version,
            "path": None if self.path is None else str(self.path),
            "kind": None if manifest is None else manifest.kind,
            "formats": [] if manifest is None else list(manifest.formats),
            "kernels": [] if manifest is None else list(manifest.kernels),
            "capabilities": [] if manifest is None else list(manifest.capabilities),
            "schemes": sorted(self.scheme_files()),
            "families": sorted(self.family_files()),
        }


@dataclass(frozen=True)
class Implementation:
    """One function of one plugin behind a hook. wraps: it watches, and answers nothing."""

    plugin: str
    function: Callable[..., Any]
    wraps: bool

    @property
    def place(self) -> str:
        """Return where it stands, for example `moeplug_int4.hooks.moeplug_quantize`."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


class Registration:
    """What `moeplug_register` is given: a list of additions that takes effect only if all of it is right."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self.formats: dict[str, NumberFormat] = {}
        self.kernels: dict[str, Kernel] = {}

    def add_format(self, number_format: NumberFormat) -> None:
        """Add a number format whose name plugin.yaml declares under `formats:`."""
        from moeplug.formats import NumberFormat

        self._add(self.formats, number_format, NumberFormat, "formats")

    def add_kernel(self, kernel: Kernel) -> None:
        """Add a kernel whose name plugin.yaml declares under `kernels:`. It is asked before the core's."""
        from moeplug.kernels.select import Kernel

        self._add(self.kernels, kernel, Kernel, "kernels")

    def _add(self, into: dict[str, Any], thing: Any, kind: type[Any], what: Literal["formats", "kernels"]) -> None:
        if not isinstance(thing, kind):
            raise PluginError(f"adds {thing!r} to {what}; expected an instance of {kind.__module__}.{kind.__name__}")
        manifest = self._plugin.manifest
        declared = [] if manifest is None else list(getattr(manifest, what))
        name = str(thing.name)
        if name not in declared:
            raise PluginError(f"adds {name!r} to {what}, but plugin.yaml declares {declared}; add it there")
        if name in into:
            raise PluginError(f"adds {name!r} to {what} twice")
        into[name] = thing

    def check_complete(self) -> None:
        """Raise PluginError where plugin.yaml declares what was not added."""
        manifest = self._plugin.manifest
        if manifest is None:
            return
        missing = [n for n in (*manifest.formats, *manifest.kernels) if n not in {**self.formats, **self.kernels}]
        if missing:
            raise PluginError(f"plugin.yaml declares {', '.join(missing)}, which moeplug_register did not add")


class Registry:
    """The plugins of this environment. Discovery reads metadata and YAML only; `activate` imports."""

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        self.plugins = tuple(plugins)
        self._manager = pluggy.PluginManager("moeplug")
        self._manager.add_hookspecs(hookspecs)
        self._active: dict[str, Registration] = {}
        self._observers: list[str] = []
        self._callers: dict[tuple[str, str | None], pluggy.HookCaller] = {}

    @classmethod
    def discover(cls, disable: Iterable[str] = (), only: Iterable[str] | None = None) -> Self:
        """Read the manifests of all installed plugins.

        disable: names to block. only: names to allow; None: those of MOEPLUG_PLUGINS, or all where it is not set.
        An unknown name in either is a UsageError.
        """
        if only is None and (allowed := os.environ.get("MOEPLUG_PLUGINS")) is not None:
            only = [name.strip() for name in allowed.split(",") if name.strip()]
        points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        plugins = [_read_plugin(point) for point in points]
        blocked = _mark_blocked(plugins, tuple(disable), None if only is None else tuple(only))
        return cls(_mark_conflicts(blocked))

    def usable(self) -> dict[str, Plugin]:
        """Return the active plugins by name."""
        return {plugin.name: plugin for plugin in self.plugins if plugin.state == "active"}

    def manifests(self) -> dict[str, Manifest]:
        """Return the manifests of the active plugins by plugin name."""
        return {name: plugin.manifest for name, plugin in self.usable().items() if plugin.manifest is not None}

    def scheme_files(self) -> dict[str, Path]:
        """Return every installed scheme of an active plugin: name → file."""
        return {name: file for plugin in self.usable().values() for name, file in plugin.scheme_files().items()}

    def scheme(self, name_or_path: str) -> Scheme:
        """Return the scheme in a file, or an installed one by its name.

        Raises PluginError where the plugin that ships it cannot be used, SchemeError or InputOutputError otherwise.
        """
        installed = self.scheme_files()
        for plugin in self.plugins:
            # A broken plugin.yaml does not say which schemes it ships; one of the plugin's own name is the usual guess.
            ships = name_or_path in plugin.scheme_files() or (plugin.manifest is None and name_or_path == plugin.name)
            if ships and name_or_path not in installed:
                self.require(plugin.name, f"scheme '{name_or_path}'")
        return find_scheme(name_or_path, installed)

    def families(self) -> list[Family]:
        """Return all families: moeplug's own, and those of active plugins. Imports no plugin.

        A descriptor that is wrong is one line on standard error, and harms no other.
        """
        return [*known_families(), *self._families_of_plugins()]

    def family_of(self, config: Mapping[str, Any]) -> Family:
        """Return the family that serves a config.json, or raise what `find_family` raises."""
        theirs, model_type = self._families_of_plugins(), config.get("model_type")
        near = (*known_families(model_type), *theirs) if isinstance(model_type, str) else ()
        serving = [family for family in near if model_type in family.model_types]
        return find_family(config, serving or (*known_families(), *theirs))

    def _families_of_plugins(self) -> list[Family]:
        found = []
        for plugin in self.usable().values():
            for file in plugin.family_files().values():
                try:
                    found.append(Family.load(file, f"{plugin.distribution} {plugin.version}"))
                except MoeplugError as error:
                    print(f"moeplug: a family of {plugin.label} is left out: {error}", file=sys.stderr)
        return found

    def family(self, name_or_path: str) -> Family:
        """Return the family in a file (with a / or .yaml), or a known one by its name."""
        if "/" in name_or_path or name_or_path.endswith(".yaml"):
            return Family.load(Path(name_or_path), "a file")
        families = self.families()
        for family in families:
            if family.name == name_or_path:
                return family
        names = sorted(family.name for family in families)
        raise UsageError(
            f"family {name_or_path!r} is not known{did_you_mean(name_or_path, names)}; known: {', '.join(names)}; "
            "a file has a / in its path or ends in .yaml"
        )

    def require(self, name: str, wanted_by: str) -> Plugin:
        """Return an active plugin, or raise PluginError that says what is wrong with it and who wants it."""
        named = [plugin for plugin in self.plugins if plugin.name == name]
        for plugin in named:
            if plugin.state == "active":
                return plugin
        if named:
            raise PluginError(f"{named[0].label} is {named[0].state}: {named[0].reason}. {wanted_by} needs it")
        known = ", ".join(sorted(self.usable())) or "none"
        raise PluginError(
            f"{wanted_by}: plugin '{name}' is not installed; installed: {known}. "
            "Install the distribution that brings it, or use a scheme of an installed one (`moeplug schemes`)"
        )

    def activate(self, name: str, wanted_by: str) -> Plugin:
        """Import a plugin and register what it brings; on any failure nothing of it stays registered."""
        plugin = self.require(name, wanted_by)
        if name in self._active:
            return plugin
        registration = Registration(plugin)
        try:
            self._register(plugin, registration)
        except (Exception, SystemExit) as error:  # a plugin that calls sys.exit must not look like success
            self._manager.unregister(name=name) if self._manager.has_plugin(name) else None
            self._callers.clear()
            reason = str(error) if isinstance(error, MoeplugError) else f"{type(error).__name__}: {error}"
            self.plugins = tuple(
                replace(p, state="broken", reason=reason) if p.name == name else p for p in self.plugins
            )
            raise PluginError(
                f"{plugin.label} did not load: {reason}. {wanted_by} needs it; other plugins are not affected"
            ) from error
        self._active[name] = registration
        self._callers.clear()
        return plugin

    def observe(self, name: str) -> None:
        """Activate an observer plugin: its hook wrappers then see every stage call of every provider."""
        if name not in {plugin.name for plugin in self.plugins}:
            observers = [plugin for plugin, manifest in self.manifests().items() if manifest.kind == "observer"]
            raise PluginError(
                f"--observe {name}: no plugin '{name}' is installed; installed observers: "
                f"{', '.join(sorted(observers)) or 'none'}. timings and trace come with `pip install moeplug-observers`"
            )
        plugin = self.activate(name, f"--observe {name}")
        if plugin.manifest is None or plugin.manifest.kind != "observer":
            raise UsageError(f"--observe {name}: {plugin.label} is not an observer (kind: observer in plugin.yaml)")
        if name not in self._observers:
            self._observers.append(name)
            self._callers.clear()

    def format(self, name: str) -> NumberFormat:
        """Return an activated plugin's number format."""
        for registration in self._active.values():
            if name in registration.formats:
                return registration.formats[name]
        raise PluginError(f"number format {name!r} is not registered by an activated plugin")

    def kernels(self, plugin: str | None) -> list[Kernel]:
        """Return the kernels that may serve a plugin's group: its own, then the core's."""
        from moeplug.kernels import core_kernels

        own = self._active[plugin].kernels.values() if plugin in self._active else ()
        return [*own, *core_kernels()]

    def brings_kernel(self, plugin: str | None, kernel: str) -> bool:
        """Return whether a kernel that serves the plugin's groups is its own; else it is the core's."""
        return plugin in self._active and kernel in self._active[plugin].kernels

    def call(self, stage: str, ctx: StageContext, default: Callable[[], Any], **given: Any) -> Any:
        """Ask the group's provider for one stage; None from it means `default()`.

        A provider's own MoeplugError passes; any other exception becomes a PluginError that names plugin, stage and
        layer. Observers see the call, and the answer as a list of one; what they return or catch changes nothing.
        """
        if not self._observers:
            return self._answer(stage, ctx, default, given)
        answers: list[Any] = []
        failures: list[BaseException] = []

        def answer() -> Any:
            try:
                answers.append(self._answer(stage, ctx, default, given))
            except BaseException as error:
                failures.append(error)
                raise
            return answers[0]

        try:
            self._watchers("moeplug_" + stage).call_extra([answer], {"ctx": ctx, **given})
        except Exception as error:
            if not failures:
                raise self._observer_failed(f"stage {stage}, layer {ctx.layer.index}", error) from error
        if failures:
            raise failures[0]
        return answers[0]

    def tell(self, event: LoadEvent) -> None:
        """Tell the observers of something beside the stages."""
        if not self._observers:
            return
        try:
            self._watchers("moeplug_event")(event=event)
        except Exception as error:
            raise self._observer_failed(f"event {event.what}", error) from error

    def implementations(self, stage: str, plugin: str | None) -> list[Implementation]:
        """Return what an active plugin and the observers have for a stage, in the order of plugins."""
        hook = "moeplug_" + stage
        found = [*self._caller(hook, plugin).get_hookimpls(), *self._watchers(hook).get_hookimpls()]
        return [Implementation(i.plugin_name, i.function, i.wrapper or i.hookwrapper) for i in found]

    @property
    def observers(self) -> tuple[str, ...]:
        """The observers that are on."""
        return tuple(self._observers)

    @property
    def watched(self) -> bool:
        """Whether somebody has to see every call of a stage: what could be done without one is done by it."""
        return bool(self._observers)

    def _answer(self, stage: str, ctx: StageContext, default: Callable[[], Any], given: Mapping[str, Any]) -> Any:
        try:
            answers = self._caller("moeplug_" + stage, ctx.plugin)(ctx=ctx, **given)
            if not answers:  # the default runs the plugin's code too: its format encodes, its kernel binds
                return default()
        except Exception as error:
            if ctx.plugin is None or isinstance(error, MoeplugError) or is_out_of_memory(error):
                raise
            raise PluginError(f"{self._where(stage, ctx)} failed: {type(error).__name__}: {error}") from error
        if len(answers) > 1:
            raise PluginError(f"{self._where(stage, ctx)}: two answers; exactly one is allowed")
        return answers[0]

    def answers(self, plugin: str | None, stage: str) -> bool:
        """Return whether a plugin implements a stage itself, if only to return None."""
        return any(found.plugin_name == plugin for found in self._caller("moeplug_" + stage, plugin).get_hookimpls())

    def _where(self, stage: str, ctx: StageContext) -> str:
        return f"plugin '{ctx.plugin}', stage {stage}, layer {ctx.layer.index}"

    def _caller(self, hook: str, provider: str | None) -> pluggy.HookCaller:
        key = (hook, provider)
        if key not in self._callers:
            self._callers[key] = self._subset(hook, {provider})
        return self._callers[key]

    def _watchers(self, hook: str) -> pluggy.HookCaller:
        key = (hook, "--observe")  # no plugin's name
        if key not in self._callers:
            self._callers[key] = self._subset(hook, self._observers)
        return self._callers[key]

    def _subset(self, hook: str, keep: Container[str | None]) -> pluggy.HookCaller:
        others = [plugin for name, plugin in self._manager.list_name_plugin() if name not in keep]
        return self._manager.subset_hook_caller(hook, remove_plugins=others)

    def _observer_failed(self, where: str, error: Exception) -> MoeplugError:
        if isinstance(error, MoeplugError):
            return error
        names = ", ".join(f"'{name}'" for name in self._observers)
        return PluginError(f"observer {names}, {where} failed: {type(error).__name__}: {error}")

    def _register(self, plugin: Plugin, registration: Registration) -> None:
        manifest = plugin.manifest
        if manifest is None or manifest.hooks is None:
            return
        module = importlib.import_module(manifest.hooks)
        self._manager.register(module, name=plugin.name)
        self._manager.check_pending()
        _check_kind(self._manager, module, manifest.kind)
        self._subset("moeplug_register", {plugin.name})(registry=registration)
        registration.check_complete()


def _check_kind(manager: pluggy.PluginManager, module: object, kind: str) -> None:
    """Raise PluginError where an observer answers a stage, or another plugin has a hook that is for observers."""
    for caller in manager.get_hookcallers(module) or ():
        if kind != "observer" and caller.name == "moeplug_event":
            raise PluginError("moeplug_event is told to observers alone; say kind: observer in plugin.yaml")
        for implementation in caller.get_hookimpls():
            answers = implementation.plugin is module and not (implementation.wrapper or implementation.hookwrapper)
            if kind == "observer" and answers and caller.name in hookspecs.STAGE_HOOKS:
                raise PluginError(f"an observer answers no stage, but {caller.name} is not a hook wrapper")


def _read_plugin(point: importlib.metadata.EntryPoint) -> Plugin:
    """Return what an entry point declares, whatever is wrong with it: listing never fails."""
    distribution = point.dist.name if point.dist is not None else "?"
    version = point.dist.version if point.dist is not None else "?"
    path = None
    try:
        path = _manifest_path(point.value)
        manifest = Manifest.from_file(path)
        _check_declaration(point, manifest)
    except IncompatibleApi as error:
        return Plugin(point.name, "incompatible", str(error), distribution, version, path)
    except MoeplugError as error:
        return Plugin(point.name, "broken", str(error), distribution, version, path)
    return Plugin(point.name, "active", "", distribution, version, path, manifest)


def _manifest_path(value: str) -> Path:
    """Return the file that `package:plugin.yaml` means, without importing the package.

    find_spec of the top-level name only: a dotted name would import its parent.
    """
    package, _, file = value.partition(":")
    top, *inner = package.split(".")
    if not file or Path(file).name != file:
        raise PluginError(f"entry point {value!r}: expected `package:plugin.yaml`")
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError) as error:
        raise PluginError(f"package {top!r} cannot be located: {error}") from error
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    if not folders:
        raise PluginError(f"package {top!r} of entry point {value!r} is not installed as a package")
    path = Path(folders[0], *inner, file)
    if not path.is_file():
        raise PluginError(f"{path} does not exist; entry point {value!r} points at it: add it as package data")
    return path


def _check_declaration(point: importlib.metadata.EntryPoint, manifest: Manifest) -> None:
    if manifest.name != point.name:
        raise PluginError(f"the entry point is called {point.name!r}, plugin.yaml says name: {manifest.name}")
    top = point.value.partition(":")[0].split(".")[0]
    if manifest.hooks is not None and manifest.hooks.split(".")[0] != top:
        raise PluginError(f"hooks: {manifest.hooks} lies outside the plugin's own package {top!r}")


def _mark_conflicts(plugins: list[Plugin]) -> list[Plugin]:
    """Return the plugins with every active one that shares a declared name with another active one in `conflict`."""
    owners: dict[tuple[str, str], list[int]] = {}
    for index, plugin in enumerate(plugins):
        if plugin.state != "active":
            continue
        for claim in {("plugin", plugin.name), *_claims(plugin)}:
            owners.setdefault(claim, []).append(index)
    marked = list(plugins)
    for (kind, name), indices in sorted(owners.items()):
        if len(indices) < 2:
            continue
        for index in indices:
            others = ", ".join(f"{plugins[i].distribution} {plugins[i].version}" for i in indices if i != index)
            way_out = "uninstall one" if kind == "plugin" else "uninstall or --disable one of them"
            reason = f"{kind} '{name}' is also declared by {others}; {way_out}"
            marked[index] = replace(marked[index], state="conflict", reason=reason)
    return marked


def _claims(plugin: Plugin) -> list[tuple[str, str]]:
    if plugin.manifest is None:
        return []
    named: Mapping[str, Iterable[str]] = {
        "format": plugin.manifest.formats,
        "kernel": plugin.manifest.kernels,
        "scheme": plugin.scheme_files(),
        "family": plugin.family_files(),
    }
    return [(kind, name) for kind, names in named.items() for name in names]


def _mark_blocked(plugins: list[Plugin], disable: tuple[str, ...], only: tuple[str, ...] | None) -> list[Plugin]:
    installed = {plugin.name for plugin in plugins}
    for source, names in (("--disable", disable), ("MOEPLUG_PLUGINS", only or ())):
        if unknown := [name for name in names if name not in installed]:
            known = ", ".join(sorted(installed)) or "none"
            raise UsageError(f"{source}: no plugin is called {', '.join(unknown)}; installed: {known}")

    def mark(plugin: Plugin) -> Plugin:
        if plugin.name in disable:
            return replace(plugin, state="blocked", reason="--disable names it")
        if only is not None and plugin.name not in only:
            return replace(plugin, state="blocked", reason="MOEPLUG_PLUGINS does not name it")
        return plugin

    return [mark(plugin) for plugin in plugins]


def warn_about_unusable(registry: Registry) -> None:
    """Print one stderr line per plugin that is broken, incompatible or in conflict; it harms nobody else."""
    for plugin in registry.plugins:
        if plugin.state in ("broken", "incompatible", "conflict"):
            print(f"moeplug: {plugin.label} is {plugin.state}: {plugin.reason.splitlines()[0]}", file=sys.stderr)
