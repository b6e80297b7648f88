"""A family finds each expert weight exactly once, and its bytes are those that transformers has in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor

from moeplug.checkpoint.descriptor import expand, lies_in
from moeplug.checkpoint.family import Family, WeightSource, by_piece, find_family, known_families
from moeplug.checkpoint.reader import Checkpoint, TensorInfo
from moeplug.errors import CheckpointError
from moeplug.moe.layout import PROJECTIONS, LayerSpec
from moeplug.moe.router import RouterSpec

MOE_LAYERS = {"qwen3_moe": [0, 2], "mixtral": [0, 1], "olmoe": [0, 1], "jamba": [1, 3]}
DESCRIPTOR = """
api: 1
model_types: [mine]
sizes:
  layers: {key: num_hidden_layers}
  experts: {key: num_local_experts}
  experts_per_token: {key: num_experts_per_tok}
  hidden: {key: hidden_size}
  intermediate: {key: intermediate_size}
activation: silu
disk:
  - gate_up: model.layers.{layer}.mlp.experts.gate_up_proj
    down: model.layers.{layer}.mlp.experts.down_proj
routing: {weight: "model.layers.{layer}.mlp.gate.weight", score: softmax, renormalize: true}
transformers:
  experts: model.layers.{layer}.mlp.experts
"""


def family_of(folder: Path, text: str = DESCRIPTOR, name: str = "mine") -> Family:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return Family.load(path)


def everything(checkpoint: Checkpoint, family: Family | None = None) -> tuple[list[WeightSource], tuple[str, ...]]:
    """Return all expert weights and the names of all other tensors, as a plan would."""
    family = family or find_family(checkpoint.config)
    sources = [s for layer in family.layers(checkpoint.config) for s in family.locate(layer, checkpoint.tensors)]
    claimed = {source.tensor.name for source in sources}
    kept = family.unclaimed(checkpoint.tensors, claimed, checkpoint.config)
    return sources, tuple(tensor.name for tensor in kept)


def weights_of(checkpoint: Checkpoint, sources: Iterable[WeightSource]) -> dict[tuple[int, int, str], Tensor]:
    """Return (layer, expert, projection) → weight, read through the stream as a load reads it."""
    pieces = by_piece(sources)
    weights = {}
    for piece, content in checkpoint.stream(list(pieces), helpers.buffers_for(pieces)):
        numbers = torch.frombuffer(bytearray(content), dtype=torch.bfloat16)
        for source in pieces[piece]:
            weights[source.layer, source.expert, source.projection] = source.weight_of(numbers)
    return weights


def assert_weights_are_those_in_memory(model_type: str, weights: dict[tuple[int, int, str], Tensor]) -> None:
    for layer in MOE_LAYERS[model_type]:
        gate_up, down = helpers.memory_experts(model_type, layer)
        gate, up = gate_up.chunk(2, dim=1)
        for expert in range(len(down)):
            for projection, expected in zip(PROJECTIONS, (gate, up, down), strict=True):
                assert torch.equal(weights[layer, expert, projection], expected[expert]), (layer, expert, projection)


def refusal(checkpoint: Path | Checkpoint, family: Family | None = None) -> str:
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        everything(opened, family)
    return str(caught.value)


@pytest.fixture
def damaged(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a per-expert checkpoint in one file."""
    return helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)


