"""Write the committed schema files: python -m moeplug.schema."""

from __future__ import annotations

from moeplug.schema import FOLDER, KINDS, text

for kind in KINDS:
    FOLDER.joinpath(f"{kind}.schema.json").write_text(text(kind), encoding="utf-8")
