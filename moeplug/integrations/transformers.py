"""Put quantized experts into a transformers model: built on meta, dense tensors as they are, never a bf16 layer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeplug.checkpoint.family import Family
from moeplug.checkpoint.reader import TensorInfo
from moeplug.errors import CheckpointError, UsageError
from moeplug.moe.experts import QuantizedExperts
from moeplug.moe.layout import LayerSpec

try:
    import transformers
except ImportError as error:
    raise UsageError(
        "runtime transformers needs the transformers package: pip install 'moeplug[transformers]', "
        "or load with runtime none to get the quantized layers alone"
    ) from error

transformers.logging.disable_progress_bar()


class TransformersExperts(QuantizedExperts):
    """QuantizedExperts in the place and with the argument order of a transformers experts module."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return (M, H). top_k_index: (M, T) ids. top_k_weights: (M, T)."""
        return super().forward(hidden_states, top_k_weights, top_k_index)


def prepare_model(path: Path, family: Family, layers: Sequence[LayerSpec], kept: Sequence[TensorInfo]) -> Any:
    """Return the model of a checkpoint on the meta device, all tensors outside the experts matched by name and shape.

    Nothing of a weight is read. Raises CheckpointError where config.json describes no model, a tensor finds no
    parameter of its shape, or a parameter finds no tensor.
    """
    model = meta_model(path)
    found = dict(_tensors(model))
    for tensor in kept:
        name = family.memory_name(tensor.name)
        if name not in found:
            raise CheckpointError(f"{tensor.name}: {type(model).__name__} has no parameter {name} for this tensor")
        if found[name].shape != torch.Size(tensor.shape):
            raise CheckpointError(f"{tensor.name}: is {tensor.shape}; {name} is {tuple(found[name].shape)}")
    given = {family.memory_name(tensor.name) for tensor in kept}
    experts = tuple(_experts_path(model, family, layer) + "." for layer in layers)
    empty = [name for name in _needed(model) if name not in given and not name.startswith(experts)]
    if empty:
        raise CheckpointError(
            f"{path}: {len(empty)} parameters of {type(model).__name__} have no tensor in the checkpoint: "
            f"{', '.join(sorted(empty)[:5])}; the files are incomplete, or not of family {family.name}"
        )
    return model


def finish_model(
    model: Any, family: Family, layers: Mapping[int, QuantizedExperts], dense: Mapping[str, Tensor]
) -> Any:
    """Return a prepared model with these experts and these dense tensors (by disk name) in their places."""
    for experts in layers.values():
        parent, attribute = _owner(model, family.experts_path(experts.layer.index))
        setattr(parent, attribute, experts)
    for name, tensor in dense.items():
        _assign(model, family.memory_name(name), tensor)
    model.tie_weights()
    _restore_computed_buffers(model, next(iter(dense.values())).device)
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    assert not left, f"prepare_model matched every tensor, yet {left} have none"
    model.requires_grad_(False)
    return model.eval()


def meta_model(path: Path) -> Any:
    """Return the model that config.json describes, all of it on the meta device. No remote code is ever run."""
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.bfloat16)
            if (path / "generation_config.json").is_file():
                model.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever transformers makes of a config.json that it does not understand
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} makes no model of config.json or generation_config.json: "
            f"{type(error).__name__}: {reason}"
        ) from error
    return model


def reference_model(path: Path, device: torch.device) -> Any:
    """Return the unquantized model as transformers itself loads it, in the checkpoint's dtype."""
    with _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto")
    return model.to(device).eval()


def tokenizer_of(path: Path) -> Any:
    """Return the checkpoint's tokenizer."""
    try:
        with _quiet():
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as in meta_model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise CheckpointError(f"{path}: no tokenizer that transformers can read: {reason}") from error


def _experts_path(model: nn.Module, family: Family, layer: LayerSpec) -> str:
    """Return where the model has a layer's experts; CheckpointError where it has none there."""
    path = family.experts_path(layer.index)
    try:
        model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"{type(model).__name__} has no module {path}, where experts belong") from error
    return path


def _needed(model: Any) -> Iterator[str]:
    """Yield the parameters and persistent buffers that a checkpoint has to bring: all but tied ones."""
    tied = set(model.all_tied_weights_keys)
    computed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    yield from (name for name, _ in _tensors(model) if name not in tied and name not in computed)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or persistent buffer."""
    parent, attribute = _owner(model, name)
    is_parameter = isinstance(getattr(parent, attribute), nn.Parameter)
    setattr(parent, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    getattr(parent, attribute)._is_hf_initialized = True  # transformers then leaves it alone


def _restore_computed_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies) through the model's own initialisation.

    It is the road of from_pretrained, which builds on meta too. Poisoned first: what stays NaN was never computed.
    """
    for module in model.modules():
        names = [n for n in module._non_persistent_buffers_set if module._buffers[n] is not None]
        names = [n for n in names if module._buffers[n].is_meta]
        if not names:
            continue
        for name in names:
            buffer = torch.empty_like(module._buffers[name], device=device)
            module._buffers[name] = buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer.zero_()
        with torch.no_grad():
            model._init_weights(module)
        for name in names:
            if bool(torch.isnan(module._buffers[name]).any()):
                raise CheckpointError(f"{type(module).__name__}.{name} is not restored by this transformers version")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)  # a tied weight under both of its names
    yield from model.named_buffers(remove_duplicate=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own log lines off the terminal; its errors still come as exceptions."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)
