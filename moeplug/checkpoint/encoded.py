"""Say where the parts of an already quantized expert weight lie: its stored values, scales and zero points.

An `Encoding` is one way to store quantized weights. It is recognised from config.json's quantization_config by
`moeplug.integrations.prequantized`; what is here knows none of them by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeplug.checkpoint.descriptor import DiskForm, expand
from moeplug.checkpoint.files import listed, shown
from moeplug.checkpoint.locate import Cut, WeightSource, bias_sources, cuts_of, source_of, weight_shapes
from moeplug.checkpoint.safetensors_header import TensorInfo
from moeplug.errors import CheckpointError
from moeplug.moe.layout import LayerSpec, Projection
from moeplug.spec import WeightSpec

if TYPE_CHECKING:
    from torch import Tensor

    from moeplug.quantization import Scales


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized weight: how its name ends, what it may be, and its (rows, columns).

    suffix: in place of "weight" at a name's end, or behind a stacked tensor's name.
    """

    suffix: str
    dtypes: tuple[str, ...]
    shape: tuple[int, int]


class Encoding(ABC):
    """One way to store quantized weights. label: for people. spec: the numbers, as a scheme says them.

    ignored: endings of names that say nothing that is not known.
    """

    label: str
    spec: WeightSpec
    ignored: tuple[str, ...] = ()

    @abstractmethod
    def parts(self, N: int, K: int) -> dict[str, Part]:
        """Return the parts of a weight (N, K) by role; "weight" is one of them."""

    @abstractmethod
    def values(self, parts: Mapping[str, Tensor], K: int) -> tuple[Tensor, Scales]:
        """Return (values (1, N, K) float32, neither scaled nor shifted, and their scales) of the parts' tensors."""

    def stacked_shape(self, part: Part, experts: int) -> tuple[int, ...]:
        """Return the shape of a stacked tensor of such parts."""
        return (experts, *part.shape)

    def matches(self, spec: WeightSpec | None) -> bool:
        """Return whether a scheme asks for just these numbers; any scale type that is no 8-bit one may hold them."""
        if spec is None:
            return False
        small = {s.scale_dtype for s in (spec, self.spec) if s.scale_dtype.startswith("float8")}
        same = spec.model_copy(update={"scale_dtype": self.spec.scale_dtype}) == self.spec
        return same and (not small or spec.scale_dtype == self.spec.scale_dtype)


def locate_encoded(
    forms: Sequence[DiskForm], layer: LayerSpec, tensors: Mapping[str, TensorInfo], encoding: Encoding
) -> tuple[WeightSource, ...]:
    """Return where each part of each expert weight of a layer lies, and the biases.

    Raises CheckpointError where one is missing, or has the wrong shape or type.
    """
    tried = []
    for form in forms:
        expected = list(_expected(form, layer, encoding))
        names = [name for name, *_ in expected]
        tried.append(names[0])
        if any(name in tensors for name in names):
            return (*_sources(expected, layer, tensors, encoding), *bias_sources(form, layer, tensors))
    raise CheckpointError(
        f"layer {layer.index}: no expert weight of {encoding.label} was found; tried {', '.join(tried)}; "
        f"first names found: {listed([shown(name) for name in tensors], 5)}"
    )


Expected = tuple[str, tuple[int, ...], str, Part, list[Cut]]


def _expected(form: DiskForm, layer: LayerSpec, encoding: Encoding) -> Iterator[Expected]:
    """Yield (tensor name, its shape, role, part, cuts of the runs) of a form."""
    shapes = weight_shapes(layer)
    for name, pattern in form.weights.items():
        for role, part in encoding.parts(*shapes[name]).items():
            rows, columns = part.shape
            if form.stacked:
                shape = encoding.stacked_shape(part, layer.num_experts)
                experts = range(layer.num_experts)
                cuts = [c for e in experts for c in cuts_of(form, name, e, e * rows * columns, part.shape, False)]
                yield expand(pattern, layer.index) + part.suffix, shape, role, part, cuts
                continue
            for expert in range(layer.num_experts):
                module = expand(pattern, layer.index, expert).removesuffix("weight")
                yield module + part.suffix, part.shape, role, part, cuts_of(form, name, expert, 0, part.shape, False)


def _sources(
    expected: Sequence[Expected], layer: LayerSpec, tensors: Mapping[str, TensorInfo], encoding: Encoding
) -> Iterator[WeightSource]:
    missing = [name for name, *_ in expected if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} tensors of the experts of layer {layer.index} ({encoding.label}) are "
            f"missing: {listed([shown(name) for name in missing])}; the checkpoint is incomplete: download it again"
        )
    for name, shape, role, part, cuts in expected:
        found = tensors[name]
        # A scale for a whole weight is often stored without dimensions, or with one.
        same = found.shape == shape or (shape == (1, 1) and found.shape in ((), (1,)))
        if not same or found.dtype not in part.dtypes:
            raise CheckpointError(
                f"{found.file}: tensor {shown(name)}: is {list(found.shape)} {found.dtype}; expected {list(shape)} of "
                f"{' or '.join(part.dtypes)} by config.json ({encoding.label})"
            )
        for cut in cuts:
            rows = part.shape[0] // 2 if cut.step == 2 else cut.stored[0]
            yield source_of(layer, cut, found, (rows, part.shape[1]), role)


class Collector:
    """Puts the parts of each expert weight together as they come; nothing is kept once a weight is complete."""

    def __init__(self, encoding: Encoding, sources: Sequence[WeightSource]) -> None:
        self._encoding = encoding
        self._roles: dict[tuple[int, int, Projection], int] = {}
        for source in sources:
            if not source.of_bias:
                key = source.layer, source.expert, source.projection
                self._roles[key] = self._roles.get(key, 0) + 1
        self._parts: dict[tuple[int, int, Projection], dict[str, Any]] = {}

    def add(self, source: WeightSource, tensor: Tensor, K: int) -> tuple[Tensor, Scales] | None:
        """Take a part (it is copied); return values and scales with a weight's last one."""
        key = source.layer, source.expert, source.projection
        parts = self._parts.setdefault(key, {})
        parts[source.role] = tensor.clone()
        if len(parts) < self._roles[key]:
            return None
        del self._parts[key]
        return self._encoding.values(parts, K)


def reading_order(sources: Sequence[WeightSource]) -> dict[tuple[str, int], tuple[int, bool]]:
    """Return (tensor name, start) → when it is read: layer by layer, what is small before the weights that need it."""
    return {(s.tensor.name, s.start): (s.layer, s.role == "weight") for s in sources}
