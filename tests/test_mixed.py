"""Mixed precision: overrides select what they say, and tune measures, chooses and writes them."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import weakref

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplug
from moeplug import RefusedError, Scheme, SchemeError, UsageError, mixed
from moeplug.mixed.solve import Way, smallest, solve
from moeplug.mixed.task import Option
from moeplug.mixed.write import scheme_text
from moeplug.registry import Registry

PLAIN = mixed.unquantized().scheme
E, H, I, T, M = 8, 64, 96, 2, 40


# Overrides, by layer, projection, expert and plugin


def weights():
    g = torch.Generator().manual_seed(0)
    return torch.randn(E, 2 * I, H, generator=g) * 0.1, torch.randn(E, H, I, generator=g) * 0.1


def tokens(seed=1):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(M, H, generator=g),
        torch.rand(M, T, generator=g),
        torch.randint(-1, E + 1, (M, T), generator=g),
    )


PLUGINS = """
api: 1
name: test
plugin: int8
weights: {format: int8, strategy: channel}
overrides:
  - {experts: "1-2", plugin: mx, weights: {format: mxfp4, strategy: group, group_size: 32, scale_dtype: float8_e8m0fnu}}
  - experts: "2,5"
    plugin: nvfp4
    weights: {format: nvfp4, strategy: group, group_size: 16, scale_dtype: float8_e4m3fn}
  - {layers: "7", experts: "6", weights: {format: int8, strategy: group, group_size: 32}}
  - {layers: "9", experts: "0", weights: null}
  - {experts: "3,7", projections: [gate_up], weights: null}
