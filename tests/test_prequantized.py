"""Checkpoints that are quantized already: what is stored is handed through, dequantized when asked, else refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor

import moeplug
from moeplug import CheckpointError, Scheme, SchemeError, api
from moeplug.checkpoint.family import find_family
from moeplug.checkpoint.reader import Checkpoint
from moeplug.integrations.family_check import save, tiny_model
from moeplug.quantization import Scales, quantize
from moeplug.registry import Registry
from moeplug.spec import WeightSpec
from moeplug.verifying import verify

Writer = Callable[[Tensor, Scales, WeightSpec], dict[str, Tensor]]


def in_int32(codes: Tensor) -> Tensor:
    """Pack codes (rows, n) of 0 to 15 into (rows, ceil(n / 8)) int32, the first in the lowest bits."""
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % 8)).view(codes.shape[0], -1, 8)
    words = (codes << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def plain(stored: Tensor, scales: Scales, spec: WeightSpec) -> dict[str, Tensor]:
    """Return compressed-tensors' int-quantized or float-quantized tensors of one weight."""
    weight = stored[0] if spec.format == "int8" else stored[0].view(torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale": scales.scale[0]}
    return tensors if spec.symmetric else tensors | {"weight_zero_point": scales.zero_point[0].to(torch.int8)}


def packed(stored: Tensor, scales: Scales, spec: WeightSpec) -> dict[str, Tensor]:
    """Return compressed-tensors' pack-quantized tensors of one weight of 4 bits."""
    codes = torch.stack([stored[0] & 15, stored[0] >> 4], -1).flatten(1)
    tensors = {"weight_packed": in_int32(codes), "weight_scale": scales.scale[0]}
    tensors["weight_shape"] = torch.tensor(codes.shape)
    if not spec.symmetric:
        tensors["weight_zero_point"] = in_int32((scales.zero_point[0].to(torch.int8) + 8).T).T
    return tensors


def in_blocks(stored: Tensor, scales: Scales, spec: WeightSpec) -> dict[str, Tensor]:
    """Return DeepSeek's fp8 tensors of one weight."""
    return {"weight": stored[0].view(torch.float8_e4m3fn), "weight_scale_inv": scales.scale[0]}


def compressed_tensors(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True} | weights, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


INT8, INT4, FP8 = {"num_bits": 8, "type": "int"}, {"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "float"}
CASES: dict[str, tuple[WeightSpec, Writer, dict[str, Any]]] = {
    "int8": (WeightSpec(format="int8"), plain, compressed_tensors("int-quantized", **INT8, strategy="channel")),
    "int8-bf16-scales": (
        WeightSpec(format="int8", scale_dtype="bfloat16"),
        plain,
        compressed_tensors("int-quantized", **INT8, strategy="channel"),
    ),
    "int8-g32-asym": (
        WeightSpec(format="int8", strategy="group", group_size=32, symmetric=False),
        plain,
        compressed_tensors("int-quantized", **INT8, strategy="group", group_size=32, symmetric=False),
    ),
    "int8-tensor": (
        WeightSpec(format="int8", strategy="tensor"),
        plain,
        compressed_tensors("int-quantized", **INT8, strategy="tensor"),
    ),
    "int4-g32": (
        WeightSpec(format="int4", strategy="group", group_size=32),
        packed,
        compressed_tensors("pack-quantized", **INT4, strategy="group", group_size=32),
    ),
    "int4-g32-asym": (
        WeightSpec(format="int4", strategy="group", group_size=32, symmetric=False),
        packed,
        compressed_tensors("pack-quantized", **INT4, strategy="group", group_size=32, symmetric=False),
    ),
    "fp8": (WeightSpec(format="fp8"), plain, compressed_tensors("float-quantized", **FP8, strategy="channel")),
    "fp8-block": (
        WeightSpec(format="fp8", strategy="block", block_structure=(32, 48)),
        in_blocks,
        {"quant_method": "fp8", "weight_block_size": [32, 48]},
    ),
}


def scheme_of(spec: WeightSpec, **more: Any) -> Scheme:
    weights = spec.model_dump(mode="json", exclude_defaults=True)
    plugin = {"mxfp4": "mx"}.get(spec.format, spec.format)
    return Scheme.from_data({"api": 1, "name": "asked", "plugin": plugin, "weights": weights, **more})


def quantized_copy(original: Path, folder: Path, spec: WeightSpec, write: Writer, config: dict[str, Any]) -> Path:
    """Return a copy of a per-expert checkpoint whose expert weights are stored as `write` does."""
    shutil.copytree(original, folder)
    registry = Registry.discover()
    registry.activate(scheme_of(spec).plugin, "a test")
    fmt, checkpoint = registry.format(spec.format), Checkpoint.open(original)
    family = find_family(checkpoint.config)
    sources = [s for layer in family.layers(checkpoint.config) for s in family.locate(layer, checkpoint.tensors)]

    def change(tensors):
        for source in sources:
            weight = tensors.pop(source.tensor.name).unsqueeze(0)
            _, N, K = weight.shape
            stored = torch.empty(1, N, K // fmt.values_per_element, dtype=fmt.storage_dtype)
            written = write(stored, quantize(weight, spec, fmt, stored), spec)
            module = source.tensor.name.removesuffix("weight")
            tensors.update({module + name: tensor.contiguous() for name, tensor in written.items()})

    helpers.edit_tensors(folder / "model.safetensors", change)
    helpers.edit_json(folder / "config.json", lambda data: data.update(quantization_config=config))
    return folder


def assert_same_layers(one: moeplug.Loaded, other: moeplug.Loaded) -> None:
    assert list(one.layers) == list(other.layers)
    for index, layer in one.layers.items():
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, other.layers[index].state_dict()[name]), (index, name)


@pytest.fixture
def stored(tiny_checkpoint, tmp_path):
    """A function case → (the unquantized checkpoint, the quantized one, its spec)."""

    def make(case: str):
        spec, write, config = CASES[case]
        original = tiny_checkpoint("qwen3_moe")
        return original, quantized_copy(original, tmp_path / case, spec, write, config), spec

    return make


@pytest.mark.parametrize("case", CASES)
def test_stored_values_and_scales_are_handed_through_where_the_scheme_asks_for_them(stored, case):
    original, folder, spec = stored(case)
    loaded = moeplug.load(folder, scheme_of(spec), device="cpu")
    assert_same_layers(loaded, moeplug.load(original, scheme_of(spec), device="cpu"))
    assert all(layer.errors.worst == 0 for layer in loaded.report.layers)


@pytest.mark.parametrize("case", ["int8-g32-asym", "int4-g32-asym", "fp8-block"])
def test_other_numbers_are_refused_with_what_is_stored_unless_the_scheme_says_requantize(stored, case):
    _, folder, spec = stored(case)
    other = WeightSpec(format="int8", strategy="group", group_size=16)
    with pytest.raises(SchemeError, match=r"already quantized .*write requantize: true") as caught:
        moeplug.plan(folder, scheme_of(other), device="cpu")
    assert str(spec.model_dump(mode="json", exclude_defaults=True)) in str(caught.value)
    anew = moeplug.load(folder, scheme_of(other, requantize=True), device="cpu")
    assert 0 < max(layer.errors.worst for layer in anew.report.layers) < 0.01
    plain_scheme = Scheme.from_data({"api": 1, "name": "plain", "weights": None, "requantize": True})
    kept = moeplug.load(folder, plain_scheme, device="cpu").layers[0]
    weight = moeplug.load(folder, scheme_of(spec), device="cpu").layers[0]
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 3]] * 7)
    out, expected = (experts(hidden, torch.full((7, 2), 0.5), ids) for experts in (kept, weight))
    # bfloat16 rounds each dequantized weight once: 2**-9 relative, less in sums.
    assert float((out - expected).norm() / expected.norm()) < 0.005


