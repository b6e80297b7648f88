"""The calls of the Python API: plan a load, do it, give it other weights, export it, or quantize weights in memory.

loaded = moeplug.load("path/to/model", scheme="int8", runtime="transformers")
loaded.model.generate(...)              # a transformers model
loaded.layers[0](hidden, weights, ids)  # one layer's QuantizedExperts
loaded.report.as_dict()                 # what was done, and its provenance
moeplug.reload(loaded, state_dict)      # other weights into the same storage
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moeplug.checkpoint.dummy import DummyCheckpoint
from moeplug.checkpoint.family import Family
from moeplug.checkpoint.memory import TORCH_DTYPES, MemoryCheckpoint
from moeplug.checkpoint.reader import Checkpoint, read_config
from moeplug.errors import CheckpointError, UsageError
from moeplug.integrations.prequantized import encoding_of
from moeplug.moe.experts import QuantizedExperts
from moeplug.moe.layout import ACTIVATIONS, LayerSpec, Projection
from moeplug.pipeline import Job, LayerBuilder, Plan, Progress, Report, Targets, plan_layer, plan_model, run
from moeplug.pipeline.explain import Explanation, explain_model
from moeplug.pipeline.plan import GroupPlan, activate_plugins, ranges, require_budget
from moeplug.pipeline.setup_kernel import device_of
from moeplug.pipeline.stored import StoredJob, is_stored, plan_stored
from moeplug.registry import Registry
from moeplug.scheme import Scheme

if TYPE_CHECKING:
    from moeplug.exporting import Exported

Runtime = Literal["transformers"]


@dataclass(frozen=True)
class Loaded:
    """A finished load.

    layers: decoder-layer index → QuantizedExperts. model: the transformers model that holds them, or None.
    report: bytes, errors, kernels, provenance. registry: whose plugins made the layers, for `reload`.
    """

    layers: dict[int, QuantizedExperts]
    model: Any
    report: Report
    registry: Registry


def demo_checkpoint() -> Path:
    """Return the folder of the checkpoint that moeplug ships: a small trained Qwen3-MoE."""
    return Path(str(resources.files("moeplug"))) / "demo" / "checkpoint"


def plan(
    model: str | Path | None = None,
    scheme: str | Path | Scheme | None = None,
    *,
    device: str | torch.device | None = None,
    runtime: Runtime | None = None,
    budget: int | None = None,
    dummy: bool = False,
    family: str | Path | Family | None = None,
    registry: Registry | None = None,
) -> Plan:
    """Return everything that `load` with the same arguments would do, without reading a weight.

    model: a checkpoint folder; None: the demo checkpoint. scheme: a Scheme, a path, or an installed scheme's name; None
    for an export in moeplug's own form, which brings its own. device: None takes the first GPU, or the CPU where there
    is none. runtime "transformers": the dense tensors count too. budget: bytes; RefusedError if the load would need
    more at its peak. dummy: config.json is enough.
    family: a Family, a descriptor file, or the name of a known one; None: the one that serves config.json's model_type.
    Raises SchemeError, CheckpointError, PluginError, InputOutputError, RefusedError, UsageError.
    """
    registry = registry or Registry.discover()
    found = find_device(device)
    if model is not None and scheme is None and not dummy and is_stored(read_config(model)):
        return _plan_export(Checkpoint.open(model), registry, found, runtime, budget)
    resolved = resolve_scheme(scheme, registry)
    activate_plugins(resolved, registry, found)
    source, found_family = open_source(model, dummy, family, registry)
    if dummy and runtime is not None:
        raise UsageError("dummy weights are for the experts alone: a dummy load has no runtime")
    with_dense = runtime is not None
    encoding = encoding_of(source.config, registry)
    planned = plan_model(
        source, found_family, resolved, registry, found, with_dense=with_dense, budget=budget, encoding=encoding
    )
    if runtime is not None:
        _empty_model(planned)  # what a load would refuse is refused here
    return planned


def _plan_export(
    source: Checkpoint, registry: Registry, device: torch.device, runtime: Runtime | None, budget: int | None
) -> Plan:
    """Return the plan of an export in our own form: it brings its scheme."""
    planned = plan_stored(source, registry, device, with_dense=runtime is not None)
    require_budget(planned, budget)
    if runtime is not None:
        _empty_model(planned)
    return planned


def explain(
    model: str | Path | None = None,
    scheme: str | Path | Scheme | None = None,
    *,
    device: str | torch.device | None = None,
    dummy: bool = False,
    family: str | Path | Family | None = None,
    observe: Iterable[str] = (),
    registry: Registry | None = None,
) -> Explanation:
    """Return who would answer each stage, which kernel each layer gets and why, here and on other devices.

    Arguments as in `load`. Nothing is refused for its device: the explanation says what stands against it.
    """
    registry = registry or Registry.discover()
    resolved = resolve_scheme(scheme, registry)
    found = find_device(device)
    activate_plugins(resolved, registry, None)
    for name in observe:
        registry.observe(name)
    source, found_family = open_source(model, dummy, family, registry)
    encoding = encoding_of(source.config, registry)
    return explain_model(source, found_family, resolved, registry, device_of(found), encoding)


def load(
    model: str | Path | None = None,
    scheme: str | Path | Scheme | None = None,
    *,
    device: str | torch.device | None = None,
    runtime: Runtime | None = None,
    budget: int | None = None,
    dummy: bool = False,
    family: str | Path | Family | None = None,
    observe: Iterable[str] = (),
    exact_error: bool = False,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> Loaded:
    """Load a checkpoint, quantizing its experts while reading, and return the layers, the model and the report.

    Arguments and errors as in `plan`; runtime "transformers" also builds the model around the layers. observe: names
    of observer plugins. exact_error: measure the error of all rows; else of every 16th row of a large weight, unless
    the scheme says `accept:`. progress: called with (bytes read, bytes to read), from any thread.
    """
    registry = registry or Registry.discover()
    planned = plan(
        model, scheme, device=device, runtime=runtime, budget=budget, dummy=dummy, family=family, registry=registry
    )
    for name in observe:
        registry.observe(name)
    return execute(planned, registry, runtime=runtime, progress=progress, exact_error=exact_error)


def execute(
    planned: Plan,
    registry: Registry,
    *,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    exact_error: bool = False,
) -> Loaded:
    """Run a plan and build the runtime's model around its layers."""
    job = Job if planned.stored is None else StoredJob
    if runtime is None:
        result = run(planned, registry, progress, job_class=job, exact_error=exact_error)
        return Loaded(result.layers, None, result.report, registry)
    from moeplug.integrations.transformers import TransformersExperts, finish_model

    empty = _empty_model(planned)  # not the plan's own: a plan may run again, and a model takes weights once
    result = run(planned, registry, progress, TransformersExperts, job, exact_error=exact_error)
    model = finish_model(empty, planned.family, result.layers, result.dense)
    return Loaded(result.layers, model, result.report, registry)


