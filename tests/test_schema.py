"""The JSON Schemas that editors use say what the models say, and every shipped YAML names its schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moeplug.manifest import Manifest
from moeplug.schema import FOLDER, KINDS, Kind, generate, modeline, text, url
from moeplug.scheme import Scheme

ROOT = Path(__file__).parent.parent
MODELS = {"scheme": Scheme, "plugin": Manifest}
SCHEMES = sorted((ROOT / "plugins").glob("*/src/*/schemes/*.yaml"))
MANIFESTS = sorted((ROOT / "plugins").glob("*/src/*/plugin.yaml"))


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every schema of a mapping with known keys."""
    if isinstance(node, dict):
        if isinstance(node.get("properties"), dict) and node.get("type") == "object":
            yield node
        for value in node.values():
            yield from objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from objects(value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_committed_schema_is_the_generated_one(kind: Kind) -> None:
    committed = (FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8")
    assert committed == text(kind), "run python -m moeplug.schema"


@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_has_a_title_an_id_and_the_fields_of_its_model(kind: Kind) -> None:
    schema = generate(kind)
    assert schema["$id"] == url(kind)
    assert schema["title"].startswith("moeplug ")
    assert list(schema["properties"]) == list(MODELS[kind].model_fields)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_described_and_every_mapping_closed_but_for_x_keys(kind: Kind) -> None:
    found = list(objects(generate(kind)))
    assert len(found) >= 5
    for node in found:
        assert node["additionalProperties"] is False
        assert node["patternProperties"] == {"^x-": {}}
        for name, field in node["properties"].items():
            assert field.get("description"), name


def test_a_scheme_that_extends_another_may_leave_out_its_weights() -> None:
    schema = generate("scheme")
    assert schema["required"] == ["api", "name"]
    assert {"required": ["extends"]} in schema["anyOf"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [(path, "scheme") for path in SCHEMES] + [(path, "plugin") for path in MANIFESTS],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_a_shipped_yaml_names_its_schema_in_its_first_line(path: Path, kind: Kind) -> None:
    assert path.read_text(encoding="utf-8").splitlines()[0] == modeline(kind)


def test_there_are_shipped_files_to_look_at() -> None:
    assert SCHEMES
    assert MANIFESTS


def test_the_schemas_are_json(tmp_path: Path) -> None:
    for kind in KINDS:
        assert json.loads(text(kind))["$schema"].endswith("2020-12/schema")
