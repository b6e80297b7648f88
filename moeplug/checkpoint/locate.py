"""Find every expert weight of a layer in a checkpoint's tensors: which bytes, and how they become gate, up and down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from moeplug.checkpoint.descriptor import DiskForm, expand
from moeplug.checkpoint.files import listed, shown
from moeplug.checkpoint.safetensors_header import DTYPE_BITS, TensorInfo
from moeplug.checkpoint.streaming import Piece, in_file_order
from moeplug.errors import CheckpointError
from moeplug.moe.layout import LayerSpec, Projection

# What an unquantized expert weight may be, by safetensors' name, and what it is called everywhere else.
WEIGHT_DTYPES: Final[Mapping[str, str]] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Cut:
    """How one expert weight lies in a tensor: a run of numbers, and the rows of it that are the weight's.

    start: first number, counted in the tensor. stored: (rows, columns) of the run. The weight is rows
    first, first + step, … of the run, after transposing it if `transposed`.
    """

    expert: int
    projection: Projection
    start: int
    stored: tuple[int, int]
    transposed: bool = False
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a form of the family has for a layer, and the expert weights in it."""

    name: str
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]

    def __str__(self) -> str:
        experts = sorted({cut.expert for cut in self.cuts})
        projections = " and ".join(dict.fromkeys(cut.projection for cut in self.cuts))
        of = f"expert {experts[0]}" if len(experts) == 1 else f"{len(experts)} experts"
        return f"{projections} of {of} ({self.name})"


@dataclass(frozen=True)
class WeightSource:
    """One expert weight (N, K) and the bytes that hold it: `nbytes` from byte `start` of `tensor`.

    Most often these bytes are the weight. A transposed or interleaved fused tensor gives one expert's gate and up in
    one run: both sources then have the same `piece`, which is read once. `weight_of` makes the weight of what was read.
    """

    layer: int
    expert: int
    projection: Projection
    tensor: TensorInfo
    start: int
    nbytes: int
    shape: tuple[int, int]
    stored: tuple[int, int]
    transposed: bool = False
    first: int = 0
    step: int = 1

    @property
    def piece(self) -> Piece:
        """What to read."""
        return Piece(self.tensor, self.start, self.nbytes)

    def weight_of(self, flat: Any) -> Any:
        """Return the weight (N, K) as a view of `flat`: the piece's numbers, a 1-D torch tensor or numpy array."""
        rows = flat.reshape(self.stored)
        if self.transposed:
            rows = rows.T
        return rows[self.first :: self.step][: self.shape[0]]


def by_piece(sources: Iterable[WeightSource]) -> dict[Piece, tuple[WeightSource, ...]]:
    """Return the pieces to read, in file order, each with the expert weights that it holds."""
    grouped: dict[Piece, list[WeightSource]] = {}
    for source in sources:
        grouped.setdefault(source.piece, []).append(source)
    return {piece: tuple(grouped[piece]) for piece in in_file_order(grouped)}


def expected_tensors(form: DiskForm, layer: LayerSpec) -> list[ExpectedTensor]:
    """Return the tensors that a form has for a layer, covering each (expert, projection) exactly once."""
    return _per_expert(form, layer) if form.gate_up is None else _fused(form, form.gate_up, layer)


def _per_expert(form: DiskForm, layer: LayerSpec) -> list[ExpectedTensor]:
    assert form.gate is not None
    assert form.up is not None
    patterns: dict[Projection, str] = {"gate": form.gate, "up": form.up, "down": form.down}
    expected = []
    for expert in range(layer.num_experts):
        for projection, pattern in patterns.items():
            shape = layer.weight_shape(projection)
            cut = Cut(expert, projection, 0, shape)
            expected.append(ExpectedTensor(expand(pattern, layer.index, expert), shape, (cut,)))
    return expected


def _fused(form: DiskForm, gate_up: str, layer: LayerSpec) -> list[ExpectedTensor]:
    experts, hidden, intermediate = layer.num_experts, layer.hidden_size, layer.intermediate_size
    pair = (hidden, 2 * intermediate) if form.transposed else (2 * intermediate, hidden)
    down = (intermediate, hidden) if form.transposed else (hidden, intermediate)
    pair_cuts = [cut for expert in range(experts) for cut in _gate_and_up(form, layer, expert, pair)]
    down_cuts = [Cut(expert, "down", expert * math.prod(down), down, form.transposed) for expert in range(experts)]
    return [
        ExpectedTensor(expand(gate_up, layer.index), (experts, *pair), tuple(pair_cuts)),
        ExpectedTensor(expand(form.down, layer.index), (experts, *down), tuple(down_cuts)),
    ]


