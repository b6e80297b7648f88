"""What moeplug.json has to say of a finished export, checked before anything in it is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from moeplug.checkpoint.files import shown
from moeplug.checkpoint.writer import MANIFEST, read_manifest
from moeplug.errors import CheckpointError


def _plain_name(name: str) -> str:
    if name != Path(name).name or "\\" in name or not name.isprintable() or name in ("", ".", ".."):
        raise ValueError("is no plain file name")
    return name


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LayerIndex = Annotated[str, Field(pattern=r"^[0-9]{1,6}$")]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Types are not converted; keys of later versions are passed over."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class ErrorFacts(Strict):
    """Relative errors of the weights of one layer that lie in one file."""

    worst: float
    where: str
    mean: float
    weights: Annotated[int, Field(ge=1)]
    sum_of_squares: float


class FileFacts(Strict):
    """One file. source_sha256: of the bytes that it was made from, where it holds tensors."""

    bytes: Count
    sha256: Sha256
    source_sha256: Sha256 | None = None
    errors: dict[LayerIndex, ErrorFacts] = {}


class SchemeFacts(Strict):
    """The scheme, whole."""

    yaml: str
    sha256: Sha256


class SourceFacts(Strict):
    """The model that was quantized."""

    sha256_of_headers: Sha256


class MadeFacts(Strict):
    """What the bytes depend on."""

    format: str
    scheme: SchemeFacts
    source: SourceFacts
    dtypes: dict[LayerIndex, Literal["bfloat16", "float16", "float32"]]
    layouts: list[str]
    shard_bytes: Count


class Record(Strict):
    """moeplug.json."""

    api: Literal[1]
    made: MadeFacts
    files: dict[Annotated[str, AfterValidator(_plain_name)], FileFacts]


def read_record(folder: Path) -> dict[str, Any]:
    """Return moeplug.json as it is, once it was found to be a `Record`; CheckpointError where it is none."""
    manifest = read_manifest(folder)
    try:
        Record.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{folder / MANIFEST}: {shown(where)}: {first['msg']}; it is not what moeplug export writes"
        ) from error
    return manifest
