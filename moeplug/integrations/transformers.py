"""Put quantized experts into a transformers model: built on meta, dense tensors as they are, never a bf16 layer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeplug.checkpoint.family import Family
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


def build_model(path: Path, family: Family, layers: Mapping[int, QuantizedExperts], dense: Mapping[str, Tensor]) -> Any:
    """Return the transformers model of a checkpoint with these experts and these dense tensors (by disk name).

    Raises CheckpointError where a parameter stays without a value, or a tensor finds no parameter of its shape.
    """
    model = meta_model(path)
    for experts in layers.values():
        _place_experts(model, family, experts.layer, experts)
    used = {_assign(model, family.memory_name(name), tensor, name) for name, tensor in dense.items()}
    model.tie_weights()
    _restore_computed_buffers(model, next(iter(dense.values())).device)
    empty = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{path}: {len(empty)} parameters of {type(model).__name__} have no tensor in the checkpoint: "
            f"{', '.join(sorted(empty)[:5])}; the model type may not be the family {family.name} describes"
        )
    assert len(used) == len(dense)
    model.requires_grad_(False)
    return model.eval()


def meta_model(path: Path) -> Any:
    """Return the model that config.json describes, all of it on the meta device. No remote code is ever run."""
    with _quiet():
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.bfloat16)
        if (path / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no tokenizer that transformers can read: {error}") from error


def _place_experts(model: nn.Module, family: Family, layer: LayerSpec, experts: QuantizedExperts) -> None:
    """Put experts where the model's own experts module is."""
    name = family.experts_path(layer.index)
    parent_name, _, attribute = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        getattr(parent, attribute)
    except AttributeError as error:
        raise CheckpointError(
            f"{type(model).__name__} has no module {name}, where {family.name} has experts"
        ) from error
    setattr(parent, attribute, experts)


def _assign(model: nn.Module, name: str, tensor: Tensor, disk_name: str) -> str:
    """Set a parameter or persistent buffer to a tensor; return its name in the model."""
    parent_name, _, attribute = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        current = getattr(parent, attribute)
    except AttributeError:
        current = None
    if not isinstance(current, Tensor):
        raise CheckpointError(f"{disk_name}: {type(model).__name__} has no parameter {name} for this tensor")
    if current.shape != tensor.shape:
        raise CheckpointError(f"{disk_name}: is {tuple(tensor.shape)}; {name} is {tuple(current.shape)}")
    if isinstance(current, nn.Parameter):
        setattr(parent, attribute, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(parent, attribute, tensor)
    getattr(parent, attribute)._is_hf_initialized = True  # transformers then leaves it alone
    return name


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
    yield from model.named_parameters()
    yield from model.named_buffers()


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