def test_a_plan_says_what_is_stored_and_counts_its_bytes(stored):
    _, folder, spec = stored("int4-g32")
    planned = moeplug.plan(folder, scheme_of(spec), device="cpu")
    assert planned.as_dict()["quantized_already"] == "compressed-tensors int4 g32"
    assert planned.expert_bytes_before == planned.expert_bytes_after == 48 * 64 * 96 * (4 + 32 / 32) // 8


def test_float32_scales_do_not_become_16_bit_ones_silently(stored):
    _, folder, spec = stored("int8")
    with pytest.raises(CheckpointError, match=r"a scale is none that int8 channel with scale_dtype: bfloat16 has"):
        moeplug.load(folder, scheme_of(spec.model_copy(update={"scale_dtype": "bfloat16"})), device="cpu")
    loaded = moeplug.load(stored("int8-bf16-scales")[1], scheme_of(spec), device="cpu")
    assert loaded.layers[0].state_dict()["groups.0.w13_scale"].dtype == torch.float32


def test_the_model_runs_where_only_experts_are_quantized(stored):
    original, folder, spec = stored("int8")
    tokens = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out, expected = (
            moeplug.load(path, scheme_of(spec), device="cpu", runtime="transformers").model(tokens).logits
            for path in (folder, original)
        )
    assert torch.equal(out, expected)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """(unquantized, with mxfp4 blocks): gpt-oss as it is published, tiny."""
    family = find_family({"model_type": "gpt_oss"})
    original, folder = tmp_path_factory.mktemp("gpt_oss"), tmp_path_factory.mktemp("mxfp4") / "model"
    save(tiny_model(family, "gpt_oss"), original)
    shutil.copytree(original, folder)
    registry = Registry.discover()
    registry.activate("mx", "a test")
    fmt, spec = registry.format("mxfp4"), MXFP4

    def change(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            weight = tensors.pop(name).transpose(1, 2).contiguous()
            E, N, K = weight.shape
            codes = torch.empty(E, N, K // 2, dtype=torch.uint8)
            scales = quantize(weight, spec, fmt, codes)
            tensors |= {f"{name}_blocks": codes.view(E, N, K // 32, 16), f"{name}_scales": scales.scale}

    helpers.edit_tensors(folder / "model.safetensors", change)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    helpers.edit_json(folder / "config.json", lambda data: data.update(quantization_config=config))
    return original, folder


MXFP4 = WeightSpec(format="mxfp4", strategy="group", group_size=32, scale_dtype="float8_e8m0fnu")


def test_gpt_oss_in_mxfp4_is_handed_through_biases_and_all(gpt_oss):
    original, folder = gpt_oss
    loaded = moeplug.load(folder, scheme_of(MXFP4), device="cpu", runtime="transformers")
    assert_same_layers(loaded, moeplug.load(original, scheme_of(MXFP4), device="cpu"))
    assert "groups.0.w13_bias" in loaded.layers[0].state_dict()


@pytest.mark.parametrize("case", [*CASES, "gpt_oss"])
def test_our_own_form_takes_over_what_is_stored(stored, gpt_oss, tmp_path, case):
    folder, spec = (gpt_oss[1], MXFP4) if case == "gpt_oss" else stored(case)[1:]
    api.export(folder, scheme_of(spec), tmp_path / "export", "moeplug")
    assert_same_layers(api.load(tmp_path / "export", device="cpu"), api.load(folder, scheme_of(spec), device="cpu"))
    assert verify(tmp_path / "export", folder).errors[0].worst == 0
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "moeplug"


def test_another_form_would_quantize_once_more_and_is_refused(stored, tmp_path):
    _, folder, spec = stored("int8")
    with pytest.raises(SchemeError, match=r"already quantized .*copy its folder; else use --format moeplug"):
        api.export(folder, scheme_of(spec), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_weights_outside_the_experts_that_are_quantized_too_are_not_exported(stored, tmp_path):
    _, folder, spec = stored("int8")

    def change(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight_scale"] = torch.ones(64, 1)

    helpers.edit_tensors(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=r"not its experts alone: .*q_proj.weight_scale"):
        api.export(folder, scheme_of(spec), tmp_path / "export", "moeplug")


def test_mxfp4_blocks_mean_what_transformers_makes_of_them(gpt_oss):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from moeplug.integrations.prequantized import Mxfp4Blocks
    from moeplug.quantization import dequantized

    tensors = helpers.load_file(gpt_oss[1] / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # (E, H, 2I)
    parts = {"weight": blocks[3].flatten(1), "scale": scales[3]}
    assert torch.equal(dequantized(*Mxfp4Blocks().values(parts, 64))[0], expected[3].T)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        (compressed_tensors("int-quantized", num_bits=3, type="int", strategy="channel"), "in a way that is not read"),
        (compressed_tensors("marlin-24", **INT4, strategy="group", group_size=32), "in a way that is not read"),
        (True, "quant_method None"),
    ],
    ids=["gptq", "fp8_without_blocks", "three_bits", "marlin", "no_object"],
)
def test_a_way_that_is_not_read_is_refused(tiny_checkpoint, tmp_path, config, expected):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    helpers.edit_json(folder / "config.json", lambda data: data.update(quantization_config=config))
    with pytest.raises(CheckpointError) as caught:
        moeplug.plan(folder, "int8", device="cpu")
    assert "already quantized" in str(caught.value)
    assert expected in str(caught.value)


BLOCK = {"type": "float", "num_bits": 8, "strategy": "block"}


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"quant_method": "compressed-tensors", "config_groups": ["Linear"]}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": ["Linear"]}}, "config_groups.g"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": "int8"}}},
            "config_groups.g.weights",
        ),
        (compressed_tensors("int-quantized", type="int", num_bits=[8]), "weights.num_bits"),
        (compressed_tensors("pack-quantized", **INT4, strategy="group", group_size=1), "group_size"),
        (compressed_tensors("float-quantized", **BLOCK), "needs block_structure"),
        (compressed_tensors("float-quantized", **BLOCK, block_structure="128x128"), "weights.block_structure"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "block_structure.1"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "block_structure"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "block_structure.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_quantization_config_with_a_wrong_value_is_refused_with_its_key(tiny_checkpoint, tmp_path, config, key):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    helpers.edit_json(folder / "config.json", lambda data: data.update(quantization_config=config))
    with pytest.raises(CheckpointError, match=r"^config\.json: 'quantization_config") as caught:
        moeplug.plan(folder, "int8", device="cpu")
    assert key in str(caught.value)


def test_a_missing_scale_and_a_wrong_shape_are_named(stored):
    _, folder, spec = stored("int8")
    name = "model.layers.2.mlp.experts.5.up_proj.weight_scale"
    helpers.edit_tensors(folder / "model.safetensors", lambda t: t.update({name: t[name][:-1].contiguous()}))
    with pytest.raises(CheckpointError, match=rf"'{name}': is \[95, 1\] F32; expected \[96, 1\] of F32 or BF16 or F16"):
        moeplug.plan(folder, scheme_of(spec), device="cpu")
    helpers.edit_tensors(folder / "model.safetensors", lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=rf"1 of 48 tensors .*layer 2 .*are missing: '{name}'"):
        moeplug.plan(folder, scheme_of(spec), device="cpu")


def test_a_scale_that_is_not_finite_is_refused(stored):
    _, folder, spec = stored("int8")
    name = "model.layers.0.mlp.experts.1.down_proj.weight_scale"
    helpers.edit_tensors(folder / "model.safetensors", lambda t: t[name].view(-1)[3:4].fill_(torch.nan))
    for scheme in (scheme_of(spec), scheme_of(WeightSpec(format="int8", strategy="tensor"), requantize=True)):
        with pytest.raises(CheckpointError, match=r"layer 0.* down.*(NaN|nan)"):
            moeplug.load(folder, scheme, device="cpu")


@pytest.mark.parametrize(
    ("case", "part", "change"),
    [
        ("int8", "weight_scale", lambda t: t.view(-1)[3:4].fill_(3e38)),
        ("fp8-block", "weight_scale_inv", lambda t: t.view(-1)[1:2].fill_(3e38)),
        ("fp8-block", "weight", lambda t: t.view(torch.uint8).view(-1)[5:6].fill_(0x7F)),
    ],
    ids=["scale_too_large", "block_scale_too_large", "a_code_that_is_NaN"],
)
def test_a_stored_weight_that_decodes_to_no_number_is_refused(stored, case, part, change):
    _, folder, spec = stored(case)
    name = f"model.layers.0.mlp.experts.1.down_proj.{part}"
    helpers.edit_tensors(folder / "model.safetensors", lambda t: change(t[name]))
    for scheme in (scheme_of(spec), scheme_of(WeightSpec(format="int8", strategy="tensor"), requantize=True)):
        with pytest.raises(CheckpointError, match=r"layer 0, expert 1, down: .*(nan|inf)"):
            moeplug.load(folder, scheme, device="cpu")


def test_a_config_that_speaks_of_quantized_weights_where_there_are_none_is_refused(tiny_checkpoint, tmp_path):
    folder, (spec, _, config) = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path), CASES["fp8-block"]
    helpers.edit_json(folder / "config.json", lambda data: data.update(quantization_config=config))
    with pytest.raises(CheckpointError, match=r"layer 0 .*are missing: .*weight_scale_inv"):
        moeplug.plan(folder, scheme_of(spec), device="cpu")


def test_biases_of_two_dtypes_in_one_layer_are_refused(gpt_oss, tmp_path):
    folder, name = helpers.copy_of(gpt_oss[1], tmp_path), "model.layers.0.mlp.experts.down_proj_bias"
    helpers.edit_tensors(folder / "model.safetensors", lambda t: t.update({name: t[name].half()}))
    with pytest.raises(CheckpointError, match=f"{name}.* expected one dtype for a layer's experts"):
        moeplug.plan(folder, scheme_of(MXFP4), device="cpu")


def test_a_scheme_that_requantizes_has_another_hash_and_older_ones_keep_theirs():
    spec = WeightSpec(format="int8")
    hashes = {scheme_of(spec).sha256, scheme_of(spec, requantize=False).sha256}
    assert len(hashes) == 1
    assert scheme_of(spec, requantize=True).sha256 not in hashes
