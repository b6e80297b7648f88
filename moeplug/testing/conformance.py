"""SchemeConformance: the tests that every plugin with schemes has to pass, run by a subclass of one line.

    class TestMine(SchemeConformance):
        plugin = "mine"

Every scheme that the plugin ships is tested on a CPU, in triton's interpreter and, where there is one, on a GPU. What
could not run is skipped as `not verified here` and said so at the end of the run.
"""

from __future__ import annotations

import copy
import gc
import io
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, TypeVar

import pytest
import torch
from torch import Tensor

from moeplug.api import quantize_experts
from moeplug.errors import CheckpointError, MoeplugError, SchemeError, UsageError
from moeplug.kernels.select import Device
from moeplug.manifest import API, CAPABILITIES, check_scheme
from moeplug.pipeline import plan_layer
from moeplug.registry import Registry
from moeplug.scheme import Scheme
from moeplug.testing.layers import (
    OTHER_FILL,
    RAGGED_SHAPES,
    REAL_SHAPES,
    Layer,
    Shape,
    WatchedRegistry,
    activate,
    activations_of,
    build,
    difference_by_token,
    fitting_shape,
    kernel_on,
    layer_spec,
    nearest,
    new_tensor_bytes,
    normal_weights,
    projections_of,
    random_tokens,
    random_weights,
    same_bytes,
    scheme_for,
    values_in_range,
    values_of,
)
from moeplug.testing.under_test import CPU, NOT_VERIFIED, PluginUnderTest

Test = TypeVar("Test", bound=Callable[..., None])
# From the least that triton serves to the newest, so that the lowest capability that a plugin claims is among them.
CAPABILITIES_OF_GPUS: Final = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def since_api(number: int) -> Callable[[Test], Test]:
    """Mark a test with the `api:` of plugin.yaml that it came with; plugins of an older api skip it."""
    return pytest.mark.since_api(number)


needs_gpu: Final = pytest.mark.needs_gpu


