"""`moeplug new-plugin` writes a distribution that installs beside moeplug's wheel, passes its tests and loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import wheels
from click.testing import CliRunner

from moeplug.cli import cli
from moeplug.errors import UsageError
from moeplug.scaffold import new_plugin

ROOT = Path(__file__).parent.parent
PLUGINS = sorted(path.parents[2] for path in (ROOT / "plugins").glob("*/src/*/schemes"))  # observers have none


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The bin folder of a virtual environment with moeplug's wheel."""
    wheel = wheels.build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))
    return wheels.environment(tmp_path_factory.mktemp("environment"), wheel)


def test_the_commands_it_names_install_test_and_load_a_plugin(environment, tmp_path):
    made = wheels.shell(environment, tmp_path, "moeplug new-plugin mine --json")
    commands = "\n".join(json.loads(made.stdout)["next"]).replace("install -e ", "install ")  # as a wheel, for once
    done = wheels.shell(environment, tmp_path, commands)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^mine: CPU and interpreter: \d+ passed$", done.stdout, re.MULTILINE), done.stdout
    assert "mine channel" in done.stdout  # the table of `load`
    imported = wheels.shell(
        environment, tmp_path, "python -c 'import moeplug_mine.hooks as m; print(m.__file__)'"
    ).stdout
    assert str(environment.parent) in imported


def test_nothing_is_overwritten(tmp_path):
    new_plugin("mine", tmp_path)
    hooks = tmp_path / "moeplug-mine" / "src" / "moeplug_mine" / "hooks.py"
    hooks.write_text("mine")
    with pytest.raises(UsageError, match="exists already; nothing was written"):
        new_plugin("mine", tmp_path)
    assert hooks.read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["Mine", "4mine", "my_own", "-mine", "mine-", "a--b", "../mine", "mine.yaml", "", "é", "x" * 41]
)
def test_a_name_that_cannot_be_one_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be a plugin's name"):
        new_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["int8", "int8-g128"], ids=["plugin", "scheme"])
def test_a_name_that_is_taken_is_refused(tmp_path, name):
    result = CliRunner().invoke(cli, ["new-plugin", name, "--into", str(tmp_path)])
    assert isinstance(result.exception, UsageError)
    assert "installed plugin, format or scheme" in str(result.exception)
    assert not list(tmp_path.iterdir())


def layout(folder):
    """The files of a distribution, with its names taken out; what a plugin has more of is not listed."""
    package = next((folder / "src").glob("moeplug_*"))
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    found = {path.relative_to(folder).as_posix().replace(package.name, "PACKAGE") for path in files}
    return {re.sub("schemes/.*", "schemes/NAME.yaml", path) for path in found}


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_official_plugins_have_the_layout_that_strangers_are_given(plugin, tmp_path):
    name = plugin.name.removeprefix("moeplug-")
    new_plugin("mine", tmp_path)
    given = layout(tmp_path / "moeplug-mine")
    of_a_repository = {".gitignore", ".github/workflows/test.yml"}  # official plugins share those of this one
    assert given - of_a_repository <= layout(plugin)
    ours, theirs = ((folder / "pyproject.toml").read_text() for folder in (plugin, tmp_path / "moeplug-mine"))
    package = next((plugin / "src").glob("moeplug_*")).name
    for line in (
        "[project.entry-points.moeplug]",
        f'packages = ["src/{package}"]',
        f'{name} = "{package}:plugin.yaml"',
    ):
        assert line in ours
        assert line.replace(package, "moeplug_mine").replace(name, "mine") in theirs
