"""What a plugin may declare, and that a scheme is held to it before anything is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeplug.errors import InputOutputError, PluginError
from moeplug.manifest import CAPABILITIES, IncompatibleApi, Manifest, check_scheme
from moeplug.scheme import Scheme

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "plugins" / "moeplug-int8" / "src" / "moeplug_int8"
BAD = sorted(Path(__file__).parent.joinpath("bad_plugins").glob("*.yaml"))


def manifest(**declared: Any) -> Manifest:
    lines = {"api": 1, "name": "p", "hooks": "p.hooks", "formats": ["f"], "capabilities": ["per_channel"], **declared}
    return Manifest.from_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in lines.items()))


def problems(text: str, *manifests: Manifest) -> list[str]:
    scheme = Scheme.from_text("api: 1\nname: a\nplugin: p\n" + text, "a.yaml")
    known = {m.name: m for m in manifests or [manifest()]}
    return [str(problem).splitlines()[0] for problem in check_scheme(scheme, known)]


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_each_broken_manifest_is_refused_with_its_one_message(path: Path) -> None:
    expected = path.read_text().split("\n")[0].removeprefix("# expect: ")
    with pytest.raises(PluginError) as caught:
        Manifest.from_file(path)
    assert f"{path}:{expected}" in str(caught.value)
    assert len(caught.value.problems) == 1  # type: ignore[attr-defined]


def test_there_are_broken_manifests_of_many_kinds() -> None:
    assert len(BAD) >= 30


def test_another_api_is_told_apart_from_a_broken_file() -> None:
    with pytest.raises(IncompatibleApi, match="written for api 2, this moeplug reads api 1; upgrade moeplug"):
        Manifest.from_text("api: 2\nname: p\neverything: new\n")
    with pytest.raises(PluginError) as caught:
        Manifest.from_text("api: one\nname: p\nhooks: p.hooks\n")
    assert not isinstance(caught.value, IncompatibleApi)


def test_a_missing_manifest_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputOutputError, match="no such file"):
        Manifest.from_file(tmp_path / "plugin.yaml")


def test_the_shipped_manifest_is_read() -> None:
    shipped = Manifest.from_file(PACKAGE / "plugin.yaml")
    assert (shipped.name, shipped.kind, shipped.hooks) == ("int8", "scheme", "moeplug_int8.hooks")
    assert shipped.schemes == "schemes"
    assert (PACKAGE / shipped.schemes).is_dir()
    assert shipped.needs is not None
    assert shipped.needs.cuda is not None
    assert shipped.needs.cuda.minimum == (8, 0)
    assert shipped.where(("formats", 0)).startswith(f"{PACKAGE / 'plugin.yaml'}:")


def test_a_plugin_of_schemes_alone_needs_no_code() -> None:
    plain = Manifest.from_text("api: 1\nname: p\nschemes: schemes/\n")
    assert plain.hooks is None
    assert plain.schemes == "schemes"


def test_a_plugin_needs_nothing_unless_it_says_so() -> None:
    assert manifest().needs is None
    needs = manifest(needs={"cpu": {}, "cuda": {}}).needs
    assert needs is not None
    assert needs.cuda is not None
    assert needs.cuda.minimum is None


WEIGHTS = {
    "per_tensor": "{format: f, strategy: tensor}",
    "per_channel": "{format: f, strategy: channel}",
    "per_group": "{format: f, strategy: group, group_size: 64}",
    "per_block": "{format: f, strategy: block, block_structure: [128, 128]}",
    "zero_points": "{format: f, strategy: channel, symmetric: false}",
}
ACTIVATIONS = {
    "activation_per_tensor": "{format: f, strategy: tensor}",
    "activation_per_token": "{format: f}",
    "activation_per_group": "{format: f, strategy: group, group_size: 64}",
}


def test_every_capability_is_asked_for_by_something() -> None:
    assert set(CAPABILITIES) == {*WEIGHTS, *ACTIVATIONS}


@pytest.mark.parametrize("capability", WEIGHTS)
def test_a_weight_spec_needs_its_capability(capability: str) -> None:
    text = f"weights: {WEIGHTS[capability]}\n"
    have = ["per_channel", capability] if capability != "per_channel" else [capability]
    assert problems(text, manifest(capabilities=have)) == []
    lacking = [c for c in CAPABILITIES if c != capability]
    (problem,) = problems(text, manifest(capabilities=lacking))
    assert problem.startswith("a.yaml:4:")
    assert "plugin 'p' " in problem


@pytest.mark.parametrize("capability", ACTIVATIONS)
@pytest.mark.parametrize("field", ["input_activations", "intermediate"])
def test_an_activation_spec_needs_its_capability(capability: str, field: str) -> None:
    text = f"weights: {{format: f}}\n{field}: {ACTIVATIONS[capability]}\n"
    assert problems(text, manifest(capabilities=["per_channel", capability])) == []
    lacking = [c for c in CAPABILITIES if c != capability]
    (problem,) = problems(text, manifest(capabilities=lacking))
    assert problem.startswith("a.yaml:5:")


def test_the_message_names_what_the_plugin_can_do() -> None:
    assert problems("weights: {format: f, strategy: tensor}\n") == [
        "a.yaml:4:32: weights.strategy: plugin 'p' does not do strategy: tensor; it does: channel"
    ]


def test_a_format_of_another_plugin_is_met_with_that_plugins_name() -> None:
    (problem,) = problems("weights: {format: g}\n", manifest(), manifest(name="q", formats=["g"]))
    assert problem == "a.yaml:4:19: weights.format: plugin 'p' has no format 'g'; plugin 'q' has it. It has: f"


def test_an_override_is_held_to_the_plugin_that_it_names() -> None:
    text = "weights: {format: f}\noverrides:\n  - {layers: 0, weights: {format: g}, plugin: q}\n"
    assert problems(text, manifest(), manifest(name="q", formats=["g"])) == []
    (problem,) = problems(text, manifest(), manifest(name="q", formats=["h"]))
    assert problem.startswith("a.yaml:6:35: overrides[0].weights.format: plugin 'q' has no format 'g'")


def test_an_override_that_changes_only_the_plugin_is_held_to_the_new_one() -> None:
    text = "weights: {format: f}\noverrides:\n  - {layers: 0, plugin: q}\n"
    (problem,) = problems(text, manifest(), manifest(name="q", formats=["h"]))
    assert problem.startswith("a.yaml:6:25: overrides[0].plugin")


def test_activations_may_use_the_format_of_any_installed_plugin() -> None:
    text = "weights: {format: f}\ninput_activations: {format: g}\n"
    able = manifest(capabilities=["per_channel", "activation_per_token"])
    assert problems(text, able, manifest(name="q", formats=["g"])) == []
    (problem,) = problems(text, able)
    assert problem.startswith("a.yaml:5:29: input_activations.format: no installed plugin has a format 'g'")


def test_an_observer_quantizes_nothing() -> None:
    observer = Manifest.from_text("api: 1\nname: p\nkind: observer\nhooks: p.hooks\n")
    (problem,) = problems("weights: {format: f}\n", observer)
    assert problem == "a.yaml:3:9: plugin: plugin 'p' is an observer and quantizes nothing; use --observe p"


OPTIONS = {
    "properties": {
        "steps": {"type": "integer", "minimum": 1, "maximum": 8, "default": 4},
        "mode": {"enum": ["fast", "best"]},
        "model_config": {"type": "boolean"},
        "weights": {"type": "array", "items": {"type": "number", "minimum": 0}},
        "inner": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    },
    "required": ["mode"],
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{mode: fast}", ""),
        ("{mode: best, steps: 8, model_config: true, weights: [0, 0.5], inner: {a: b}, x-own: 1}", ""),
        ("{}", "a.yaml:5:1: options.mode: 'mode' is missing"),
        ("{mode: fats}", "a.yaml:5:17: options.mode: found the text 'fats', expected 'fast' or 'best'; did you mean"),
        ("{mode: fast, steps: 9}", "a.yaml:5:30: options.steps: found the number 9, expected at most 8"),
        ("{mode: fast, steps: 1.0}", "a.yaml:5:30: options.steps: found the number 1.0, expected a whole number"),
        ("{mode: fast, model_config: 1}", "expected true or false"),
        ("{mode: fast, weights: [1, -1]}", "options.weights[1]: found the number -1, expected at least 0"),
        ("{mode: fast, inner: {}}", "options.inner.a: 'a' is missing"),
        (
            "{mode: fast, inner: {a: b, c: d}}",
            "options.inner.c: unknown key 'c'; allowed: a",
        ),
        ("{mode: fast, stpes: 1}", "options.stpes: unknown key 'stpes'; did you mean 'steps'?"),
        ("{mode: fast, option_0: 1}", "unknown key 'option_0'"),
    ],
)
def test_options_are_checked_against_the_declaration(options: str, message: str) -> None:
    found = problems(f"weights: {{format: f}}\noptions: {options}\n", manifest(options=OPTIONS))
    assert len(found) == (1 if message else 0)
    assert message in "".join(found)


def test_a_scheme_without_options_still_has_to_give_the_required_ones() -> None:
    (problem,) = problems("weights: {format: f}\n", manifest(options=OPTIONS))
    assert problem == "a.yaml:1:1: options.mode: 'mode' is missing"


def test_defaults_of_options_are_filled_in() -> None:
    declared = manifest(options=OPTIONS)
    assert declared.with_defaults({"mode": "fast"}) == {"mode": "fast", "steps": 4}
    assert declared.with_defaults({"steps": 1}) == {"steps": 1}


def test_a_scheme_made_in_python_is_checked_too() -> None:
    scheme = Scheme.from_data({"api": 1, "name": "a", "plugin": "p", "weights": {"format": "g"}})
    (problem,) = check_scheme(scheme, {"p": manifest()})
    assert str(problem).startswith("<data>: weights.format: plugin 'p' has no format 'g'")


def test_a_plugin_that_is_not_there_is_named_once() -> None:
    (problem,) = problems("weights: {format: f}\n", manifest(name="pp"))
    assert problem == "a.yaml:3:9: plugin: plugin 'p' is not installed or not usable; did you mean 'pp'? Installed: pp"
