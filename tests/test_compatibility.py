"""What others build on changes on purpose or not at all: public names, hooks, and the keys of YAML files."""

from __future__ import annotations

import difflib
from pathlib import Path

import public_api

from moeplug.schema import generate

LIST = Path(__file__).parent / "public_api.txt"


def test_public_names_and_hooks_are_those_of_the_committed_list():
    committed, found = LIST.read_text().splitlines(), public_api.public_api()
    differing = [line for line in difflib.ndiff(committed, found) if line.startswith(("- ", "+ "))]
    assert committed == found, (
        "the public API differs from tests/public_api.txt:\n"
        + "\n".join(differing)
        + "\nA line that is gone or different (-) breaks plugins and scripts: read docs/compatibility.md first. Where "
        "it is meant, run `python tests/public_api.py > tests/public_api.txt` and give it a line in CHANGELOG.md"
    )


def keys_of(schema, path=""):
    """Yield the path of every key that a JSON Schema allows, those that must be given with a star."""
    for name, inner in schema.get("properties", {}).items():
        yield f"{path}{name}{'*' if name in schema.get('required', ()) else ''}"
        yield from keys_of(inner, f"{path}{name}.")
    for name, definition in schema.get("$defs", {}).items():
        yield from keys_of(definition, f"{name}: ")


def test_api_1_keeps_its_keys():
    """Keys may come, as optional ones; none of these may go, and none may become required."""
    scheme, plugin = set(keys_of(generate("scheme"))), set(keys_of(generate("plugin")))
    assert {"api*", "name*", "weights", "plugin", "extends", "overrides", "options", "accept"} <= scheme
    assert {"api*", "name*", "kind", "hooks", "schemes", "formats", "kernels", "options", "needs"} <= plugin
    assert {key for key in scheme if key.endswith("*") and ":" not in key} == {"api*", "name*"}
    assert {key for key in plugin if key.endswith("*") and ":" not in key} == {"api*", "name*"}
