"""What the documents show is run: code blocks, YAML blocks, and the commands they name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moeplug.checking import check_file
from moeplug.cli import cli
from moeplug.registry import Registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "plugins").glob("*/README.md"))]


def blocks(page, language):
    """Return the blocks that stand for themselves; one behind a comment is a file of tests/test_guide.py."""
    return re.findall(rf"(?<!-->\n)```{language}\n(.*?)```", page.read_text(), re.DOTALL)


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
