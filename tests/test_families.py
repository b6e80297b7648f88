"""Every family that has a descriptor gives the numbers of transformers' own model: tiny, random, saved by transformers.

A descriptor without a proof fails here, because the tests run over the folder of descriptors.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any, NamedTuple

import helpers
import pytest
import torch
from torch import nn

import moeplug
from moeplug.checkpoint.descriptor import expand, lies_in
from moeplug.checkpoint.family import Family, by_piece, find_family, known_families
from moeplug.checkpoint.reader import Checkpoint
from moeplug.errors import UsageError
from moeplug.integrations import family_check
from moeplug.integrations.family_check import LARGEST_ERROR, logits, prove, relative_error, tiny_config, tiny_model
from moeplug.integrations.transformers import TransformersExperts, auto_class, reference_model, transformers
from moeplug.moe.experts import QuantizedExperts
from moeplug.moe.router import route_reference
from moeplug.quantization import dequantize, quantize
from moeplug.registry import Registry
from moeplug.spec import WeightSpec

MODEL_TYPES = {model_type: family for family in known_families() for model_type in family.model_types}
# The version in which every family of the table was found; older ones may lack the newest.
ALL_FAMILIES = (5, 17)


class Tiny(NamedTuple):
    """A tiny model of transformers, and the folder that transformers saved it in."""

    family: Family
    model: Any
    folder: Any
    logits: torch.Tensor


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a function model_type → Tiny; skips where this transformers has no such model type, and says so."""
    made: dict[str, Tiny] = {}

    def make(model_type: str) -> Tiny:
        if model_type not in made:
            family = MODEL_TYPES[model_type]
            try:
                tiny_config(family, model_type)
            except UsageError as error:
                pytest.skip(str(error))
            folder = tmp_path_factory.mktemp(model_type)
            model = tiny_model(family, model_type)
            family_check.save(model, folder)
            made[model_type] = Tiny(family, model, folder, logits(model))
        return made[model_type]

    return make


def upstream_experts(tiny: Tiny) -> set[str]:
    """Return the paths of the experts modules that transformers built."""
    names = {name for name, module in tiny.model.named_modules() if name.split(".")[-1] == "experts"}
    assert all(isinstance(tiny.model.get_submodule(name), nn.Module) for name in names)
    return names


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < ALL_FAMILIES, reason="an older transformers"
)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_family_is_left_out_for_want_of_a_model(model_type):
    assert tiny_config(MODEL_TYPES[model_type], model_type).model_type == model_type


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_unquantized_logits_equal_those_of_transformers_with_every_moe_layer_replaced(tiny, model_type):
    made = tiny(model_type)
    scheme = family_check.PLAIN
    loaded = moeplug.load(made.folder, scheme, device="cpu", runtime="transformers")
    assert relative_error(logits(loaded.model), made.logits) < LARGEST_ERROR
    replaced = {name for name, module in loaded.model.named_modules() if isinstance(module, TransformersExperts)}
    assert replaced == upstream_experts(made) != set()
    original = made.model.state_dict()
    dense = [name for name in original if not any(name.startswith(path + ".") for path in replaced)]
    for name in dense:
        assert torch.equal(loaded.model.state_dict()[name], original[name]), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_int8_logits_are_those_of_transformers_with_weights_rounded_to_int8(tiny, model_type, tmp_path):
    made = tiny(model_type)
    loaded = moeplug.load(made.folder, "int8", device="cpu", runtime="transformers")
    found = logits(loaded.model)
    rounded = logits(reference_model(fake_quantized(made, tmp_path), torch.device("cpu")))
    assert relative_error(found, rounded) < LARGEST_ERROR
    assert relative_error(found, made.logits) > 10 * LARGEST_ERROR


