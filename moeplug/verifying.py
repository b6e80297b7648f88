"""Read an export again and say every difference: from its own moeplug.json, and from the model it was made from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeplug.checkpoint.files import counted, listed, read_exactly
from moeplug.checkpoint.locate import WeightSource
from moeplug.checkpoint.reader import Checkpoint
from moeplug.checkpoint.record import read_record
from moeplug.checkpoint.writer import MANIFEST, OutputTensor, in_shards, is_as_recorded
from moeplug.errors import UsageError, VerificationError
from moeplug.exporting import ExpertWriting, LayerWriting, Writing, form_of, layouts_of
from moeplug.integrations.prequantized import encoding_of
from moeplug.pipeline import Progress, one_torch_thread, torch_dtype
from moeplug.pipeline.builder import LayerErrors
from moeplug.pipeline.memory import within_memory
from moeplug.pipeline.plan import Plan, activate_plugins, plan_model
from moeplug.pipeline.stored import recorded_errors
from moeplug.registry import Registry
from moeplug.scheme import Scheme


@dataclass(frozen=True)
class Verified:
    """What was compared and found equal. errors: by layer, measured again; empty without a model."""

    folder: Path
    files: int
    bytes: int
    tensors: int
    errors: Mapping[int, LayerErrors]

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        layers = [{"layer": index, **vars(errors)} for index, errors in self.errors.items()]
        counts = {"files": self.files, "bytes": self.bytes, "tensors": self.tensors}
        return {"folder": str(self.folder), **counts, "layers": layers}


def verify(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    registry: Registry | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Compare every file with moeplug.json, and with `against` every tensor with what it was made from.

    Raises VerificationError that lists the differences, CheckpointError where the folder is no export.
    """
    folder = Path(folder)
    manifest = read_record(folder)
    _refuse(folder, list(_of_files(folder, manifest["files"])))
    export = Checkpoint.open(folder)
    errors: dict[int, LayerErrors] = {}
    if against is not None:
        source = Checkpoint.open(against)
        if source.fingerprint() != manifest["made"]["source"]["sha256_of_headers"]:
            _refuse(folder, [f"{source.path} is not the model it was made from: config, headers or sizes differ"])
        made, registry = manifest["made"], registry or Registry.discover()
        plan = _plan_again(source, made, registry, device or torch.device("cpu"))
        comparing = _comparing(plan, registry, made)
        _refuse(folder, list(_of_tensors([t for item in comparing.items for t in item.tensors], export)))
        shards = in_shards([item.tensors for item in comparing.items], made["shard_bytes"])
        _refuse(folder, [f"{MANIFEST} has no {shard.name}" for shard in shards if shard.name not in manifest["files"]])
        comparing.assign(shards)
        comparing.compare_with(export)
        memory = within_memory(comparing.needed_bytes, plan.device)
        with memory, one_torch_thread(torch.device("cpu")), comparing.reader:
            comparing.read_everything(progress or (lambda done, total: None))
        _refuse(folder, [*comparing.differences, *_of_facts(comparing, manifest["files"])])
        errors = recorded_errors(manifest)
    total = sum(facts["bytes"] for facts in manifest["files"].values())
    return Verified(folder, len(manifest["files"]), total, len(export.tensors), errors)


def _refuse(folder: Path, differences: Sequence[str]) -> None:
    if differences:
        count = counted(len(differences), "difference")
        raise VerificationError(f"{folder}: {count}: {listed(list(differences))}; export it again")


