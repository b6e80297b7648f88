"""Put quantized experts into a transformers model: built on meta, dense tensors as they are, never a bf16 layer."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeplug.checkpoint.descriptor import MAX_LAYERS, ReplacedBlock, expand
from moeplug.checkpoint.family import Family
from moeplug.checkpoint.files import locate_file, shown
from moeplug.checkpoint.locate import WEIGHT_DTYPES
from moeplug.checkpoint.reader import TensorInfo
from moeplug.errors import CheckpointError, UsageError
from moeplug.kernels.router import route
from moeplug.moe.experts import QuantizedExperts
from moeplug.moe.layout import LayerSpec
from moeplug.moe.router import RouterSpec

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
        """Return hidden_states' shape, (M, H) or (batch, length, H). top_k_index: (M, T) ids. top_k_weights: (M, T)."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        return super().forward(hidden, top_k_weights, top_k_index).view(hidden_states.shape)


class RoutedBlock(nn.Module):
    """An MoE block in the place of one whose own forward cannot call such experts.

    Tokens are routed, and the shared expert is added.

    The router, a linear layer, and the shared expert are the model's own, under their own names.
    """

    def __init__(self, block: nn.Module, names: ReplacedBlock, spec: RouterSpec) -> None:
        super().__init__()
        self._names, self._spec = names, spec
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return (M, H), or that and the router's logits (M, E)."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        router = self.get_submodule(self._names.router)
        logits = F.linear(hidden, router.weight, router.bias)  # type: ignore[arg-type]
        weights, ids = route(logits, self._spec)
        out = self.get_submodule("experts")(hidden, ids, weights)
        if self._names.shared is not None:
            out = out + self.get_submodule(self._names.shared)(hidden)
        return (out, logits) if self._names.returns_logits else out


def prepare_model(path: Path, family: Family, layers: Sequence[LayerSpec], kept: Sequence[TensorInfo]) -> Any:
    """Return the model of a checkpoint on the meta device, all tensors outside the experts matched by name and shape.

    Nothing of a weight is read. Raises CheckpointError where config.json describes no model, a tensor finds no
    parameter of its shape, or a parameter finds no tensor.
    """
    model = meta_model(path)
    found, shapes = dict(_tensors(model)), {tensor.name: tensor.shape for tensor in kept}
    given = _memory_names(family, shapes)
    for name, parts in given.items():
        label = ", ".join(parts)
        if name not in found:
            raise CheckpointError(
                f"{label}: {type(model).__name__} has no parameter {name} for this tensor; config.json and the weights "
                "do not belong together, or the name is damaged"
            )
        rows = sum(shapes[part][0] for part in parts) if len(parts) > 1 else None
        shape = shapes[parts[0]] if rows is None else (rows, *shapes[parts[0]][1:])
        if found[name].shape != torch.Size(shape):
            raise CheckpointError(
                f"{label}: is {shape}; {name} is {tuple(found[name].shape)} by config.json; config.json and the "
                "weights do not belong together"
            )
    _require_dtypes(model, given, {tensor.name: tensor for tensor in kept})
    experts = tuple(experts_path(model, family, layer) + "." for layer in layers)
    empty = [name for name in _needed(model) if name not in given and not name.startswith(experts)]
    if empty:
        raise CheckpointError(
            f"{path}: {len(empty)} parameters of {type(model).__name__} have no tensor in the checkpoint: "
            f"{', '.join(sorted(empty)[:5])}; the files are incomplete, or not of family {family.name}"
        )
    return model


