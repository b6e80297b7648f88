"""Build distributions, and virtual environments that have nothing of moeplug but wheels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# An environment has neither pip nor a console script of pytest.
SHELL = f"""
set -e
pip() {{ {sys.executable} -m pip --python "$(command -v python)" "$@" -q --no-deps --no-build-isolation; }}
pytest() {{ python -m pytest "$@"; }}
"""


def build(source: Path, target: str, folder: Path) -> Path:
    """Build the "wheel" or "sdist" of a source tree into folder, and return the file."""
    before = set(folder.iterdir())
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder], cwd=source, check=True)
    (built,) = set(folder.iterdir()) - before
    return built


def environment(folder: Path, *wheels: Path) -> Path:
    """Make a virtual environment with these wheels, and return its bin folder.

    Whatever else the running environment has, torch for one, it has too, by links; but nothing of moeplug.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    shared = folder / "shared"
    shared.mkdir()
    for path in [Path(path) for path in sys.path if path.endswith("site-packages")]:
        for entry in path.iterdir():
            if "moeplug" not in entry.name and not (shared / entry.name).exists():
                (shared / entry.name).symlink_to(entry)
    (site / "shared.pth").write_text(str(shared))  # searched after site; .pth files in it are not read
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", *wheels], check=True)
    return folder / "bin"


def run(bin_folder: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of an environment in a folder that is also its home."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MOEPLUG_PLUGINS")}
    clean |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(folder), "XDG_STATE_HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)


def shell(bin_folder: Path, folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run commands as a user types them; what pip would fetch is in the environment already."""
    return run(bin_folder, folder, "bash", "-c", SHELL + script)
