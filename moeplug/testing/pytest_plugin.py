"""What pytest loads where moeplug is installed: markers, strict known failures, and the report of conformance runs.

A run on a GPU with `--moeplug-attest` writes gpu-attestation.json beside the test file. Committed, it is read back by
runs without a GPU, whose report then says what was verified, when, where and with which versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from moeplug.testing.attestation import Attestation, describe_age

pytest.register_assert_rewrite(*(f"moeplug.testing.{name}" for name in ("conformance", "layers", "under_test")))

PROPERTY: Final = "moeplug conformance"
FILE_NAME: Final = "gpu-attestation.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --moeplug-attest."""
    group = parser.getgroup("moeplug")
    group.addoption(
        "--moeplug-attest",
        action="store_true",
        help=f"on a GPU: write {FILE_NAME} beside the test file of each SchemeConformance class that passed",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the kit's markers and start its report."""
    for line in (
        "since_api(number): the `api:` of plugin.yaml that a conformance test came with",
        "needs_gpu: a conformance test that is verified on a GPU alone",
    ):
        config.addinivalue_line("markers", line)
    config.pluginmanager.register(Report(config), "moeplug-conformance-report")


def _class_of(item: pytest.Item) -> Any:
    """Return the conformance class of a test, None for any other test."""
    cls = getattr(item, "cls", None)
    named = (f"{base.__module__}.{base.__qualname__}" for base in getattr(cls, "__mro__", ()))
    return cls if "moeplug.testing.conformance.SchemeConformance" in named else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark known failures as strict xfails, and skip what is newer than the plugin's api."""
    by_class: dict[Any, list[pytest.Item]] = {}
    for item in items:
        if (cls := _class_of(item)) is not None:
            by_class.setdefault(cls, []).append(item)
    for cls, tests in by_class.items():
        for item in tests:
            _skip_newer(item, cls)
        mark_known_failures(cls, tests)


def _skip_newer(item: pytest.Item, cls: Any) -> None:
    marker = item.get_closest_marker("since_api")
    number, speaks = marker.args[0] if marker is not None else 1, cls.speaks_api()
    if number > speaks:
        item.add_marker(pytest.mark.skip(f"came with api {number}; the plugin's plugin.yaml says api: {speaks}"))


def mark_known_failures(cls: Any, tests: list[pytest.Item]) -> None:
    """Make tests that a class says to fail strict xfails; raise UsageError where it gives no reason or no test."""
    for name, reason in cls.known_failures.items():
        if not str(reason).strip():
            raise pytest.UsageError(f"{cls.__name__}: known_failures[{name!r}] has no reason; say why it fails")
        if not hasattr(cls, name.partition("[")[0]):
            raise pytest.UsageError(f"{cls.__name__}: known_failures names {name!r}, which is no test of the class")
        for item in (t for t in tests if name in (t.name, getattr(t, "originalname", None))):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Note in the report of a conformance test whose it is; workers of pytest-xdist send it to the controller."""
    if (cls := _class_of(item)) is not None and not any(name == PROPERTY for name, _ in item.user_properties):
        of_gpu = item.get_closest_marker("needs_gpu") is not None
        facts = {"plugin": cls.plugin, "file": str(item.path.parent / FILE_NAME), "of_gpu": of_gpu}
        item.user_properties.append((PROPERTY, facts))
    return (yield)


class Report:
    """Counts conformance tests by plugin, and says at the end what was verified and what was not."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._counts: dict[tuple[str, str], dict[str, int]] = {}
        self._all = not any("::" in argument for argument in config.args)

    def pytest_deselected(self) -> None:
        """Remember that not every test runs."""
        self._all = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one test's outcome: its call, or the phase that ended it before."""
        facts = dict(report.user_properties).get(PROPERTY)
        if not isinstance(facts, dict) or not (report.when == "call" or report.outcome != "passed"):
            return
        counts = self._counts.setdefault((facts["plugin"], facts["file"]), {})
        where = "gpu" if facts["of_gpu"] else "cpu"
        reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
        outcome: str = "not verified here" if "not verified here" in reason else report.outcome
        if hasattr(report, "wasxfail") and report.skipped:
            outcome = "known to fail"
        counts[f"{where} {outcome}"] = counts.get(f"{where} {outcome}", 0) + 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Write a line or two for each plugin, and its attestation where one is asked for."""
        if not self._counts or hasattr(self._config, "workerinput"):
            return
        terminalreporter.section("moeplug conformance")
        for (plugin, file), counts in sorted(self._counts.items()):
            terminalreporter.line(f"{plugin}: {_said(counts, 'cpu', 'CPU and interpreter')}")
            terminalreporter.line(f"{plugin}: {_said(counts, 'gpu', 'GPU')}")
            terminalreporter.line(f"{plugin}: {self.attested(plugin, Path(file), counts)}")

    def attested(self, plugin: str, file: Path, counts: dict[str, int]) -> str:
        """Return a line about the attestation in a file, which is written first where that is asked for."""
        failed = sum(n for outcome, n in counts.items() if outcome.endswith("failed"))
        if not self._config.getoption("--moeplug-attest"):
            return describe_age(file, plugin)
        if failed or not self._all or not counts.get("gpu passed") or counts.get("gpu not verified here"):
            return f"{FILE_NAME} is not written: all tests have to run, the GPU's too, and none may fail"
        Attestation.of_this_machine(plugin, counts["gpu passed"]).write(file)
        return f"wrote {file}: commit it"


def _said(counts: dict[str, int], where: str, name: str) -> str:
    mine = [f"{n} {outcome.removeprefix(where + ' ')}" for outcome, n in counts.items() if outcome.startswith(where)]
    return f"{name}: {', '.join(mine) or 'nothing ran'}"
