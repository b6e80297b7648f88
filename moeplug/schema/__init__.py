"""Give editors JSON Schemas of the two YAML files, so that they complete keys and underline mistakes while one types.

The committed scheme.schema.json and plugin.schema.json are generated from the models that read the files, and a test
keeps them equal; `python -m moeplug.schema` writes them. A schema cannot say everything that the models check.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

Kind = Literal["scheme", "plugin"]
KINDS: Final[tuple[Kind, ...]] = ("scheme", "plugin")

# With the api's number, so that an old file keeps its schema. Editors find it in the first comment of a YAML file:
# an address works in every folder and after installation, a relative path works in neither.
SCHEMA_URL: Final = "https://moeplug.readthedocs.io/schema/1/{kind}.schema.json"
FOLDER: Final = Path(__file__).parent

_TITLES: Final = {"scheme": "moeplug scheme", "plugin": "moeplug plugin.yaml"}


def generate(kind: Kind) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a scheme file, or of plugin.yaml."""
    from moeplug.manifest import Manifest
    from moeplug.scheme import Scheme

    schema = _for_editors((Scheme if kind == "scheme" else Manifest).model_json_schema())
    if kind == "scheme":  # what a scheme leaves out may come from the one that it extends
        schema["required"] = ["api", "name"]
        schema["anyOf"] = [{"required": ["weights"]}, {"required": ["extends"]}]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": url(kind), "title": _TITLES[kind]}
    return {**head, **schema}


def text(kind: Kind) -> str:
    """Return the schema as the committed file has it."""
    return json.dumps(generate(kind), indent=2, ensure_ascii=False) + "\n"


def url(kind: Kind) -> str:
    """Return the address of a schema."""
    return SCHEMA_URL.format(kind=kind)


def modeline(kind: Kind) -> str:
    """Return the first line of a YAML file that tells an editor which schema it follows."""
    return f"# yaml-language-server: $schema={url(kind)}"


def _for_editors(node: Any) -> Any:
    """Return a schema without pydantic's titles, and with `x-` keys allowed wherever keys are closed."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    clean = {
        key: {name: _for_editors(inner) for name, inner in value.items()}
        if key in ("properties", "$defs")
        else _for_editors(value)
        for key, value in node.items()
        if key != "title"
    }
    if clean.get("additionalProperties") is False:
        clean["patternProperties"] = {"^x-": {}}
    return clean
