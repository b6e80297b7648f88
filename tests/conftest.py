"""Fixtures for all tests. Helpers that are plain functions stand in helpers.py: `import helpers`."""

from __future__ import annotations

import shutil
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


@pytest.fixture(scope="session")
def wide_experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 151 MB that is experts alone; do not change it."""
    import helpers

    folder = tmp_path_factory.mktemp("wide")
    yield helpers.save_wide(folder)
    shutil.rmtree(folder)
