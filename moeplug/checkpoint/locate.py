"""Find every expert weight of a layer in a checkpoint's tensors: which bytes, and how they become gate, up and down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, cast

from moeplug.checkpoint.descriptor import Biases, DiskForm, expand
from moeplug.checkpoint.files import listed, shown
from moeplug.checkpoint.safetensors_header import DTYPE_BITS, TensorInfo
from moeplug.checkpoint.streaming import Piece, in_file_order
from moeplug.errors import CheckpointError
from moeplug.moe.layout import LayerSpec, Projection

# What an unquantized expert weight may be, by safetensors' name, and what it is called everywhere else.
WEIGHT_DTYPES: Final[Mapping[str, str]] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Cut:
    """How one expert weight, or its bias, lies in a tensor: a run of numbers, and the rows of it that are the weight's.

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
    of_bias: bool = False


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
    """One expert weight (N, K), or its bias (N, 1), and the bytes that hold it: `nbytes` from byte `start` of `tensor`.

    Most often these bytes are the weight. A transposed or interleaved fused tensor gives one expert's gate and up in
    one run: both sources then have the same `piece`, which is read once. `weight_of` makes the weight of what was read.
    role: which part of an already quantized weight it is (`moeplug.checkpoint.encoded`).
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
    of_bias: bool = False
    role: str = "weight"

    @property
    def piece(self) -> Piece:
        """What to read."""
        return Piece(self.tensor, self.start, self.nbytes)

    @property
    def place(self) -> tuple[int, tuple[int, int]]:
        """Return where in the piece's numbers the weight's first lies, and how far the next in its column and row."""
        strides = (1, self.stored[1]) if self.transposed else (self.stored[1], 1)
        return self.first * strides[0], (self.step * strides[0], strides[1])

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
    return [
        *_tensors(form, layer, form.weights, weight_shapes(layer), of_bias=False),
        *(_tensors(form, layer, _names(form.bias), _bias_shapes(layer), of_bias=True) if form.bias else ()),
    ]


def bias_sources(form: DiskForm, layer: LayerSpec, tensors: Mapping[str, TensorInfo]) -> Iterator[WeightSource]:
    """Yield where the biases of a layer lie."""
    if form.bias is None:
        return
    expected = _tensors(form, layer, _names(form.bias), _bias_shapes(layer), of_bias=True)
    for tensor in expected:
        if tensor.name not in tensors:
            raise CheckpointError(f"{tensor} of layer {layer.index} is missing; download the checkpoint again")
        _require_weight(tensors[tensor.name], tensor, layer)
    _require_one_dtype([tensors[tensor.name] for tensor in expected], layer)
    for tensor in expected:
        yield from (source_of(layer, cut, tensors[tensor.name]) for cut in tensor.cuts)


def _names(biases: Biases) -> dict[str, str]:
    return {part: name for part, name in biases if name is not None}


def weight_shapes(layer: LayerSpec) -> dict[str, tuple[int, int]]:
    """Return (N, K) of what a descriptor names: gate, up, both in one, down."""
    H, I = layer.hidden_size, layer.intermediate_size
    return {"gate": (I, H), "up": (I, H), "gate_up": (2 * I, H), "down": (H, I)}


def _bias_shapes(layer: LayerSpec) -> dict[str, tuple[int, int]]:
    """Biases are weights of one column to everything that only moves numbers."""
    return {part: (rows, 1) for part, (rows, _) in weight_shapes(layer).items()}


def _tensors(
    form: DiskForm, layer: LayerSpec, names: Mapping[str, str], shapes: Mapping[str, tuple[int, int]], *, of_bias: bool
) -> list[ExpectedTensor]:
    experts = range(layer.num_experts)
    if not form.stacked:
        return [
            ExpectedTensor(
                expand(name, layer.index, expert),
                shapes[part][:1] if of_bias else shapes[part],
                tuple(cuts_of(form, part, expert, 0, shapes[part], False, of_bias)),
            )
            for expert in experts
            for part, name in names.items()
        ]
    expected = []
    for part, name in names.items():
        transposed = form.is_transposed(part) and not of_bias
        rows, columns = shapes[part][::-1] if transposed else shapes[part]
        shape: tuple[int, ...] = (len(experts), rows) if of_bias else (len(experts), rows, columns)
        if form.flat and not of_bias:
            shape = (len(experts) * rows, columns)
        starts = [expert * rows * columns for expert in experts]
        cuts = [c for e in experts for c in cuts_of(form, part, e, starts[e], (rows, columns), transposed, of_bias)]
        expected.append(ExpectedTensor(expand(name, layer.index), shape, tuple(cuts)))
    return expected


def cuts_of(
    form: DiskForm,
    part: str,
    expert: int,
    start: int,
    stored: tuple[int, int],
    transposed: bool,
    of_bias: bool = False,
) -> list[Cut]:
    """Return the cuts of one expert's run of numbers: one, or gate's and up's."""
    if part != "gate_up":
        return [Cut(expert, cast(Projection, part), start, stored, transposed, of_bias=of_bias)]
    order: list[Projection] = ["gate", "up"] if form.first == "gate" else ["up", "gate"]
    both = stored[1] if transposed else stored[0]
    if form.interleaved:
        return [Cut(expert, order[i], start, stored, transposed, first=i, step=2, of_bias=of_bias) for i in (0, 1)]
    if transposed:
        return [Cut(expert, order[i], start, stored, True, first=i * both // 2, of_bias=of_bias) for i in (0, 1)]
    half = (both // 2, stored[1])  # the common case: each is a run of its own, and one weight is read at a time
    return [Cut(expert, order[i], start + i * math.prod(half), half, of_bias=of_bias) for i in (0, 1)]


def locate(forms: Sequence[DiskForm], layer: LayerSpec, tensors: Mapping[str, TensorInfo]) -> tuple[WeightSource, ...]:
    """Return where each expert weight of a layer lies; see `Family.locate`."""
    expected = _form_of(forms, layer, tensors)
    missing = [str(tensor) for tensor in expected if tensor.name not in tensors]
    if missing:
        count = f"{len(missing)} of {len(expected)} expert tensors of layer {layer.index} are missing"
        raise CheckpointError(f"{count}: {listed(missing)}; the checkpoint is incomplete: download it again")
    for tensor in expected:
        _require_weight(tensors[tensor.name], tensor, layer)
    _require_one_dtype([tensors[tensor.name] for tensor in expected], layer)
    return tuple(source_of(layer, cut, tensors[tensor.name]) for tensor in expected for cut in tensor.cuts)


def _form_of(forms: Sequence[DiskForm], layer: LayerSpec, tensors: Mapping[str, TensorInfo]) -> list[ExpectedTensor]:
    """Return what to expect of the one form that the tensors have."""
    candidates = [expected_tensors(as_shapes_tell(form, layer, tensors), layer) for form in forms]
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


def as_shapes_tell(form: DiskForm, layer: LayerSpec, tensors: Mapping[str, TensorInfo]) -> DiskForm:
    """Return a form that says whether its tensors are transposed, by their shapes where the descriptor leaves it open.

    It always can be told: H == 2I and H == I are never true at once, so one of gate_up and down shows it.
    """
    if form.transposed != "by_shape":
        return form
    readings = [form.model_copy(update={"transposed": transposed}) for transposed in (False, True)]
    for reading in readings:
        expected = [tensor for tensor in expected_tensors(reading, layer) if tensor.name in tensors]
        if all(tensors[tensor.name].shape == tensor.shape for tensor in expected):
            return reading
    return readings[0]


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


def _require_one_dtype(found: Sequence[TensorInfo], layer: LayerSpec) -> None:
    first = found[0]
    other = next((tensor for tensor in found if tensor.dtype != first.dtype), None)
    if other:
        raise CheckpointError(
            f"{other.file}: tensor {shown(other.name)}: dtype {other.dtype}, but {shown(first.name)} of the same "
            f"layer {layer.index} has {first.dtype}; expected one dtype for a layer's experts"
        )


def source_of(
    layer: LayerSpec, cut: Cut, tensor: TensorInfo, shape: tuple[int, int] | None = None, role: str = "weight"
) -> WeightSource:
    """Return which bytes of a tensor hold a cut. shape: of what they are, where they are no whole weight or bias."""
    item_bytes = DTYPE_BITS[tensor.dtype] // 8
    N, K = layer.weight_shape(cut.projection)
    return WeightSource(
        layer=layer.index,
        expert=cut.expert,
        projection=cut.projection,
        tensor=tensor,
        start=cut.start * item_bytes,
        nbytes=math.prod(cut.stored) * item_bytes,
        shape=shape or (N, 1 if cut.of_bias else K),
        stored=cut.stored,
        transposed=cut.transposed,
        first=cut.first,
        step=cut.step,
        of_bias=cut.of_bias,
        role=role,
    )
