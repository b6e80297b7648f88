"""Plugins as distributions on a path of their own: found without an import, imported when named, never half there."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import moeplug
from moeplug import PluginError, SchemeError, UsageError
from moeplug.formats import Unquantized
from moeplug.hookspecs import STAGE_HOOKS, StageContext
from moeplug.kernels import Device, KernelRequest
from moeplug.moe.layout import LayerSpec
from moeplug.registry import Registry, warn_about_unusable

MANIFEST = """
api: 1
name: {name}
hooks: {package}.hooks
formats: [{name}]
capabilities: [per_channel]
"""
HOOKS = """
import torch
import moeplug
from moeplug.formats import NumberFormat


class Mine(NumberFormat):
    name = "{name}"
    storage_dtype = torch.int8
    bits = 8
    max_value = 127.0

    def encode(self, scaled, out):
        out.copy_(scaled.round_())

    def decode(self, stored, out):
        out.copy_(stored)


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(Mine())
"""
SCHEME = "api: 1\nname: {name}\nplugin: {name}\nweights: {{format: {name}, strategy: channel}}\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path into which a test installs plugins."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]


def install(site, name, manifest=None, hooks=None, version="1.0", distribution=None, target=None):
    """Lay a distribution out as pip does: a package, and metadata with its entry point."""
    package, distribution = f"fake_{name}", distribution or f"moeplug-{name}"
    folder = site / package
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("")
    (folder / "plugin.yaml").write_text(manifest or MANIFEST.format(name=name, package=package))
    (folder / "hooks.py").write_text(hooks if hooks is not None else HOOKS.format(name=name))
    metadata = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(f"[moeplug]\n{name} = {target or package}:plugin.yaml\n")
    return folder


def states(registry):
    return {plugin.name: plugin.state for plugin in registry.plugins}


def reason(registry, name):
    return next(plugin.reason for plugin in registry.plugins if plugin.name == name)


def context(plugin):
    layer = LayerSpec(3, "layer 3", 4, 2, 8, 6)
    plain = Unquantized(torch.float32)
    request = KernelRequest(layer, Device("cpu"), None, None, plain, plain)
    return StageContext(plugin, request, (0, 1, 2, 3), moeplug.kernels.core_kernels()[1], {})


def test_discovery_lists_a_plugin_without_importing_it(site):
    install(site, "one", hooks="raise RuntimeError('imported')")
    registry = Registry.discover()
    assert states(registry)["one"] == "active"
    assert "fake_one" not in sys.modules
    listed = next(plugin.as_dict() for plugin in registry.plugins if plugin.name == "one")
    assert listed["distribution"] == "moeplug-one"
    assert listed["version"] == "1.0"
    assert listed["capabilities"] == ["per_channel"]
    assert listed["path"].endswith("fake_one/plugin.yaml")


def test_a_dotted_entry_point_is_found_without_importing_its_parent(site):
    folder = install(site, "outer")
    (folder / "inner").mkdir()
    (folder / "plugin.yaml").rename(folder / "inner" / "plugin.yaml")
    points = next(site.glob("*.dist-info")) / "entry_points.txt"
    points.write_text("[moeplug]\nouter = fake_outer.inner:plugin.yaml\n")
    assert states(Registry.discover())["outer"] == "active"
    assert "fake_outer" not in sys.modules


def test_a_broken_plugin_leaves_the_others_loaded(site, capsys):
    install(site, "good")
    install(site, "bad", manifest="api: 1\nname: bad\nhoks: fake_bad.hooks\n")
    registry = Registry.discover()
    assert states(registry)["good"] == "active"
    assert states(registry)["bad"] == "broken"
    assert "hoks" in reason(registry, "bad")
    registry.activate("good", "a test")
    warn_about_unusable(registry)
    lines = [line for line in capsys.readouterr().err.splitlines() if "bad" in line]
    assert len(lines) == 1


def test_a_plugin_of_another_api_is_incompatible(site):
    install(site, "next", manifest="api: 2\nname: next\nnew_key: 1\n")
    registry = Registry.discover()
    assert states(registry)["next"] == "incompatible"
    with pytest.raises(PluginError, match="is incompatible"):
        registry.activate("next", "a test")


def test_two_distributions_of_one_name_are_a_conflict_that_names_both(site):
    install(site, "twin")
    install(site, "twin", distribution="moeplug-other-twin", version="2.0")
    registry = Registry.discover()
    twins = [plugin for plugin in registry.plugins if plugin.name == "twin"]
    assert [twin.state for twin in twins] == ["conflict", "conflict"]
    assert {"moeplug-twin 1.0" in twin.reason or "moeplug-other-twin 2.0" in twin.reason for twin in twins} == {True}
    with pytest.raises(PluginError, match="is conflict"):
        registry.require("twin", "a test")


def test_two_plugins_that_declare_one_format_are_a_conflict(site):
    install(site, "aa")
    install(site, "bb", manifest="api: 1\nname: bb\nhooks: fake_bb.hooks\nformats: [aa]\n")
    registry = Registry.discover()
    assert states(registry)["aa"] == states(registry)["bb"] == "conflict"
    assert "format 'aa'" in reason(registry, "bb")


def test_blocking_one_of_two_ends_their_conflict(site):
    install(site, "aa")
    install(site, "bb", manifest="api: 1\nname: bb\nhooks: fake_bb.hooks\nformats: [aa]\n")
    assert "--disable one of them" in reason(Registry.discover(), "aa")
    registry = Registry.discover(disable=["bb"])
    assert states(registry)["aa"] == "active"
    assert states(registry)["bb"] == "blocked"
    assert states(Registry.discover(only=["aa"]))["aa"] == "active"


def test_a_broken_plugin_does_not_drag_its_namesake_into_a_conflict(site):
    install(site, "twin")
    install(site, "twin", distribution="moeplug-other-twin", version="2.0", target="no_such_package")
    registry = Registry.discover()
    assert sorted(p.state for p in registry.plugins if p.name == "twin") == ["active", "broken"]
    registry.activate("twin", "a test")


@pytest.mark.parametrize(
    ("target", "message"),
    [("no_such_package", "is not installed as a package"), ("fake_gone.deeper", "does not exist")],
)
def test_an_entry_point_that_leads_nowhere_is_broken(site, target, message):
    install(site, "gone", target=target)
    registry = Registry.discover()
    assert states(registry)["gone"] == "broken"
    assert message in reason(registry, "gone")


def test_an_entry_point_under_another_name_is_broken(site):
    install(site, "said", manifest=MANIFEST.format(name="other", package="fake_said"))
    assert "plugin.yaml says name: other" in reason(Registry.discover(), "said")


def test_hooks_outside_the_plugins_own_package_are_refused(site):
    install(site, "thief", manifest="api: 1\nname: thief\nhooks: os.path\nformats: [thief]\n")
    assert "outside the plugin's own package" in reason(Registry.discover(), "thief")


def test_disable_blocks_a_plugin(site):
    install(site, "one")
    registry = Registry.discover(disable=["one"])
    assert states(registry)["one"] == "blocked"
    with pytest.raises(PluginError, match="blocked: --disable names it"):
        registry.activate("one", "a test")


def test_the_environment_variable_is_an_allow_list(site, monkeypatch):
    install(site, "one")
    install(site, "two")
    monkeypatch.setenv("MOEPLUG_PLUGINS", "two")
    registry = Registry.discover()
    assert states(registry)["one"] == "blocked"
    assert states(registry)["two"] == "active"
    monkeypatch.setenv("MOEPLUG_PLUGINS", "")
    assert set(states(Registry.discover()).values()) == {"blocked"}


@pytest.mark.parametrize("source", ["--disable", "MOEPLUG_PLUGINS"])
def test_an_unknown_name_in_a_block_or_allow_list_is_an_error(site, monkeypatch, source):
    with pytest.raises(UsageError, match=f"{source}: no plugin is called nobody"):
        Registry.discover(disable=["nobody"] if source == "--disable" else [], only=["nobody"])


def test_a_plugin_that_is_not_installed_is_named_with_those_that_are():
    with pytest.raises(PluginError, match="my.yaml: plugin 'nobody' is not installed; installed: .*int8"):
        Registry.discover().activate("nobody", "my.yaml")


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def broken(:", "SyntaxError"),
        (HOOKS.format(name="one") + "    raise ValueError('late')\n", "ValueError: late"),
        (HOOKS.format(name="other"), "adds 'other' to formats, but plugin.yaml declares"),
        (HOOKS.format(name="one") + "    registry.add_format(Mine())\n", "adds 'one' to formats twice"),
        (HOOKS.format(name="one").replace("Mine()", "Mine"), "expected an instance of moeplug.formats.NumberFormat"),
        ("import sys\nsys.exit(0)\n", "SystemExit"),
        ("", "declares one, which moeplug_register did not add"),
        (HOOKS.format(name="one") + "\n@moeplug.hookimpl\ndef moeplug_quantise(ctx): ...\n", "moeplug_quantise"),
        (HOOKS.format(name="one") + "\n@moeplug.hookimpl\ndef moeplug_allocate(context): ...\n", "context"),
    ],
    ids=[
        "import",
        "syntax",
        "raises_late",
        "undeclared",
        "twice",
        "a_class",
        "exits",
        "declared_only",
        "unknown_hook",
        "unknown_argument",
    ],
)
def test_a_registration_that_fails_leaves_nothing_of_the_plugin_registered(site, hooks, message):
    install(site, "one", hooks=hooks)
    install(site, "two")
    registry = Registry.discover()
    with pytest.raises(PluginError, match=message) as caught:
        registry.activate("one", "schemes/one.yaml:2")
    assert "plugin 'one' (moeplug-one 1.0)" in str(caught.value)
    assert "schemes/one.yaml:2 needs it" in str(caught.value)
    assert states(registry)["one"] == "broken"
    with pytest.raises(PluginError, match="not registered"):
        registry.format("one")
    assert registry.call("allocate", context("one"), lambda: "default") == "default"
    registry.activate("two", "a test")
    assert registry.format("two").name == "two"


def test_only_the_groups_own_provider_is_asked(site):
    answer = "\n@moeplug.hookimpl\ndef moeplug_allocate(ctx):\n    return '{name}'\n"
    for name in ("one", "two"):
        install(site, name, hooks=HOOKS.format(name=name) + answer.format(name=name))
    registry = Registry.discover()
    registry.activate("one", "a test")
    registry.activate("two", "a test")
    assert registry.call("allocate", context("one"), lambda: "default") == "one"
    assert registry.call("allocate", context("two"), lambda: "default") == "two"
    assert registry.call("allocate", context(None), lambda: "default") == "default"


@pytest.mark.parametrize("hook", STAGE_HOOKS)
def test_none_means_the_cores_default_at_every_stage(site, hook):
    silent = f"\n@moeplug.hookimpl\ndef {hook}(ctx):\n    return None\n"
    install(site, "one", hooks=HOOKS.format(name="one") + silent)
    registry = Registry.discover()
    registry.activate("one", "a test")
    given = dict.fromkeys(_arguments(hook) - {"ctx"})
    assert registry.call(hook.removeprefix("moeplug_"), context("one"), lambda: "default", **given) == "default"


def _arguments(hook):
    import inspect

    return set(inspect.signature(getattr(moeplug.hookspecs, hook)).parameters)


def test_an_exception_in_a_hook_names_plugin_stage_and_layer(site):
    raising = "\n@moeplug.hookimpl\ndef moeplug_allocate(ctx):\n    raise KeyError('w13')\n"
    install(site, "one", hooks=HOOKS.format(name="one") + raising)
    registry = Registry.discover()
    registry.activate("one", "a test")
    with pytest.raises(PluginError, match="plugin 'one', stage allocate, layer 3 failed: KeyError: 'w13'"):
        registry.call("allocate", context("one"), lambda: None)


def test_an_exception_in_a_plugins_format_names_the_plugin_too(site):
    broken = HOOKS.format(name="one").replace("out.copy_(scaled.round_())", "out.no_such_method()")
    install(site, "one", hooks=broken)
    scheme = moeplug.Scheme.from_text(SCHEME.format(name="one"))
    with pytest.raises(PluginError, match="plugin 'one', stage quantize, layer 0 failed: AttributeError"):
        moeplug.quantize_experts(torch.randn(2, 8, 16), torch.randn(2, 16, 4), scheme)


KERNEL = """
from moeplug.kernels import Kernel
from moeplug.moe.layout import CONCATENATED