"""
STORED_AS = {"int8": [0, 4], "mxfp4": [1], "nvfp4": [2, 5], "int8-g32": [6]}


def test_experts_of_several_plugins_in_one_layer_store_what_each_scheme_alone_stores():
    w13, w2 = weights()
    layer = moeplug.quantize_experts(w13, w2, Scheme.from_text(PLUGINS), layer=7)
    assert [group.ctx.plugin for group in layer.groups] == ["int8", "mx", "nvfp4", "int8", "int8"]
    for name, experts in STORED_AS.items():
        alone = moeplug.quantize_experts(w13, w2, name)
        for expert, projection in itertools.product(experts, ("gate", "up", "down")):
            assert torch.equal(layer.stored(projection, expert), alone.stored(projection, expert)), (name, expert)
    for expert in (3, 7):
        assert torch.equal(layer.stored("gate", expert), w13[expert, :I])
        assert torch.equal(
            layer.stored("down", expert), moeplug.quantize_experts(w13, w2, "int8").stored("down", expert)
        )


def test_experts_of_several_plugins_are_one_call_with_the_sum_of_their_results():
    """Ids of other groups, -1 and ids out of range contribute nothing, and the sum repeats bit for bit."""
    w13, w2 = weights()
    layer = moeplug.quantize_experts(w13, w2, Scheme.from_text(PLUGINS), layer=7)
    hidden, topk_weights, ids = tokens()
    ids[:2] = torch.tensor([[3, 7], [6, 6]])
    half = Scheme.from_text(
        "api: 1\nname: half\nplugin: int8\nweights: {format: int8}\n"
        "overrides: [{projections: [gate_up], weights: null}]\n"
    )
    expected = torch.zeros(M, H, dtype=torch.float64)
    for scheme, experts in [*STORED_AS.items(), (half, [3, 7])]:
        alone = moeplug.quantize_experts(w13, w2, scheme)
        expected += alone(hidden, topk_weights, torch.where(torch.isin(ids, torch.tensor(experts)), ids, -1)).double()
    found = layer(hidden, topk_weights, ids)
    # Float32 sums of a few terms, in another order.
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-6
    assert torch.equal(found, layer(hidden, topk_weights, ids))
    assert torch.equal(found, layer(hidden, topk_weights, ids.int(), out=torch.empty_like(found)))


def test_one_expert_of_two_plugins_is_refused():
    text = PLUGINS + '  - {experts: "4", projections: [down], plugin: fp8, weights: {format: fp8}}\n'
    with pytest.raises(SchemeError, match=r"layer 0, expert 4: gate_up is by plugin int8, down by plugin fp8; one"):
        moeplug.quantize_experts(*weights(), Scheme.from_text(text))


# The solver


WAYS = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10)).map(lambda pair: Way(*pair)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(WAYS, min_size=1, max_size=5), st.floats(0, 1))
def test_no_choice_within_the_limit_has_a_smaller_error_than_the_solvers(units, where):
    most = sum(max(way.nbytes for way in unit) for unit in units)
    limit = smallest(units) + int(where * (most - smallest(units)))
    solution = solve(units, limit)
    chosen = [unit[pick] for unit, pick in zip(units, solution.picks, strict=True)]
    assert sum(way.nbytes for way in chosen) <= limit
    allowed = (pick for pick in itertools.product(*units) if sum(way.nbytes for way in pick) <= limit)
    best = min(sum(way.error for way in pick) for pick in allowed)
    largest = max(way.error for unit in units for way in unit)
    # The gap is 1e-4 of the sum; HiGHS takes numbers below 1e-6 of the largest for zero.
    assert sum(way.error for way in chosen) <= best * (1 + 1.1e-4) + 1e-6 * largest


def test_bytes_are_held_to_the_last_one_where_numbers_are_as_large_as_models():
    g = torch.Generator().manual_seed(0)
    units = [
        [Way(9_437_184 + 3 * k, float(torch.rand((), generator=g))), Way(2_400_001, 2.0 + k % 7)] for k in range(300)
    ]
    for limit in (smallest(units), smallest(units) + 7_037_182, 2_000_000_001):
        solution = solve(units, limit)
        assert sum(unit[pick].nbytes for unit, pick in zip(units, solution.picks, strict=True)) <= limit


def test_a_limit_below_the_smallest_choice_is_refused():
    with pytest.raises(RefusedError, match="at least 5 bytes; 4 are allowed"):
        solve([[Way(2, 1.0), Way(9, 0.0)], [Way(3, 1.0)]], 4)


# The scheme that is written


def candidates_of(text, registry=None):
    return mixed.find_candidates(text.split(","), registry or Registry.discover())


CANDIDATES = candidates_of("int8,int8-g32,mxfp4,nvfp4,none")
OPTIONS = [
    Option(one, other)
    for one, other in itertools.product(CANDIDATES, CANDIDATES)
    if one.plugin is None or other.plugin is None or one.plugin == other.plugin
]
PICKS = st.dictionaries(
    st.integers(0, 6), st.integers(1, 6).flatmap(lambda n: st.lists(st.sampled_from(OPTIONS), min_size=n, max_size=n)),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(PICKS)
def test_the_scheme_that_is_written_says_of_every_expert_what_was_picked(picks):
    scheme = Scheme.from_text(scheme_text("my", "a: mix", dict(sorted(picks.items())), "Made by hand."))
    for layer, options in picks.items():
        for expert, option in enumerate(options):
            for projection, candidate in (("gate", option.gate_up), ("up", option.gate_up), ("down", option.down)):
                assert scheme.weights_for(layer, expert, projection) == (candidate.plugin, candidate.spec)


def test_the_scheme_that_is_written_reads_as_if_by_hand():
    int8, _, mxfp4, _, none = (Option(candidate, candidate) for candidate in CANDIDATES)
    half = Option(mxfp4.gate_up, none.down)
    picks = {
        0: [int8] * 4,
        1: [int8] * 4,
        2: [mxfp4] * 4,
        3: [mxfp4, none, mxfp4, mxfp4],
        5: [mxfp4, half, half, mxfp4],
    }
    assert scheme_text("my", "a mix", picks, "Made by hand.") == (
        "# Made by hand.\n"
        "api: 1\n"
        "name: my\n"
        'description: "a mix"\n'
        "plugin: mx\n"
        "\n"
        "weights: {format: mxfp4, strategy: group, group_size: 32, scale_dtype: float8_e8m0fnu}   # mxfp4\n"
        "\n"
        "overrides:\n"
        '  - layers: "0-1"\n'
        "    plugin: int8\n"
        "    weights: {format: int8, strategy: channel}   # int8\n"
        '  - layers: "3"\n'
        '    experts: "1"\n'
        "    weights: null   # unquantized\n"
        '  - layers: "5"\n'
        '    experts: "1-2"\n'
        "    projections: [down]\n"
        "    weights: null   # unquantized\n"
    )


def test_activations_and_options_that_candidates_share_are_written(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    for file, strategy in ((one, "channel"), (two, "tensor")):
        file.write_text(
            f"api: 1\nname: {file.stem}\nplugin: int8\nweights: {{format: int8, strategy: {strategy}}}\n"
            "input_activations: {format: int8, strategy: token}\nintermediate: null\noptions: {depth: 3}\n"
        )
    first, second, none = (Option(c, c) for c in candidates_of(f"{one},{two},none"))
    scheme = Scheme.from_text(scheme_text("my", "a mix", {0: [first, second, none]}, "Made."))
    assert scheme.input_activations == first.gate_up.scheme.input_activations
    assert scheme.intermediate is None
    assert scheme.options == {"depth": 3}


def test_options_make_their_plugin_the_schemes_own(tmp_path):
    (tmp_path / "one.yaml").write_text("api: 1\nname: one\nplugin: mx\nweights: {format: mxfp8}\noptions: {depth: 3}\n")
    one, int8 = (Option(c, c) for c in candidates_of(f"{tmp_path / 'one.yaml'},int8"))
    scheme = Scheme.from_text(scheme_text("my", "a mix", {0: [int8, int8, one]}, "Made."))
    assert (scheme.plugin, scheme.options) == ("mx", {"depth": 3})
    assert [scheme.weights_for(0, expert, "down")[0] for expert in range(3)] == ["int8", "int8", "mx"]


# Candidates


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["", "overrides: [{layers: 0, weights: null}]\n"], "candidate .*1.yaml: has overrides"),
        (["", "input_activations: &"], "0.yaml and .*1.yaml differ in input_activations, which"),
        (["input_activations: &", "input_activations: &intermediate: null\n"], "1.yaml differ in intermediate, which"),
        (["", "options: {a: 1}\n"], "0.yaml and .*1.yaml differ in options"),
        (["options: {a: 1}\n", "options: {a: 1}\nplugin: mx\n"], "candidates of plugins int8 and mx have options"),
    ],
    ids=["overrides", "activations", "intermediate", "options", "options_of_two_plugins"],
)  # fmt: skip
def test_candidates_that_cannot_stand_in_one_scheme_are_refused(tmp_path, texts, message):
    files = [tmp_path / f"{number}.yaml" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        plugin = "" if "plugin" in text else "plugin: int8\n"
        text = text.replace("&", "{format: int8}\n")
        file.write_text(f"api: 1\nname: c\n{plugin}weights: {{format: int8}}\n{text}")
    with pytest.raises(UsageError, match=message):
        candidates_of(",".join(map(str, files)))


def test_by_default_all_installed_schemes_that_differ_in_weights_alone_are_candidates():
    names = {candidate.name for candidate in mixed.default_candidates(Registry.discover())}
    assert {"int8", "int8-g32", "mxfp4", "none"} <= names
    assert not {"int8-w8a8", "fp8", "fp8-block"} & names


def test_a_candidate_that_does_not_fit_is_an_error_unless_someone_is_told(tiny_checkpoint):
    registry, told = Registry.discover(), []
    wanted = candidates_of("int8,int8-g128", registry)  # 128 divides neither 64 nor 96
    with pytest.raises(SchemeError, match="K=64 is not a multiple of group_size=128"):
        mixed.Task.open(tiny_checkpoint("qwen3_moe"), wanted, registry=registry, device="cpu")
    task = mixed.Task.open(tiny_checkpoint("qwen3_moe"), wanted, registry=registry, device="cpu", left_out=told.append)
    assert [option.name for option in task.options] == ["int8"]
    assert told[0].startswith("int8-g128 is left out: ")


def test_the_family_comes_from_the_same_plugins_as_the_schemes(tiny_checkpoint, monkeypatch):
    registry = Registry.discover()
    wanted = candidates_of("int8,none", registry)
    monkeypatch.delattr(Registry, "discover")  # --disable would not hold for another one
    mixed.Task.open(tiny_checkpoint("qwen3_moe"), wanted, registry=registry, device="cpu")


# Measuring


def task_of(checkpoint, names, per="expert"):
    registry = Registry.discover()
    return mixed.Task.open(checkpoint, candidates_of(names, registry), registry=registry, per=per, device="cpu")


def samples_of(task, unused=()):
    """Random tokens for every layer, in bfloat16, none of which goes to the unused experts."""
    g = torch.Generator().manual_seed(3)
    used = torch.tensor([e for e in range(task.any_plan.layers[0].layer.num_experts) if e not in unused])
    return {
        plan.layer.index: mixed.Sample(
            torch.randn(M, plan.layer.hidden_size, generator=g).bfloat16(),
            used[torch.rand(M, len(used), generator=g).argsort(1)[:, :T]],  # no expert twice for one token
            torch.rand(M, T, generator=g),
        )
        for plan in task.any_plan.layers
    }


@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_errors_are_those_of_the_layers_that_a_load_leaves(tiny_checkpoint, model_type, fused):
    task = task_of(tiny_checkpoint(model_type, fused), "int8,mxfp4,none", "projection")
    samples = samples_of(task)
    errors = mixed.measure(task, samples)
    exact = moeplug.load(tiny_checkpoint(model_type), PLAIN, device="cpu").layers
    for option in task.options:
        layers = moeplug.load(tiny_checkpoint(model_type), option.scheme, device="cpu").layers
        for index, sample in samples.items():

            def output(layer, ids, sample=sample):
                return layer(sample.hidden.float(), sample.topk_weights, ids).double()

            pairs = [(e, torch.where(sample.topk_ids == e, e, -1)) for e in range(exact[index].layer.num_experts)]
            whole = sum(float(output(exact[index], ids).square().sum()) for _, ids in pairs)
            found = {of.expert: of for of in errors.experts if of.layer == index}
            assert sorted(found) == [e for e, _ in pairs]
            for expert, ids in pairs:
                error = float((output(layers[index], ids) - output(exact[index], ids)).square().sum()) / whole
                assert found[expert].errors[option] == pytest.approx(error, rel=1e-3, abs=1e-12)
                assert found[expert].tokens == int((sample.topk_ids == expert).sum())


def relative_squares(checkpoint, scheme, layer, expert):
    """The sum over projections of || W' - W ||**2 / || W ||**2, int8 with a scale for each row."""
    quantized = moeplug.load(checkpoint, scheme, device="cpu").layers[layer]
    exact = moeplug.load(checkpoint, PLAIN, device="cpu").layers[layer]
    total = 0.0
    for projection in ("gate", "up", "down"):
        group = quantized.groups[0]
        name = "w2_scale" if projection == "down" else "w13_scale"
        scale = group.ctx.layout.view(group.get_buffer(name), projection)[expert]
        weight = exact.stored(projection, expert).double()
        decoded = quantized.stored(projection, expert).double() * scale.double()
        total += float((decoded - weight).square().sum() / weight.square().sum())
    return total


