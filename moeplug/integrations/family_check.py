"""Prove a family descriptor by numbers: a tiny random model of transformers' own, saved, loaded, compared.

    proof = prove(find_family({"model_type": "mixtral"}), "mixtral", folder)
    print(proof.describe())

Shapes prove nothing: gate and up look alike, and so may a matrix and its transpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor

from moeplug.checkpoint.descriptor import Descriptor, DiskForm
from moeplug.checkpoint.family import Family
from moeplug.checkpoint.reader import Checkpoint
from moeplug.errors import MoeplugError, UsageError
from moeplug.integrations.transformers import (
    TransformersExperts,
    auto_class,
    finish_model,
    prepare_model,
    quiet,
)
from moeplug.pipeline import plan_model, run
from moeplug.registry import Registry
from moeplug.scheme import Scheme

PLAIN: Final = Scheme.from_text("api: 1\nname: plain\nweights: null\n")
CPU: Final = torch.device("cpu")
# float32 sums in another order, through a few layers, give 1e-7 to 3e-6; a wrong reading of the weights over 0.01.
LARGEST_ERROR: Final = 2e-5
TOKENS: Final = (2, 11)

# Small values of what configs call their sizes; each counts where a config has the key. Sizes of experts differ from
# each other, so that a transposed reading has another shape; groups and dense first layers are there.
TINY: Final[dict[str, Any]] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "num_hidden_layers": 2,
    "shared_expert_intermediate_size": 80, "n_shared_experts": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "qk_head_dim": 48, "v_head_dim": 16,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "top_k_experts": 3,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "max_position_embeddings": 128, "sliding_window": 16,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TINY_VISION: Final[dict[str, Any]] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_heads": 2,
    "num_attention_heads": 2, "out_hidden_size": 64, "patch_size": 4, "image_size": 16,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """What the comparison gave. error: relative, of the logits in float32; None: it did not come to numbers.

    hint: what is probably wrong, or the error that ended it.
    """

    family: str
    model_type: str
    transformers: str
    error: float | None
    layers: int
    hint: str = ""

    @property
    def holds(self) -> bool:
        """Return whether the numbers agree."""
        return self.error is not None and self.error <= LARGEST_ERROR

    def as_dict(self) -> dict[str, Any]:
        """Return what `moeplug family-check --json` prints."""
        return {**asdict(self), "holds": self.holds}

    def describe(self) -> str:
        """Return one line for people."""
        label = f"family '{self.family}', {self.model_type}, transformers {self.transformers}"
        if self.error is None:
            return f"{label}: does not load: {self.hint}"
        verdict = "proven" if self.holds else "WRONG"
        what = f"{self.layers} MoE layers, relative error of the logits {self.error:.2g}"
        return f"{label}: {verdict}: {what}" + (f"; {self.hint}" if self.hint else "")


def tiny_config(family: Family, model_type: str) -> Any:
    """Return a small config of a model type, with what the descriptor adds to it under `tiny`."""
    try:
        defaults = transformers.AutoConfig.for_model(model_type)
    except ValueError as error:
        raise UsageError(
            f"transformers {transformers.__version__} has no model type {model_type!r}: nothing to compare with"
        ) from error
    return transformers.AutoConfig.for_model(model_type, **_merged(_small(defaults), family.descriptor.tiny))


def tiny_model(family: Family, model_type: str) -> Any:
    """Return a random float32 model, eval mode, always the same; what upstream sets to a constant is random too.

    Experts' weights are larger than usual, so that clamps and activations leave their straight parts.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config(family, model_type)
        model = auto_class(config).from_config(config, dtype=torch.float32)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                size = 6 * tensor.shape[-1] ** -0.5 if _is_of_experts(name) and tensor.dim() > 1 else 0.05
                tensor.add_(torch.randn(tensor.shape) * size)
    return model.eval().requires_grad_(False)