class Greedy(Kernel):
    name = "greedy"
    layout = CONCATENATED

    def reason_against(self, request):
        return None

    def bind(self, request, weights, scales):
        return lambda hidden, topk_weights, topk_ids, out=None: hidden * 0


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(Mine())
    registry.add_kernel(Greedy())
"""


def test_a_plugins_kernel_serves_its_own_groups_and_no_others(site):
    manifest = MANIFEST.format(name="one", package="fake_one") + "kernels: [greedy]\n"
    install(site, "one", manifest=manifest, hooks=HOOKS.format(name="one").split("@moeplug")[0] + KERNEL)
    registry = Registry.discover()
    scheme = moeplug.Scheme.from_text(SCHEME.format(name="one"))
    weights = torch.randn(2, 8, 16), torch.randn(2, 16, 4)
    assert moeplug.quantize_experts(*weights, scheme, registry=registry).kernels == ("greedy",)
    assert moeplug.quantize_experts(*weights, "int8", registry=registry).kernels == ("cpu-grouped",)


def test_a_plugins_own_scheme_error_passes_unchanged(site):
    raising = "\n@moeplug.hookimpl\ndef moeplug_allocate(ctx):\n    raise moeplug.SchemeError('too narrow')\n"
    install(site, "one", hooks=HOOKS.format(name="one") + raising)
    registry = Registry.discover()
    registry.activate("one", "a test")
    with pytest.raises(SchemeError, match="^too narrow$"):
        registry.call("allocate", context("one"), lambda: None)


OBSERVER = """
import moeplug

