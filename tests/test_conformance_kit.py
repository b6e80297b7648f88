"""The conformance kit has teeth: each plugin of broken_plugins/ fails the test that its first lines name."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from moeplug.testing import SchemeConformance, pytest_plugin
from moeplug.testing.attestation import Attestation, describe_age, versions_of

ROOT = Path(__file__).parent.parent
BROKEN = {file.stem: file for file in sorted((ROOT / "tests" / "broken_plugins").glob("*.py"))}
CAPABILITIES = ["per_channel", "per_group", "zero_points"]
CONFORMANCE = """
from moeplug.testing import SchemeConformance


class Test{name}(SchemeConformance):
    plugin = "{name}"
    relative_rms = {promises}
"""


def header(name):
    """What a broken plugin says about itself, below its first line."""
    return yaml.safe_load(ast.get_docstring(ast.parse(BROKEN[name].read_text())).partition("\n\n")[2])


def install(site, name, hooks, schemes, formats, capabilities):
    """Lay a plugin out as pip does: a package, and metadata with its entry point."""
    package = site / f"{name}_plugin"
    (package / "schemes").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "hooks.py").write_text(hooks)
    manifest = {"api": 1, "name": name, "hooks": f"{name}_plugin.hooks", "schemes": "schemes", "formats": formats}
    (package / "plugin.yaml").write_text(yaml.safe_dump(manifest | {"capabilities": capabilities}))
    for scheme, fields in schemes.items():
        data = {"api": 1, "name": scheme, "plugin": name, **fields}
        (package / "schemes" / f"{scheme}.yaml").write_text(yaml.safe_dump(data))
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[moeplug]\n{name} = {name}_plugin:plugin.yaml\n")


def run_pytest(folder, *arguments, site=None, plugins=("int8",)):
    """Run pytest in a process of its own, where only these plugins may be used, in a folder without a conftest."""
    path = os.pathsep.join(str(p) for p in (site, ROOT / "tests") if p)
    environment = os.environ | {"PYTHONPATH": path, "MOEPLUG_PLUGINS": ",".join(plugins), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every broken plugin's run of the test that it names: plugin → {test: message of its failure, or None}."""
    folder, site = tmp_path_factory.mktemp("broken"), tmp_path_factory.mktemp("site")
    for name in BROKEN:
        said = header(name)
        capabilities = said.get("capabilities", CAPABILITIES)
        schemes = {name: {"weights": {"format": name, **said.get("weights", {})}}}
        install(site, name, BROKEN[name].read_text(), schemes, [name], capabilities)
        promises = {name: said["promises"]} if "promises" in said else {}
        (folder / f"test_{name}.py").write_text(CONFORMANCE.format(name=name, promises=promises))
    asked = [f"test_{name}.py::Test{name}::{header(name)['fails']}" for name in BROKEN]
    done = run_pytest(folder, *asked, "--junitxml=results.xml", site=site, plugins=("int8", *BROKEN))
    assert (folder / "results.xml").exists(), done.stdout + done.stderr
    found = {name: {} for name in BROKEN}
    for case in ET.parse(folder / "results.xml").iter("testcase"):
        failure = next((part.text for part in case if part.tag in ("failure", "error")), None)
        found[case.get("classname").rpartition(".Test")[2]][case.get("name")] = failure
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_fails_the_test_that_is_about_it(outcomes, name):
    failures = [message for message in outcomes[name].values() if message is not None]
    assert failures, f"{header(name)['fails']} passes: {sorted(outcomes[name])}"
    assert any(header(name)["says"] in message for message in failures), failures[0]


def test_every_test_of_the_kit_says_which_api_it_came_with():
    for name, test in vars(SchemeConformance).items():
        if name.startswith("test_"):
            assert any(mark.name == "since_api" for mark in test.pytestmark), name


