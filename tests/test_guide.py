"""The plugin guide is followed from its first command to its last, in an environment with moeplug's wheel alone."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import wheels

from moeplug import hookspecs

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "plugin-guide.md").read_text()
SITTING = GUIDE[GUIDE.index("## In one sitting") : GUIDE.index("## The stages")]
STEPS = re.findall(r"(?:<!-- (file|insert): (\S+) -->\n)?```(console|python|yaml)\n(.*?)```", SITTING, re.DOTALL)


def commands(console):
    """Yield (command, the lines that it has to print, in this order; … stands for anything)."""
    for part in console.split("$ ")[1:]:
        command, *lines = part.rstrip("\n").split("\n")
        yield command, lines


def missing_line(expected, printed):
    """Return the first of the expected lines that does not follow in what was printed."""
    left = iter(printed)
    for line in expected:
        pattern = ".*".join(map(re.escape, line.split("…")))
        if not any(re.fullmatch(pattern, found.rstrip()) for found in left):
            return line
    return None


def test_the_sitting_does_what_it_shows(tmp_path):
    wheel = wheels.build(ROOT, "wheel", tmp_path)
    environment, folder = wheels.environment(tmp_path / "environment", wheel), tmp_path
    for kind, path, _, text in STEPS:
        if kind == "file":
            (folder / path).write_text(text)
        elif kind == "insert":
            file = folder / path
            before, hook, after = file.read_text().partition("\n\n@moeplug.hookimpl")
            file.write_text(f"{before}\n{text}{hook}{after}")
        else:
            for command, expected in commands(text):
                if command.startswith("cd "):
                    folder = folder / command.removeprefix("cd ")
                    continue
                done = wheels.shell(environment, folder, command)
                printed = done.stdout + done.stderr
                assert done.returncode == 0, f"{command}\n{printed}"
                assert missing_line(expected, printed.splitlines()) is None, f"{command}\n{printed}"
    compare_with_the_official_plugin(folder / "src" / "moeplug_my_nf4")


def compare_with_the_official_plugin(package):
    official = ROOT / "plugins" / "moeplug-nf4" / "src" / "moeplug_nf4"
    for name in ("codebook.py", "decode.py", "hooks.py"):
        mine = (package / name).read_text().replace("moeplug_my_nf4", "moeplug_nf4").replace("my-nf4", "nf4")
        assert mine == (official / name).read_text(), f"the guide's {name} is not the official plugin's"


@pytest.mark.parametrize("hook", ["moeplug_register", *hookspecs.STAGE_HOOKS, "moeplug_event"])
def test_the_guide_shows_the_signature_of_every_hook(hook):
    signature = inspect.signature(getattr(hookspecs, hook))
    names = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    shown = f"{hook}{signature.replace(parameters=names, return_annotation=signature.empty)}"
    assert f"### {hook}\n\n```\n{shown} -> {signature.return_annotation}\n```\n" in GUIDE