seen = []


@moeplug.hookimpl(wrapper=True)
def moeplug_allocate(ctx):
    result = yield
    seen.append((ctx.plugin, result))
    return result
"""


def watched(site, hooks):
    """Return a registry that an observer with these hooks watches."""
    install(site, "watch", manifest="api: 1\nname: watch\nkind: observer\nhooks: fake_watch.hooks\n", hooks=hooks)
    registry = Registry.discover()
    registry.observe("watch")
    return registry


def test_an_observer_sees_the_calls_of_every_provider_and_answers_none(site):
    install(site, "watch", manifest="api: 1\nname: watch\nkind: observer\nhooks: fake_watch.hooks\n", hooks=OBSERVER)
    answer = "\n@moeplug.hookimpl\ndef moeplug_allocate(ctx):\n    return 'answer'\n"
    install(site, "one", hooks=HOOKS.format(name="one") + answer)
    registry = Registry.discover()
    registry.activate("one", "a test")
    registry.observe("watch")
    assert registry.call("allocate", context("one"), lambda: "default") == "answer"
    assert registry.call("allocate", context(None), lambda: "default") == "default"
    assert sys.modules["fake_watch.hooks"].seen == [("one", ["answer"]), (None, ["default"])]


@pytest.mark.parametrize("returned", ["None", "['another']", "[]"])
def test_what_an_observer_returns_changes_nothing(site, returned):
    registry = watched(site, OBSERVER.replace("return result", f"return {returned}"))
    assert registry.call("allocate", context(None), lambda: "default") == "default"


def test_a_failure_that_an_observer_catches_still_ends_the_load(site):
    catching = OBSERVER.replace("result = yield", "result = []\n    try:\n        yield\n    except Exception: pass")
    registry = watched(site, catching)

    def failing():
        raise SchemeError("the stage's own")

    with pytest.raises(SchemeError, match="the stage's own"):
        registry.call("allocate", context(None), failing)
    assert sys.modules["fake_watch.hooks"].seen == [(None, [])]


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_observer_that_fails_is_named(site, place):
    yielding = {"before": "1 / 0; result = yield", "after": "result = yield; 1 / 0"}[place]
    registry = watched(site, OBSERVER.replace("result = yield", yielding))
    with pytest.raises(PluginError, match="observer 'watch', stage allocate, layer 3 failed: ZeroDivisionError"):
        registry.call("allocate", context(None), lambda: "default")


EVENTS = """
import threading
import moeplug