def test_without_data_an_experts_error_is_that_of_its_weights_over_the_number_of_experts(tiny_checkpoint):
    checkpoint = tiny_checkpoint("qwen3_moe")
    task = task_of(checkpoint, "int8,none")
    errors = mixed.measure(task, None)
    int8, none = task.options
    assert (errors.data_free, errors.unreached) == (True, 0)
    for of in errors.experts[::5]:
        assert of.errors[int8] == pytest.approx(relative_squares(checkpoint, "int8", of.layer, of.expert) / 8, rel=1e-4)
        assert of.errors[none] == 0


def test_an_expert_without_tokens_is_judged_by_its_weights_as_if_one_token_came(tiny_checkpoint):
    checkpoint = tiny_checkpoint("qwen3_moe")
    task = task_of(checkpoint, "int8,none")
    errors = mixed.measure(task, samples_of(task, unused=(2, 5)))
    assert errors.unreached == 4
    for of in errors.experts:
        assert (of.tokens == 0) == (of.expert in (2, 5))
        if of.tokens == 0:
            expected = relative_squares(checkpoint, "int8", of.layer, of.expert) / (M * T)
            assert of.errors[task.options[0]] == pytest.approx(expected, rel=1e-4)


def test_one_expert_is_in_memory_at_a_time(tiny_checkpoint, monkeypatch):
    module = importlib.import_module("moeplug.mixed.measure")
    measure_expert, earlier = module._measure_expert, []

    def watched(task, layer, expert, weights, sample):
        assert all(weight() is None for weight in earlier)
        earlier.extend(weakref.ref(weight) for weight in weights.values())
        return measure_expert(task, layer, expert, weights, sample)

    monkeypatch.setattr(module, "_measure_expert", watched)
    mixed.measure(task_of(tiny_checkpoint("qwen3_moe", fused=True, shards=3), "int8"), None)
    assert len(earlier) == 2 * 8 * 3