def prove(family: Family, model_type: str, folder: Path) -> Proof:
    """Build the tiny model in an empty folder, load it under `weights: null`, and compare the logits in float32."""
    with quiet():
        model = tiny_model(family, model_type)
        save(model, folder)
        expected = logits(model)
        proof = _compared(family, folder, expected, Proof(family.name, model_type, transformers.__version__, None, 0))
        return proof if proof.holds else replace(proof, hint=_hint(family, folder, expected) or proof.hint)


def _compared(family: Family, folder: Path, expected: Tensor, proof: Proof) -> Proof:
    """Return the proof with the error that a family's reading of the folder gives, or with what ended it."""
    try:
        loaded = load_plain(family, folder)
        layers = sum(isinstance(module, TransformersExperts) for module in loaded.modules())
        return replace(proof, error=relative_error(logits(loaded), expected), layers=layers)
    except MoeplugError as error:
        return replace(proof, hint=str(error))
    except (TypeError, RuntimeError) as error:  # upstream's block and such experts do not fit each other
        reason = f"{type(error).__name__}: {error}; if upstream's block calls its experts in another way, say `block`"
        return replace(proof, hint=reason)


def save(model: Any, folder: Path) -> None:
    """Save as transformers does, in the form of published files."""
    model.save_pretrained(folder)


def load_plain(family: Family, folder: Path) -> Any:
    """Return the model that moeplug makes of a folder with a given family, experts unquantized."""
    registry = Registry([])
    plan = plan_model(Checkpoint.open(folder), family, PLAIN, registry, CPU, with_dense=True)
    layers = [layer.layer for layer in plan.layers]
    empty = prepare_model(folder, family, layers, plan.kept)
    result = run(plan, registry, module_class=TransformersExperts)
    return finish_model(empty, family, result.layers, result.dense)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return a model's logits of fixed tokens in float64."""
    tokens = torch.randint(3, 64, TOKENS, generator=torch.Generator().manual_seed(5))
    return model(input_ids=tokens, use_cache=False).logits.double()  # type: ignore[no-any-return]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())


def _small(config: Any) -> dict[str, Any]:
    known = config.to_dict()
    small = {key: value for key, value in TINY.items() if key in known}
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            small[key] = dict(TINY_VISION) if key == "vision_config" else _small(getattr(config, key))
    return small


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _is_of_experts(name: str) -> bool:
    return "experts" in name.split(".") and "shared" not in name


def _hint(family: Family, folder: Path, expected: Tensor) -> str:
    """Return what would make the numbers agree, found by trying it; empty where no single change does."""
    for what, descriptor in _variants(family.descriptor):
        proof = Proof(family.name, "", transformers.__version__, None, 0)
        if _compared(replace(family, descriptor=descriptor), folder, expected, proof).holds:
            return f"it agrees with {what}"
    return ""


def _variants(descriptor: Descriptor) -> Iterator[tuple[str, Descriptor]]:
    """Yield descriptors with one reading of the weights changed, or two, and what the change is called."""
    changes = {
        "gate and up swapped": _swapped,
        "gate and up interleaved where it says one after the other, or the reverse": _interleaved,
        "rows and columns transposed": _transposed,
    }
    tried = [(name, tuple(change(form) for form in descriptor.disk)) for name, change in changes.items()]
    tried += [
        (f"{first}, and {second}", tuple(changes[second](changes[first](form)) for form in descriptor.disk))
        for first in changes
        for second in changes
        if first < second
    ]
    for name, forms in tried:
        yield name, descriptor.model_copy(update={"disk": list(forms)})


def _swapped(form: DiskForm) -> DiskForm:
    if form.gate_up is None:
        return form.model_copy(update={"gate": form.up, "up": form.gate}) if form.gate else form
    return form.model_copy(update={"first": "up" if form.first == "gate" else "gate"})


def _interleaved(form: DiskForm) -> DiskForm:
    return form.model_copy(update={"interleaved": not form.interleaved}) if form.gate_up else form


def _transposed(form: DiskForm) -> DiskForm:
    return form.model_copy(update={"transposed": form.transposed is False}) if form.stacked else form