class SchemeConformance(PluginUnderTest):
    """Subclass it in a test file, as `class TestMine(SchemeConformance): plugin = "mine"`.

    plugin: the installed plugin's name.
    relative_rms: scheme → the largest relative rms error of an expert weight that its author promises, on normal
        weights with K of 1024 or the next whole group; left out: no worse than moeplug's own scales with every value
        rounded to the nearest, which is tested in any case.
    known_failures: test → the reason why it fails, for example {"test_x": "…"} or, of one scheme, {"test_x[mine]":
        "…"}. They are strict: a test that passes all the same fails the run.
    """

    plugin: ClassVar[str]
    relative_rms: ClassVar[Mapping[str, float]] = {}
    known_failures: ClassVar[Mapping[str, str]] = {}

    # --- what is installed -------------------------------------------------------------------------------------------

    @since_api(1)
    def test_the_plugin_is_installed_and_what_it_declares_is_there(self) -> None:
        self._registry().activate(self.plugin, "the conformance kit")
        assert self._manifest().kind == "scheme", "an observer has no schemes to test"
        assert self._manifest().formats or self._scheme_names(), "it brings neither a format nor a scheme"

    @since_api(1)
    def test_a_scheme_asks_only_for_what_is_declared(self, scheme: str) -> None:
        problems = check_scheme(self._scheme(scheme), self._registry().manifests())
        assert not problems, "\n".join(map(str, problems))

    @since_api(1)
    def test_what_is_promised_is_about_schemes_that_exist(self) -> None:
        unknown = set(self.relative_rms) - set(self._scheme_names())
        assert not unknown, f"relative_rms names {sorted(unknown)}; the plugin ships {self._scheme_names()}"

    @since_api(1)
    def test_a_claimed_capability_works(self, claimed: str) -> None:
        """With every format, but for zero points, which a format may refuse, and with one format of activations."""
        for name in self._manifest().formats:
            self._expect_capability(claimed, name)

    @since_api(1)
    def test_a_capability_that_is_not_claimed_is_refused(self, unclaimed: str) -> None:
        manifests = self._registry().manifests()
        for name in self._manifest().formats:
            asked = scheme_for(unclaimed, self._manifest(), name, self._base(name), name)
            assert check_scheme(asked, manifests), f"{unclaimed} is not declared, but a scheme may ask for it"
            with pytest.raises(SchemeError):
                quantize_experts(*random_weights(fitting_shape(asked)), asked, registry=self._registry())

    # --- number formats ----------------------------------------------------------------------------------------------

    @since_api(1)
    def test_the_numbers_of_a_format_are_what_it_says(self, number_format: str) -> None:
        fmt, values = self._format(number_format), values_of(self._format(number_format))
        assert len(values) <= 2**fmt.bits, f"{len(values)} values do not fit in {fmt.bits} bits"
        assert fmt.max_value in values, f"max_value {fmt.max_value} is none of the values that bytes decode to"
        if fmt.asymmetric_range is None or fmt.asymmetric_range[0] < 0:
            assert fmt.max_value == values.max(), "larger values can be stored, so the range is not used to its end"
        for end in fmt.asymmetric_range or ():
            assert end in values, f"asymmetric_range ends at {end}, which no byte decodes to"
        for dtype in fmt.exact_in:
            kept = values[values.abs() <= fmt.max_value].float()
            assert torch.equal(kept.to(dtype).float(), kept), f"exact_in has {dtype}, which rounds some values"

    @since_api(1)
    @pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
    def test_encoding_gives_the_nearest_value_and_writes_nothing_else(self, number_format: str, strided: bool) -> None:
        fmt, K = self._format(number_format), 1024
        values = values_in_range(fmt, symmetric=True)
        generator = torch.Generator().manual_seed(0)
        scaled = (2 * torch.rand(5, K, generator=generator) - 1) * fmt.max_value
        scaled[1] = values[torch.arange(K) % len(values)].float()
        scaled[2] = scaled[2] * torch.logspace(-6, 0, K)
        expected = nearest(values, scaled)
        packed = K // fmt.values_per_element
        around = torch.full((7, 2 * packed), -91, dtype=torch.int8).view(fmt.storage_dtype)
        out = around[1:6, ::2] if strided else around[1:6, :packed]
        fmt.encode(scaled.clone(), out)
        decoded = torch.empty(5, K)
        fmt.decode(out, decoded)
        error, least = (decoded - scaled).abs().double(), (expected - scaled).abs()
        # 1e-5 of a value: float32's rounding where a value lies between two that can be stored.
        wrong = error > least + 1e-5 * scaled.abs()
        assert not wrong.any(), (
            f"{scaled[wrong][0]:g} is stored as {decoded[wrong][0]:g}, not as {expected[wrong][0]:g}"
        )
        out.view(torch.int8).fill_(-91)
        assert bool((around.view(torch.int8) == -91).all()), "encode wrote beside `out`"

    # --- bytes -------------------------------------------------------------------------------------------------------

    @since_api(1)
    @pytest.mark.parametrize("shape", ["fitting", *RAGGED_SHAPES])
    def test_weights_come_back_as_well_as_they_can(self, scheme: str, shape: str) -> None:
        """No weight is worse than under moeplug's own scales, each value rounded to the nearest."""
        self._expect_weights(self._layer_or_refusal(scheme, shape))

    @since_api(1)
    def test_every_value_is_the_nearest_under_its_final_scale(self, scheme: str) -> None:
        """Scales are rounded before anything is encoded with them, and every group meets its own."""
        layer = self._layer(scheme)
        for projection, expert, spec, kept in projections_of(layer):
            if spec is None:
                continue
            values = values_in_range(layer.ctx_of(expert).format(projection), spec.symmetric)
            N, K = kept.given.shape[1:]
            columns = torch.arange(K) // spec.columns(K)
            scale = kept.scales.values(N).double()[0].expand(N, -1)[:, columns]
            zero_point = kept.scales.zero_point
            zero = 0 if zero_point is None else zero_point.double()[0].expand(N, -1)[:, columns]
            scaled = kept.given[0].double() / scale + zero
            least = (nearest(values, scaled) - scaled).abs() * scale
            error = (layer.decoded(projection, expert) - kept.given[0]).abs().double()
            worse = error > least + 1e-5 * (scaled.abs() + 1) * scale  # float32's rounding near a tie
            where = f"expert {expert}, {projection}, (row, column) {torch.nonzero(worse)[:3].tolist()}"
            assert not worse.any(), f"{where}: another stored value is nearer under the scale that was returned"

    @since_api(1)
    def test_normal_weights_come_back_within_what_is_promised(self, scheme: str) -> None:
        """`relative_rms` of the test class, and the scheme's own `accept:`."""
        given, unit = self._scheme(scheme), fitting_shape(self._scheme(scheme)).I // 2
        K = -(-1024 // unit) * unit
        shape, accept = Shape(1, 1, K, K), None if given.accept is None else given.accept.relative_rms
        layer = self._build(scheme, shape, weights=normal_weights(shape), accept=accept)
        promised = self.relative_rms.get(scheme)
        if promised is not None:
            assert layer.worst_error <= promised, f"{layer.worst_error:.4g} on normal weights; {promised} is promised"
        assert layer.worst_error < 1, "the stored weights say nothing about the given ones"

    @since_api(1)
    def test_bytes_are_the_same_each_time_whatever_the_buffers_held(self, scheme: str) -> None:
        once, again = self._layer(scheme), self._build(scheme, fill=OTHER_FILL)
        self._expect_same_buffers(once, again)

    @since_api(1)
    def test_bytes_do_not_depend_on_how_many_weights_come_at_once_or_in_which_order(self, scheme: str) -> None:
        self._expect_same_buffers(self._layer(scheme), self._build(scheme, whole_projections=True))

    @since_api(1)
    def test_an_expert_does_not_depend_on_the_others(self, scheme: str) -> None:
        """Expert 1 alone is changed; only its rows change."""
        layer = self._layer(scheme)
        w13, w2 = (weight.clone() for weight in random_weights(self._fitting(scheme)))
        w13[1], w2[1] = -3 * w13[1].flip(0), -3 * w2[1].flip(0)
        other = self._build(scheme, weights=(w13, w2))
        for projection, expert, _, kept in projections_of(layer):
            same = same_bytes(kept.stored, other.kept[projection, expert].stored)
            assert same == (expert != 1), f"expert {expert}, {projection}: {'unchanged' if same else 'changed'}"

    @since_api(1)
    def test_the_callers_weights_stay_as_they_were(self, scheme: str) -> None:
        layer, (w13, w2) = self._layer(scheme), random_weights(self._fitting(scheme))
        assert same_bytes(layer.w13, w13), "a stage wrote into the weights it was given (w13)"
        assert same_bytes(layer.w2, w2), "a stage wrote into the weights it was given (w2)"

    @since_api(1)
    def test_a_stage_writes_only_what_it_is_given(self, scheme: str) -> None:
        assert not self._layer(scheme).offences

    @since_api(1)
    def test_rows_of_zeros_and_extreme_rows_come_back_finite(self, scheme: str) -> None:
        shape = self._fitting(scheme)
        w13, w2 = (weight.clone() for weight in random_weights(shape))
        w13[0], w2[0], w2[1, :, 0] = 0, 0, 0
        w2[1, 0], w2[1, 1], w2[2, 3, 5] = 0, 1e-38, 1000  # a row of zeros, the smallest normal numbers, an outlier
        layer = self._build(scheme, weights=(w13, w2))
        for projection, expert, _, _ in projections_of(layer):
            decoded = layer.decoded(projection, expert)
            assert decoded.isfinite().all(), f"expert {expert}, {projection}: NaN or an infinity"
            of_zeros = layer.original(projection, expert) == 0
            if expert == 0:
                assert not decoded[of_zeros].any(), f"expert 0, {projection}: zeros became other numbers"
        self._expect_reference(layer, *random_tokens(shape, dtype=torch.float32))

    # --- shapes ------------------------------------------------------------------------------------------------------

    @since_api(1)
    @pytest.mark.parametrize("model", REAL_SHAPES)
    def test_a_real_models_layer_is_planned_or_refused_by_name(self, scheme: str, model: str) -> None:
        self._expect_plan_or_refusal(scheme, REAL_SHAPES[model])

    @since_api(1)
    def test_a_layer_of_a_real_models_size_gives_the_references_numbers(self, scheme: str) -> None:
        """One expert of Qwen3-30B-A3B; the smallest real one."""
        shape = Shape(1, 1, *REAL_SHAPES["Qwen3-30B-A3B"][2:])
        self._expect_plan_or_refusal(scheme, shape)
        if self._fits(scheme, shape):
            layer = self._build(scheme, shape)
            self._expect_weights(layer)
            self._expect_reference(layer, *random_tokens(shape, M=3))

    # --- numbers on a CPU --------------------------------------------------------------------------------------------

    @since_api(1)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("shape", ["fitting", *RAGGED_SHAPES])
    def test_the_kernel_gives_the_references_numbers(self, scheme: str, shape: str, dtype: torch.dtype) -> None:
        layer = self._layer_or_refusal(scheme, shape)
        self._expect_reference(layer, *random_tokens(Shape(*_sizes(layer)), dtype=dtype))

    @since_api(1)
    def test_the_layer_computes_what_its_weights_say(self, scheme: str) -> None:
        """Against the given weights: whatever stages 2 and 4 do, gate stays gate, each expert keeps its place."""
        layer = self._layer(scheme)
        tokens = random_tokens(self._fitting(scheme), M=32, dtype=torch.float32)
        out, expected = layer.experts(*tokens).double(), layer.reference(*tokens, decoded=False).double()
        relative = float((out - expected).norm() / expected.norm())
        # Errors of three weights add up, gate's grows through the activation; 0.1: quantized activations of 8 bits.
        limit = 3 * layer.worst_error + (0.1 if layer.quantizes_activations else 1e-4)
        assert relative <= limit, f"the output is {relative:.3g} off what the given weights make; {limit:.3g} is due"

    @since_api(1)
    def test_no_tokens_give_no_rows(self, scheme: str) -> None:
        layer, shape = self._layer(scheme), self._fitting(scheme)
        for M, T in ((0, 2), (3, 0)):
            out = layer.experts(*random_tokens(shape._replace(T=T), M=M))
            assert out.shape == (M, shape.H)
            assert not out.any()

    @since_api(1)
    def test_one_token_is_served(self, scheme: str) -> None:
        for T in (1, 2):
            tokens = random_tokens(self._fitting(scheme)._replace(T=T), M=1)
            self._expect_reference(self._layer(scheme), *tokens)

    @since_api(1)
    def test_an_expert_named_twice_counts_twice(self, scheme: str) -> None:
        hidden, weights, ids = random_tokens(self._fitting(scheme), M=5)
        self._expect_reference(self._layer(scheme), hidden, weights, ids[:, :1].expand(5, 2).contiguous())

    @since_api(1)
    @pytest.mark.parametrize("chosen", [0, 2], ids=["first", "last"])
    def test_experts_without_tokens_change_nothing(self, scheme: str, chosen: int) -> None:
        hidden, weights, ids = random_tokens(self._fitting(scheme), M=5)
        self._expect_reference(self._layer(scheme), hidden, weights, torch.full_like(ids, chosen))

    @since_api(1)
    @pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
    def test_ids_out_of_range_contribute_nothing(self, scheme: str, ids_dtype: torch.dtype) -> None:
        layer = self._layer(scheme)
        hidden, weights, ids = random_tokens(self._fitting(scheme), M=6)
        ids[0, 0], ids[1], ids[2, 1], ids[3] = -1, -1, 3, torch.iinfo(torch.int32).max
        self._expect_reference(layer, hidden, weights, ids.to(ids_dtype))
        out = layer.experts(hidden, weights, ids.to(ids_dtype))
        assert not out[1].any(), "a token without experts has a result"

    @since_api(1)
    def test_a_call_repeats_bit_for_bit(self, scheme: str) -> None:
        tokens = random_tokens(self._fitting(scheme), M=40, dtype=torch.float32)
        once = self._layer(scheme).experts(*tokens)
        for _ in range(3):
            assert same_bytes(self._layer(scheme).experts(*tokens), once), "the same call gave other bits"

    @since_api(1)
    def test_a_token_does_not_depend_on_its_batch(self, scheme: str) -> None:
        hidden, weights, ids = random_tokens(self._fitting(scheme), M=9, dtype=torch.float32)
        hidden = hidden * torch.logspace(-2, 2, 9).unsqueeze(1)  # a scale for all tokens would lose the first ones
        experts = self._layer(scheme).experts
        together = experts(hidden, weights, ids)
        for m in range(9):
            alone = experts(hidden[m : m + 1], weights[m : m + 1], ids[m : m + 1])
            # Another path may sum in another order, and then a quantized intermediate moves by a step.
            limit = 2**-5 if self._layer(scheme).quantizes_activations else 1e-4
            assert difference_by_token(alone, together[m : m + 1]).item() <= limit, f"token {m} depends on the others"

    @since_api(1)
    def test_a_call_changes_nothing_but_its_output(self, scheme: str) -> None:
        layer = self._layer(scheme)
        hidden, weights, ids = random_tokens(self._fitting(scheme), M=6)
        given = [tensor.clone() for tensor in (hidden, weights, ids)]
        before = {name: tensor.clone() for name, tensor in layer.stored_bytes.items()}
        around = torch.full((8, 2 * hidden.shape[1]), torch.nan, dtype=hidden.dtype)
        out = around[1:7, ::2]
        assert layer.experts(hidden, weights, ids, out=out) is out, "`out` was given, another tensor came back"
        assert same_bytes(out, layer.experts(hidden, weights, ids))
        for tensor, old in zip((hidden, weights, ids), given, strict=True):
            assert same_bytes(tensor, old), "a call changed what it was given"
        for name, old in before.items():
            assert same_bytes(layer.stored_bytes[name], old), f"a call changed {name}"
        out.fill_(torch.nan)
        assert bool(around.isnan().all()), "a call wrote beside `out`"

    # --- a module's life ---------------------------------------------------------------------------------------------

    @since_api(1)
    def test_a_state_dict_comes_back(self, scheme: str) -> None:
        layer, shape = self._layer(scheme), self._fitting(scheme)
        file = io.BytesIO()
        torch.save(layer.experts.state_dict(), file)
        file.seek(0)
        other = self._build(scheme, weights=random_weights(shape, seed=9))
        tokens = random_tokens(shape)
        assert not same_bytes(other.experts(*tokens), layer.experts(*tokens)), "other weights give the same result"
        other.experts.load_state_dict(torch.load(file))
        self._expect_same_buffers(layer, other)
        assert same_bytes(other.experts(*tokens), layer.experts(*tokens)), "loaded, but it computes something else"

    @since_api(1)
    def test_moving_and_copying_change_no_byte(self, scheme: str) -> None:
        layer, moved = self._layer(scheme), copy.deepcopy(self._layer(scheme).experts)
        tokens = random_tokens(self._fitting(scheme))
        moved.to(torch.float16).to("cpu").double()
        for name, buffer in moved.named_buffers():
            assert same_bytes(buffer, layer.stored_bytes[name]), f"{name} changed"
            assert buffer.dtype == layer.stored_bytes[name].dtype, f"{name} is {buffer.dtype} now"
        assert same_bytes(moved(*tokens), layer.experts(*tokens))

    @since_api(1)
    def test_on_the_meta_device_it_holds_no_memory_and_refuses_calls(self, scheme: str) -> None:
        layer = self._layer(scheme)
        empty = copy.deepcopy(layer.experts).to("meta")
        assert {buffer.device.type for buffer in empty.buffers()} == {"meta"}
        tokens = random_tokens(self._fitting(scheme))
        with pytest.raises(UsageError):
            empty(*tokens)
        empty.load_state_dict(layer.experts.state_dict(), assign=True)
        assert same_bytes(empty.groups[0].w2, layer.experts.groups[0].w2)  # type: ignore[arg-type]

    @since_api(1)
    def test_a_layer_holds_the_memory_that_its_plan_says(self, scheme: str) -> None:
        """A second copy of the weights, unpacked or in 16 bits, would be what quantizing was meant to save."""
        shape, tokens = self._fitting(scheme), random_tokens(self._fitting(scheme))
        weights = random_weights(shape)
        self._build(scheme, weights=weights).experts(*tokens)  # scratch memory is made once
        with new_tensor_bytes() as held:
            layer = self._build(scheme, weights=weights)
            layer.experts(*tokens)
            layer.kept.clear()
            self._registry().begin()
            # 1 KiB: ids, slot tables and other small things.
            assert held() <= layer.plan.bytes_after + 1024, f"the plan says {layer.plan.bytes_after} bytes"

    @since_api(1)
    def test_nothing_stays_of_a_layer_that_is_gone(self, scheme: str) -> None:
        shape, tokens = self._fitting(scheme), random_tokens(self._fitting(scheme))

        def come_and_go() -> None:
            self._build(scheme, weights=random_weights(shape)).experts(*tokens)
            self._registry().begin()

        come_and_go()  # what a plugin keeps once, such as a codebook, is no leak
        with new_tensor_bytes() as held:
            come_and_go()
            assert held() == 0, "bytes of each layer stay"

    # --- bad inputs --------------------------------------------------------------------------------------------------

    @since_api(1)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
    def test_weights_that_are_not_finite_are_refused(self, scheme: str, value: float) -> None:
        w13, w2 = (weight.clone() for weight in random_weights(self._fitting(scheme)))
        w2[1, 2, 3] = value
        with pytest.raises(CheckpointError, match="row 2, column 3"):
            self._build(scheme, weights=(w13, w2))

    @since_api(1)
    def test_calls_that_fit_no_layer_are_refused(self, scheme: str) -> None:
        experts, (hidden, weights, ids) = self._layer(scheme).experts, random_tokens(self._fitting(scheme))
        wrong: list[tuple[Tensor, Tensor, Tensor]] = [
            (hidden[:, :-1], weights, ids),
            (hidden, weights[:-1], ids),
            (hidden, weights, ids.float()),
            (hidden.double(), weights, ids),
            (hidden.unsqueeze(0), weights, ids),
        ]
        for arguments in wrong:
            with pytest.raises(UsageError):
                experts(*arguments)

    @since_api(1)
    def test_a_state_of_another_scheme_is_refused(self, scheme: str) -> None:
        layer, shape = self._layer(scheme), self._fitting(scheme)
        plain = Scheme.from_data({"api": 1, "name": "plain", "weights": None})
        unquantized = build(WatchedRegistry(()), plain, shape)
        with pytest.raises((MoeplugError, RuntimeError)):  # RuntimeError: torch's own, of keys and shapes
            layer.experts.load_state_dict(unquantized.experts.state_dict())

    @since_api(1)
    def test_an_option_that_is_not_declared_is_refused(self, scheme: str) -> None:
        given = self._scheme(scheme)
        data = json.loads(given.model_dump_json(exclude_unset=True, exclude={"extends"}))
        asked = Scheme.from_data({**data, "options": {**given.options, "no-such-option": 1}})
        with pytest.raises(SchemeError, match="no-such-option"):
            quantize_experts(*random_weights(self._fitting(scheme)), asked, registry=self._registry())

    # --- GPUs --------------------------------------------------------------------------------------------------------

    @since_api(1)
    def test_a_kernel_serves_every_kind_of_device_that_is_claimed(self, scheme: str) -> None:
        """Asked, not run: on some GPU from the declared compute capability on, and on a CPU."""
        needs = self._manifest().needs
        if needs is not None and needs.cuda is None:
            pytest.skip("the plugin claims no GPU")
        registry, given, against = self._registry(), self._scheme(scheme), ""
        activate(registry, given)
        plan = plan_layer(layer_spec(self._fitting(scheme)), given, registry, CPU)
        least = (needs.cuda.minimum if needs is not None and needs.cuda is not None else None) or (0, 0)
        for capability in (c for c in CAPABILITIES_OF_GPUS if c >= least):
            try:
                for group in plan.groups:
                    kernel_on(registry, group.ctx, Device("cuda", 0, capability))
            except SchemeError as error:
                against = str(error)
            else:
                return
        pytest.fail(f"plugin.yaml claims GPUs, but none is served: {against}")

    @since_api(1)
    def test_every_stored_byte_decodes_in_the_kernel_as_the_format_says(self, number_format: str) -> None:
        self._expect_interpreted("formats", number_format)

    @since_api(1)
    def test_the_gpus_kernel_gives_the_references_numbers_in_the_interpreter(self, scheme: str) -> None:
        self._expect_interpreted("schemes", scheme)

    @since_api(1)
    @needs_gpu
    def test_a_gpu_stores_the_bytes_that_a_cpu_stores(self, scheme: str, gpu: torch.device) -> None:
        layer, there = self._layer(scheme), self._on(gpu, scheme)
        for projection, expert, _, kept in projections_of(layer):
            stored = layer.experts.stored(projection, expert)
            assert same_bytes(there.experts.stored(projection, expert).cpu(), stored), f"expert {expert}, {projection}"
            mine, its = kept.scales, there.kept[projection, expert].scales
            for part in ("scale", "zero_point", "global_scale"):
                here = getattr(mine, part)
                assert here is None or same_bytes(here, getattr(its, part).cpu()), f"{part}, expert {expert}"
        w13, w2 = (weight.to(gpu) for weight in random_weights(self._fitting(scheme)))
        unwatched = quantize_experts(w13, w2, self._scheme(scheme), registry=Registry.discover())
        for name, buffer in there.experts.named_buffers():
            assert same_bytes(unwatched.get_buffer(name), buffer), f"{name}, where nobody watches the stages"

    @since_api(1)
    @needs_gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("M", [1, 7, 200])
    def test_a_gpu_gives_the_references_numbers(
        self, scheme: str, gpu: torch.device, M: int, dtype: torch.dtype
    ) -> None:
        tokens = [tensor.to(gpu) for tensor in random_tokens(self._fitting(scheme), M=M, dtype=dtype)]
        self._expect_reference(self._on(gpu, scheme), *tokens)

    @since_api(1)
    @needs_gpu
    def test_moving_to_a_gpu_and_back_changes_no_byte(self, scheme: str, gpu: torch.device) -> None:
        layer, moved = self._layer(scheme), copy.deepcopy(self._layer(scheme).experts)
        tokens = random_tokens(self._fitting(scheme), dtype=torch.float32)
        there = moved.to(gpu)(*(tensor.to(gpu) for tensor in tokens)).cpu()
        assert difference_by_token(there, layer.experts(*tokens)).max() <= 2**-5
        moved.to("cpu")
        for name, buffer in moved.named_buffers():
            assert same_bytes(buffer, layer.stored_bytes[name]), f"{name} changed"

    @since_api(1)
    @needs_gpu
    def test_a_captured_graph_replays_with_other_tokens(self, scheme: str, gpu: torch.device) -> None:
        experts, shape = self._on(gpu, scheme).experts, self._fitting(scheme)
        held = [tensor.to(gpu) for tensor in random_tokens(shape)]
        experts(*held)  # compiles before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(*held)
        for seed in (5, 6):
            for old, new in zip(held, random_tokens(shape, seed=seed), strict=True):
                old.copy_(new)
            graph.replay()
            assert same_bytes(out, experts(*held)), "the replay gave another result than a call"

    @since_api(1)
    @needs_gpu
    def test_nothing_stays_on_a_gpu_of_a_layer_that_is_gone(self, scheme: str, gpu: torch.device) -> None:
        tokens = [tensor.to(gpu) for tensor in random_tokens(self._fitting(scheme))]
        weights = tuple(weight.to(gpu) for weight in random_weights(self._fitting(scheme)))

        def come_and_go() -> int:
            self._build(scheme, weights=weights).experts(*tokens)
            self._registry().begin()
            gc.collect()
            return torch.cuda.memory_allocated(gpu)

        come_and_go()
        first, second = come_and_go(), come_and_go()
        assert second <= first, f"{second - first} bytes stay of each layer"

    # --- what pytest asks for ----------------------------------------------------------------------------------------

    @pytest.fixture
    def gpu(self) -> torch.device:
        """The first GPU; without one the test is skipped as not verified here."""
        needs = self._manifest().needs
        if needs is not None and needs.cuda is None:
            pytest.skip("the plugin claims no GPU")
        if not torch.cuda.is_available():
            pytest.skip(NOT_VERIFIED + "this torch sees no GPU")
        least = (needs.cuda.minimum if needs is not None and needs.cuda is not None else None) or (0, 0)
        if torch.cuda.get_device_capability(0) < least:
            pytest.skip(NOT_VERIFIED + f"this GPU is older than the plugin needs, compute capability {least}")
        return torch.device("cuda", 0)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give a test the plugin's schemes, formats or capabilities, one by one, by the name of its argument."""
        if not isinstance(getattr(self, "plugin", None), str):
            raise pytest.UsageError(f'{type(self).__name__}: say which plugin, for example plugin = "mine"')
        claimed = self._manifest().capabilities if self._is_usable() else ()
        given: Mapping[str, Callable[[], Any]] = {
            "scheme": lambda: [self._parameter(name) for name in self._scheme_names()],
            "number_format": lambda: self._manifest().formats if self._is_usable() else (),
            "claimed": lambda: claimed,
            "unclaimed": lambda: [c for c in CAPABILITIES if c not in claimed],
        }
        for name, values in given.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values())

    @classmethod
    def _parameter(cls, scheme: str) -> Any:
        """Return a scheme's name for parametrize; skipped where no installed plugin has its activations' format."""
        try:
            wanted = {spec.format for spec in activations_of(cls._scheme(scheme))}
        except SchemeError:
            wanted = set()  # its tests say what is wrong with the file
        missing = wanted - {name for manifest in cls._registry().manifests().values() for name in manifest.formats}
        reason = f"{NOT_VERIFIED}no installed plugin has the format {', '.join(sorted(missing))}"
        return pytest.param(scheme, marks=[pytest.mark.skip(reason)] if missing else [])

    @classmethod
    def speaks_api(cls) -> int:
        """Return the `api:` of the plugin's plugin.yaml; tests that came with a newer one are skipped."""
        return cls._manifest().api if cls._is_usable() else API


def _sizes(layer: Layer) -> tuple[int, int, int, int]:
    of = layer.plan.layer
    return of.num_experts, of.experts_per_token, of.hidden_size, of.intermediate_size
