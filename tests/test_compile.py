"""torch.compile, fake tensors, make_fx and torch.export see one operator, which gives the numbers of an eager call."""

from __future__ import annotations

import copy
import gc

import formats
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import moeplug
from moeplug import Scheme, UsageError
from moeplug.kernels import ops

E, H, I, T = 8, 64, 32, 2
PLAIN = Scheme.from_text("api: 1\nname: plain\nweights: null\n")
MIXED = Scheme.from_text(
    "api: 1\nname: mixed\nplugin: int8\nweights: {format: int8}\n"
    'overrides: [{experts: "1,5", weights: null}, {experts: "6-7", projections: [down], weights: null}]\n'
)
SCHEMES = {"int8": "int8", "int8-g32": "int8-g32", "int8-w8a8": "int8-w8a8", "plain": PLAIN, "three groups": MIXED}


def quantized(scheme, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    w13, w2 = torch.randn(E, 2 * I, H, generator=g) / H**0.5, torch.randn(E, H, I, generator=g) / I**0.5
    return moeplug.quantize_experts(w13.to(dtype), w2.to(dtype), scheme)


def tokens(M=5, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, E, (M, T), generator=g)
    return torch.randn(M, H, generator=g).to(dtype), torch.rand(M, T, generator=g), ids


class Block(nn.Module):
    """A layer as a model has it: a router, the experts, and operations around them for a compiler to fuse."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts
        self.router = nn.Linear(H, E, bias=False)
        nn.init.normal_(self.router.weight, generator=torch.Generator().manual_seed(2))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(T)
        return x + 2 * self.experts(x * 0.5, weights, ids)


def compiled(module, **options):
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager", fullgraph=True, **options)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_compiled_block_without_graph_breaks_gives_the_eager_bits(scheme, dynamic):
    block = Block(quantized(scheme))
    fast = compiled(block, dynamic=dynamic)
    for M in (5, 1, 17, 0):
        x = tokens(M)[0]
        assert torch.equal(fast(x), block(x)), M


@pytest.mark.parametrize("name", ["fp8-block", "int4-g32-asym", "nvfp4"])
def test_packed_weights_and_every_kind_of_scale_pass_the_compiler(name):
    g = torch.Generator().manual_seed(0)
    experts = formats.quantized(torch.randn(E, 2 * I, H, generator=g), torch.randn(E, H, I, generator=g), name)
    assert torch.equal(compiled(experts)(*tokens()), experts(*tokens()))


def test_one_dynamic_graph_serves_every_number_of_tokens():
    block, graphs = Block(quantized("int8")), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for M in (5, 6, 300):
        x = tokens(M)[0]
        assert torch.equal(fast(x), block(x))
    assert len(graphs) == 1
    assert [str(n.target) for n in graphs[0].graph.nodes].count("moeplug.experts") == 1


@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
def test_layers_compiled_one_by_one_can_share_a_graph():
    blocks, graphs, x = [Block(quantized("int8", seed)) for seed in range(12)], [], tokens()[0]

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in blocks:
        expected = block(x)
        block.compile(backend=backend, fullgraph=True)
        assert torch.equal(block(x), expected)
    assert len(graphs) <= 2  # the first layer's own, then one for all that follow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_compiled_call_writes_out_and_keeps_dtypes(dtype):
    experts, args = quantized(MIXED, dtype=dtype), tokens(dtype=dtype)
    fast = compiled(lambda *x, out=None: experts(*x, out=out))
    assert torch.equal(fast(*args), experts(*args))
    for out in (torch.full((5, H), torch.nan), torch.full((5, H), torch.nan, dtype=dtype)):
        assert fast(*args, out=out) is out
        assert torch.equal(out, experts(*args, out=torch.empty_like(out)))


def test_an_eager_call_does_not_meet_the_dispatcher(monkeypatch):
    experts = quantized("int8")
    monkeypatch.setattr(ops, "experts", lambda *_: pytest.fail("an eager call was traced"))
    experts(*tokens())
    with pytest.raises(pytest.fail.Exception, match="was traced"), FakeTensorMode(allow_non_fake_inputs=True):
        experts(*tokens())


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
def test_the_operator_is_what_torch_expects_of_one(out_dtype):
    (group,) = quantized("int8", dtype=torch.bfloat16).groups
    args = (*tokens(dtype=torch.bfloat16), list(group.buffers()), group._handle, out_dtype)
    checks = torch.library.opcheck(torch.ops.moeplug.experts.default, args)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_fake_tensors_give_shape_and_dtype_without_a_kernel(scheme):
    experts = quantized(scheme, dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(buffer) for name, buffer in experts.named_buffers()}
        args = tuple(mode.from_tensor(x) for x in tokens(7, torch.bfloat16))
        out = functional_call(experts, state, args)
    assert (out.shape, out.dtype, out.device.type) == ((7, H), torch.bfloat16, "cpu")
    assert out.is_contiguous()


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operator_and_its_graph_gives_the_eager_bits(mode):
    experts = quantized(MIXED)
    state = dict(experts.named_buffers())
    graph = make_fx(lambda state, *x: functional_call(experts, state, x), tracing_mode=mode)(state, *tokens())
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("moeplug.experts.default") == len(experts.groups)
    args = tokens(9 if mode == "symbolic" else 5, seed=3)
    assert torch.equal(graph(state, *args), experts(*args))


def test_an_exported_program_gives_the_eager_bits():
    block = Block(quantized("int8")).eval()
    M = torch.export.Dim("M", min=2, max=512)
    program = torch.export.export(block, (tokens()[0],), dynamic_shapes=({0: M},))
    x = tokens(33)[0]
    assert torch.equal(program.module()(x), block(x))


def test_a_compiled_block_follows_load_state_dict_and_to():
    block, other = Block(quantized("int8")), Block(quantized("int8", seed=7))
    fast, x = compiled(block), tokens()[0]
    before = fast(x)
    for assign in (False, True):
        block.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert torch.equal(fast(x), other(x))
    assert not torch.equal(fast(x), before)
    block.to(torch.bfloat16)
    assert torch.equal(fast(x.bfloat16()), block(x.bfloat16()))


def test_a_copy_has_a_handle_of_its_own():
    block = Block(quantized("int8"))
    other = copy.deepcopy(block)
    assert other.experts.groups[0]._handle != block.experts.groups[0]._handle
    other.load_state_dict(Block(quantized("int8", seed=7)).state_dict())
    x = tokens()[0]
    assert torch.equal(compiled(other)(x), other(x))
    assert not torch.equal(other(x), block(x))


def test_a_graph_whose_experts_are_gone_says_so():
    experts = quantized("int8")
    (group,) = experts.groups
    args = (*tokens(), list(group.buffers()), group._handle)
    torch.ops.moeplug.experts(*args)
    del experts, group
    gc.collect()
    with pytest.raises(UsageError, match="no longer exist in this process: keep their module alive"):
        torch.ops.moeplug.experts(*args)


def test_a_traced_call_checks_its_arguments_like_an_eager_one():
    experts = quantized("int8")
    hidden, weights, ids = tokens()
    with pytest.raises(UsageError, match=r"hidden is \(5, 63\)"):
        torch.compile(experts, backend="eager")(hidden[:, 1:], weights, ids)


def logits(model, ids):
    return model(ids, use_cache=False).logits


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("scheme", ["int8", MIXED], ids=["int8", "three groups"])
def test_a_compiled_transformers_model_gives_the_eager_logits(tiny_checkpoint, scheme):
    model = moeplug.load(tiny_checkpoint("qwen3_moe"), scheme, device="cpu", runtime="transformers").model
    torch._dynamo.reset()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (11, 4):
        ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(length))
        assert relative(logits(fast, ids), logits(model, ids)) < 2**-9  # no rounding is added or left out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_inductor_gives_the_eager_logits(tiny_checkpoint):
    model = moeplug.load(tiny_checkpoint("qwen3_moe"), "int8", device="cpu", runtime="transformers").model
    torch._dynamo.reset()
    fast = torch.compile(model)
    ids = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
    assert relative(logits(fast, ids), logits(model, ids)) < 0.02  # fused, float32 is not rounded to bfloat16 between