def _of_files(folder: Path, recorded: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, facts in recorded.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif not is_as_recorded(folder / name, facts):
            yield f"{name} is not the file that was written: size or sha256 differ from {MANIFEST}"
    for path in sorted(folder.glob("*.safetensors*")):
        if path.name not in recorded:
            yield f"{path.name} is not in {MANIFEST}"


def _of_tensors(expected: Sequence[OutputTensor], export: Checkpoint) -> Iterator[str]:
    wanted = {tensor.name: tensor for tensor in expected}
    for name in wanted.keys() - export.tensors.keys():
        yield f"{name} is missing"
    for name in export.tensors.keys() - wanted.keys():
        yield f"{name} belongs to no weight of the model"
    for name in wanted.keys() & export.tensors.keys():
        found = export.tensors[name]
        if (found.dtype, found.shape) != (wanted[name].dtype, wanted[name].shape):
            yield f"{name} is {found.dtype} {found.shape}, expected {wanted[name].dtype} {wanted[name].shape}"


def _of_facts(comparing: _Comparing, recorded: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name in comparing.shard_names():
        found, expected = comparing.facts(name), recorded[name]
        if found["source_sha256"] != expected.get("source_sha256"):
            yield f"{name}: the model's weights are not those that it was made from"
        if found["errors"] != expected.get("errors"):
            yield f"{name}: the errors that {MANIFEST} records are not those that are measured"


def _plan_again(source: Checkpoint, made: Mapping[str, Any], registry: Registry, device: torch.device) -> Plan:
    """Return the plan that an export was made by: its scheme for this model."""
    scheme = Scheme.from_text(made["scheme"]["yaml"], MANIFEST)
    activate_plugins(scheme, registry, device)
    family, encoding = registry.family_of(source.config), encoding_of(source.config, registry)
    return plan_model(source, family, scheme, registry, device, with_dense=True, encoding=encoding)


def _comparing(plan: Plan, registry: Registry, made: Mapping[str, Any]) -> _Comparing:
    if made["format"] != "moeplug":
        return _ComparingExperts(plan, registry, form_of(made["format"], plan, registry))
    layouts = layouts_of(plan)
    if layouts != made["layouts"]:
        raise UsageError(
            f"the export holds the layouts {', '.join(made['layouts'])}, and on {plan.device} kernels want "
            f"{', '.join(layouts)}; verify it with the --device that it was made for"
        )
    return _ComparingLayers(plan, registry)


class _Reader:
    """Reads tensors of an export, its files open."""

    def __init__(self, export: Checkpoint) -> None:
        self._export = export
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> None:
        self._descriptors = {shard.source.path: shard.source.open() for shard in self._export.shards}

    def __exit__(self, *error: Any) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def bytes_of(self, name: str, start: int, count: int) -> Tensor:
        """Return (count,) uint8: bytes of a tensor."""
        tensor = self._export.tensors[name]
        data = read_exactly(self._descriptors[tensor.file], count, tensor.offset + start, tensor.file)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor."""
        tensor = self._export.tensors[name]
        return self.bytes_of(name, 0, tensor.nbytes).view(torch_dtype(tensor)).view(tensor.shape)


class _Comparing(Writing):
    """Does what an export does, and compares with the export's bytes where that would write them."""

    def compare_with(self, export: Checkpoint) -> None:
        """Begin: every tensor of the export has to be equal."""
        self.reader, self.differences = _Reader(export), list[str]()

    def shard_names(self) -> list[str]:
        """Return the names of the files with tensors."""
        return list(self._shards)

    def _write(self, name: str, start: int, tensor: Tensor) -> None:
        expected = tensor.contiguous().view(-1).view(torch.uint8).cpu()
        if not torch.equal(self.reader.bytes_of(name, start, expected.numel()), expected):
            self.differences.append(f"{name} is not what its weights become")


class _ComparingExperts(_Comparing, ExpertWriting):
    """Decodes each expert weight of the export too, by the rules of its format, and measures its error."""

    def _quantized(self, source: WeightSource, weight: Tensor, origin: str) -> tuple[dict[str, Tensor], float]:
        tensors, relative = super()._quantized(source, weight, origin)
        ctx = self._contexts[source.layer, source.expert]
        if ctx.spec(source.projection) is not None:
            exported = {name.rpartition(".")[2]: self.reader.tensor(name) for name in tensors}
            decoded = self._form.unpack(ctx, source.projection, exported)
            self._compare_errors(source, weight[0].cpu(), decoded, relative)
        return tensors, relative

    def _compare_errors(self, source: WeightSource, weight: Tensor, decoded: Tensor, relative: float) -> None:
        size = weight.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
        found = float((weight.double() - decoded.double()).norm() / size)
        # Ours come from float32 squares, good to six digits.
        if not math.isclose(found, relative, rel_tol=1e-4, abs_tol=1e-9):
            self.differences.append(
                f"layer {source.layer}, expert {source.expert}, {source.projection}: decodes with a relative error of "
                f"{found:.6g}; expected {relative:.6g}"
            )


class _ComparingLayers(_Comparing, LayerWriting):
    """Whole layers are compared byte by byte; the errors come with quantizing them again."""