def reload(loaded: Loaded, source: str | Path | Mapping[str, Tensor], *, progress: Progress | None = None) -> Report:
    """Quantize other weights of the same model into the storage of a finished load, and return what was done.

    source: a checkpoint folder, or tensors by the names that they have in the checkpoint's files, on any device.
    One expert weight at a time: no address changes, so captured CUDA graphs and compiled code stay valid. The dense
    weights of a loaded model are replaced too. What can be checked is checked before the first byte changes. A reload
    that fails later leaves layers of which some experts are old and some new: calling or saving one raises UsageError
    until a reload comes to its end.
    Raises what `load` raises, and CheckpointError where the source is of another model.
    """
    before, layers = loaded.report.plan, loaded.layers
    if isinstance(source, Mapping):  # tensors are as a model has them, however the files of the load stored them
        config = {key: value for key, value in before.checkpoint.config.items() if key != "quantization_config"}
        checkpoint: Checkpoint | MemoryCheckpoint = MemoryCheckpoint.of(source, config)
    else:
        checkpoint = Checkpoint.open(source)
        if is_stored(checkpoint.config):
            raise UsageError(f"{source}: is an export in moeplug's own form; load it instead. Nothing was changed")
    same = checkpoint.config.get("model_type") == before.checkpoint.config.get("model_type")
    family = before.family if same else loaded.registry.family_of(checkpoint.config)
    with_dense = loaded.model is not None
    registry, device = loaded.registry, next(iter(layers.values())).slots.device
    encoding = None if isinstance(checkpoint, MemoryCheckpoint) else encoding_of(checkpoint.config, registry)
    planned = plan_model(checkpoint, family, before.scheme, registry, device, with_dense=with_dense, encoding=encoding)
    _require_same_layers(planned, layers)
    # Groups as they are now: a module that was moved has other kernels and layouts than its load planned.
    groups = {i: tuple(GroupPlan(g.ctx, ()) for g in module.expert_groups()) for i, module in layers.items()}
    layers_now = tuple(replace(old, groups=groups[old.layer.index]) for old in planned.layers)
    planned = replace(planned, layers=layers_now)
    dense = _dense_targets(loaded, planned) if with_dense else {}
    return run(planned, registry, progress, into=Targets(layers, dense)).report