def fake_quantized(made: Tiny, target):
    """Return a copy of the checkpoint whose experts are what their int8 form decodes to, in float32."""
    shutil.copytree(made.folder, target, dirs_exist_ok=True)
    checkpoint = Checkpoint.open(made.folder)
    sources = [
        s for layer in made.family.layers(checkpoint.config) for s in made.family.locate(layer, checkpoint.tensors)
    ]
    registry = Registry.discover()
    registry.activate("int8", "a test")
    spec, fmt = WeightSpec(format="int8"), registry.format("int8")

    def change(tensors):
        for piece, held in by_piece(sources).items():
            numbers = tensors[piece.tensor.name].view(-1)[piece.start // 4 : (piece.start + piece.nbytes) // 4]
            for source in held:
                weight = source.weight_of(numbers)
                if not source.of_bias:
                    stored = torch.empty(1, *weight.shape, dtype=torch.int8)
                    weight.copy_(dequantize(stored, quantize(weight.unsqueeze(0), spec, fmt, stored), fmt)[0])

    helpers.edit_tensors(target / "model.safetensors", change)
    return target


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_routing_rule_chooses_and_weighs_as_transformers_does(tiny, model_type):
    made = tiny(model_type)
    config, rule, memory = made.model.config.to_dict(), made.family.descriptor.routing, made.family.memory_name
    for layer in made.family.layers(config):
        where = lambda pattern, index=layer.index: memory(expand(pattern, index))  # noqa: E731
        owner = where(rule.weight).rpartition(".")[0]
        router, experts = made.model.get_submodule(owner), made.model.get_submodule(experts_path(made, layer.index))
        seen: dict[str, Any] = {}
        hooks = [
            router.register_forward_pre_hook(lambda module, args, seen=seen: seen.update(input=args[0])),
            experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.update(args=args)),
        ]
        logits(made.model)
        for hook in hooks:
            hook.remove()
        tensors = dict(made.model.state_dict())
        found = [None if p is None else tensors[where(p)] for p in (rule.bias, rule.correction, rule.expert_scale)]
        x = seen["input"].reshape(-1, seen["input"].shape[-1])
        scores = torch.nn.functional.linear(x, tensors[where(rule.weight)], found[0])
        correction = None if found[1] is None else found[1].flatten()
        weights, ids = route_reference(scores, made.family.router(config, layer.index), correction, found[2])
        assert torch.equal(*(by_expert(weights, ids, layer.num_experts) > 0, upstream_weights(seen, layer) > 0))
        torch.testing.assert_close(by_expert(weights, ids, layer.num_experts), upstream_weights(seen, layer))


def experts_path(made: Tiny, index: int) -> str:
    modules = dict(made.model.named_modules())
    return next(path for path in made.family.experts_paths(index) if path in modules)


def by_expert(weights, ids, num_experts):
    """Return (M, E): each expert's weight for each token, 0 where it is not chosen."""
    return torch.zeros(ids.shape[0], num_experts).scatter_(1, ids.long(), weights.float())


def upstream_weights(seen, layer):
    """Return (M, E) of what upstream gave its experts: ids and weights, or every expert's inputs, already weighted."""
    if not layer.router_weight_on_input:
        _, ids, weights = seen["args"]
        return by_expert(weights, ids, layer.num_experts)
    x = seen["input"].reshape(1, -1, layer.hidden_size)
    routed = seen["args"][0].view(layer.num_experts, -1, layer.hidden_size)
    return ((routed * x).sum(2) / (x * x).sum(2)).T


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_stacked_files_of_transformers_own_form_load_too(tiny, model_type, tmp_path):
    made = tiny(model_type)
    made.model.save_pretrained(tmp_path, save_original_format=False)
    if model_type == "kimi_linear":
        assert "model.layers.0.self_attn.conv1d.weight" in Checkpoint.open(tmp_path).tensors
    loaded = moeplug.load(tmp_path, family_check.PLAIN, device="cpu", runtime="transformers")
    assert relative_error(logits(loaded.model), made.logits) < LARGEST_ERROR


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_a_family_keeps_is_there_and_is_never_among_the_experts(tiny, model_type):
    made = tiny(model_type)
    checkpoint = Checkpoint.open(made.folder)
    claimed = set()
    for layer in made.family.layers(checkpoint.config):
        claimed |= {source.tensor.name for source in made.family.locate(layer, checkpoint.tensors)}
        for pattern in made.family.descriptor.kept:
            assert expand(pattern, layer.index) in checkpoint.tensors
    kept = {tensor.name for tensor in made.family.unclaimed(checkpoint.tensors, claimed, checkpoint.config)}
    assert kept | claimed == set(checkpoint.tensors)
    assert not kept & claimed
    shared = made.family.descriptor.shared
    if shared is not None:
        assert any(lies_in(name, tuple(shared.path.split("."))) for name in kept)


# The proof finds mistakes