def _require_dtypes(model: Any, given: Mapping[str, Sequence[str]], kept: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError where a tensor has numbers that the model cannot compute with in that place.

    A few tensors are in float32 among others in 16 bits because the model's code computes with them so. Where it does
    not, torch refuses a product in the middle of the first forward.
    """
    found, bytes_of = dict(_tensors(model)), dict.fromkeys(WEIGHT_DTYPES, 0)
    for tensor in kept.values():
        if tensor.dtype in bytes_of:
            bytes_of[tensor.dtype] += tensor.nbytes
    usual = max(bytes_of, key=bytes_of.__getitem__)
    for name, parts in given.items():
        is_float, as_the_model = found[name].is_floating_point(), found[name].dtype == model.dtype
        for tensor in (kept[part] for part in parts):
            where = f"{tensor.file}: {shown(tensor.name)}: dtype {tensor.dtype}"
            if is_float != (tensor.dtype in WEIGHT_DTYPES):
                expected = f"one of {', '.join(WEIGHT_DTYPES)}" if is_float else str(found[name].dtype)
                raise CheckpointError(
                    f"{where} is not what {type(model).__name__} computes with there; expected {expected}: give the "
                    "unquantized checkpoint, or load with runtime none to get the quantized layers alone"
                )
            if is_float and as_the_model and tensor.dtype != usual and _cannot_mix(model, name, tensor, usual):
                raise CheckpointError(
                    f"{where} among weights of {usual}: {type(model).__name__} cannot compute with both there; save "
                    "the checkpoint in one dtype, or load with runtime none to get the quantized layers alone"
                )


def _cannot_mix(model: Any, name: str, tensor: TensorInfo, usual: str) -> bool:
    """Return whether a module with such a tensor refuses inputs of the usual dtype, or hands on another one."""
    module, attribute = _owner(model, name)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return True

    def forward(dtype: str) -> Any:
        of = {n: usual for n, _ in _tensors(module)} | {attribute: dtype}
        made = {n: torch.ones(t.shape, dtype=getattr(torch, WEIGHT_DTYPES[of[n]])) for n, t in _tensors(module)}
        hidden = torch.ones(1, made["weight"].shape[-1], dtype=getattr(torch, WEIGHT_DTYPES[usual]))
        return torch.func.functional_call(module, made, (hidden,))

    try:
        expected = forward(usual)
    except Exception:  # neither a norm nor a router, but something that takes more: it cannot be tried so
        return False
    try:
        made = forward(tensor.dtype)
    except RuntimeError:
        return True
    return isinstance(made, Tensor) and made.dtype != expected.dtype


def finish_model(
    model: Any, family: Family, layers: Mapping[int, QuantizedExperts], dense: Mapping[str, Tensor]
) -> Any:
    """Return a prepared model with these experts and these dense tensors (by disk name) in their places."""
    for experts in layers.values():
        parent, attribute = _owner(model, experts_path(model, family, experts.layer))
        setattr(parent, attribute, experts)
        replace_block(model, family, experts.layer)
    for name, parts in _memory_names(family, dense).items():
        tensors = [dense[part] for part in parts]
        _assign(model, name, tensors[0] if len(tensors) == 1 else torch.cat(tensors))
    model.tie_weights()
    _restore_computed_buffers(model, next(iter(dense.values())).device)
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    assert not left, f"prepare_model matched every tensor, yet {left} have none"
    model.requires_grad_(False)
    return model.eval()


def meta_model(path: Path) -> Any:
    """Return the model that config.json describes, all of it on the meta device. No remote code is ever run."""
    _require_own_files(path)
    try:
        with quiet():
            config = _config_of(path)
            _require_few_layers(path, config.to_dict())
            with torch.device("meta"):
                model = auto_class(config).from_config(config, dtype=config.dtype or torch.bfloat16)
            if (path / "generation_config.json").is_file():
                model.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers makes of a config.json that it does not understand
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} makes no model of config.json or generation_config.json: "
            f"{type(error).__name__}: {reason}"
        ) from error
    return model


def reference_model(path: Path, device: torch.device) -> Any:
    """Return the unquantized model as transformers itself loads it, in the checkpoint's dtype."""
    with quiet():
        config = _config_of(path)
        model = auto_class(config).from_pretrained(path, config=config, local_files_only=True, dtype="auto")
    return model.to(device).eval()


def _config_of(path: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = None  # a file may name a repository there, whose code transformers would get and run
    return config


def _require_few_layers(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a part of the model, such as its vision tower, claims more layers than any has.

    transformers would build them one by one, at 5 ms each, before anyone could see that the files have no such tensors.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            _require_few_layers(path, value)
        elif isinstance(value, int) and value > MAX_LAYERS and re.fullmatch(r"(n|num)_.*layers|depth", str(key)):
            raise CheckpointError(f"{path / 'config.json'}: {key} is {value}; expected at most {MAX_LAYERS:,}")


def _require_own_files(path: Path) -> None:
    """Raise CheckpointError where a file that transformers may read is a symlink out of the checkpoint."""
    for file in path.iterdir():
        if file.suffix in (".json", ".txt", ".model", ".jinja"):
            locate_file(path, file.name, allow_symlinks=False)


def auto_class(config: Any) -> Any:
    """Return transformers' class that makes the whole model of a config: with images where there are any."""
    with_images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if with_images else transformers.AutoModelForCausalLM


def tokenizer_of(path: Path) -> Any:
    """Return the checkpoint's tokenizer."""
    _require_own_files(path)
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as in meta_model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise CheckpointError(f"{path}: no tokenizer that transformers can read: {reason}") from error


def experts_path(model: nn.Module, family: Family, layer: LayerSpec) -> str:
    """Return where the model has a layer's experts; CheckpointError where it has none there."""
    paths = family.experts_paths(layer.index)
    for path in paths:
        with contextlib.suppress(AttributeError):
            model.get_submodule(path)
            return path
    raise CheckpointError(f"{type(model).__name__} has no module {' or '.join(paths)}, where experts belong")


def replace_block(model: Any, family: Family, layer: LayerSpec) -> None:
    """Put a RoutedBlock in the place of a layer's MoE block, where the family says that its own cannot call experts."""
    names = family.descriptor.transformers.block
    if names is None:
        return
    parent, attribute = _owner(model, expand(names.path, layer.index))
    spec = family.router(model.config.to_dict(), layer.index)
    setattr(parent, attribute, RoutedBlock(getattr(parent, attribute), names, spec))


def _memory_names(family: Family, names: Collection[str]) -> dict[str, list[str]]:
    """Return memory name → names on disk: one, or those that are one tensor in memory."""
    joined = family.joined(names)
    parts = {part for several in joined.values() for part in several}
    return {family.memory_name(name): [name] for name in names if name not in parts} | joined


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
def quiet() -> Iterator[None]:
    """Keep transformers' own log lines off the terminal; its errors still come as exceptions."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)