def _gate_and_up(form: DiskForm, layer: LayerSpec, expert: int, pair: tuple[int, int]) -> list[Cut]:
    hidden, intermediate = layer.hidden_size, layer.intermediate_size
    start = expert * math.prod(pair)
    order: list[Projection] = ["gate", "up"] if form.first == "gate" else ["up", "gate"]
    if form.interleaved:
        return [Cut(expert, order[i], start, pair, form.transposed, first=i, step=2) for i in (0, 1)]
    if form.transposed:
        return [Cut(expert, order[i], start, pair, True, first=i * intermediate) for i in (0, 1)]
    half = (intermediate, hidden)  # the common case: each is a run of its own, and one weight is read at a time
    return [Cut(expert, order[i], start + i * math.prod(half), half) for i in (0, 1)]


def locate(forms: Sequence[DiskForm], layer: LayerSpec, tensors: Mapping[str, TensorInfo]) -> tuple[WeightSource, ...]:
    """Return where each expert weight of a layer lies; see `Family.locate`."""
    expected = _form_of(forms, layer, tensors)
    missing = [str(tensor) for tensor in expected if tensor.name not in tensors]
    if missing:
        count = f"{len(missing)} of {len(expected)} expert tensors of layer {layer.index} are missing"
        raise CheckpointError(f"{count}: {listed(missing)}; the checkpoint is incomplete: download it again")
    for tensor in expected:
        _require_weight(tensors[tensor.name], tensor, layer)
    dtype = _one_dtype([tensors[tensor.name] for tensor in expected], layer)
    item_bytes = DTYPE_BITS[dtype] // 8
    return tuple(_source(layer, cut, tensors[tensor.name], item_bytes) for tensor in expected for cut in tensor.cuts)


def _form_of(forms: Sequence[DiskForm], layer: LayerSpec, tensors: Mapping[str, TensorInfo]) -> list[ExpectedTensor]:
    """Return what to expect of the one form that the tensors have."""
    candidates = [expected_tensors(form, layer) for form in forms]
    found = [[tensor.name for tensor in expected if tensor.name in tensors] for expected in candidates]
    present = [i for i, names in enumerate(found) if names]
    if not present:
        _refuse_unmatched(forms, candidates, layer, tensors)
    if len(present) > 1:
        names = " and ".join(shown(found[i][0]) for i in present)
        raise CheckpointError(
            f"layer {layer.index} has its experts twice, in two forms: {names}; which of them counts is not known"
        )
    return candidates[present[0]]


def _refuse_unmatched(
    forms: Sequence[DiskForm],
    candidates: Sequence[list[ExpectedTensor]],
    layer: LayerSpec,
    tensors: Mapping[str, TensorInfo],
) -> NoReturn:
    tried = ", ".join(pattern for form in forms for pattern in form.patterns)
    near = [name for name in tensors if f".{layer.index}." in name and "expert" in name] or list(tensors)
    counts = " or ".join(f"{len(expected)}" for expected in candidates)
    raise CheckpointError(
        f"0 of {counts} expert tensors of layer {layer.index} matched; patterns tried: {tried}; "
        f"first names found: {listed([shown(name) for name in near], 5) or 'none'}; "
        "if the names are of another model type, config.json and the weights do not belong together"
    )


def _require_weight(found: TensorInfo, expected: ExpectedTensor, layer: LayerSpec) -> None:
    where = f"{found.file}: tensor {shown(found.name)}"
    if found.dtype not in WEIGHT_DTYPES:
        known = ", ".join(WEIGHT_DTYPES)
        reason = "already quantized, or not weights" if DTYPE_BITS[found.dtype] < 16 else "not a dtype of weights"
        raise CheckpointError(
            f"{where}: dtype {found.dtype} is {reason}; expected one of {known}: give the unquantized checkpoint"
        )
    if found.shape != expected.shape:
        raise CheckpointError(
            f"{where}: has shape {list(found.shape)}, expected {list(expected.shape)} by config.json "
            f"(hidden size {layer.hidden_size}, intermediate size {layer.intermediate_size}, "
            f"{layer.num_experts} experts); config.json and the weights do not belong together"
        )


def _one_dtype(found: Sequence[TensorInfo], layer: LayerSpec) -> str:
    first = found[0]
    other = next((tensor for tensor in found if tensor.dtype != first.dtype), None)
    if other:
        raise CheckpointError(
            f"{other.file}: tensor {shown(other.name)}: dtype {other.dtype}, but {shown(first.name)} of the same "
            f"layer {layer.index} has {first.dtype}; expected one dtype for a layer's experts"
        )
    return first.dtype


def _source(layer: LayerSpec, cut: Cut, tensor: TensorInfo, item_bytes: int) -> WeightSource:
    return WeightSource(
        layer=layer.index,
        expert=cut.expert,
        projection=cut.projection,
        tensor=tensor,
        start=cut.start * item_bytes,
        nbytes=math.prod(cut.stored) * item_bytes,
        shape=layer.weight_shape(cut.projection),
        stored=cut.stored,
        transposed=cut.transposed,
        first=cut.first,
        step=cut.step,
    )
