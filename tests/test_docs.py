"""What the documents show is run: code blocks, YAML blocks, and the commands they name."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moeplug.checking import check_file
from moeplug.cli import cli
from moeplug.registry import Registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "plugins").glob("*/README.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


PYTHON = [(page.name, i, code) for page in PAGES for i, code in enumerate(blocks(page, "python"))]
YAML = [(page.name, i, code) for page in PAGES for i, code in enumerate(blocks(page, "yaml"))]


@pytest.mark.parametrize(("page", "index", "code"), PYTHON, ids=[f"{page}-{i}" for page, i, _ in PYTHON])
def test_python_in_the_documents_runs(page, index, code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "index", "code"), YAML, ids=[f"{page}-{i}" for page, i, _ in YAML])
def test_yaml_in_the_documents_is_valid(page, index, code, tmp_path):
    file = tmp_path / ("plugin.yaml" if "hooks:" in code else "scheme.yaml")
    file.write_text(code)
    if "plugin: mine" in code:  # the guide's own plugin is installed by the test below
        pytest.skip("checked with the guide's plugin")
    assert "is good" in check_file(file, None, Registry.discover())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_in_the_documents_exist(page):
    for line in re.findall(r"^moeplug [^\n#]*|`moeplug [^`\n]*`", page.read_text(), re.MULTILINE):
        words = line.strip("` ").split()[1:]
        if not words or words[0].startswith("-"):
            continue
        command = cli.commands.get(words[0])
        assert command is not None, line
        known = {option for parameter in command.params for option in parameter.opts}
        for option in [word for word in words if word.startswith("--")]:
            assert option in known, f"{page.name}: {line}: {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_guides_smallest_plugin_works_when_it_is_put_together(tmp_path):
    guide = ROOT / "docs" / "plugin-guide.md"
    (manifest, scheme, _observer), hooks = blocks(guide, "yaml"), blocks(guide, "python")[0]
    (tmp_path / "pyproject.toml").write_text(blocks(guide, "toml")[0])
    package = tmp_path / "src" / "moeplug_mine"
    (package / "schemes").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "plugin.yaml").write_text(manifest)
    (package / "hooks.py").write_text(hooks)
    (package / "schemes" / "mine.yaml").write_text(scheme)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")  # what pip does with a wheel of pure Python
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import torch, moeplug\n"
        "experts = moeplug.quantize_experts(torch.randn(2, 64, 32), torch.randn(2, 32, 32), 'mine')\n"
        "assert 'mine channel' in repr(experts)\n"
        "assert experts.stored('gate', 0).abs().max() == 127\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