told = []


@moeplug.hookimpl
def moeplug_event(event):
    told.append((event, threading.current_thread().name))
"""


def test_an_observer_is_told_of_every_read_and_of_the_end(site):
    registry = watched(site, EVENTS)
    moeplug.load(scheme="int8", device="cpu", registry=registry)
    told = sys.modules["fake_watch.hooks"].told
    end, _ = told[-1]
    assert [e.what for e, _ in told] == ["read"] * (len(told) - 1) + ["load"]  # a CPU copies nothing
    assert sum(e.nbytes for e, _ in told[:-1]) == end.nbytes > 1_000_000
    assert all(end.started <= e.started <= e.ended <= end.ended for e, _ in told)
    assert {thread for e, thread in told if e.what == "read"} == {"moeplug-reader"}


def test_an_observer_is_told_of_the_end_of_a_load_that_fails(site):
    registry = watched(site, EVENTS)
    text = SCHEME.format(name="int8") + "accept: {relative_rms: 0.0000001}\n"
    with pytest.raises(moeplug.RefusedError):
        moeplug.load(scheme=moeplug.Scheme.from_text(text), device="cpu", registry=registry)
    assert sys.modules["fake_watch.hooks"].told[-1][0].what == "load"


def test_an_event_is_told_to_observers_alone(site):
    install(site, "one", hooks=HOOKS.format(name="one") + EVENTS)
    with pytest.raises(PluginError, match="moeplug_event is told to observers alone; say kind: observer"):
        Registry.discover().activate("one", "a test")


def test_an_observer_that_answers_a_stage_is_refused(site):
    answering = OBSERVER.replace("(wrapper=True)", "").replace("result = yield", "result = 'mine'")
    install(site, "watch", manifest="api: 1\nname: watch\nkind: observer\nhooks: fake_watch.hooks\n", hooks=answering)
    with pytest.raises(PluginError, match="answers no stage, but moeplug_allocate is not a hook wrapper"):
        Registry.discover().observe("watch")


def test_a_scheme_plugin_is_no_observer(site):
    install(site, "one")
    with pytest.raises(UsageError, match="is not an observer"):
        Registry.discover().observe("one")


def test_an_installed_scheme_is_found_by_name(site):
    folder = install(site, "one", manifest=MANIFEST.format(name="one", package="fake_one") + "schemes: schemes\n")
    (folder / "schemes").mkdir()
    (folder / "schemes" / "one.yaml").write_text(SCHEME.format(name="one"))
    registry = Registry.discover()
    assert registry.scheme_files()["one"] == folder / "schemes" / "one.yaml"
    experts = moeplug.quantize_experts(torch.randn(2, 8, 16), torch.randn(2, 16, 4), "one", registry=registry)
    assert "one channel" in repr(experts)


def test_listing_imports_neither_torch_nor_triton_nor_a_plugin():
    code = """
    import sys
    from moeplug.registry import Registry
    Registry.discover()
    heavy = {m for m in sys.modules if m in ("torch", "triton", "numpy", "transformers") or m.startswith("moeplug_")}
    assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