# Choosing


@pytest.mark.parametrize("per", ["layer", "expert", "projection"])
def test_a_choice_fits_its_budget_and_is_no_worse_than_any_uniform_scheme_that_does(tiny_checkpoint, per, tmp_path):
    task = task_of(tiny_checkpoint("qwen3_moe"), "int8,int8-g32,mxfp4,mxfp8,nvfp4,none", per)
    errors = mixed.measure(task, samples_of(task))
    least, most = task.smallest_budget, max(plan.peak_bytes for plan in task.uniform.values())
    for budget in (least, (2 * least + most) // 3, (least + 2 * most) // 3, most):
        choice = mixed.choose(task, errors, budget)
        file = tmp_path / "my.yaml"
        choice.write(file, None)
        plan = moeplug.plan(task.checkpoint.path, file, device="cpu", runtime="transformers", budget=budget)
        assert plan.expert_bytes_after == choice.expert_bytes
        for uniform in choice.uniforms():
            if choice.fits(uniform):
                assert errors.relative_rms(choice.error) <= uniform.relative_rms * 1.0001
    if per == "layer":
        assert all(len(set(options)) == 1 for options in choice.picks.values())
    assert {option.name for option in choice.counts} == {"none"}


def test_a_finer_choice_is_never_worse(tiny_checkpoint):
    tasks = [
        task_of(tiny_checkpoint("qwen3_moe"), "int8,mxfp4,mxfp8,none", per) for per in ("layer", "expert", "projection")
    ]
    errors = mixed.measure(tasks[2], samples_of(tasks[2]))
    budget = (tasks[0].smallest_budget + tasks[0].any_plan.peak_bytes) // 2
    layer, expert, projection = (mixed.choose(task, errors, budget).error for task in tasks)
    assert projection <= expert * 1.0001 <= layer * 1.0002
    assert projection < layer


def test_a_budget_that_no_choice_fits_is_refused_with_the_smallest_that_one_does(tiny_checkpoint):
    task = task_of(tiny_checkpoint("olmoe"), "int8,mxfp4")
    task.require_possible(task.smallest_budget)
    with pytest.raises(RefusedError, match=f"the smallest budget that one fits is {task.smallest_budget} bytes"):
        task.require_possible(task.smallest_budget - 1)
    mxfp4 = task.uniform[task.options[1].down]
    assert task.smallest_budget == mxfp4.peak_bytes


def test_the_scheme_says_how_it_was_made(tiny_checkpoint, tmp_path):
    task = task_of(tiny_checkpoint("qwen3_moe"), "int8,none")
    errors = mixed.measure(task, samples_of(task, unused=(1,)))
    choice = mixed.choose(task, errors, task.smallest_budget + 100_000)
    text = " ".join(choice.yaml("my", tmp_path / "words.txt").replace("\n# ", " ").split())
    assert "for a budget of " in text
    assert f"on {M} tokens of words.txt: 0." in text
    assert "2 experts got no token and were judged by their weights." in text
    assert str(tmp_path) not in text
    alone = mixed.choose(task, mixed.measure(task, None), task.smallest_budget)
    assert "on the weights alone (--data-free)" in " ".join(alone.yaml("my", None).replace("\n# ", " ").split())


def test_the_errors_of_a_choice_add_up(tiny_checkpoint):
    task = task_of(tiny_checkpoint("qwen3_moe"), "int8,none")
    errors = mixed.measure(task, None)
    choice = mixed.choose(task, errors, task.smallest_budget)
    assert math.isclose(choice.error, sum(of.errors[task.options[0]] for of in errors.experts))
    doubled = dataclasses.replace(
        errors,
        experts=tuple(
            dataclasses.replace(of, errors={o: 2 * e for o, e in of.errors.items()}) for of in errors.experts
        ),
    )
    assert math.isclose(mixed.choose(task, doubled, task.smallest_budget).error, 2 * choice.error)