CLASSES = """
from moeplug.testing import SchemeConformance, since_api


class TestKnown(SchemeConformance):
    plugin = "int8"
    known_failures = {
        "test_one_token_is_served[int8]": "it once did",
        "test_that_fails": "it has to",
    }

    def test_that_fails(self):
        raise AssertionError

    @since_api(2)
    def test_of_tomorrow(self):
        raise AssertionError


class TestNowhere(SchemeConformance):
    plugin = "nowhere"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of some tests of CLASSES that asks for an attestation: what pytest printed, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "test_classes.py").write_text(CLASSES)
    asked = (
        "test_one_token_is_served or test_a_captured_graph or test_the_plugin_is_installed or tomorrow or that_fails"
    )
    done = run_pytest(folder, "-k", asked, "--moeplug-attest", "-rA")
    return done.stdout, folder


def test_a_run_says_what_was_not_verified_here(run):
    text, _ = run
    assert "int8: CPU and interpreter: 6 passed, 1 failed, 1 known to fail, 1 skipped" in text
    assert "int8: GPU: 6 not verified here" in text or "int8: GPU: 6 passed" in text


def test_a_known_failure_that_passes_fails_the_run(run):
    text, _ = run
    assert "[XPASS(strict)] it once did" in text
    assert "PASSED test_classes.py::TestKnown::test_one_token_is_served[int8-g32]" in text


def test_a_plugin_that_is_not_installed_fails_one_test_and_says_so(run):
    text, _ = run
    assert "FAILED test_classes.py::TestNowhere::test_the_plugin_is_installed_and_what_it_declares_is_there" in text
    assert "plugin 'nowhere' is not installed" in text


def test_a_test_of_a_newer_api_is_skipped(run):
    text, _ = run
    assert "came with api 2; the plugin's plugin.yaml says api: 1" in text


def test_an_attestation_of_a_run_that_failed_is_not_written(run):
    text, folder = run
    assert "gpu-attestation.json is not written: all tests have to run, the GPU's too, and none may fail" in text
    assert not (folder / "gpu-attestation.json").exists()


@pytest.mark.parametrize(
    ("known", "said"),
    [({"test_one_token_is_served": ""}, "has no reason"), ({"test_one_tok": "x"}, "which is no test of the class")],
    ids=["no_reason", "no_test"],
)
def test_a_known_failure_has_a_reason_and_a_test(known, said):
    item = SimpleNamespace(name="test_one_token_is_served[int8]", originalname="test_one_token_is_served")
    with pytest.raises(pytest.UsageError, match=said):
        pytest_plugin.mark_known_failures(type("TestMine", (), {"known_failures": known}), [item])


def test_an_attestation_of_a_run_on_a_gpu_is_written_and_read_back(tmp_path, monkeypatch, pytestconfig):
    """Without a GPU here: its name is made up, the run's counts too."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(pytestconfig.option, "moeplug_attest", True)
    monkeypatch.setattr(pytestconfig, "args", ["tests"])
    report, file = pytest_plugin.Report(pytestconfig), tmp_path / "gpu-attestation.json"
    for counts in (
        {"gpu passed": 3, "cpu failed": 1},
        {"cpu passed": 3},
        {"gpu passed": 3, "gpu not verified here": 1},
    ):
        assert "is not written" in report.attested("int8", file, counts)
        assert not file.exists()
    assert report.attested("int8", file, {"gpu passed": 3, "cpu passed": 5}) == f"wrote {file}: commit it"
    report.pytest_deselected()
    assert "all tests have to run" in report.attested("int8", file, {"gpu passed": 3})
    assert "0 days ago, on NVIDIA H100: 3 passed, with the versions that are installed here" in describe_age(
        file, "int8"
    )


def test_where_triton_runs_no_kernel_at_all_that_is_the_reason():
    pytest.importorskip("triton", reason="triton is not installed")
    from moeplug.testing.interpreter import problem_of_interpreter

    # This process is not under TRITON_INTERPRET=1, and triton takes no tensors of a CPU, with a GPU or without.
    assert re.match(r"the interpreter of triton [\d.]+ fails with NumPy [\d.]+: ", problem_of_interpreter())


def test_an_interpreter_that_runs_no_kernel_leaves_schemes_unverified_and_formats_verified(monkeypatch):
    found = {"unable": "it fails with this NumPy", "schemes": {}, "formats": {"int8": {"torch.float16": None}}}
    monkeypatch.setattr(SchemeConformance, "plugin", "int8", raising=False)
    monkeypatch.setattr(SchemeConformance, "_interpreted", lambda: found)
    kit = SchemeConformance()
    with pytest.raises(pytest.skip.Exception, match="not verified here: it fails with this NumPy"):
        kit.test_the_gpus_kernel_gives_the_references_numbers_in_the_interpreter("int8")
    kit.test_every_stored_byte_decodes_in_the_kernel_as_the_format_says("int8")
    found["formats"]["int8"]["torch.float16"] = "word 0x0001 is wrong"
    with pytest.raises(AssertionError, match="word 0x0001 is wrong"):
        kit.test_every_stored_byte_decodes_in_the_kernel_as_the_format_says("int8")


def test_a_class_that_names_no_plugin_is_told_how():
    with pytest.raises(pytest.UsageError, match='say which plugin, for example plugin = "mine"'):
        SchemeConformance().pytest_generate_tests(None)


def test_an_attestation_says_how_old_it_is_and_what_has_changed_since(tmp_path):
    file = tmp_path / "gpu-attestation.json"
    versions = versions_of("int8")
    Attestation("other", 1, "2026-01-01", "a GPU", {}).write(file)
    Attestation("int8", 78, "2026-11-01", "NVIDIA H100", versions).write(file)
    line = describe_age(file, "int8", today="2026-11-22")
    assert line.startswith("attested 2026-11-01, 21 days ago, on NVIDIA H100: 78 passed, with the versions")
    Attestation("int8", 78, "2026-11-01", "NVIDIA H100", versions | {"moeplug": "0.0.1"}).write(file)
    assert "but with moeplug 0.0.1 (here" in describe_age(file, "int8")
    assert "no GPU run is attested" in describe_age(file, "third")
    assert set(json.loads(file.read_text())) == {"int8", "other"}
    for damaged in ("{", "[]", '{"int8": {}}', '{"int8": 1}'):
        file.write_text(damaged)
        assert "cannot be read" in describe_age(file, "int8")