@pytest.fixture
def damaged_fused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a fused checkpoint in one file."""
    return helpers.copy_of(tiny_checkpoint("qwen3_moe", fused=True), tmp_path)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    helpers.edit_tensors(folder / "model.safetensors", change)
    return folder


# The four families


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
@pytest.mark.parametrize("shards", [1, 3])
def test_expert_weights_are_bit_for_bit_those_that_transformers_has_in_memory(
    tiny_checkpoint: Callable[..., Path], model_type: str, fused: bool, shards: int
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(model_type, fused=fused, shards=shards))
    sources, _ = everything(checkpoint)
    assert any("gate_up" in source.tensor.name for source in sources) == fused
    assert_weights_are_those_in_memory(model_type, weights_of(checkpoint, sources))


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
def test_each_expert_weight_is_found_once_and_read_alone(
    tiny_checkpoint: Callable[..., Path], model_type: str, fused: bool
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(model_type, fused=fused))
    sources, _ = everything(checkpoint)
    layers = find_family(checkpoint.config).layers(checkpoint.config)
    assert Counter((s.layer, s.expert, s.projection) for s in sources) == Counter(
        (layer.index, expert, p) for layer in layers for expert in range(layer.num_experts) for p in PROJECTIONS
    )
    assert all(s.nbytes == 2 * s.shape[0] * s.shape[1] for s in sources)
    assert all(len(held) == 1 for held in by_piece(sources).values())


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_all_other_tensors_are_kept_and_have_a_place_in_the_transformers_model(
    tiny_checkpoint: Callable[..., Path], model_type: str
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(model_type))
    family = find_family(checkpoint.config)
    sources, kept = everything(checkpoint)
    assert {*kept, *(source.tensor.name for source in sources)} == set(checkpoint.tensors)
    memory = helpers.tiny_model(model_type).state_dict()
    for name in kept:
        assert tuple(memory[family.memory_name(name)].shape) == checkpoint.tensors[name].shape
    for layer in MOE_LAYERS[model_type]:
        assert helpers.tiny_model(model_type).get_submodule(family.experts_paths(layer)[0]).num_experts > 1


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_the_tensors_that_a_family_keeps_are_there_in_every_moe_layer(
    tiny_checkpoint: Callable[..., Path], model_type: str
) -> None:
    _, kept = everything(Checkpoint.open(tiny_checkpoint(model_type)))
    family = next(family for family in known_families() if model_type in family.model_types)
    for layer in MOE_LAYERS[model_type]:
        assert {expand(pattern, layer) for pattern in family.descriptor.kept} <= set(kept)


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("qwen3_moe", {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 3, "mlp_only_layers": []}),
        ("jamba", {"num_hidden_layers": 6, "expert_layer_period": 3, "expert_layer_offset": 2}),
        ("jamba", {"num_hidden_layers": 3, "expert_layer_period": 1, "expert_layer_offset": 0}),
    ],
    ids=["step_2_except_3", "step_3", "period_3_offset_2", "every_layer"],
)
def test_moe_layers_are_those_in_which_transformers_builds_experts(model_type: str, changed: dict[str, Any]) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **helpers.TINY_CONFIGS[model_type] | changed)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    built = [int(name.split(".")[2]) for name, _ in model.named_modules() if name.endswith(".experts")]
    written = json.loads(config.to_json_string(use_diff=False))
    assert [layer.index for layer in find_family(written).layers(written)] == built


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_a_layer_has_the_sizes_of_config_json_and_the_activation(
    tiny_checkpoint: Callable[..., Path], model_type: str
) -> None:
    config = Checkpoint.open(tiny_checkpoint(model_type)).config
    experts = 8 if model_type == "qwen3_moe" else 4
    first = MOE_LAYERS[model_type][0]
    block = "feed_forward" if model_type == "jamba" else "mlp"
    expected = LayerSpec(first, f"model.layers.{first}.{block}.experts", experts, 2, 64, 96, "silu", "bfloat16")
    assert find_family(config).layers(config)[0] == expected


def test_published_and_newly_saved_names_of_a_size_are_both_read(tiny_checkpoint: Callable[..., Path]) -> None:
    config = Checkpoint.open(tiny_checkpoint("qwen3_moe")).config
    family = find_family(config)
    published = {key: value for key, value in config.items() if key != "num_local_experts"} | {"num_experts": 8}
    assert family.layers(published) == family.layers(config)
    with pytest.raises(CheckpointError, match="contradict each other"):
        family.layers(config | {"num_experts": 9})


@pytest.mark.parametrize(
    ("model_type", "changed", "renormalize"),
    [
        ("mixtral", {}, True),
        ("jamba", {}, False),
        ("qwen3_moe", {"norm_topk_prob": True}, True),
        ("olmoe", {"norm_topk_prob": None}, False),
    ],
)
def test_routing_says_whether_weights_are_renormalized(
    tiny_checkpoint: Callable[..., Path], model_type: str, changed: dict[str, Any], renormalize: bool
) -> None:
    config = Checkpoint.open(tiny_checkpoint(model_type)).config | changed
    rule = find_family(config).router(config)
    assert rule == RouterSpec(2, renormalize=renormalize)


# Which family


def test_an_unknown_model_type_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(CheckpointError, match=r"'mixtrall' is not known; known: dbrx, .*, mixtral, .* mean 'mixtral'"):
        find_family({"model_type": "mixtrall"})


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["mixtral"]}], ids=str)
def test_a_config_without_a_model_type_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: .*model_type.* expected one of dbrx, "):
        find_family(config)


def test_a_family_of_a_plugin_is_found_and_cannot_take_anothers_model_type(tmp_path: Path) -> None:
    mine = family_of(tmp_path)
    assert find_family({"model_type": "mine"}, families=[mine]) is mine
    thief = family_of(tmp_path, DESCRIPTOR.replace("[mine]", "[mixtral]"), "thief")
    with pytest.raises(CheckpointError, match=r"mixtral\.yaml and .*thief\.yaml"):
        find_family({"model_type": "mixtral"}, families=[*known_families(), thief])


# Which layers, and which sizes


def sized(text: str, folder: Path, **config: Any) -> list[LayerSpec]:
    """Return the layers of a config of 6 layers under the descriptor with some text in place of the routing rule."""
    base = {"num_hidden_layers": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 8}
    family = family_of(folder, DESCRIPTOR.replace("routing:", f"{text}\nrouting:"))
    return family.layers(base | {"intermediate_size": 16, "model_type": "mine"} | config)


LAYERS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "listed": ("moe_layers: {listed: moe, first: 5}", {"moe": [3, 1, 9]}, [1, 3]),
    "not_listed": ("moe_layers: {listed: moe, first: 4}", {"moe": None}, [4, 5]),
    "kinds": ("moe_layers: {kinds: [{key: kinds, is: moe}]}", {"kinds": ["a", "moe", "a", "a", "moe", "b"]}, [1, 4]),
    "letters": ("moe_layers: {kinds: [{key: none, is: x}, {key: kinds, is: E}]}", {"kinds": "M*EM*E"}, [2, 5]),
    "from_the_end": ("moe_layers: {first: 1, last: -2}", {}, [1, 2, 3, 4]),
    "last": ("moe_layers: {last: {key: end}}", {"end": 2}, [0, 1, 2]),
}


@pytest.mark.parametrize("case", LAYERS)
def test_moe_layers_are_as_config_json_lists_or_names_them(tmp_path: Path, case: str) -> None:
    text, config, expected = LAYERS[case]
    assert [layer.index for layer in sized(text, tmp_path, **config)] == expected


def test_a_size_may_be_a_list_with_one_for_each_layer(tmp_path: Path) -> None:
    sizes = [8, 16, 24, 32, 40, 48]
    assert [layer.intermediate_size for layer in sized("", tmp_path, intermediate_size=sizes)] == sizes
    with pytest.raises(CheckpointError, match=r"intermediate_size is \[8, 16\], expected"):
        sized("", tmp_path, intermediate_size=[8, 16])


def test_an_inner_object_and_dotted_keys_are_read(tmp_path: Path) -> None:
    text = DESCRIPTOR.replace("sizes:", "section: text_config\nsizes:").replace(
        "{key: hidden_size}", "{key: ffn.width}"
    )
    text = text.replace("{key: num_hidden_layers}", "{key: depth, length_of: [kinds]}")
    inner = {"ffn": {"width": 8}, "kinds": ["a"] * 3, "num_local_experts": 4, "num_experts_per_tok": 2}
    layers = family_of(tmp_path, text).layers({"model_type": "mine", "text_config": inner, "intermediate_size": 16})
    assert [(layer.index, layer.hidden_size) for layer in layers] == [(0, 8), (1, 8), (2, 8)]


def test_what_a_family_ignores_is_neither_kept_nor_refused(damaged: Path) -> None:
    extra = ["model.layers.3.mlp.experts.0.gate_proj.weight", "model.layers.3.norm.weight", "mtp.layers.0.x"]
    change_tensors(damaged, lambda tensors: tensors.update({name: torch.zeros(2) for name in extra}))
    checkpoint = Checkpoint.open(damaged)
    family = find_family(checkpoint.config)
    ignoring = family.descriptor.model_copy(update={"ignore": ["model.layers.{extra}", "mtp"]})
    kept = everything(checkpoint, replace(family, descriptor=ignoring))[1]
    assert not set(extra) & set(kept)
    assert "model.layers.2.mlp.gate.weight" in kept
    assert "1 tensor among the experts" in refusal(checkpoint, family)


# Wrong values in config.json


WRONG_VALUES: dict[str, tuple[str, Any, str]] = {
    "absent": ("hidden_size", None, "has no hidden_size, expected the hidden size, a whole number"),
    "absent_of_two_names": ("num_local_experts", None, "has no num_experts or num_local_experts"),
    "text": ("num_local_experts", "8", "num_local_experts is '8', expected"),
    "true": ("num_hidden_layers", True, "num_hidden_layers is True, expected"),
    "zero": ("moe_intermediate_size", 0, "moe_intermediate_size is 0, expected the intermediate size"),
    "negative": ("num_experts_per_tok", -1, "num_experts_per_tok is -1"),
    "absurd": ("num_hidden_layers", 10**15, "num_hidden_layers is 1000000000000000, expected"),
    "a_layer_too_many": ("num_hidden_layers", 1001, "num_hidden_layers is 1001, expected the layers, a whole number"),
    "an_expert_too_many": ("num_local_experts", 16385, "expected the experts, a whole number from 1 to 16,384"),
    "fraction": ("hidden_size", 64.0, "hidden_size is 64.0"),
    "more_chosen_than_there_are": ("num_experts_per_tok", 9, "9 experts per token, but only 8 experts"),
    "activation": ("hidden_act", "xielu", "hidden_act is 'xielu', expected one of silu"),
    "layers_are_no_list": ("mlp_only_layers", 1, "mlp_only_layers is 1, expected a list"),
    "layers_of_text": ("mlp_only_layers", ["0"], "mlp_only_layers is ['0'], expected a list"),
    "period_zero": ("decoder_sparse_step", 0, "decoder_sparse_step is 0, expected the period"),
    "all_dense": ("mlp_only_layers", [0, 1, 2], "none of the 3 layers has experts"),
    "quantized": ("quantization_config", {"quant_method": "fp8"}, "already quantized (quantization_config"),
    "quantized_somehow": ("quantization_config", True, "already quantized"),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_a_wrong_value_in_config_json_is_named_with_what_was_expected(
    tiny_checkpoint: Callable[..., Path], case: str
) -> None:
    key, value, expected = WRONG_VALUES[case]
    config = Checkpoint.open(tiny_checkpoint("qwen3_moe")).config | {key: value}
    with pytest.raises(CheckpointError) as caught:
        find_family(config).layers(config)
    assert str(caught.value).startswith("config.json: ")
    assert expected in str(caught.value)


# Rows 17 to 20, 23 and 24: tensors that are not what config.json says


@pytest.mark.parametrize("digits", ["9" * 5000, "٣"], ids=["5000_digits", "arabic_three"])
def test_a_name_with_a_number_that_no_layer_has_is_kept_under_its_name(digits: str) -> None:
    name = f"model.layers.{digits}.norm.weight"
    tensors = {name: TensorInfo(name, "BF16", (1,), Path("a.safetensors"), 0, 2)}
    for family in known_families():
        assert family.joined([name]) == {}
        assert not family._is_ignored(name, 3)
    assert list(known_families()[0].unclaimed(tensors, ())) == [tensors[name]]


def test_a_missing_projection_of_one_expert_is_named(damaged: Path) -> None:
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    change_tensors(damaged, lambda tensors: tensors.pop(name))
    message = refusal(damaged)
    assert "1 of 24 expert tensors of layer 2 are missing" in message
    assert f"down of expert 5 ({name})" in message


def test_of_many_missing_weights_ten_and_the_count_are_named(damaged: Path) -> None:
    change_tensors(damaged, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".up_proj" in n or ".7." in n])
    message = refusal(damaged)
    assert message.startswith("10 of 24 ")
    assert message.count("model.layers.0.mlp.experts") == 10
    change_tensors(damaged, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".6." in n])
    assert "and 2 more" in refusal(damaged)


def test_a_missing_fused_tensor_is_named(damaged_fused: Path) -> None:
    change_tensors(damaged_fused, lambda tensors: tensors.pop("model.layers.0.mlp.experts.down_proj"))
    assert "down of 8 experts (model.layers.0.mlp.experts.down_proj)" in refusal(damaged_fused)


def test_names_that_match_nothing_are_shown_beside_the_patterns_that_were_tried(damaged: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name.replace(".mlp.", ".moe.")] = tensors.pop(name)

    message = refusal(change_tensors(damaged, rename))
    assert message.startswith("0 of 24 or 2 expert tensors of layer 0 matched")
    assert "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight" in message
    assert "'model.layers.0.moe.experts.0." in message


@pytest.mark.parametrize("form", ["per_expert", "fused"])
@pytest.mark.parametrize(
    "change", [lambda t: t[..., :-1], lambda t: t.flatten(), lambda t: t.mT], ids=["narrow", "rank", "transposed"]
)
def test_a_wrong_shape_is_refused_with_both_shapes(
    damaged: Path, damaged_fused: Path, form: str, change: Callable[[Tensor], Tensor]
) -> None:
    folder, part = (damaged, "experts.3.up_proj.weight") if form == "per_expert" else (damaged_fused, "gate_up_proj")
    name = f"model.layers.2.mlp.{part}" if form == "per_expert" else f"model.layers.2.mlp.experts.{part}"
    right = list(Checkpoint.open(folder).tensors[name].shape)
    change_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    wrong = list(Checkpoint.open(folder).tensors[name].shape)
    message = refusal(folder)
    assert f"model.safetensors: tensor '{name}': has shape {wrong}, expected {right} by config.json" in message


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool], ids=str
)
def test_weights_of_eight_bits_are_refused_as_already_quantized(damaged: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    change_tensors(damaged, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    message = refusal(damaged)
    assert f"'{name}': dtype" in message
    assert "already quantized" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_weights_of_another_dtype_are_refused_with_those_that_are_read(damaged: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    change_tensors(damaged, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert "expected one of BF16, F16, F32" in refusal(damaged)


def test_two_dtypes_in_one_layer_are_refused(damaged: Path) -> None:
    name = "model.layers.0.mlp.experts.4.gate_proj.weight"
    change_tensors(damaged, lambda tensors: tensors.update({name: tensors[name].float()}))
    assert "expected one dtype for a layer's experts" in refusal(damaged)


def test_experts_in_both_forms_at_once_are_refused(damaged: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    change_tensors(damaged, lambda tensors: tensors.update({name: torch.zeros(8, 64, 96, dtype=torch.bfloat16)}))
    message = refusal(damaged)
    assert "layer 0 has its experts twice" in message
    assert name in message


STRAYS = {
    "an_expert_too_many": "model.layers.0.mlp.experts.8.gate_proj.weight",
    "a_bias": "model.layers.0.mlp.experts.0.gate_proj.bias",
    "a_scale": "model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv",
    "a_leading_zero": "model.layers.0.mlp.experts.00.gate_proj.weight",
    "experts_of_a_dense_layer": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "experts_of_a_layer_too_many": "model.layers.3.mlp.experts.0.gate_proj.weight",
}


@pytest.mark.parametrize("case", STRAYS)
def test_a_tensor_among_the_experts_that_nobody_claims_is_refused(damaged: Path, case: str) -> None:
    name = STRAYS[case]
    change_tensors(damaged, lambda tensors: tensors.update({name: torch.zeros(2, dtype=torch.bfloat16)}))
    message = refusal(damaged)
    assert "1 tensor among the experts" in message
    assert f"'{name}'" in message


def test_a_fused_bias_is_refused(damaged_fused: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    change_tensors(damaged_fused, lambda tensors: tensors.update({name: torch.zeros(8, 192)}))
    assert f"'{name}'" in refusal(damaged_fused)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.shared_experts.up_proj.weight", "model.layers.0.mlp.expertsx.y"])
def test_a_name_that_only_begins_like_the_experts_is_kept(damaged: Path, name: str) -> None:
    change_tensors(damaged, lambda tensors: tensors.update({name: torch.zeros(2)}))
    assert name in everything(Checkpoint.open(damaged))[1]


# Forms that no shipped family has


@pytest.mark.parametrize("first", ["gate", "up"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["concatenated", "interleaved"])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_every_declared_layout_of_fused_tensors_gives_the_same_weights(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, transposed: bool, interleaved: bool, first: str
) -> None:
    folder = helpers.copy_of(tiny_checkpoint("mixtral", fused=True), tmp_path)
    helpers.rewrite_fused(folder, "mixtral", transposed=transposed, interleaved=interleaved, first=first)
    options = f"    transposed: {transposed}\n    interleaved: {interleaved}\n    first: {first}\n".lower()
    family = family_of(tmp_path, DESCRIPTOR.replace("routing:", f"{options}routing:".lstrip("\n")))
    checkpoint = Checkpoint.open(folder)
    sources, _ = everything(checkpoint, family)
    assert_weights_are_those_in_memory("mixtral", weights_of(checkpoint, sources))


def test_a_square_expert_is_read_as_declared_because_its_shape_says_nothing(tmp_path: Path) -> None:
    size, experts = 4, 2
    layer = LayerSpec(0, "experts", experts, 1, size, size)
    down = TensorInfo("model.layers.0.mlp.experts.down_proj", "F32", (experts, size, size), Path("f"), 0, 128)
    pair = TensorInfo("model.layers.0.mlp.experts.gate_up_proj", "F32", (experts, 8, size), Path("f"), 128, 256)
    numbers = torch.arange(16.0)
    for transposed in (False, True):
        text = DESCRIPTOR.replace("routing:", f"    transposed: {str(transposed).lower()}\nrouting:")
        shape = (experts, size, 8) if transposed else pair.shape
        tensors = {down.name: down, pair.name: TensorInfo(pair.name, "F32", shape, Path("f"), 128, 256)}
        sources = family_of(tmp_path, text).locate(layer, tensors)
        found = next(source for source in sources if source.projection == "down" and source.expert == 1)
        expected = numbers.reshape(size, size)
        assert torch.equal(found.weight_of(numbers), expected.T if transposed else expected)


def test_patterns_are_texts_and_not_regular_expressions(damaged_fused: Path, tmp_path: Path) -> None:
    text = DESCRIPTOR.replace("mlp.experts", "mlp.e.perts")
    family = family_of(tmp_path, text.replace("intermediate_size", "moe_intermediate_size"))
    assert "0 of 2 expert tensors" in refusal(damaged_fused, family)
    assert not lies_in("model.layers.0.mlp.experts.x", ("model", "layers", "{layer}", "mlp", ".*"))


BAD_DESCRIPTORS: dict[str, tuple[str, str, str]] = {
    "unknown_key": ("activation: silu", "activation: silu\nactivatoin: silu", "activatoin"),
    "unknown_activation": ("activation: silu", "activation: sillu", "sillu"),
    "later_api": ("api: 1", "api: 2", "api 2"),
    "no_layer": ("model.layers.{layer}.mlp.experts.down_proj", "model.experts.down_proj", "{layer} is missing"),
    "part_of_a_segment": ("{layer}.mlp.experts.down_proj", "{layer}.mlp.down_{layer}", "whole segment"),
    "unknown_blank": ("{layer}.mlp.experts.down_proj", "{layer}.{block}.down", "whole segment"),
    "extra_elsewhere": ("{layer}.mlp.experts.down_proj", "{layer}.{extra}.down_proj", "whole segment"),
    "ignored_blank": ("activation: silu", 'activation: silu\nignore: ["a.{later}"]', "whole segment"),
    "empty_segment": ("mlp.experts.down_proj", "mlp..down_proj", "non-empty segments"),
    "expert_in_fused": ("mlp.experts.down_proj", "mlp.{expert}.down", "{expert} is in every name"),
    "fused_and_gate": ("  - gate_up:", "  - gate: a.{layer}\n    gate_up:", "already holds gate and up"),
    "no_form": (
        "  - gate_up: model.layers.{layer}.mlp.experts.gate_up_proj\n    down",
        "  - down",
        "gate, up and down",
    ),
    "no_gate_but_gated": ("  - gate_up:", "  - up:", "lacks a gate"),
    "a_gate_but_not_gated": ("activation: silu", "activation: silu\ngated: false", "has a gate"),
    "bias_of_other_parts": (
        "mlp.experts.down_proj\n",
        'mlp.experts.down_proj\n    bias: {up: "a.{layer}.b", down: "a.{layer}.c"}\n',
        "expected the keys of the weights, gate_up, down",
    ),
    "interleaved_without_both": (
        "  - gate_up: model.layers.{layer}.mlp.experts.gate_up_proj",
        "  - gate: a.{layer}\n    up: b.{layer}\n    interleaved: true",
        "for gate_up, which holds both",
    ),
    "one_name_twice": ("experts.gate_up_proj", "experts.down_proj", "the same name"),
    "too_many_experts": ("experts: {key: num_local_experts}", "experts: 100000000000000000", "at most 16384"),
    "period_of_nothing": ("activation: silu", "activation: silu\nmoe_layers: {period: 0}", "at least 1"),
    "layers_below_0": ("activation: silu", "activation: silu\nmoe_layers: {first: -3}", "at least 0"),
    "size_is_text": ("hidden: {key: hidden_size}", "hidden: hidden_size", "hidden"),
    "score": ("score: softmax", "score: softermax", "softermax"),
    "not_yaml": ("api: 1", "api: [", "YAML"),
}


@pytest.mark.parametrize("case", BAD_DESCRIPTORS)
def test_a_wrong_descriptor_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    old, new, expected = BAD_DESCRIPTORS[case]
    assert old in DESCRIPTOR
    with pytest.raises(CheckpointError) as caught:
        family_of(tmp_path, DESCRIPTOR.replace(old, new))
    assert "mine.yaml:" in str(caught.value)
    assert expected in str(caught.value)
