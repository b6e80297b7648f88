"""Routing gives transformers' numbers, in torch and in one kernel; ties, infinities and NaNs have a defined end."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import CASES, DEEPSEEK_V3, GPT_OSS, difference, inputs_of

from moeplug.errors import UsageError
from moeplug.kernels.router import launch_of, route, route_triton
from moeplug.moe.router import RouterSpec, route_reference

ROOT = Path(__file__).parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# family: config fields, and the rule that they ask for. 18 experts, 6 groups of 3: no power of two anywhere.
SIZES = {"num_experts": 18, "num_local_experts": 18, "n_routed_experts": 18, "num_experts_per_tok": 3}
SIZES |= {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
GROUPS = {"n_group": 6, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
GROUPED = RouterSpec(3, "sigmoid", 6, 2, "top2_sum", True, 1e-20, 2.5)
FAMILIES = {
    "qwen3_moe": ({"norm_topk_prob": True}, RouterSpec(3, renormalize=True)),
    "qwen3_moe-raw": ({"norm_topk_prob": False}, RouterSpec(3)),
    "olmoe": ({}, RouterSpec(3)),
    "mixtral": ({}, RouterSpec(3, renormalize=True)),
    "gpt_oss": ({}, RouterSpec(3, "softmax_of_chosen")),
    "jamba": ({}, RouterSpec(3)),
    "minimax_m2": ({}, RouterSpec(3, "sigmoid", renormalize=True)),
    "deepseek_v2": (
        GROUPS | {"topk_method": "group_limited_greedy"},
        RouterSpec(3, "softmax", 6, 2, scaling_factor=2.5),
    ),
    "deepseek_v3": (GROUPS, GROUPED),
    "glm4_moe": (GROUPS, GROUPED),
    "glm4_moe-no_groups": (
        GROUPS | {"n_group": 1, "topk_group": 1},
        RouterSpec(3, "sigmoid", renormalize=True, epsilon=1e-20, scaling_factor=2.5),
    ),
}
MODULES = {"jamba": "JambaSparseMoeBlock", "deepseek_v3": "DeepseekV3TopkRouter", "glm4_moe": "Glm4MoeTopkRouter"}
MODULES |= {"deepseek_v2": "DeepseekV2TopkRouter", "qwen3_moe": "Qwen3MoeTopKRouter", "olmoe": "OlmoeTopKRouter"}
MODULES |= {"mixtral": "MixtralTopKRouter", "gpt_oss": "GptOssTopKRouter", "minimax_m2": "MiniMaxM2TopKRouter"}


def upstream(family, fields, hidden):
    """Return (logits, bias or None, topk_weights, topk_ids) of a random router of transformers, in float32."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **SIZES | fields)
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    router = getattr(modeling, MODULES[family])(config).float()
    generator = torch.Generator().manual_seed(1)
    for tensor in [*router.parameters(), *router.buffers()]:
        torch.nn.init.normal_(tensor, std=0.5, generator=generator)
    if family == "jamba" and not hasattr(router, "route_tokens_to_experts"):  # after transformers 5.17: as others
        router = router.router
    elif family == "jamba":
        logits = router.router(hidden)
        ids, weights = router.route_tokens_to_experts(hidden, logits)
        return logits, None, weights, ids
    bias = getattr(router, "e_score_correction_bias", None)
    if family == "minimax_m2":
        bias = torch.randn(18, generator=generator)
        return *router(hidden, bias)[:1], bias, *router(hidden, bias)[1:]
    logits, weights, ids = router(hidden)
    return logits, bias, weights, ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_routed_as_transformers_routes_it(name):
    pytest.importorskip("transformers")
    fields, spec = FAMILIES[name]
    hidden = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, bias, expected, expected_ids = upstream(name.partition("-")[0], fields, hidden)
    assert (bias is not None) == (name.partition("-")[0] in ("deepseek_v3", "glm4_moe", "minimax_m2"))
    weights, ids = route_reference(logits, spec, bias)
    expected_ids, order = expected_ids.sort(1)  # transformers leaves the order of the chosen open (sorted=False)
    ids, mine = ids.long().sort(1)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.gather(1, mine), expected.gather(1, order), rtol=1e-6, atol=0)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-float("inf"), -2.5, -0.0, 0.0, 1.0, 3.0]), min_size=1, max_size=20), st.data())