def _require_same_layers(planned: Plan, layers: Mapping[int, QuantizedExperts]) -> None:
    given = {layer.layer.index: layer.layer for layer in planned.layers}
    if given.keys() != layers.keys():
        raise CheckpointError(
            f"{planned.checkpoint.path}: has MoE layers {ranges(sorted(given))}; the model that is loaded has "
            f"{ranges(sorted(layers))}. Nothing was changed"
        )
    for index, module in layers.items():
        for name, value in vars(module.layer).items():
            if getattr(given[index], name) != value:
                raise CheckpointError(
                    f"{planned.checkpoint.path}: layer {index} has {name} {getattr(given[index], name)}; the model "
                    f"that is loaded has {value}. Nothing was changed"
                )


def _dense_targets(loaded: Loaded, planned: Plan) -> dict[str, Tensor]:
    """Return where each dense tensor of the source belongs in the loaded model."""
    found = dict(loaded.model.named_parameters(remove_duplicate=False)) | dict(loaded.model.named_buffers())
    targets: dict[str, Tensor] = {}
    for tensor in planned.kept:
        target = found.get(planned.family.memory_name(tensor.name))
        dtype = None if target is None else str(target.dtype).removeprefix("torch.")
        if target is None or tuple(target.shape) != tensor.shape or dtype != TORCH_DTYPES[tensor.dtype]:
            described = "nothing of this name" if target is None else f"{tuple(target.shape)} {dtype}"
            raise CheckpointError(
                f"{planned.checkpoint.path}: {tensor.name} is {tensor.shape} {tensor.dtype}; the model that is loaded "
                f"has {described}. Nothing was changed"
            )
        targets[tensor.name] = target.data
    missing = {tensor.name for tensor in loaded.report.plan.kept} - targets.keys()
    if missing:
        raise CheckpointError(
            f"{planned.checkpoint.path}: has no {sorted(missing)[0]}, which the model that is loaded has. Nothing was "
            "changed"
        )
    return targets


