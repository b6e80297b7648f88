"""Write a new plugin: a whole distribution, from the templates that moeplug ships."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

from moeplug.errors import UsageError

SUFFIX: Final = ".template"  # no tool takes a template for what it will become


def new_plugin(name: str, into: Path, taken: Collection[str] = ()) -> list[Path]:
    """Write the distribution moeplug-NAME into a new folder of `into`, and return its files.

    taken: names of installed plugins, formats and schemes: one more would be a conflict.
    Raises UsageError where the name cannot be one, or the folder exists.
    """
    _check_name(name, taken)
    package = f"moeplug_{name.replace('-', '_')}"
    values = {"name": name, "distribution": f"moeplug-{name}", "package": package}
    folder = into / values["distribution"]
    if folder.exists():
        raise UsageError(f"{folder} exists already; nothing was written. Choose another name, or another --into")
    written = []
    for path, text in _templates():
        file = folder / path.replace("PACKAGE", package).replace("NAME", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(values))
        written.append(file)
    return written


def _check_name(name: str, taken: Collection[str]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name, re.ASCII) or len(name) > 40:
        raise UsageError(
            f"{name!r} cannot be a plugin's name: expected a-z, 0-9 and single '-' between them, a letter first, at "
            "most 40, for example nf4 or my-format. The distribution will be called moeplug-NAME"
        )
    if name in taken:
        raise UsageError(f"{name!r} is the name of an installed plugin, format or scheme; choose another")


def _templates() -> Iterator[tuple[str, str]]:
    """Yield (path, text) of each template, sorted."""
    root = Path(str(resources.files("moeplug"))) / "templates" / "plugin"
    for file in sorted(root.rglob(f"*{SUFFIX}")):
        yield file.relative_to(root).as_posix().removesuffix(SUFFIX), file.read_text()
