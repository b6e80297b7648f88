"""Text files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moeplug import InputOutputError
from moeplug.writing import write_whole


def test_a_file_is_written_whole_with_the_users_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new" / "report.json", "{}\n")
    finally:
        os.umask(before)
    (file,) = (tmp_path / "new").iterdir()
    assert file.read_text() == "{}\n"
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl_c", "full"])
def test_a_file_that_is_not_written_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    (tmp_path / "report.json").write_text("old")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((KeyboardInterrupt, InputOutputError)):
        write_whole(tmp_path / "report.json", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"