def test_experts_come_by_choice_then_by_id(values, data):
    T = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda e: (-values[e], e))[:T]
    for score in ("softmax", "sigmoid", "softmax_of_chosen"):
        ids = route_reference(torch.tensor([values]), RouterSpec(T, score))[1]
        assert ids.tolist() == [expected]


def test_equal_groups_come_by_number():
    spec = RouterSpec(4, n_group=4, topk_group=2)
    assert route_reference(torch.zeros(1, 12), spec)[1].tolist() == [[0, 1, 2, 3]]


def test_an_expert_left_out_is_not_chosen_even_where_those_that_stay_are_at_minus_infinity():
    logits = torch.full((1, 6), -float("inf"))
    logits[0, 4] = 0.0
    assert route_reference(logits, RouterSpec(3, "sigmoid", 2, 1))[1].tolist() == [[4, 3, 5]]


def test_the_bias_changes_the_choice_and_no_weight():
    logits, bias = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([9.0, 0.0, 0.0])
    weights, ids = route_reference(logits, RouterSpec(2), bias)
    assert ids.tolist() == [[0, 2]]
    assert torch.equal(weights, logits.softmax(1)[:, [0, 2]])


def test_a_nan_is_chosen_first_and_shows():
    logits = torch.tensor([[1.0, float("nan"), 3.0, 2.0]])
    weights, ids = route_reference(logits, RouterSpec(2, "sigmoid"))
    assert ids.tolist() == [[1, 2]]
    assert weights.isnan().tolist() == [[True, False]]
    assert route_reference(logits, RouterSpec(2))[0].isnan().all()


def test_scores_that_round_to_the_same_number_are_told_apart_by_their_logits():
    ids = route_reference(torch.tensor([[-300.0, -200.0, 30.0, 40.0]]), RouterSpec(4, "sigmoid"))[1]
    assert ids.tolist() == [[3, 2, 1, 0]]


def test_epsilon_and_scaling_factor_are_applied_in_this_order():
    spec = RouterSpec(2, "sigmoid", renormalize=True, epsilon=1.0, scaling_factor=3.0)
    weights, _ = route_reference(torch.zeros(1, 2), spec)
    assert weights.tolist() == [[0.75, 0.75]]  # 0.5 / (1 + 1) * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k=0; expected at least 1"),
        ({"score": "relu"}, "score='relu'; expected one of softmax, sigmoid, softmax_of_chosen"),
        ({"group_score": "mean"}, "group_score='mean'; expected one of max, top2_sum"),
        ({"n_group": 2, "topk_group": 3}, "expected 1 <= topk_group <= n_group"),
        ({"topk_group": 0}, "expected 1 <= topk_group <= n_group"),
        ({"score": "softmax_of_chosen", "renormalize": True}, "sum to 1 already"),
        ({"epsilon": 1e-20}, "0 without renormalize"),
        ({"epsilon": -1.0, "renormalize": True}, "expected a finite number from 0 on"),
        ({"epsilon": float("nan"), "renormalize": True}, "expected a finite number from 0 on"),
        ({"scaling_factor": float("inf")}, "scaling_factor=inf"),
        ({"least_sum": 1e-12}, "0 without renormalize"),
        ({"norm": 0.0}, "norm=0.0; expected a number above 0"),
        ({"score": "sparsemixer"}, "sparsemixer needs jitter above 0"),
        ({"score": "sparsemixer", "jitter": 0.1, "renormalize": True}, "neither groups nor renormalize"),
    ],
)
def test_a_rule_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        RouterSpec(**{"top_k": 2} | fields)


