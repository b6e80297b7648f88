"""Let transformers' own from_pretrained read an export of moeplug's own form.

Imported when transformers.quantizers is, once moeplug was imported; without it transformers says in a warning that it
does not know `quant_method: moeplug`, and leaves the experts random.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeplug.checkpoint.reader import Checkpoint
from moeplug.errors import CheckpointError
from moeplug.pipeline import run
from moeplug.pipeline.stored import QUANT_METHOD, StoredJob, plan_stored
from moeplug.registry import Registry


@register_quantization_config(QUANT_METHOD)
class MoeplugConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of an export in moeplug's own form."""

    def __init__(self, scheme: str = "", manifest: str = "", **kwargs: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.scheme, self.manifest = scheme, manifest


@register_quantizer(QUANT_METHOD)
class MoeplugHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Leaves the experts out of transformers' loading, and puts ours in their places after it."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError(f"quant_method {QUANT_METHOD} needs the folder of an export; found no weight files")
        self._export = Checkpoint.open(Path(checkpoint_files[0]).parent)
        from moeplug.integrations.transformers import experts_path

        plan = plan_stored(self._export, Registry.discover(), torch.device("cpu"), with_dense=False)
        for layer in plan.layers:
            path = experts_path(model, plan.family, layer.layer)
            model.set_submodule(path, torch.nn.Identity())  # without parameters: nothing is missing
            model._keys_to_ignore_on_load_unexpected.add(rf"^{re.escape(layer.layer.name)}\.groups\.")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from moeplug.integrations.transformers import TransformersExperts, experts_path, replace_block

        registry = Registry.discover()
        plan = plan_stored(self._export, registry, model.device, with_dense=False)
        for experts in run(plan, registry, None, TransformersExperts, StoredJob).layers.values():
            model.set_submodule(experts_path(model, plan.family, experts.layer), experts)
            replace_block(model, plan.family, experts.layer)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return False: `moeplug export` writes such a folder, save_pretrained does not."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Return False: quantized experts are for inference."""
        return False
