"""Write a quantized checkpoint to disk, in one pass over the source, and never more of it in memory than a layer.

    exported = export(plan, registry, "models/OLMoE-int8", "compressed-tensors")

A form says which tensors an expert weight becomes and what config.json says of them. `moeplug` is our own: whole layers
as the planned kernel reads them. The others write one expert weight at a time, under the family's own names.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from moeplug import __version__
from moeplug.checkpoint.descriptor import EXPERT, expand, folder_of
from moeplug.checkpoint.files import SourceFile, Stamp, listed, locate_file, read_exactly, shown
from moeplug.checkpoint.locate import WeightSource
from moeplug.checkpoint.memory import TORCH_DTYPES
from moeplug.checkpoint.reader import CONFIG, INDEX, PICKLE_SUFFIXES, Checkpoint, Piece, in_file_order
from moeplug.checkpoint.writer import (
    MANIFEST,
    PARTIAL,
    FileLayer,
    OutputFile,
    OutputShard,
    OutputTensor,
    Staging,
    in_shards,
)
from moeplug.errors import CheckpointError, RefusedError, SchemeError, UsageError
from moeplug.hookspecs import StageContext
from moeplug.integrations.compressed_tensors import CompressedTensors
from moeplug.integrations.fp8_checkpoints import Fp8Checkpoints
from moeplug.moe.experts import QuantizedExperts
from moeplug.moe.layout import Projection
from moeplug.pipeline import Job, Plan, Progress, dense_pieces, one_torch_thread, require_finite, torch_dtype
from moeplug.pipeline.builder import LayerErrors, StageSeconds
from moeplug.pipeline.load import load, refuse_not_finite, refuse_plugins_not_finite
from moeplug.pipeline.memory import within_memory
from moeplug.pipeline.plan import LayerPlan
from moeplug.pipeline.quantize import quantize
from moeplug.pipeline.stored import QUANT_METHOD, StoredGroup, recorded_errors
from moeplug.quantization import Scales, reordered, squared_error
from moeplug.quantization import quantize as quantize_weight
from moeplug.registry import Registry

SHARD_BYTES: Final = 5 * 10**9  # what other tools write, and what a crash costs at most
NOT_COPIED: Final = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", PARTIAL, *PICKLE_SUFFIXES)
COPY_BYTES: Final = 1 << 20
SAFETENSORS_DTYPES: Final = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
ANSWERED: Final = ("allocate", "load", "create_scales", "setup_kernel")


class PerExpertForm(Protocol):
    """How someone else's format stores one expert weight, and what its config.json says."""

    def pack(self, ctx: StageContext, projection: Projection, stored: Tensor, scales: Scales) -> dict[str, Tensor]:
        """Return tensors by the last part of their names. stored: (N, K'), layout undone; scales: (1, R, C)."""

    def unpack(self, ctx: StageContext, projection: Projection, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight (N, K) float32 that such tensors stand for."""

    def quantization_config(
        self, module: Callable[[Projection, Sequence[int]], str], ignore: list[str]
    ) -> dict[str, Any]:
        """Return `quantization_config`.

        module: gives the regular expression of a projection's modules in some layers. ignore: what stays as it was.
        """

    def readers(self) -> tuple[str, ...]:
        """Return, a line each, who reads this and who is known to fail."""


PER_EXPERT: Final[dict[str, Callable[[Sequence[StageContext]], PerExpertForm]]] = {
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8Checkpoints,
}
FORMS: Final = (*PER_EXPERT, "moeplug")


@dataclass(frozen=True)
class Exported:
    """What an export left: its folder, sizes, the errors of each layer, and who reads it."""

    folder: Path
    form: str
    bytes_before: int
    bytes_after: int
    files: int
    errors: Mapping[int, LayerErrors]
    readers: tuple[str, ...]
    continued: int

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        layers = [{"layer": index, **vars(errors)} for index, errors in self.errors.items()]
        facts = {name: value for name, value in vars(self).items() if name not in ("folder", "errors", "readers")}
        return {"folder": str(self.folder), **facts, "layers": layers, "readers": list(self.readers)}


def export(
    plan: Plan,
    registry: Registry,
    target: str | Path,
    form: str = "compressed-tensors",
    *,
    resume: bool = False,
    progress: Progress | None = None,
    files: FileLayer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the export that a plan makes, whole or not at all.

    resume: continue what an earlier, interrupted export of the same left. files, shard_bytes: for tests.
    Raises SchemeError where the form has no words for the scheme, UsageError where the target exists or is being
    written, RefusedError where an expert weight is worse than the scheme accepts, InputOutputError.
    """
    if not isinstance(plan.checkpoint, Checkpoint):
        raise UsageError("generated weights are not exported; give a checkpoint's folder")
    if form not in FORMS:
        raise UsageError(f"format {form!r} is not one of {', '.join(FORMS)}")
    _require_unquantized_rest(plan)
    writing: Writing
    if form == "moeplug":
        writing = LayerWriting(plan, registry)
    else:
        writing = ExpertWriting(plan, registry, form_of(form, plan, registry))
    shards = in_shards([item.tensors for item in writing.items], shard_bytes)
    copies = _copies(plan.checkpoint.path)
    stamps = {shard.source.path.name: shard.stamp for shard in plan.checkpoint.shards}
    stamps |= {name: copy.stamp for name, copy in copies.items()}
    # Of a copied or remounted model the inode may differ, its size and time do not.
    resuming = {name: f"{stamp.size} bytes, {stamp.mtime_ns} ns" for name, stamp in stamps.items()}
    made = _made(plan, registry, form, shard_bytes)
    with Staging.open(Path(target), made, resuming=resuming, resume=resume, files=files) as staging:
        continued = len(staging.finished)
        left = [shard for shard in shards if not staging.has(shard.name)]
        staging.require_free(sum(shard.nbytes for shard in left) + sum(copy.stamp.size for copy in copies.values()))
        writing.begin(staging, shards)
        with within_memory(writing.needed_bytes, plan.device), one_torch_thread(plan.device), writing:
            writing.read_everything(progress or (lambda done, total: None))
        if len(shards) > 1:
            staging.add(INDEX, [_index(shards)])
        for name, copy in copies.items():
            staging.add(name, copy.parts())
        staging.add(CONFIG, [_config(plan, writing.quantization_config())])
        staging.publish()
        errors = recorded_errors({"files": staging.finished})
    return Exported(
        folder=Path(target),
        form=form,
        bytes_before=plan.checkpoint.total_bytes,
        bytes_after=sum(tensor.nbytes for shard in shards for tensor in shard.tensors),
        files=len(shards),
        errors=errors,
        readers=writing.readers(),
        continued=continued,
    )


@dataclass(frozen=True)
class Item:
    """Tensors that are written together, because they are made from the same pieces."""

    pieces: tuple[Piece, ...]
    tensors: tuple[OutputTensor, ...]


class Writing(Job):
    """One pass over the source that writes what it makes, shard after shard. `items` come in the order of writing."""

    in_order = True

    def __init__(self, plan: Plan, registry: Registry) -> None:
        super().__init__(plan, registry, QuantizedExperts, exact_error=True)
        self.items: list[Item] = []
        self._open_shard = contextlib.ExitStack()
        self._file: OutputFile | None = None
        self._file_name = ""

    @property
    def needed_bytes(self) -> int:
        """Return the most memory that it takes on the device."""
        return self._plan.transient_bytes

    def begin(self, staging: Staging, shards: Sequence[OutputShard]) -> None:
        """Take the shards to write, and leave out the pieces of those that are finished."""
        self._staging = staging
        self.assign(shards)
        left = {piece for piece, name in self._shard_of_piece.items() if not staging.has(name)}
        self._pieces = [piece for piece in self._pieces if piece in left]
        self.total_bytes = sum(piece.nbytes for piece in self._pieces)

    def assign(self, shards: Sequence[OutputShard]) -> None:
        """Learn which shard each tensor, and each piece of the source, belongs to."""
        self._shards = {shard.name: shard for shard in shards}
        self._shard_of = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        self._shard_of_piece = {p: self._shard_of[item.tensors[0].name] for item in self.items for p in item.pieces}
        self._digests = {name: hashlib.sha256() for name in self._shards}
        self._errors_of: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in self._shards}

    def facts(self, shard: str) -> dict[str, Any]:
        """Return what moeplug.json says of a shard: the source's bytes, and errors by layer."""
        return {"source_sha256": self._digests[shard].hexdigest(), "errors": self._errors_of[shard]}

    def __enter__(self) -> None:
        self._open_shard.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._open_shard.__exit__(*error)

    def _pieces_to_read(self) -> list[Piece]:
        return in_file_order([*self._experts, *dense_pieces(self._plan)])

    def _write(self, name: str, start: int, tensor: Tensor) -> None:
        """Write bytes of an output tensor; the first of a new shard finishes the one before it."""
        shard = self._shard_of[name]
        if shard != self._file_name:
            self._open_shard.close()
            facts = functools.partial(self.facts, shard)
            self._file = self._open_shard.enter_context(self._staging.shard(self._shards[shard], facts))
            self._file_name = shard
        assert self._file is not None
        data = tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()
        self._file.write(name, start, memoryview(data))  # type: ignore[arg-type]  # numpy gives a buffer

    def _keep(self, piece: Piece, raw: Tensor) -> None:
        require_finite(piece, raw)
        self._hash(piece, raw)
        self._write(self.kept_name(piece.tensor.name), piece.start, raw)

    def kept_name(self, name: str) -> str:
        """Return what a tensor outside the experts is called in the export."""
        return name

    def _hash(self, piece: Piece, raw: Tensor) -> None:
        self._digests[self._shard_of_piece[piece]].update(memoryview(raw.cpu().numpy()))  # type: ignore[arg-type]

    def _note_errors(self, name: str, layer: int, errors: LayerErrors, weights: int = 1) -> None:
        """Add errors of a layer to what is said of the shard that holds the tensor of this name."""
        noted = self._errors_of[self._shard_of[name]].setdefault(
            str(layer), {"worst": -1.0, "where": "", "mean": 0.0, "weights": 0, "sum_of_squares": 0.0}
        )
        if errors.worst > noted["worst"]:
            noted |= {"worst": errors.worst, "where": errors.worst_where}
        total = noted["mean"] * noted["weights"] + errors.mean * weights
        noted["weights"] += weights
        noted["sum_of_squares"] += errors.sum_of_squares
        noted["mean"] = total / noted["weights"]

    def _kept_items(self) -> list[Item]:
        pieces: dict[str, list[Piece]] = {tensor.name: [] for tensor in self._plan.kept}
        for piece in dense_pieces(self._plan):
            pieces[piece.tensor.name].append(piece)
        return [
            Item(tuple(pieces[t.name]), (OutputTensor(self.kept_name(t.name), t.dtype, t.shape),))
            for t in self._plan.kept
        ]

    def _in_order(self, items: Sequence[Item]) -> list[Item]:
        """Return items by the place of their last piece in the files: that is when they are written."""
        places = {piece: place for place, piece in enumerate(self._pieces)}
        return sorted(items, key=lambda item: max((places[piece] for piece in item.pieces), default=-1))


