"""Tiny checkpoints, written by transformers itself, and ways to damage them. `import helpers` works in every test."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeplug.checkpoint.reader import Checkpoint, Piece, in_file_order

MODEL_TYPES = ("qwen3_moe", "mixtral", "olmoe", "jamba")

# H, 2I and I differ, so that no transposed reading has the right shape; K is a multiple of 32 everywhere.
_COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_COMMON,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "head_dim": 32,
        "num_experts": 8,
        "moe_intermediate_size": 96,
        "intermediate_size": 160,
        "norm_topk_prob": True,
    },
    "mixtral": {**_COMMON, "num_hidden_layers": 2, "num_local_experts": 4},
    "olmoe": {**_COMMON, "num_hidden_layers": 2, "num_experts": 4},
    "jamba": {
        **_COMMON,
        "num_hidden_layers": 4,
        "num_experts": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
}


@functools.cache
def tiny_model(model_type: str) -> nn.Module:
    """Return a random transformers model, bfloat16, eval mode; always the same weights. Do not change it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(model_type, **TINY_CONFIGS[model_type])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(torch.bfloat16).eval()


def save_tiny(model_type: str, folder: Path, *, fused: bool = False, shards: int = 1) -> Path:
    """Save the tiny model as transformers does: per-expert tensors, or its own fused ones; in about `shards` files."""
    model = tiny_model(model_type)
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    size = total // shards if shards > 1 else 2 * total
    model.save_pretrained(folder, max_shard_size=size, save_original_format=not fused)
    return folder


def copy_of(checkpoint: Path, folder: Path) -> Path:
    """Return a copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, folder / checkpoint.name))


def fused_names(model_type: str, layer: int) -> tuple[str, str]:
    """Return the names of a layer's gate_up and down in the fused form."""
    block = "feed_forward" if model_type == "jamba" else "mlp"
    return f"model.layers.{layer}.{block}.experts.gate_up_proj", f"model.layers.{layer}.{block}.experts.down_proj"


def memory_experts(model_type: str, layer: int) -> tuple[Tensor, Tensor]:
    """Return transformers' in-memory gate_up (E, 2I, H) and down (E, H, I) of the tiny model."""
    parameters = tiny_model(model_type).state_dict()
    gate_up, down = fused_names(model_type, layer)
    return parameters[gate_up], parameters[down]


def shard_files(checkpoint: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, sorted."""
    return sorted(checkpoint.glob("*.safetensors"))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return (the header's JSON, the data after it) of a valid safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: Mapping[str, Any] | bytes, data: bytes) -> Path:
    """Write a safetensors file with any header, also a wrong one. Bytes are taken as the JSON text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file's header in place, leaving its data as they are."""
    header, data = read_header(path)
    change(header)
    write_raw(path, header, data)


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change a file's tensors and write it again, valid."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rewrite_fused(
    checkpoint: Path, model_type: str, *, transposed: bool = False, interleaved: bool = False, first: str = "gate"
) -> None:
    """Rewrite a one-file checkpoint of transformers' fused form in another fused form."""
    config = json.loads((checkpoint / "config.json").read_text())

    def change(tensors: dict[str, Tensor]) -> None:
        for layer in range(config["num_hidden_layers"]):
            gate_up_name, down_name = fused_names(model_type, layer)
            if gate_up_name not in tensors:
                continue
            gate, up = tensors[gate_up_name].chunk(2, dim=1)
            pair = [gate, up] if first == "gate" else [up, gate]
            joined = torch.stack(pair, dim=2).flatten(1, 2) if interleaved else torch.cat(pair, dim=1)
            down = tensors[down_name]
            tensors[gate_up_name] = (joined.transpose(1, 2) if transposed else joined).contiguous()
            tensors[down_name] = (down.transpose(1, 2) if transposed else down).contiguous()

    edit_tensors(checkpoint / "model.safetensors", change)


def buffers_for(pieces: Collection[Piece], count: int = 2) -> list[memoryview]:
    """Return read buffers that hold any of the pieces."""
    return [memoryview(bytearray(max(piece.nbytes for piece in pieces))) for _ in range(count)]


def whole_tensors(checkpoint: Checkpoint) -> list[Piece]:
    """Return all tensors of a checkpoint as pieces, in file order."""
    return in_file_order(Piece(tensor, 0, tensor.nbytes) for tensor in checkpoint.tensors.values())


def save_wide(folder: Path) -> Path:
    """Save such a Qwen3-MoE of four layers with 4 experts, 151 MB in four files: its experts alone, all the same."""
    write_wide_config(folder, layers=4, experts=4)
    weight = torch.randn(768, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    shapes = {"gate_proj": weight, "up_proj": weight, "down_proj": weight.T.contiguous()}
    weight_map = {}
    for layer in range(4):
        names = {f"model.layers.{layer}.mlp.experts.{e}.{p}.weight": w for e in range(4) for p, w in shapes.items()}
        file = f"model-{layer}.safetensors"
        save_file({name: w.clone() for name, w in names.items()}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_wide_config(folder: Path, layers: int = 1, experts: int = 64) -> None:
    """Write the config.json of a Qwen3-MoE with one layer of 64 experts, 3 MiB a projection: for dummy weights."""
    config = TINY_CONFIGS["qwen3_moe"] | {"model_type": "qwen3_moe", "mlp_only_layers": [], "hidden_act": "silu"}
    config |= {"num_hidden_layers": layers, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": experts}
    (folder / "config.json").write_text(json.dumps(config))
