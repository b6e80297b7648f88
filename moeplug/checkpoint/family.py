"""Turn a family descriptor and a config.json into the layers of a model, and say where each expert weight lies.

    family = find_family(checkpoint.config)
    sources = [s for layer in family.layers(checkpoint.config) for s in family.locate(layer, checkpoint.tensors)]
    dense = family.unclaimed(checkpoint.tensors, {source.tensor.name for source in sources}, checkpoint.config)

A family is a YAML file, families/*.yaml here or one that a plugin brings; this code names none.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moeplug.checkpoint.config_values import (
    activation,
    flag,
    holds,
    integer,
    integers,
    kinds_of_layers,
    number,
    section_of,
    value_at,
)
from moeplug.checkpoint.descriptor import (
    EXTRA,
    LAYER,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_SIZE,
    ConfigIntegers,
    Descriptor,
    expand,
    folder_of,
    index_of,
    lies_in,
)
from moeplug.checkpoint.encoded import Encoding, locate_encoded
from moeplug.checkpoint.files import counted, listed, shown
from moeplug.checkpoint.locate import WEIGHT_DTYPES, WeightSource, as_shapes_tell, by_piece, expected_tensors, locate
from moeplug.checkpoint.safetensors_header import TensorInfo
from moeplug.errors import CheckpointError
from moeplug.moe.layout import LayerSpec
from moeplug.problems import Document, did_you_mean
from moeplug.validation import require_api, validate
from moeplug.yaml_marks import load_yaml, parse_yaml

if TYPE_CHECKING:
    from moeplug.moe.router import RouterSpec

__all__ = ["Family", "WeightSource", "by_piece", "find_family", "known_families"]

FAMILIES: Final = Path(__file__).with_name("families")


@dataclass(frozen=True)
class Family:
    """One kind of model: how its files name and lay out experts.

    name: of the descriptor; source: its file; origin: who ships it, for listings.
    """

    name: str
    source: Path
    descriptor: Descriptor
    origin: str = "moeplug"

    @classmethod
    def load(cls, path: Path, origin: str = "moeplug") -> Family:
        """Read a descriptor; CheckpointError lists every problem in it with file, line and column."""
        return cls._make(path.stem, path, load_yaml(path, error=CheckpointError), origin)

    @classmethod
    def from_text(cls, text: str, name: str) -> Family:
        """Return the family of a descriptor in a YAML text."""
        return cls._make(name, Path(f"{name}.yaml"), parse_yaml(text, f"{name}.yaml", CheckpointError), "a text")

    @classmethod
    def _make(cls, name: str, path: Path, document: Document, origin: str) -> Family:
        require_api(document, 1, CheckpointError, "a family descriptor")
        return cls(name, path, validate(document, Descriptor, error=CheckpointError), origin)

    @property
    def model_types(self) -> tuple[str, ...]:
        """The `model_type` values of config.json that this family serves."""
        return tuple(self.descriptor.model_types)

    def layers(self, config: Mapping[str, Any]) -> list[LayerSpec]:
        """Return the MoE blocks that config.json describes, in order.

        dtype is what config.json claims (bfloat16 where it names none); the tensors themselves decide.
        Raises CheckpointError for a missing or wrong value, an already quantized checkpoint, or no MoE block at all.
        """
        _require_unquantized(config)
        config = section_of(config, self.descriptor.section)
        count = self._layer_count(config)
        blocks = [self._layer(config, index) for index in self._moe_indices(config, count)]
        if not blocks:
            raise CheckpointError(f"config.json: none of the {count} layers has experts; there is nothing to quantize")
        return blocks

    def _layer(self, config: Mapping[str, Any], index: int) -> LayerSpec:
        sizes = self.descriptor.sizes
        experts = integer(config, sizes.experts, "experts", 1, index, MAX_EXPERTS)
        per_token = integer(config, sizes.experts_per_token, "experts per token", 1, index)
        if per_token > experts:
            raise CheckpointError(f"config.json: {per_token} experts per token, but only {experts} experts")
        return LayerSpec(
            index=index,
            name=self.experts_paths(index)[0],
            num_experts=experts,
            experts_per_token=per_token,
            hidden_size=integer(config, sizes.hidden, "hidden size", 1, index),
            intermediate_size=integer(config, sizes.intermediate, "intermediate size", 1, index),
            **activation(config, self.descriptor.activation),
            gated=self.descriptor.gated,
            router_weight_on_input=self.descriptor.routing.weight_on_input,
            dtype=_dtype(config),
        )

    def _layer_count(self, config: Mapping[str, Any]) -> int:
        return integer(config, self.descriptor.sizes.layers, "layers", 1, most=MAX_LAYERS)

    def _moe_indices(self, config: Mapping[str, Any], count: int) -> list[int]:
        rule = self.descriptor.moe_layers
        if rule.listed is not None and value_at(config, rule.listed) is not None:
            listed = integers(config, ConfigIntegers(key=rule.listed))
            return sorted(index for index in set(listed) if 0 <= index < count)
        kinds = kinds_of_layers(config, rule.kinds)
        if kinds is not None:
            return [index for index, is_moe in enumerate(kinds[:count]) if is_moe]
        period = integer(config, rule.period, "period of MoE layers", 1)
        offset = integer(config, rule.offset, "offset of MoE layers", -MAX_SIZE)
        first = integer(config, rule.first, "first MoE layer", 0)
        last = integer(config, rule.last, "last MoE layer", -MAX_SIZE)
        end = min(count, (count + last if last < 0 else last) + 1)
        excepted = set(integers(config, rule.excepted))
        return [i for i in range(first, end) if (i - offset) % period == 0 and i not in excepted]

    def locate(self, layer: LayerSpec, tensors: Mapping[str, TensorInfo]) -> tuple[WeightSource, ...]:
        """Return where each (expert, projection) of a layer lies, and its bias where there are biases, each once.

        Raises CheckpointError where one is missing, has the wrong shape or dtype, or is there in two forms.
        """
        return locate(self.descriptor.disk, layer, tensors)

    def locate_encoded(
        self, layer: LayerSpec, tensors: Mapping[str, TensorInfo], encoding: Encoding
    ) -> tuple[WeightSource, ...]:
        """Return where each part of each already quantized expert weight of a layer lies, and the biases."""
        return locate_encoded(self.descriptor.disk, layer, tensors, encoding)

    def unclaimed(
        self, tensors: Mapping[str, TensorInfo], claimed: Container[str], config: Mapping[str, Any] | None = None
    ) -> tuple[TensorInfo, ...]:
        """Return the tensors outside the experts: they stay as they are. claimed: the names that `locate` found.

        config: says how many layers there are; what the descriptor ignores, such as a layer after the last that only
        predicts more tokens, is then left out.
        Raises CheckpointError where a tensor lies among the experts and none of them claimed it: an expert too many, a
        bias, the scale of a quantized weight, or experts of a layer that config.json calls dense.
        """
        count = None if config is None else self._layer_count(section_of(config, self.descriptor.section))
        folders = {folder_of(pattern) for form in self.descriptor.disk for pattern in form.patterns}
        left = [name for name in tensors if name not in claimed]
        kept = [name for name in left if count is None or not self._is_ignored(name, count)]
        stray = [name for name in kept if any(lies_in(name, folder) for folder in folders)]
        if stray:
            names = listed([shown(name) for name in stray])
            raise CheckpointError(
                f"{counted(len(stray), 'tensor')} among the experts that config.json and the family {self.name!r} "
                f"do not describe: {names}; config.json and the weights do not belong together, or the family "
                "needs a descriptor that knows them"
            )
        return tuple(tensors[name] for name in kept)

    def _is_ignored(self, name: str, count: int) -> bool:
        segments = name.split(".")
        for pattern in self.descriptor.ignore:
            wanted = pattern.split(".")
            if len(segments) >= len(wanted) and all(
                (index_of(found) or 0) >= count if want == EXTRA else want in (LAYER, found)
                for want, found in zip(wanted, segments, strict=False)
            ):
                return True
        return False

    def dummy_tensors(self, layer: LayerSpec) -> list[tuple[str, tuple[int, ...]]]:
        """Return (name, shape) of the tensors that hold a layer's experts, in the family's first form."""
        form = as_shapes_tell(self.descriptor.disk[0], layer, {})
        return [(tensor.name, tensor.shape) for tensor in expected_tensors(form, layer)]

    def router(self, config: Mapping[str, Any], layer: int = 0) -> RouterSpec:
        """Return how tokens choose experts in this model; layer: where config.json has a list with one for each."""
        from moeplug.moe.router import RouterSpec  # imports torch, which checking a descriptor does not

        rule, config = self.descriptor.routing, section_of(config, self.descriptor.section)
        groups = rule.groups if rule.groups is not None and holds(config, rule.groups.when) else None
        renormalize = flag(config, rule.renormalize)
        return RouterSpec(
            top_k=integer(config, self.descriptor.sizes.experts_per_token, "experts per token", 1, layer),
            score=rule.score,
            n_group=integer(config, groups.count, "groups of experts", 1) if groups else 1,
            topk_group=integer(config, groups.kept, "groups that are kept", 1) if groups else 1,
            group_score=groups.score if groups else "max",
            renormalize=renormalize,
            epsilon=number(config, rule.epsilon, "epsilon") if renormalize else 0.0,
            least_sum=number(config, rule.least_sum, "least sum") if renormalize else 0.0,
            norm=number(config, rule.norm, "norm"),
            scaling_factor=number(config, rule.scale, "scaling factor"),
            jitter=number(config, rule.jitter, "jitter"),
        )

    def experts_paths(self, layer: int) -> tuple[str, ...]:
        """Return where a transformers model may have a layer's experts module; the first path that it has counts."""
        paths = self.descriptor.transformers.experts
        return tuple(expand(path, layer) for path in ([paths] if isinstance(paths, str) else paths))

    def memory_name(self, name: str) -> str:
        """Return what transformers calls a tensor in memory that has this name on disk."""
        segments = name.split(".")
        for rule in self.descriptor.transformers.rename:
            segments = _replaced(segments, rule.source.split("."), rule.to.split("."))
        return ".".join(segments)

    def joined(self, names: Collection[str]) -> dict[str, list[str]]:
        """Return memory name → names on disk of tensors that are one in memory, in order, of those that are there."""
        found = {}
        for rule in self.descriptor.transformers.join:
            numbers = {index_of(part) for name in names for part in name.split(".")}
            for layer in (found for found in numbers if found is not None):
                parts = [expand(pattern, layer) for pattern in rule.source]
                if all(part in names for part in parts):
                    found[expand(rule.to, layer)] = parts
        return found


