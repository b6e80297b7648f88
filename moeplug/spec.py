"""What a scheme says about one tensor: how weights are stored, how activations are quantized.

Field names are those of compressed-tensors, so that an export is one to one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from moeplug.validation import NAME_PATTERN, field_error

FormatName = Annotated[str, Field(pattern=NAME_PATTERN)]
_Side = Annotated[int, Field(ge=1, le=65536)]


class WeightSpec(BaseModel):
    """How one projection's weights (N, K) are stored.

    Scales have the shape (N, K) reduced by `strategy`: tensor (1, 1); channel (N, 1); group (N, K / group_size);
    block (N / rows, K / columns) of `block_structure`, rounded up, as K / group_size is under `pad`. Values decode as
    (stored - zero_point) * scale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: FormatName = Field(description="a number format that the plugin registers, for example int8")
    strategy: Literal["tensor", "channel", "group", "block"] = Field(
        default="channel",
        description="which weights share a scale: all of the tensor, a row (channel), "
        "group_size weights of a row, or a block of block_structure",
    )
    group_size: int | None = Field(
        default=None,
        ge=2,
        le=65536,
        description="strategy group: how many weights along K share a scale; it must divide K, or say pad: true",
    )
    pad: bool = Field(
        default=False,
        description="strategy group: where group_size does not divide K, the last group of a row has the weights that "
        "are left, as if zeros filled it; nothing more is stored",
    )
    block_structure: tuple[_Side, _Side] | None = Field(
        default=None,
        strict=False,  # a list is fine, in YAML and in Python
        description="strategy block: [rows, columns] that share a scale",
    )
    symmetric: bool = Field(default=True, description="false: a zero point beside every scale")
    range: Literal["symmetric", "full"] = Field(
        default="symmetric",
        description="symmetric: the largest magnitude of a group becomes the format's largest value; full: integers "
        "use the lowest value too, as compressed-tensors does (-128 to 127 with scale amax / 127.5)",
    )
    scale_dtype: Literal["float32", "bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn"] = Field(
        default="float32",
        description="what scales are rounded to before the weights are encoded with them; float8_e8m0fnu: powers of "
        "two (OCP microscaling), float8_e4m3fn: beside a float32 scale for the whole weight (NVFP4)",
    )

    @model_validator(mode="after")
    def _strategy_and_sizes_agree(self) -> WeightSpec:
        _require(self.strategy, "group", "group_size", self.group_size, "group_size: 128")
        _require(self.strategy, "block", "block_structure", self.block_structure, "block_structure: [128, 128]")
        if self.pad and self.strategy != "group":
            raise field_error("pad", f"pad has a meaning only with strategy: group, but strategy is {self.strategy}")
        if not self.symmetric and self.strategy == "block":
            raise field_error("symmetric", "strategy: block has no zero points; write symmetric: true")
        if not self.symmetric and self.scale_dtype.startswith("float8"):
            raise field_error("symmetric", f"scale_dtype: {self.scale_dtype} has no zero points; write symmetric: true")
        if not self.symmetric and self.range == "full":
            raise field_error("range", "symmetric: false uses the whole range anyway; leave range out")
        if self.range == "full" and self.scale_dtype.startswith("float8"):
            raise field_error("range", f"scale_dtype: {self.scale_dtype} has a rule of its own; leave range out")
        return self

    @model_serializer(mode="wrap")
    def _without_a_later_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `pad` and `range` where they are the default: schemes of before keep their hash."""
        later = {"pad": False, "range": "symmetric"}
        return {key: value for key, value in dump(self).items() if key not in later or value != later[key]}

    @property
    def scale_rows(self) -> int:
        """How many rows of a weight one row of scales serves: the first of block_structure, else 1."""
        return self.block_structure[0] if self.block_structure else 1

    def columns(self, K: int) -> int:
        """Return how many weights along K share a scale; a row's last may be fewer if there is a `ragged_block`."""
        return min(K, self.block_structure[1] if self.block_structure else self.group_size or K)

    @property
    def ragged_block(self) -> tuple[int, int] | None:
        """Return (rows, columns) that share a scale where those at an edge may be fewer; None: K is whole groups."""
        return (1, self.group_size) if self.pad and self.group_size else self.block_structure

    def describe(self) -> str:
        """Return a short label, for example `int8 g128 asym`."""
        size = {"group": f"g{self.group_size}", "block": "x".join(map(str, self.block_structure or ()))}
        words = [self.format, size.get(self.strategy, self.strategy)]
        words += ["asym"] if not self.symmetric else ["full"] if self.range == "full" else []
        return " ".join(words)


class ActivationSpec(BaseModel):
    """How activations (M, K) are quantized before a product. Dynamic: scales are made from each call's values."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: FormatName = Field(description="a number format that an installed plugin registers")
    strategy: Literal["tensor", "token", "group"] = Field(
        default="token", description="which values share a scale: all, one token's, or group_size of one token's"
    )
    group_size: int | None = Field(
        default=None, ge=2, le=65536, description="strategy group: how many values along K share a scale"
    )
    dynamic: Literal[True] = Field(default=True, description="only dynamic activation scales exist")

    @model_validator(mode="after")
    def _strategy_and_sizes_agree(self) -> ActivationSpec:
        _require(self.strategy, "group", "group_size", self.group_size, "group_size: 128")
        return self

    def describe(self) -> str:
        """Return a short label, for example `int8 token`."""
        return f"{self.format} {f'g{self.group_size}' if self.group_size else self.strategy}"


def _require(strategy: str, needed_by: str, field: str, value: object, example: str) -> None:
    """Raise where a size is missing under the strategy that needs it, or given under another."""
    if strategy == needed_by and value is None:
        raise field_error(field, f"strategy: {needed_by} needs {field}, for example {example}")
    if strategy != needed_by and value is not None:
        raise field_error(
            field,
            f"{field} has a meaning only with strategy: {needed_by}, but strategy is {strategy}; change one of them",
        )