@pytest.mark.parametrize(
    ("logits", "spec", "bias", "message"),
    [
        (torch.zeros(4), RouterSpec(2), None, r"logits are \(4,\); expected \(M, E\)"),
        (torch.zeros(4, 0), RouterSpec(1), None, "E from 1 to 1024"),
        (torch.zeros(1, 1025), RouterSpec(1), None, "E from 1 to 1024"),
        (torch.zeros(4, 8).double(), RouterSpec(2), None, "float64; expected bfloat16"),
        (torch.zeros(4, 8), RouterSpec(9), None, "top_k=9 is more than 1 of 1 groups of 8 experts"),
        (torch.zeros(4, 8), RouterSpec(5, n_group=4, topk_group=2), None, "top_k=5 is more than 2 of 4 groups of 2"),
        (torch.zeros(4, 9), RouterSpec(2, n_group=2), None, "n_group=2 does not divide E=9"),
        (torch.zeros(4, 8), RouterSpec(1, n_group=8, group_score="top2_sum"), None, "leaves 1 expert per group"),
        (torch.zeros(4, 8), RouterSpec(2), torch.zeros(1, 8), r"bias is \(1, 8\) torch.float32; expected floats"),
        (torch.zeros(4, 8), RouterSpec(2), torch.zeros(8).int(), "int32; expected floats"),
        (torch.zeros(4, 8), RouterSpec(2), torch.zeros(8, device="meta"), "bias is on meta, logits are on cpu"),
    ],
)
def test_a_call_that_does_not_fit_says_why(logits, spec, bias, message):
    for function in (route, route_reference):
        with pytest.raises(UsageError, match=message):
            function(logits, spec, bias)


@pytest.mark.parametrize("jitter", [0.01, 0.5])
def test_sparsemixer_gives_the_numbers_of_phimoe(jitter):
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * 2
    logits[:50] -= 5  # all below 0: the threshold then divides by |logit|
    expected_weights, expected_ids = sparsemixer(logits, jitter, training=False, top_k=2)
    weights, ids = route(logits, RouterSpec(2, "sparsemixer", jitter=jitter))
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights)
    with pytest.raises(UsageError, match="it takes no bias"):
        route(logits, RouterSpec(2, "sparsemixer", jitter=jitter), torch.zeros(16))


def test_weights_are_divided_by_a_norm_or_by_a_least_sum_and_scaled_by_expert():
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    scores, ids = logits.softmax(1).topk(3, dim=1)
    for norm in (2.0, 3.0):
        weights, found = route(logits, RouterSpec(3, renormalize=True, norm=norm))
        assert torch.equal(found.long(), ids)
        torch.testing.assert_close(weights, scores / scores.norm(norm, dim=1, keepdim=True))
    least, _ = route(logits, RouterSpec(3, renormalize=True, least_sum=0.8))
    torch.testing.assert_close(least, scores / scores.sum(1, keepdim=True).clamp(min=0.8))
    scale = torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5
    scaled, _ = route(logits, RouterSpec(3), expert_scale=scale)
    torch.testing.assert_close(scaled, scores * scale[ids])


def test_rules_that_the_kernel_does_not_know_compile_as_torch_operations():
    logits = torch.randn(5, 8)
    for spec in (RouterSpec(2, renormalize=True, norm=2.0), RouterSpec(2, "sparsemixer", jitter=0.1)):
        graph = torch.fx.experimental.proxy_tensor.make_fx(partial(route, spec=spec))(logits)
        assert not any("moeplug" in str(node.target) for node in graph.graph.nodes)
        torch.testing.assert_close(graph(logits)[0], route(logits, spec)[0])