class UnknownModelType(CheckpointError):
    """No family serves a config.json's model_type."""


def find_family(config: Mapping[str, Any], families: Iterable[Family] | None = None) -> Family:
    """Return the family of a config.json, by its model_type. families: to choose from; None: moeplug's own.

    Raises UnknownModelType where no family serves it, CheckpointError where it is missing, two families claim it, or
    the one that does is a draft that nobody proved.
    """
    families = list(known_families() if families is None else families)
    types = sorted({model_type for family in families for model_type in family.model_types})
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        found = "has no model_type" if model_type is None else f"model_type is {shown(model_type)}, which is no text"
        raise CheckpointError(f"config.json: {found}; expected one of {', '.join(types)}")
    matching = [family for family in families if model_type in family.model_types]
    if len(matching) > 1:
        sources = " and ".join(str(family.source) for family in matching)
        raise CheckpointError(
            f"config.json: model_type {shown(model_type)} is claimed by {sources}; remove one of them"
        )
    if not matching:
        known = f"known: {', '.join(types)}{did_you_mean(model_type, types)}"
        raise UnknownModelType(
            f"config.json: model_type {shown(model_type)} is not known; {known}. `moeplug plan MODEL` drafts a "
            "descriptor from the tensors' names; --family FILE|NAME says which one to use"
        )
    if matching[0].descriptor.unproven:
        raise CheckpointError(
            f"{matching[0].source}: the descriptor of model_type {shown(model_type)} says `unproven: true`; prove it "
            f"with `moeplug family-check {model_type}` and delete that line, or name it with --family"
        )
    return matching[0]


def known_families(naming: str = "") -> tuple[Family, ...]:
    """Return the families that moeplug itself knows, by name. naming: those alone whose files hold this text.

    A file that serves a model type holds its name; looking for it in all takes 1 ms, parsing all takes 150.
    """
    return tuple(_known(path) for path in sorted(FAMILIES.glob("*.yaml")) if naming in path.read_text(encoding="utf-8"))


@functools.cache
def _known(path: Path) -> Family:
    return Family.load(path)


def _require_unquantized(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    raise CheckpointError(
        f"config.json: the checkpoint is already quantized (quantization_config, quant_method {shown(method)}); "
        "this way of storing it is not read: give the unquantized checkpoint"
    )


def _dtype(config: Mapping[str, Any]) -> str:
    claimed = str(config.get("dtype") or config.get("torch_dtype"))
    return claimed if claimed in WEIGHT_DTYPES.values() else "bfloat16"


def _replaced(segments: list[str], old: list[str], new: list[str]) -> list[str]:
    """Return segments with every run that equals `old` replaced by `new`."""
    result: list[str] = []
    position = 0
    while position < len(segments):
        if segments[position : position + len(old)] == old:
            result, position = result + new, position + len(old)
        else:
            result, position = [*result, segments[position]], position + 1
    return result