def export(
    model: str | Path | None,
    scheme: str | Path | Scheme | None,
    target: str | Path,
    form: str = "compressed-tensors",
    *,
    device: str | torch.device | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> Exported:
    """Quantize a checkpoint into a new folder, `target`, in one pass; nothing is ever overwritten.

    form: "compressed-tensors", "fp8" (128 x 128 blocks, as DeepSeek's) or "moeplug". resume: continue an interrupted
    export of the same. Other arguments and errors as in `load`; the result says who reads it.
    """
    from moeplug.exporting import export as write

    registry = registry or Registry.discover()
    resolved = resolve_scheme(scheme, registry)
    found = find_device(device)
    activate_plugins(resolved, registry, found)
    source, family = open_source(model, registry=registry)
    encoding = encoding_of(source.config, registry)
    planned = plan_model(source, family, resolved, registry, found, with_dense=True, encoding=encoding)
    return write(planned, registry, target, form, resume=resume, progress=progress)


def quantize_experts(
    w13: Tensor,
    w2: Tensor,
    scheme: str | Path | Scheme | None = None,
    *,
    experts_per_token: int = 1,
    activation: str = "silu",
    layer: int = 0,
    registry: Registry | None = None,
) -> QuantizedExperts:
    """Return the quantized experts of one layer whose weights are in memory, on the device they are on.

    w13: (E, 2I, H) float, gate rows then up rows. w2: (E, H, I) float. layer: the index that overrides see.
    The same stages run as in a load, one expert weight at a time.
    """
    if activation not in ACTIVATIONS:
        raise UsageError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    E, H, I = w2.shape if w2.dim() == 3 else (0, 0, 0)
    if not E or tuple(w13.shape) != (E, 2 * I, H):
        raise UsageError(f"w13 is {tuple(w13.shape)}, w2 is {tuple(w2.shape)}; expected (E, 2I, H) and (E, H, I)")
    registry = registry or Registry.discover()
    resolved = resolve_scheme(scheme, registry)
    activate_plugins(resolved, registry, w13.device)
    dtype = str(w13.dtype).removeprefix("torch.")
    spec = LayerSpec(layer, f"layer {layer}", E, experts_per_token, H, I, activation, dtype)
    limit = None if resolved.accept is None else resolved.accept.relative_rms
    builder = LayerBuilder(plan_layer(spec, resolved, registry, w13.device), registry, limit)
    weights: dict[Projection, Tensor] = {"gate": w13[:, :I], "up": w13[:, I:], "down": w2}
    for expert in range(E):
        for projection, tensor in weights.items():
            builder.feed(projection, (expert,), tensor[expert : expert + 1])
    return builder.finish()[0]


def _empty_model(planned: Plan) -> Any:
    """Return the runtime's model without weights, every tensor of the plan matched to it."""
    from moeplug.integrations.transformers import prepare_model

    layers = [layer.layer for layer in planned.layers]
    return prepare_model(planned.checkpoint.path, planned.family, layers, planned.kept)


def resolve_scheme(scheme: str | Path | Scheme | None, registry: Registry) -> Scheme:
    """Return a Scheme of a Scheme, a path, or the name of an installed scheme. There is no default: None is refused."""
    if scheme is None:
        known = ", ".join(sorted(registry.scheme_files())) or "none"
        raise UsageError(
            f"no scheme was named: give a scheme file or the name of an installed scheme; installed: {known}"
        )
    return scheme if isinstance(scheme, Scheme) else registry.scheme(str(scheme))


def find_device(device: str | torch.device | None) -> torch.device:
    """Return the device to use; None: the first GPU, or the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r}: expected cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}: expected cpu, cuda or cuda:N")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = found.index or 0
        if index >= count:
            raise UsageError(f"device {device!r}: this torch sees {count} GPUs; use --device cpu")
        return torch.device("cuda", index)
    return found


def open_source(
    model: str | Path | None,
    dummy: bool = False,
    family: str | Path | Family | None = None,
    registry: Registry | None = None,
) -> tuple[Checkpoint | DummyCheckpoint, Family]:
    """Return a checkpoint, headers validated, and its family; dummy: its config.json with generated weights."""
    registry = registry or Registry.discover()
    path = demo_checkpoint() if model is None else Path(model)
    if dummy:
        config = read_config(path)
        found = resolve_family(family, config, registry)
        return DummyCheckpoint.from_config(config, found), found
    checkpoint = Checkpoint.open(path)
    return checkpoint, resolve_family(family, checkpoint.config, registry)


def resolve_family(family: str | Path | Family | None, config: Mapping[str, Any], registry: Registry) -> Family:
    """Return a Family of a Family, a descriptor file or a name; None: the one that serves a config.json."""
    if family is None:
        return registry.family_of(config)
    return family if isinstance(family, Family) else registry.family(str(family))