def test_route_refuses_to_lose_a_gradient():
    logits = torch.zeros(2, 8, requires_grad=True)
    with pytest.raises(UsageError, match="is for inference"):
        route(logits, RouterSpec(2))
    with torch.no_grad():
        route(logits, RouterSpec(2))


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "no_tokens"])
def test_route_on_a_cpu_is_the_reference(name):
    logits, bias = inputs_of(CASES[name])
    assert difference(route(logits, CASES[name].spec, bias), CASES[name]) is None


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_a_model_that_routes_compiles_in_one_graph(name):
    case, seen = CASES[name], []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    logits, bias = inputs_of(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, b: route(x * 1, case.spec, b), fullgraph=True, backend=backend)
    with torch.no_grad():
        assert difference(compiled(logits, bias), case) is None
    assert any("moeplug.route" in target for target in seen)


def test_the_custom_op_is_what_its_schema_and_its_fake_say():
    arguments = (4, "softmax_of_chosen", 1, 1, "max", False, 0.0, 1.0)
    torch.library.opcheck(torch.ops.moeplug.route, (torch.randn(5, 32), None, *arguments))
    torch.library.opcheck(torch.ops.moeplug.route, (torch.randn(0, 32).half(), torch.zeros(32), *arguments))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """Run every case in one process with TRITON_INTERPRET=1; return {name: what differs}."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(ROOT / "tests/router_cases.py"), "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_references_numbers(interpreted, name):
    assert interpreted[name] is None


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_references_numbers_on_a_gpu_twice(name):
    case = CASES[name]
    logits, bias = inputs_of(case, "cuda")
    first, second = route(logits, case.spec, bias), route_triton(logits, case.spec, bias)
    assert difference(first, case) is None
    assert torch.equal(first[0].view(torch.int32), second[0].view(torch.int32))
    assert torch.equal(first[1], second[1])


@needs_gpu
def test_a_captured_graph_routes_what_is_in_its_buffer_now():
    case = CASES["deepseek_v3"]
    logits, bias = inputs_of(case, "cuda")
    static = torch.zeros_like(logits)
    route(static, case.spec, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = route(static, case.spec, bias)
    static.copy_(logits)
    graph.replay()
    assert difference(captured, case) is None


def compiled(spec: RouterSpec, E: int, logits: str, bias: str | None, capability: int):
    """Compile route_kernel as the launcher would launch it; return triton's CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moeplug.kernels import _router

    kernel, launch = _router.route_kernel, launch_of(E, spec, bias is not None)
    constants = {name: value for name, value in launch.items() if name in kernel.arg_names} | {"stride_le": 1}
    constants |= {"bias_ptr": None, "stride_be": 0} if bias is None else {"stride_be": 1}
    pointers = {"logits_ptr": logits, "bias_ptr": bias, "weights_ptr": "fp32", "ids_ptr": "i32"}
    signature = {n: "constexpr" if n in constants else f"*{pointers[n]}" if n in pointers else "i32"
                 for n in kernel.arg_names}  # fmt: skip
    divisible = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*") or n == "stride_lm"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in divisible})
    options = {name: launch[name] for name in ("num_warps", "enable_fp_fusion")}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="there is nothing to compile")
@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("spec", "E", "logits", "bias"),
    [
        (RouterSpec(8, renormalize=True), 128, "bf16", None),
        (DEEPSEEK_V3, 256, "fp32", "fp32"),
        (GPT_OSS, 32, "fp16", None),
        (RouterSpec(6, n_group=8, topk_group=3), 160, "fp32", None),
        (RouterSpec(1), 1, "bf16", "bf16"),
        (RouterSpec(32), 1024, "bf16", None),
    ],
    ids=["qwen3", "deepseek_v3", "gpt_oss", "deepseek_v2", "one_expert", "1024_experts"],
)
def test_the_kernel_compiles_without_atomics(spec, E, logits, bias, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a cached kernel would prove nothing
    kernel = compiled(spec, E, logits, bias, capability)
    assert kernel.asm["cubin"]
    assert "atom" not in kernel.asm["ptx"], "an atomic would make results depend on the order of programs"
    assert kernel.metadata.shared <= 48 * 1024
