"""Build distributions, and virtual environments that have nothing of moeplug but wheels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def build(source: Path, target: str, folder: Path) -> Path:
    """Build the "wheel" or "sdist" of a source tree into folder, and return the file."""
    before = set(folder.iterdir())
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder], cwd=source, check=True)
    (built,) = set(folder.iterdir()) - before
    return built


def environment(folder: Path, *wheels: Path) -> Path:
    """Make a virtual environment with these wheels, and return its bin folder; torch is that of the running one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text("\n".join(shared))  # searched after site, and their own .pth files are not read
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", *wheels], check=True)
    return folder / "bin"


def run(bin_folder: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of an environment in a folder that is also its home."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MOEPLUG_PLUGINS")}
    clean |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(folder), "XDG_STATE_HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