def changed(family: Family, **form: Any) -> Family:
    """Return a family whose first form says something else."""
    first = family.descriptor.disk[0].model_copy(update=form)
    return replace(family, descriptor=family.descriptor.model_copy(update={"disk": [first]}))


MISTAKES = {
    "gate_and_up_swapped": ("mixtral", {"gate": 1, "up": 0}, "gate and up swapped"),
    "stacked_swapped": ("granitemoe", {"first": "up"}, "gate and up swapped"),
    "not_interleaved": ("gpt_oss", {"interleaved": False}, "interleaved"),
    "interleaved": ("granitemoe", {"interleaved": True}, "interleaved"),
    "not_transposed": ("llama4_text", {"transposed": False}, "transposed"),
    "interleaved_and_swapped": ("gpt_oss", {"interleaved": False, "first": "up"}, "interleaved"),
    "down_not_transposed": ("dbrx", {"transposed": False}, ""),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_wrong_descriptor_is_not_proven_and_the_mistake_is_named(case, tmp_path):
    model_type, form, hint = MISTAKES[case]
    family = MODEL_TYPES[model_type]
    if case == "gate_and_up_swapped":
        names = family.descriptor.disk[0]
        form = {"gate": names.up, "up": names.gate}
    proof = prove(changed(family, **form), model_type, tmp_path)
    assert not proof.holds
    assert hint in proof.hint
    assert model_type in proof.describe()


def test_a_wrong_activation_or_clamp_is_not_proven(tmp_path):
    family = MODEL_TYPES["gpt_oss"]
    for number, update in enumerate(({"limit": 100.0}, {"offset": 0.0}, {"alpha": 1.0})):
        activation = family.descriptor.activation.model_copy(update=update)
        wrong = replace(family, descriptor=family.descriptor.model_copy(update={"activation": activation}))
        assert not prove(wrong, "gpt_oss", tmp_path / str(number)).holds, update


def test_a_family_of_another_model_type_is_not_proven(tmp_path):
    with pytest.raises(UsageError, match="no model type 'nonesuch'"):
        prove(MODEL_TYPES["mixtral"], "nonesuch", tmp_path)


def test_images_are_seen_by_a_model_that_has_them(tiny):
    made = tiny("qwen3_vl_moe")
    assert auto_class(made.model.config) is transformers.AutoModelForImageTextToText
    assert find_family(Checkpoint.open(made.folder).config) == made.family
    assert any(isinstance(m, QuantizedExperts) for m in family_check.load_plain(made.family, made.folder).modules())


# Jamba-Mini 1.7, in its real shapes


JAMBA_MINI = {
    "model_type": "jamba", "num_hidden_layers": 32, "num_experts": 16, "num_experts_per_tok": 2, "hidden_size": 4096,
    "intermediate_size": 14336, "hidden_act": "silu", "expert_layer_period": 2, "expert_layer_offset": 1,
    "attn_layer_period": 8, "attn_layer_offset": 4, "dtype": "bfloat16",
}  # fmt: skip


def write_config(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_jamba_mini_is_planned_with_its_layer_pattern_and_real_shapes(tmp_path):
    planned = moeplug.plan(write_config(tmp_path, **JAMBA_MINI), "int8", device="cpu", dummy=True)
    assert [layer.layer.index for layer in planned.layers] == list(range(1, 32, 2))
    weights = 16 * 3 * 4096 * 14336
    assert planned.expert_bytes_before == 16 * 2 * weights
    assert planned.expert_bytes_after == 16 * (weights + 16 * 4 * (2 * 14336 + 4096))


@pytest.mark.slow
def test_one_moe_layer_of_jamba_mini_loads_and_runs(tmp_path):
    folder = write_config(tmp_path, **JAMBA_MINI | {"num_hidden_layers": 2})
    loaded = moeplug.load(folder, "int8", device="cpu", dummy=True)
    assert list(loaded.layers) == [1]
    layer = loaded.layers[1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4096, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(16, generator=generator)[:2] for _ in range(5)])
    out = layer(hidden, torch.full((5, 2), 0.5), ids)
    assert out.shape == hidden.shape
    # Weights have a standard deviation of 0.02, so gate and up have 1.3, h about 1, and down's sum over 14336 about 2.
    assert 0.5 < float(out.float().std()) < 4
    again = layer(hidden[:1], torch.full((1, 2), 0.5), ids[:1])
    torch.testing.assert_close(again.float(), out[:1].float(), atol=0.02, rtol=0.02)
