"""One layer through the five stages in memory: coverage, groups, hooks, and what a plugin may answer."""

from __future__ import annotations

import copy
import math
from types import ModuleType

import pytest
import torch

import moeplug
from moeplug import CheckpointError, PluginError, RefusedError, Scheme, SchemeError, UsageError
from moeplug.api import activate_plugins
from moeplug.hookspecs import STAGE_HOOKS
from moeplug.moe.experts import QuantizedExperts, relayout
from moeplug.moe.layout import CONCATENATED, INTERLEAVED, PROJECTIONS, LayerSpec
from moeplug.moe.reference import experts_reference
from moeplug.pipeline import LayerBuilder, plan_layer
from moeplug.quantization import Scales, quantize
from moeplug.registry import Registry

E, H, I, T, M = 6, 64, 32, 2, 9
LAYER = LayerSpec(4, "layer 4", E, T, H, I)


def scheme_of(text=""):
    body = "api: 1\nname: test\nplugin: int8\nweights: {format: int8, strategy: channel}\n"
    return Scheme.from_text(body + text)


def weights(seed=0, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(seed)
    w13, w2 = torch.randn(E, 2 * I, H, generator=g) * 0.1, torch.randn(E, H, I, generator=g) * 0.1
    return w13.to(dtype), w2.to(dtype)


def tokens(seed=1, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, H, generator=g).to(dtype)
    return hidden, torch.rand(M, T, generator=g), torch.randint(0, E, (M, T), generator=g)


def parts(w13, w2):
    return {"gate": w13[:, :I], "up": w13[:, I:], "down": w2}


def builder_of(scheme, plugin=None, layer=LAYER):
    """A builder whose int8 provider is the installed plugin, with the stages of `plugin` added to it."""
    registry = Registry.discover()
    activate_plugins(scheme, registry, torch.device("cpu"))
    if plugin is not None:
        module = ModuleType("test_plugin")
        vars(module).update({name: moeplug.hookimpl(hook) for name, hook in plugin.items()})
        manager = registry._manager
        original = manager.unregister(name="int8")
        for name in dir(original):
            if name.startswith("moeplug_") and not hasattr(module, name):
                setattr(module, name, getattr(original, name))
        manager.register(module, name="int8")
    return LayerBuilder(plan_layer(layer, scheme, registry, torch.device("cpu")), registry)


def feed_all(builder, w13, w2, order=None):
    steps = [(p, e) for p in PROJECTIONS for e in range(E)]
    for projection, expert in order or steps:
        builder.feed(projection, (expert,), parts(w13, w2)[projection][expert : expert + 1])
    return builder.finish()


def reference(w13, w2, hidden, topk_weights, ids):
    experts = [(w13[e, :I].float(), w13[e, I:].float(), w2[e].float()) for e in range(E)]
    return experts_reference(hidden, topk_weights, ids, experts)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_the_order_of_arrival_does_not_change_a_byte():
    w13, w2 = weights()
    steps = [(p, e) for p in PROJECTIONS for e in range(E)]
    shuffled = [steps[i] for i in torch.randperm(len(steps), generator=torch.Generator().manual_seed(3)).tolist()]
    one, _ = feed_all(builder_of(scheme_of()), w13, w2)
    other, _ = feed_all(builder_of(scheme_of()), w13, w2, shuffled)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_batch_of_experts_gives_the_bytes_of_one_at_a_time():
    w13, w2 = weights()
    batched = builder_of(scheme_of())
    for projection, tensor in parts(w13, w2).items():
        batched.feed(projection, range(4), tensor[:4])
        batched.feed(projection, (5, 4), tensor[[5, 4]])
    one, errors = feed_all(builder_of(scheme_of()), w13, w2)
    other, batched_errors = batched.finish()
    assert errors.worst == batched_errors.worst
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_quantize_experts_drives_the_same_stages():
    w13, w2 = weights()
    built, _ = feed_all(builder_of(scheme_of()), w13, w2)
    quantized = moeplug.quantize_experts(w13, w2, scheme_of())
    assert isinstance(quantized, QuantizedExperts)
    for name, tensor in built.state_dict().items():
        if not name.endswith("_extra_state"):
            assert torch.equal(tensor, quantized.state_dict()[name]), name


def test_the_forward_is_the_reference_on_decoded_weights():
    w13, w2 = weights()
    experts = moeplug.quantize_experts(w13, w2, "int8")
    hidden, topk_weights, ids = tokens()
    scale13, scale2 = experts.groups[0].w13_scale, experts.groups[0].w2_scale
    decoded13 = experts.groups[0].w13.float() * scale13
    decoded2 = experts.groups[0].w2.float() * scale2
    expected = reference(decoded13, decoded2, hidden, topk_weights, ids)
    # bfloat16 results of the same float32 sums in another order: half a unit in the last place, 2**-9.
    assert relative(experts(hidden, topk_weights, ids), expected) < 2**-8
    assert relative(experts(hidden, topk_weights, ids), reference(w13, w2, hidden, topk_weights, ids)) < 0.02


@pytest.mark.parametrize("missing", [("gate", 0), ("up", 5), ("down", 3)], ids=str)
def test_a_missing_expert_weight_is_named(missing):
    w13, w2 = weights()
    steps = [(p, e) for p in PROJECTIONS for e in range(E) if (p, e) != missing]
    with pytest.raises(CheckpointError, match=f"layer 4: never came: expert {missing[1]}, {missing[0]}$"):
        feed_all(builder_of(scheme_of()), w13, w2, steps)


def test_an_expert_weight_that_comes_twice_is_refused():
    w13, _ = weights()
    builder = builder_of(scheme_of())
    builder.feed("gate", (1,), w13[1:2, :I])
    with pytest.raises(CheckpointError, match="here: layer 4, expert 1: gate came twice"):
        builder.feed("gate", (1,), w13[1:2, :I], "here")


def test_an_expert_that_the_layer_does_not_have_is_refused():
    with pytest.raises(CheckpointError, match="layer 4 has no expert 6"):
        builder_of(scheme_of()).feed("gate", (6,), weights()[0][:1, :I])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named_to_the_element(bad):
    w13, _ = weights()
    w13[2, 3, 7] = bad
    builder = builder_of(scheme_of())
    with pytest.raises(CheckpointError, match=rf"a.safetensors: layer 4, expert 2, gate: {bad} at row 3, column 7"):
        builder.feed("gate", (1, 2), w13[1:3, :I], "a.safetensors")


def test_a_weight_of_the_wrong_shape_is_refused_with_both_shapes():
    with pytest.raises(CheckpointError, match=r"gate weights are \(1, 31, 64\); expected \(1, 32, 64\)"):
        builder_of(scheme_of()).feed("gate", (0,), weights()[0][:1, : I - 1])


def test_integer_weights_are_refused():
    with pytest.raises(CheckpointError, match="expected 16- or 32-bit floats"):
        builder_of(scheme_of()).feed("gate", (0,), torch.ones(1, I, H, dtype=torch.int8))


def test_accept_refuses_the_layer_and_names_the_worst_expert():
    w13, w2 = weights()
    scheme = scheme_of("accept: {relative_rms: 0.001}\n")
    with pytest.raises(RefusedError, match=r"layer 0, expert \d, (gate|up|down): relative error 0.00\d+ is above"):
        moeplug.quantize_experts(w13, w2, scheme)
    moeplug.quantize_experts(w13, w2, scheme_of("accept: {relative_rms: 0.05}\n"))


def test_the_reported_error_is_the_worst_and_the_mean_over_expert_weights():
    w13, w2 = weights()
    experts, errors = feed_all(builder_of(scheme_of()), w13, w2)
    group = experts.groups[0]
    decoded = {"w13": group.w13.float() * group.w13_scale, "w2": group.w2.float() * group.w2_scale}
    exact = parts(w13, w2)
    found = parts(decoded["w13"], decoded["w2"])
    each = {(p, e): relative(found[p][e], exact[p][e]) for p in PROJECTIONS for e in range(E)}
    assert errors.worst == pytest.approx(max(each.values()), rel=1e-4)
    assert errors.mean == pytest.approx(sum(each.values()) / len(each), rel=1e-4)
    (projection, expert) = max(each, key=each.get)
    assert errors.worst_where == f"expert {expert}, {projection}"


# Mixed precision: groups


MIXED = {
    "one_expert_unquantized": 'overrides: [{experts: "2", weights: null}]\n',
    "scattered_experts": 'overrides: [{experts: "0,3-4", weights: {format: int8, strategy: group, group_size: 32}}]\n',
    "down_unquantized": "overrides: [{projections: [down], weights: null}]\n",
    "everything_unquantized": 'overrides: [{layers: "0-9", weights: null}]\n',
    "three_groups": 'overrides: [{experts: "1", weights: null}, '
    '{experts: "5", weights: {format: int8, strategy: tensor}}]\n',
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("overrides", MIXED.values(), ids=MIXED)
def test_a_layer_of_several_groups_is_one_call_with_the_reference_result(overrides, dtype):
    w13, w2 = weights(dtype=dtype)
    experts = moeplug.quantize_experts(w13, w2, scheme_of(overrides))
    hidden, topk_weights, ids = tokens(dtype=dtype)
    ids[0, 0], ids[1, 1] = -1, E + 3
    ids[2] = 2
    expected = reference(w13, w2, hidden, topk_weights, ids)
    out = experts(hidden, topk_weights, ids)
    assert out.dtype == dtype
    assert relative(out, expected) < 0.02  # int8 weights are within 0.01, products of two of them within 0.02
    assert torch.equal(out, experts(hidden, topk_weights, ids))


def test_unquantized_experts_are_the_reference_to_rounding():
    w13, w2 = weights()
    experts = moeplug.quantize_experts(w13, w2, Scheme.from_text("api: 1\nname: plain\nweights: null\n"))
    hidden, topk_weights, ids = tokens()
    assert torch.equal(experts.groups[0].w13, w13)
    assert relative(experts(hidden, topk_weights, ids), reference(w13, w2, hidden, topk_weights, ids)) < 2**-8


def test_a_group_with_no_token_changes_nothing():
    w13, w2 = weights()
    experts = moeplug.quantize_experts(w13, w2, scheme_of(MIXED["one_expert_unquantized"]))
    hidden, topk_weights, ids = tokens()
    ids[ids == 2] = 3
    assert relative(experts(hidden, topk_weights, ids), reference(w13, w2, hidden, topk_weights, ids)) < 0.02


# What plugins may answer


def spoiled(change):
    """A stage 3 that quantizes as the core does, then spoils its answer."""

    def moeplug_quantize(ctx, projection, tensor, out):
        return change(quantize(tensor, ctx.spec(projection), ctx.format(projection), out))

    return {"moeplug_quantize": moeplug_quantize}


BAD_ANSWERS = {
    "allocate_shape": ({"moeplug_allocate": lambda ctx: {"w13": torch.empty(1), "w2": torch.empty(1)}}, "w13 is .1,."),
    "allocate_missing": ({"moeplug_allocate": lambda ctx: {}}, "stage allocate, layer 4: w13 is nothing"),
    "load_shape": ({"moeplug_load": lambda tensor: tensor[:, 1:]}, r"stage load, layer 4: returned \(1, 31, 64\)"),
    "load_type": ({"moeplug_load": lambda tensor: "weights"}, "returned str; expected 16- or 32-bit floats"),
    "load_dtype": ({"moeplug_load": lambda tensor: tensor.double()}, "returned .*float64; expected 16- or 32-bit"),
    "load_nan": ({"moeplug_load": lambda tensor: tensor * math.nan}, "returned NaN or an infinity for gate"),
    "allocate_type": ({"moeplug_allocate": lambda ctx: 5}, "returned int; expected a mapping of w13 and w2"),
    "quantize_type": (spoiled(lambda scales: scales.scale), "returned Tensor; expected moeplug.Scales"),
    "quantize_shape": (spoiled(lambda s: Scales(s.scale[:, :, 0])), r"scale is \(1, 32\); expected \(1, 32, 1\)"),
    "quantize_dtype": (spoiled(lambda s: Scales(s.scale.double())), "scale is torch.float64; expected torch.float32"),
    "quantize_nan": (spoiled(lambda s: Scales(s.scale * math.nan)), "a scale is NaN or infinite"),
    "quantize_zero_point": (
        spoiled(lambda s: Scales(s.scale, torch.zeros(s.scale.shape))),
        "zero_point is given; the spec has none",
    ),
    "create_scales_mapping": ({"moeplug_create_scales": lambda ctx: [1]}, "returned list; expected a mapping"),
    "create_scales_type": ({"moeplug_create_scales": lambda ctx: {"w13_scale": 1}}, "w13_scale is no tensor"),
    "create_scales_missing": ({"moeplug_create_scales": lambda ctx: {"x": torch.ones(1)}}, "left no 'w13_scale'"),
    "setup_kernel_type": ({"moeplug_setup_kernel": lambda ctx: 3}, "returned int; expected a callable"),
}


@pytest.mark.parametrize(("plugin", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_wrong_answer_to_a_stage_ends_the_load_with_plugin_and_stage(plugin, message):
    w13, w2 = weights()
    with pytest.raises(PluginError, match=message):
        feed_all(builder_of(scheme_of(), plugin), w13, w2)


def test_every_stage_is_called_in_order_with_what_the_contract_says():
    calls = []

    def seen(name, keys):
        def hook(**given):
            calls.append((name, given))

        arguments = ", ".join(keys)
        return eval(f"lambda {arguments}: hook(**dict({', '.join(f'{k}={k}' for k in keys)}))", {"hook": hook})

    given = {
        "moeplug_allocate": ["ctx"],
        "moeplug_load": ["ctx", "projection", "experts", "tensor"],
        "moeplug_quantize": ["ctx", "projection", "experts", "tensor", "out"],
        "moeplug_create_scales": ["ctx", "scales"],
        "moeplug_setup_kernel": ["ctx", "weights", "scales"],
    }
    assert tuple(given) == STAGE_HOOKS
    w13, w2 = weights()
    feed_all(builder_of(scheme_of(), {name: seen(name, keys) for name, keys in given.items()}), w13, w2)
    names = [name for name, _ in calls]
    assert names == ["moeplug_allocate", *["moeplug_load", "moeplug_quantize"] * 3 * E, *names[-2:]]
    assert names[-2:] == ["moeplug_create_scales", "moeplug_setup_kernel"]
    quantized = [g for name, g in calls if name == "moeplug_quantize"]
    assert {(g["projection"], g["experts"]) for g in quantized} == {(p, (e,)) for p in PROJECTIONS for e in range(E)}
    assert all(g["out"].shape == g["tensor"].shape for g in quantized)
    assert {p: tuple(s.scale.shape) for p, s in calls[-2][1]["scales"].items()} == {
        "gate": (E, I, 1), "up": (E, I, 1), "down": (E, H, 1)
    }  # fmt: skip
    assert sorted(calls[-1][1]["weights"]) == ["w13", "w2"]
    assert sorted(calls[-1][1]["scales"]) == ["w13_scale", "w2_scale"]


def test_a_stage_that_answers_changes_what_is_stored():
    def moeplug_load(tensor):
        return tensor * 2

    w13, w2 = weights()
    doubled, _ = feed_all(builder_of(scheme_of(), {"moeplug_load": moeplug_load}), w13, w2)
    plain, _ = feed_all(builder_of(scheme_of()), w13, w2)
    assert torch.equal(doubled.groups[0].w13_scale, plain.groups[0].w13_scale * 2)
    assert torch.equal(doubled.groups[0].w13, plain.groups[0].w13)


def test_setup_kernel_may_bind_a_kernel_of_its_own():
    def moeplug_setup_kernel(ctx, weights, scales):
        return lambda hidden, topk_weights, topk_ids, out=None: torch.full_like(hidden, 7)

    w13, w2 = weights()
    experts, _ = feed_all(builder_of(scheme_of(), {"moeplug_setup_kernel": moeplug_setup_kernel}), w13, w2)
    assert bool((experts(*tokens()) == 7).all())


# The module


def test_dtype_changes_do_not_touch_buffers():
    experts = moeplug.quantize_experts(*weights(), "int8")
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    for moved in (experts.to(torch.bfloat16), experts.half(), experts.double(), experts.float()):
        for name, tensor in moved.state_dict().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert experts(*tokens()).dtype == torch.bfloat16


def test_a_state_dict_comes_back_bit_for_bit():
    source = moeplug.quantize_experts(*weights(0), "int8-g32")
    target = moeplug.quantize_experts(*weights(9), "int8-g32")
    assert not torch.equal(source(*tokens()), target(*tokens()))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(*tokens()), target(*tokens()))


def test_a_state_dict_survives_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    source, target = (moeplug.quantize_experts(*weights(seed), "int8") for seed in (0, 9))
    save_file(source.state_dict(), tmp_path / "experts.safetensors")
    target.load_state_dict(load_file(tmp_path / "experts.safetensors"))
    assert torch.equal(source(*tokens()), target(*tokens()))


def test_a_state_dict_of_another_spec_is_refused_before_a_byte_is_copied():
    source = moeplug.quantize_experts(*weights(0), "int8")
    target = moeplug.quantize_experts(*weights(9), Scheme.from_text(
        "api: 1\nname: t\nplugin: int8\nweights: {format: int8, strategy: channel, scale_dtype: bfloat16}\n"
    ))  # fmt: skip
    before = target(*tokens())
    with pytest.raises(SchemeError, match=r"gate_up: the state has .*float32.*, this module has .*bfloat16"):
        target.load_state_dict(source.state_dict())
    assert torch.equal(before, target(*tokens()))


def test_a_state_dict_of_another_layout_is_laid_out_anew():
    source, target = (moeplug.quantize_experts(*weights(seed), "int8") for seed in (0, 9))
    state = source.state_dict()
    for name in ("w13", "w13_scale"):
        state[f"groups.0.{name}"] = relayout(state[f"groups.0.{name}"], name, CONCATENATED, INTERLEAVED)
    text = bytes(state["groups.0._extra_state"].tolist()).replace(b"concatenated", b"interleaved")
    state["groups.0._extra_state"] = torch.tensor(list(text), dtype=torch.uint8)
    target.load_state_dict(state)
    assert torch.equal(source(*tokens()), target(*tokens()))


def test_a_layout_and_its_inverse_are_one_view():
    plain = torch.arange(2 * 10 * 3).view(2, 10, 3)
    interleaved = relayout(plain, "w13", CONCATENATED, INTERLEAVED)
    assert torch.equal(interleaved[:, ::2], plain[:, :5])
    assert torch.equal(relayout(interleaved, "w13", INTERLEAVED, CONCATENATED), plain)
    assert INTERLEAVED.view(interleaved, "up").data_ptr() == interleaved[:, 1].data_ptr()


def test_stored_gives_an_expert_weight_back_whatever_the_layout():
    w13, w2 = weights()
    experts = moeplug.quantize_experts(w13, w2, Scheme.from_text("api: 1\nname: plain\nweights: null\n"))
    for projection, tensor in parts(w13, w2).items():
        assert torch.equal(experts.stored(projection, 4), tensor[4])
    with pytest.raises(UsageError, match="layer 0 has no expert 6"):
        experts.stored("gate", 6)


def test_a_state_dict_may_be_assigned_instead_of_copied():
    source, target = (moeplug.quantize_experts(*weights(seed), "int8") for seed in (0, 9))
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(source(*tokens()), target(*tokens()))
    empty = moeplug.quantize_experts(*weights(9), "int8").to("meta")
    empty.load_state_dict(source.state_dict(), assign=True)
    empty.slots = source.slots.clone()
    assert torch.equal(source(*tokens()), empty(*tokens()))


def test_parameters_are_quantized_without_a_graph():
    w13, w2 = weights()
    for scheme in ("int8", "int8-g32", scheme_of("overrides: [{experts: '1', weights: null}]\n")):
        plain = moeplug.quantize_experts(w13, w2, scheme)
        trained = moeplug.quantize_experts(torch.nn.Parameter(w13), torch.nn.Parameter(w2), scheme)
        for name, tensor in trained.state_dict().items():
            assert not tensor.requires_grad
            assert torch.equal(tensor, plain.state_dict()[name])


def test_quantize_experts_leaves_the_given_weights_alone():
    w13, w2 = weights(dtype=torch.float32)
    before = w13.clone(), w2.clone()
    for scheme in ("int8", "int8-g32", Scheme.from_text("api: 1\nname: plain\nweights: null\n")):
        moeplug.quantize_experts(w13, w2, scheme)
    assert torch.equal(w13, before[0])
    assert torch.equal(w2, before[1])


def test_a_copy_is_a_module_of_its_own():
    experts = moeplug.quantize_experts(*weights(), "int8")
    expected = experts(*tokens())
    twin = copy.deepcopy(experts)
    twin.groups[0].w13.zero_()
    assert torch.equal(experts(*tokens()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, i: (h[:, :5], w, i), r"hidden is \(9, 5\); expected \(M, 64\)"),
        (lambda h, w, i: (h, w[:4], i), r"expected both \(9, T\)"),
        (lambda h, w, i: (h, i, w), "weights come before ids"),
        (lambda h, w, i: (h.requires_grad_(), w, i), "for inference"),
    ],
    ids=["hidden", "weights", "swapped", "grad"],
)
def test_a_wrong_call_says_what_was_expected(change, message):
    experts = moeplug.quantize_experts(*weights(), "int8")
    with pytest.raises(UsageError, match=message):
        experts(*change(*tokens()))


def test_on_the_meta_device_experts_have_a_shape_and_refuse_to_run():
    experts = moeplug.quantize_experts(*weights(), "int8").to("meta")
    assert experts.groups[0].w13.shape == (E, 2 * I, H)
    with pytest.raises(UsageError, match="on the meta device"):
        experts.groups[0](*tokens())


def test_the_repr_says_scheme_kernel_and_bytes():
    text = repr(moeplug.quantize_experts(*weights(), "int8"))
    assert "6 x int8 channel by cpu-grouped" in text
    assert f"{E * (3 * H * I + 4 * (2 * I + H)):,} bytes" in text


@pytest.mark.parametrize(
    ("w13", "w2"),
    [((0, 2 * I, H), (0, H, I)), ((E, 2 * I, H), (E, H, I + 1)), ((E, I, H), (E, H, I)), ((2 * I, H), (H, I))],
    ids=str,
)
def test_quantize_experts_refuses_shapes_that_do_not_fit(w13, w2):
    with pytest.raises(UsageError, match=r"expected \(E, 2I, H\) and \(E, H, I\)"):
        moeplug.quantize_experts(torch.ones(w13), torch.ones(w2), "int8")
