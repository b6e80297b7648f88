"""What pip installs works outside this repository: wheels, and wheels that are built from sdists."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import wheels

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = [ROOT, *sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))]


def test_moeplug_and_a_plugin_from_wheels_load_the_demo_from_another_folder(tmp_path):
    built = [wheels.build(source, "wheel", tmp_path) for source in (ROOT, ROOT / "plugins" / "moeplug-int8")]
    environment = wheels.environment(tmp_path / "environment", *built)
    done = wheels.run(environment, tmp_path, "moeplug", "load", "--scheme", "int8", "--runtime", "none", "--json")
    assert done.returncode == 0, done.stderr
    provenance = json.loads(done.stdout)["provenance"]
    for path in (provenance["plugins"][0]["path"], provenance["scheme"]["path"], provenance["checkpoint"]["path"]):
        assert Path(path).is_relative_to(tmp_path / "environment")


def test_schemes_are_links_to_every_file_that_a_plugin_ships():
    links = {path.name: path for path in (ROOT / "schemes").iterdir()}
    shipped = {path.name: path for path in (ROOT / "plugins").glob("*/src/*/schemes/*.yaml")}
    assert links.keys() == shipped.keys()
    for name, link in links.items():
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == shipped[name]


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rebuilt(source, folder):
    """Return (a wheel of a source tree, a wheel of its unpacked sdist)."""
    for name in ("direct", "sdist", "unpacked", "rebuilt"):
        (folder / name).mkdir(parents=True)
    with tarfile.open(wheels.build(source, "sdist", folder / "sdist")) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4: refuses links that lead out of the folder
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return wheels.build(source, "wheel", folder / "direct"), wheels.build(unpacked, "wheel", folder / "rebuilt")


@pytest.mark.parametrize("source", DISTRIBUTIONS[1:], ids=lambda path: path.name)
def test_a_plugins_sdist_builds_the_same_wheel(source, tmp_path):
    direct, from_sdist = rebuilt(source, tmp_path)
    assert contents(direct) == contents(from_sdist)
    names = set(contents(direct))
    assert {f"{path.parent.name}/{path.name}" for path in (source / "src").glob("*/*.py")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_moeplugs_sdist_builds_the_same_wheel_and_its_schemes_lead_somewhere(tmp_path):
    direct, from_sdist = rebuilt(ROOT, tmp_path)
    assert contents(direct) == contents(from_sdist)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for link in (unpacked / "schemes").iterdir():
        assert link.read_bytes() == (ROOT / "schemes" / link.name).read_bytes()


@pytest.mark.slow
def test_every_distribution_from_sdists_loads_every_scheme_and_does_the_main_job(tmp_path):
    built = [rebuilt(source, tmp_path / f"built-{i}")[1] for i, source in enumerate(DISTRIBUTIONS)]
    environment = wheels.environment(tmp_path / "environment", *built)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    plugins = json.loads(wheels.run(environment, folder, "moeplug", "plugins", "--json").stdout)
    assert {plugin["state"] for plugin in plugins} == {"active"}
    assert all(Path(plugin["path"]).is_relative_to(tmp_path) for plugin in plugins)
    main = wheels.run(environment, folder, "moeplug", "load", "--scheme", "int8")
    assert main.returncode == 0, main.stderr
    assert "top-1 agreement" in main.stdout
    schemes = [scheme for plugin in plugins for scheme in plugin["schemes"]]
    assert sorted(schemes) == sorted(path.stem for path in (ROOT / "schemes").iterdir())
    for scheme in schemes:
        arguments = ("load", "--scheme", scheme, "--device", "cpu", "--runtime", "none")
        done = wheels.run(environment, folder, "moeplug", *arguments)
        assert done.returncode == 0, f"{scheme}: {done.stderr}"
