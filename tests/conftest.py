"""Fixtures for all tests. Helpers that are plain functions stand in helpers.py: `import helpers`."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# --import-mode=importlib puts no folder on sys.path, so that tests/*.py could not import each other.
sys.path.insert(0, str(Path(__file__).parent))

TinyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """Return a function (model_type, fused=False, shards=1) → folder of a tiny random checkpoint; do not change it.

    Written by transformers, once per session. To damage one: `helpers.copy_of(tiny_checkpoint(...), tmp_path)`.
    """
    import helpers

    made: dict[tuple[str, bool, int], Path] = {}

    def make(model_type: str, fused: bool = False, shards: int = 1) -> Path:
        key = (model_type, fused, shards)
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            made[key] = helpers.save_tiny(model_type, folder, fused=fused, shards=shards)
        return made[key]

    return make


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """A function that runs the moeplug command in this process and returns (exit code, stdout, stderr)."""
    from moeplug.cli import main

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moeplug", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return ended.value.code, printed.out, printed.err

    return call


@pytest.fixture(scope="session")
def wide_experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 151 MB that is experts alone; do not change it."""
    import helpers

    folder = tmp_path_factory.mktemp("wide")
    yield helpers.save_wide(folder)
    shutil.rmtree(folder)