class ExpertWriting(Writing):
    """Writes each expert weight as soon as it is read, in someone else's form and under the family's own names."""

    def __init__(self, plan: Plan, registry: Registry, form: PerExpertForm) -> None:
        super().__init__(plan, registry)
        self._form = form
        self._patterns = _per_expert_patterns(plan)
        self._moved = _moved_folders(plan, self._patterns)
        self._contexts = {
            (layer.layer.index, expert): group.ctx
            for layer in plan.layers
            for group in layer.groups
            for expert in group.ctx.experts
        }
        self._samples: dict[Any, tuple[tuple[str, str, tuple[int, ...]], ...]] = {}
        experts = [Item((piece,), tuple(self._tensors(sources))) for piece, sources in self._experts.items()]
        self.items = self._in_order([*self._kept_items(), *experts])

    def _feed(self, piece: Piece, raw: Tensor, seconds: StageSeconds) -> None:
        self._hash(piece, raw)
        for source in self._experts[piece]:
            weight = source.weight_of(raw.view(torch_dtype(piece.tensor))).unsqueeze(0)
            origin = f"{piece.tensor.file.name}: {piece.tensor.name}"
            for name, tensor in self._quantized(source, weight, origin)[0].items():
                self._write(name, 0, tensor)

    @torch.no_grad()
    def _quantized(self, source: WeightSource, weight: Tensor, origin: str) -> tuple[dict[str, Tensor], float]:
        """Run stages 2 and 3 on one expert weight (1, N, K); return its tensors by full name, and its error."""
        ctx = self._contexts[source.layer, source.expert]
        fmt, experts, projection = ctx.format(source.projection), (source.expert,), source.projection
        ready, peaks = load(self._registry, ctx, projection, experts, weight, (origin,))
        _require_finite(ctx, source, peaks, origin)
        shape = (*ready.shape[:2], ready.shape[2] // fmt.values_per_element)
        out = torch.empty(shape, dtype=fmt.storage_dtype, device=ready.device)
        scales = quantize(self._registry, ctx, projection, experts, ready, out)
        if scales.scale is not None and not bool(torch.isfinite(scales.values(ready.shape[1])).all()):
            raise SchemeError(f"{origin}: a scale is NaN or does not fit its scale_dtype; use scale_dtype: float32")
        stored = reordered(out, fmt, ctx.layout.words(projection), False)
        error, size = squared_error(ready, stored, scales, fmt)[0].tolist()
        relative = (error / max(size, torch.finfo(torch.float64).tiny)) ** 0.5
        self._require_accepted(source, relative)
        module = self._module(source)
        if ctx.spec(projection) is None:
            return {f"{module}.weight": stored[0]}, relative
        tensors = {f"{module}.{part}": t for part, t in self._form.pack(ctx, projection, stored[0], scales).items()}
        errors = LayerErrors(relative, relative, f"expert {source.expert}, {projection}", relative**2)
        self._note_errors(next(iter(tensors)), source.layer, errors)
        return tensors, relative

    def _require_accepted(self, source: WeightSource, relative: float) -> None:
        accept = self._plan.scheme.accept
        if accept is not None and not relative <= accept.relative_rms:
            raise RefusedError(
                f"layer {source.layer}, expert {source.expert}, {source.projection}: relative error {relative:.4g} is "
                f"above the scheme's accept: relative_rms: {accept.relative_rms}; nothing was published. Keep this "
                "layer in more bits with an override, or raise the limit"
            )

    def _tensors(self, sources: Sequence[WeightSource]) -> Iterator[OutputTensor]:
        for source in sources:
            module = self._module(source)
            for part, dtype, shape in self._sample(self._contexts[source.layer, source.expert], source):
                yield OutputTensor(f"{module}.{part}", dtype, shape)

    def _sample(self, ctx: StageContext, source: WeightSource) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Return (name, dtype, shape) of the tensors that a weight becomes: those of a weight of zeros, made once."""
        spec, fmt = ctx.spec(source.projection), ctx.format(source.projection)
        if spec is None:
            return (("weight", source.tensor.dtype, source.shape),)
        key = (spec, source.shape)
        if key not in self._samples:
            zeros = torch.zeros(1, *source.shape, dtype=torch.bfloat16)
            out = torch.empty(1, source.shape[0], source.shape[1] // fmt.values_per_element, dtype=fmt.storage_dtype)
            packed = self._form.pack(ctx, source.projection, out[0], quantize_weight(zeros, spec, fmt, out))
            self._samples[key] = tuple((part, _dtype_name(t.dtype), tuple(t.shape)) for part, t in packed.items())
        return self._samples[key]

    def _module(self, source: WeightSource) -> str:
        return expand(self._patterns[source.projection], source.layer, source.expert).removesuffix(".weight")

    def kept_name(self, name: str) -> str:
        """Return a kept tensor's name in files with a tensor per expert, where the source has fused ones."""
        for found, wanted in self._moved.items():
            if name.startswith(found):
                return wanted + name.removeprefix(found)
        return name

    def quantization_config(self) -> dict[str, Any]:
        """Return what config.json says of the weights."""
        kept = [self.kept_name(t.name) for t in self._plan.kept if len(t.shape) >= 2 and t.name.endswith(".weight")]
        modules = [name.removesuffix(".weight") for name in kept]
        modules += [self._plan.family.memory_name(name) for name in modules]  # where a reader renames before it matches
        for sources in self._experts.values():
            modules += [
                self._module(s) for s in sources if self._contexts[s.layer, s.expert].spec(s.projection) is None
            ]
        return self._form.quantization_config(self._pattern, list(dict.fromkeys(modules)))

    def _pattern(self, projection: Projection, layers: Sequence[int]) -> str:
        values = {"{layer}": f"({'|'.join(map(str, layers))})", "{expert}": r"\d+"}
        segments = self._patterns[projection].removesuffix(".weight").split(".")
        return "re:^" + r"\.".join(values.get(segment, re.escape(segment)) for segment in segments) + "$"

    def readers(self) -> tuple[str, ...]:
        """Return who reads it."""
        return self._form.readers()


class LayerWriting(Writing):
    """Writes each layer as the planned kernel reads it, once its last weight has come."""

    def __init__(self, plan: Plan, registry: Registry) -> None:
        super().__init__(plan, registry)
        pieces: dict[int, list[Piece]] = {}
        for piece, sources in self._experts.items():
            for layer in dict.fromkeys(source.layer for source in sources):
                pieces.setdefault(layer, []).append(piece)
        self._planned = {layer.layer.index: self._tensors(layer) for layer in plan.layers}
        layers = [Item(tuple(pieces[index]), tensors) for index, tensors in self._planned.items()]
        self.items = self._in_order([*self._kept_items(), *layers])

    def _tensors(self, layer: LayerPlan) -> tuple[OutputTensor, ...]:
        return tuple(
            OutputTensor(f"{layer.layer.name}.groups.{number}.{name}", _dtype_name(tensor.dtype), tuple(tensor.shape))
            for number, group in enumerate(layer.groups)
            for name, tensor in StoredGroup(group.ctx, self._registry).module.state_dict().items()
        )

    @property
    def needed_bytes(self) -> int:
        """Return the most memory that it takes on the device: one layer, as it is stored, more than others."""
        return super().needed_bytes + max(layer.bytes_after for layer in self._plan.layers)

    def _feed(self, piece: Piece, raw: Tensor, seconds: StageSeconds) -> None:
        self._hash(piece, raw)
        super()._feed(piece, raw, seconds)

    def _finish(self, layer: int, experts: QuantizedExperts, errors: LayerErrors) -> None:
        tensors = {f"{experts.layer.name}.{name}": tensor for name, tensor in experts.state_dict().items()}
        found = {name: (_dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        if found != {tensor.name: (tensor.dtype, tensor.shape) for tensor in self._planned[layer]}:
            raise SchemeError(
                f"layer {layer}: has buffers beside weights, biases and scales, a plugin's own, and no export says "
                "them; load it instead"
            )
        for name, tensor in tensors.items():
            self._write(name, 0, tensor)
        weights = len(experts.layer.projections) * experts.layer.num_experts
        self._note_errors(self._planned[layer][0].name, layer, errors, weights)

    def quantization_config(self) -> dict[str, Any]:
        """Return what config.json says of the weights."""
        return {"quant_method": QUANT_METHOD, "scheme": self._plan.scheme.name, "manifest": MANIFEST}

    def readers(self) -> tuple[str, ...]:
        """Return who reads it."""
        return (
            "moeplug load, moeplug.load: a plain read, nothing is quantized again",
            "transformers 5.17: yes, from_pretrained, once moeplug is imported",
            "vLLM, SGLang: no",
        )


def _require_finite(ctx: StageContext, source: WeightSource, peaks: Tensor, origin: str) -> None:
    """Raise what stage 2 does not wait to see on a GPU."""
    read, made = peaks[0].tolist()
    if not math.isfinite(read):
        refuse_not_finite(ctx, source.projection, source.expert, "holds NaN or an infinity", origin)
    if not math.isfinite(made):
        refuse_plugins_not_finite(ctx, source.projection, (source.expert,))


def _require_unquantized_rest(plan: Plan) -> None:
    """Raise CheckpointError where weights outside the experts are quantized too: our config.json would not say how."""
    if plan.encoding is None:
        return
    endings = tuple({part.suffix for part in plan.encoding.parts(1, 1).values()} - {"weight"})
    quantized = [shown(tensor.name) for tensor in plan.kept if tensor.name.endswith(endings)]
    if quantized:
        raise CheckpointError(
            f"the checkpoint is already quantized ({plan.encoding.label}), and not its experts alone: "
            f"{listed(quantized, 3)}; such a one is not exported: give the unquantized checkpoint"
        )


def form_of(form: str, plan: Plan, registry: Registry) -> PerExpertForm:
    """Return the form of this name; SchemeError where it cannot say what the plan does."""
    if plan.encoding is not None:
        raise SchemeError(
            f"the checkpoint is already quantized ({plan.encoding.label}), and {form} would quantize it once more; if "
            "its own form will do, copy its folder; else use --format moeplug, which takes over what is stored"
        )
    contexts = [group.ctx for layer in plan.layers for group in layer.groups]
    if any(source.of_bias for source in plan.sources):
        raise SchemeError(f"the experts have biases, which {form} has no words for; use --format moeplug")
    for layer in plan.layers:
        if len(layer.groups) > 1:
            raise SchemeError(f"layer {layer.layer.index}: {form} cannot say that experts differ; use --format moeplug")
    for plugin in {ctx.plugin for ctx in contexts if ctx.plugin is not None}:
        for stage in ANSWERED:
            if registry.answers(plugin, stage):
                raise SchemeError(
                    f"plugin {plugin!r} answers stage {stage} itself, so what {form} would say of its weights is not "
                    "known; use --format moeplug"
                )
    if form not in PER_EXPERT:  # of a moeplug.json
        raise UsageError(f"format {form[:60]!r} is not one of {', '.join(FORMS)}; export the model again")
    return PER_EXPERT[form](contexts)


def _per_expert_patterns(plan: Plan) -> dict[str, str]:
    """Return the family's own names of a tensor per expert weight."""
    for form in plan.family.descriptor.disk:
        if not form.stacked and "gate_up" not in form.weights:
            return form.weights
    raise SchemeError(
        f"family {plan.family.name} has its experts only fused, and this format has none; use --format moeplug"
    )


def _moved_folders(plan: Plan, patterns: Mapping[str, str]) -> dict[str, str]:
    """Return what names in an MoE block begin with in the source → in files with a tensor per expert, where it differs.

    Mixtral's fused files call block_sparse_moe mlp.
    """
    wanted = ".".join(folder_of(patterns["down"])[:-1]) + "."
    for form in plan.family.descriptor.disk:
        names = {expand(pattern, plan.layers[0].layer.index) for pattern in form.patterns if EXPERT not in pattern}
        found = ".".join(folder_of(form.down)[:-1]) + "."
        if plan.sources[0].tensor.name in names and found != wanted:
            layers = [layer.layer.index for layer in plan.layers]
            return {expand(found, layer): expand(wanted, layer) for layer in layers}
    return {}


def _made(plan: Plan, registry: Registry, form: str, shard_bytes: int) -> dict[str, Any]:
    """Return what the bytes depend on. No time and no path: the same export is the same bytes."""
    used = sorted(plan.scheme.plugins())
    plugins = [p for p in registry.plugins if p.name in used]
    return {
        "format": form,
        "moeplug": __version__,
        "torch": torch.__version__,
        "plugins": [{"name": p.name, "distribution": p.distribution, "version": p.version} for p in plugins],
        "scheme": {"name": plan.scheme.name, "sha256": plan.scheme.sha256, "yaml": plan.scheme.to_yaml()},
        "source": {"name": plan.checkpoint.path.resolve().name, "sha256_of_headers": plan.checkpoint.fingerprint()},
        "family": plan.family.name,
        "dtypes": {str(layer.layer.index): layer.layer.dtype for layer in plan.layers},
        "layouts": layouts_of(plan) if form == "moeplug" else [],
        "shard_bytes": shard_bytes,
    }


def layouts_of(plan: Plan) -> list[str]:
    """Return the layouts that the planned kernels read."""
    return sorted({group.ctx.layout.name for layer in plan.layers for group in layer.groups})


@dataclass(frozen=True)
class Copy:
    """A file beside the weights, as it was when the export began."""

    source: SourceFile
    stamp: Stamp

    @classmethod
    def of(cls, source: SourceFile) -> Copy:
        """Open it once, so that what cannot be read is found before the weights are."""
        descriptor = source.open()
        try:
            return cls(source, Stamp.of(descriptor))
        finally:
            os.close(descriptor)

    def parts(self) -> Iterator[bytes]:
        """Yield its bytes; CheckpointError where it was changed."""
        descriptor, path, size = self.source.open(), self.source.path, self.stamp.size
        try:
            self.stamp.require(descriptor, path)
            for start in range(0, size, COPY_BYTES):
                yield read_exactly(descriptor, min(COPY_BYTES, size - start), start, path)
            self.stamp.require(descriptor, path)
        finally:
            os.close(descriptor)


def _copies(folder: Path) -> dict[str, Copy]:
    """Return the files beside the weights by name: tokenizer, generation config, license …"""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    ours = {CONFIG, INDEX, MANIFEST}
    copied = [name for name in names if name not in ours and not name.endswith(NOT_COPIED)]
    return {name: Copy.of(locate_file(folder, name, allow_symlinks=False)) for name in copied}


def _config(plan: Plan, quantization_config: Mapping[str, Any]) -> bytes:
    """Return the model's config.json with another quantization."""
    kept = {key: value for key, value in plan.checkpoint.config.items() if key != "compression_config"}
    return _json({**kept, "quantization_config": quantization_config})


def _index(shards: Sequence[OutputShard]) -> bytes:
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return _json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _dtype_name(dtype: torch.dtype) -> str:
    return SAFETENSORS_DTYPES[str(dtype).removeprefix("torch.")]
