"""Exports read by those they are made for: compressed-tensors, transformers, and moeplug itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from formats import FORMATS, SPECS, scheme_of
from interop_cases import case
from safetensors.torch import load_file

import moeplug
from moeplug import RefusedError, SchemeError, UsageError, api
from moeplug.checkpoint.reader import Checkpoint
from moeplug.checkpoint.writer import read_manifest
from moeplug.quantization import dequantize, quantize
from moeplug.scheme import Scheme
from moeplug.spec import ActivationSpec
from moeplug.verifying import verify

FP8_TOKENS = ActivationSpec(format="fp8")
FP8_GROUPS = ActivationSpec(format="fp8", strategy="group", group_size=128)
INT8_TOKENS = ActivationSpec(format="int8")
FORMS = [pytest.param(False, id="per_expert"), pytest.param(True, id="fused")]
NAMES = {"qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"), "mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
NAMES |= {"olmoe": NAMES["qwen3_moe"], "jamba": ("feed_forward", *NAMES["qwen3_moe"][1:])}
# The sizes of the tiny models are not multiples of 128, so g32 stands for g128.
SCHEMES = {
    "int8": (SPECS["int8"], INT8_TOKENS),
    "int8-weights": (SPECS["int8"], None),
    "int8-full": (case("int8", range="full")[0], INT8_TOKENS),
    "int4-g32": (SPECS["int4-g32"], None),
    "int4-g32-asym": (SPECS["int4-g32-asym"], None),
    "fp8-channel": (SPECS["fp8-channel"], FP8_TOKENS),
    "fp8-tensor": (SPECS["fp8-tensor"], FP8_TOKENS),
    "fp8-block": (SPECS["fp8-block"], None),
    "mxfp4": (SPECS["mxfp4"], None),
    "mxfp8": (SPECS["mxfp8"], None),
    "nvfp4": (SPECS["nvfp4"], None),
}


def scheme(name):
    spec, activations = SCHEMES[name]
    return scheme_of(spec, activations, activations)


def tensors_in(folder):
    return {name: tensor for path in helpers.shard_files(folder) for name, tensor in load_file(path).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def weights_of(model_type):
    """Yield (module on disk, weight (N, K)) of every expert weight of a tiny model."""
    block, gate, up, down = NAMES[model_type]
    for layer in moe_layers(model_type):
        gate_up, downs = helpers.memory_experts(model_type, layer)
        for e in range(gate_up.shape[0]):
            halves = dict(zip((gate, up), gate_up[e].chunk(2), strict=True)) | {down: downs[e]}
            for name, weight in halves.items():
                yield f"model.layers.{layer}.{block}.experts.{e}.{name}", weight


def moe_layers(model_type):
    names = (helpers.fused_names(model_type, layer)[0] for layer in range(8))
    return [layer for layer, name in enumerate(names) if name in helpers.tiny_model(model_type).state_dict()]


def decoded(weight, spec):
    """Return what our own quantization makes of a weight (N, K)."""
    fmt = FORMATS[spec.format]
    stored = torch.empty(1, weight.shape[0], weight.shape[1] // fmt.values_per_element, dtype=fmt.storage_dtype)
    return dequantize(stored, quantize(weight[None], spec, fmt, stored), fmt)[0]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("fused", FORMS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_compressed_tensors_reads_an_export_bit_for_bit(tiny_checkpoint, tmp_path, model_type, fused, name):
    source, target = tiny_checkpoint(model_type, fused, shards=2), tmp_path / "export"
    api.export(source, scheme(name), target)
    tensors, config = tensors_in(target), QuantizationConfig.model_validate(config_of(target)["quantization_config"])
    (group,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    for module, weight in weights_of(model_type):
        parts = {part: tensors.pop(part) for part in list(tensors) if part.startswith(module + ".")}
        read = compressor.decompress({part.rpartition(".")[2]: t for part, t in parts.items()}, group)["weight"]
        ours = decoded(weight, SCHEMES[name][0])
        if read.dtype == torch.bfloat16:  # its fp4 and MX readers compute in bfloat16
            torch.testing.assert_close(read.float(), ours, rtol=2**-7, atol=0)
        else:
            assert torch.equal(read, ours), module
    dense = tensors_in(tiny_checkpoint(model_type, False))
    assert set(tensors) == {part for part in dense if ".experts." not in part}
    assert all(torch.equal(tensor, dense[part]) for part, tensor in tensors.items())


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_every_linear_that_stays_is_in_the_ignore_list(tiny_checkpoint, tmp_path, model_type):
    api.export(tiny_checkpoint(model_type), scheme("int8"), tmp_path / "export")
    ignored = set(config_of(tmp_path / "export")["quantization_config"]["ignore"])
    model = helpers.tiny_model(model_type)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    routers = {
        name.removesuffix(".weight") for name, t in model.state_dict().items() if re.search(r"gate|router", name)
    }
    kept = {name for name in linear | routers if ".experts" not in name}
    assert len(kept) > 5
    assert kept <= ignored
    assert not [name for name in ignored if ".experts." in name]


@pytest.mark.parametrize("name", ["int8", "int4-g32", "mxfp4"])
@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_a_fused_and_a_per_expert_file_give_the_same_export(tiny_checkpoint, tmp_path, model_type, name):
    for fused in (False, True):
        api.export(tiny_checkpoint(model_type, fused), scheme(name), tmp_path / str(fused))
    one, other = tensors_in(tmp_path / "False"), tensors_in(tmp_path / "True")
    assert one.keys() == other.keys()
    for part, tensor in one.items():
        assert torch.equal(tensor.view(torch.uint8), other[part].view(torch.uint8)), part


def test_layers_that_an_override_leaves_alone_are_ignored_and_unchanged(tiny_checkpoint, tmp_path):
    text = "api: 1\nname: x\nplugin: int8\nweights: {format: int8}\noverrides: [{layers: '0', weights: null}]\n"
    source = tiny_checkpoint("qwen3_moe")
    api.export(source, Scheme.from_text(text), tmp_path / "export")
    before, after = tensors_in(source), tensors_in(tmp_path / "export")
    untouched = [name for name in before if name.startswith("model.layers.0.mlp.experts.")]
    ignored = set(config_of(tmp_path / "export")["quantization_config"]["ignore"])
    assert len(untouched) == 24
    for name in untouched:
        assert torch.equal(before[name], after[name])
        assert name.removesuffix(".weight") in ignored


def test_different_specs_become_groups_with_targets_that_match_their_modules_alone(tiny_checkpoint, tmp_path):
    text = (
        "api: 1\nname: x\nplugin: int8\nweights: {format: int8}\n"
        "overrides: [{projections: [down], weights: {format: int8, strategy: group, group_size: 32}}]\n"
    )
    api.export(tiny_checkpoint("qwen3_moe"), Scheme.from_text(text), tmp_path / "export")
    groups = config_of(tmp_path / "export")["quantization_config"]["config_groups"].values()
    modules = {name for name, _ in weights_of("qwen3_moe")}
    matched = [{m for m in modules for t in group["targets"] if re.match(t.removeprefix("re:"), m)} for group in groups]
    assert matched[0] | matched[1] == modules
    assert not matched[0] & matched[1]
    assert {m.rpartition(".")[2] for m in matched[1]} == {"down_proj"}


def logits(model):
    ids = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids, use_cache=False).logits.double()


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """A Qwen3-MoE whose experts have several blocks of 128 x 128."""
    import transformers

    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 384, "num_experts": 4, "num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model("qwen3_moe", **helpers.TINY_CONFIGS["qwen3_moe"] | sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # transformers and compressed-tensors warn of each other
@pytest.mark.parametrize(("name", "form"), [("fp8-channel", "compressed-tensors"), ("int4-g32", "compressed-tensors"),
                                            ("mxfp4", "compressed-tensors"), ("fp8-block", "fp8")])  # fmt: skip
def test_transformers_reads_the_exports_that_we_say_it_reads(wide_checkpoint, tmp_path, name, form):
    import transformers

    exported = api.export(wide_checkpoint, scheme(name), tmp_path / "export", form)
    assert any(reader.startswith("transformers 5.17: yes") for reader in exported.readers)
    theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.bfloat16))
    weights_only = scheme_of(SCHEMES[name][0])
    loaded = moeplug.load(wide_checkpoint, weights_only, runtime="transformers", device="cpu")
    unquantized = moeplug.load(wide_checkpoint, "int8", runtime="transformers", device="cpu")
    # Activations and some products are in bfloat16 there; the scheme's own error is several times as large.
    assert relative(theirs, logits(loaded.model)) < 0.02
    assert relative(theirs, logits(loaded.model)) < 0.7 * relative(theirs, logits(unquantized.model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "activations"), [("int8", INT8_TOKENS), ("fp8-block", FP8_GROUPS), ("mxfp8", None),
                                                   ("int4-g32-asym", None)])  # fmt: skip
def test_transformers_refuses_the_exports_that_we_say_it_refuses(wide_checkpoint, tmp_path, name, activations):
    import transformers

    made = scheme_of(SCHEMES[name][0], activations, activations)
    exported = api.export(wide_checkpoint, made, tmp_path / "export")
    assert "transformers 5.17: no, a RuntimeError" in exported.readers
    with pytest.raises(RuntimeError):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [*SCHEMES, "nf4"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "jamba"])
def test_our_own_form_loads_as_what_was_quantized(tiny_checkpoint, tmp_path, model_type, name):
    made = scheme_of(case("nf4", group_size=32)[0]) if name == "nf4" else scheme(name)
    source, target = tiny_checkpoint(model_type, shards=3), tmp_path / "export"
    exported = api.export(source, made, target, "moeplug")
    loaded = [
        moeplug.load(*arguments, runtime="transformers", device="cpu", exact_error=True)
        for arguments in ((source, made), (target,))
    ]
    assert torch.equal(logits(loaded[0].model), logits(loaded[1].model))
    assert loaded[0].layers.keys() == loaded[1].layers.keys() == exported.errors.keys()
    for index, experts in loaded[0].layers.items():
        other = loaded[1].layers[index].state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in experts.state_dict().items())
    first, second = (result.report.as_dict()["layers"] for result in loaded)
    assert first == second


FROM_PRETRAINED = """
import sys
if sys.argv[2] == "first":
    import moeplug
import torch, transformers
import moeplug
from moeplug.moe.experts import QuantizedExperts
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert sum(isinstance(module, QuantizedExperts) for module in model.modules()) == 2
assert not any(parameter.is_meta for parameter in model.parameters())
ids = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    torch.save(model(ids, use_cache=False).logits, sys.argv[1] + "/logits.pt")
"""


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_from_pretrained_reads_our_own_form_once_moeplug_is_imported(tiny_checkpoint, tmp_path, model_type, order):
    source, target = tiny_checkpoint(model_type, shards=3), tmp_path / "export"
    api.export(source, "int8", target, "moeplug")
    done = subprocess.run([sys.executable, "-c", FROM_PRETRAINED, str(target), order], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not initialized" not in done.stderr
    assert "UNEXPECTED" not in done.stderr
    loaded = moeplug.load(source, "int8", runtime="transformers", device="cpu")
    assert torch.equal(torch.load(target / "logits.pt").double(), logits(loaded.model))


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "llama4_text", "deepseek_v3"])
def test_experts_with_biases_without_gates_or_fused_alone_are_exported_too(tmp_path, model_type):
    from moeplug.checkpoint.family import known_families
    from moeplug.integrations.family_check import tiny_model

    family = next(family for family in known_families() if model_type in family.model_types)
    tiny_model(family, model_type).save_pretrained(tmp_path / "source")
    api.export(tmp_path / "source", "int8", tmp_path / "export", "moeplug")
    moeplug.verify(tmp_path / "export", tmp_path / "source")
    loaded = [
        moeplug.load(*arguments, runtime="transformers", device="cpu").model
        for arguments in ((tmp_path / "source", "int8"), (tmp_path / "export",))
    ]
    assert torch.equal(logits(loaded[0]), logits(loaded[1]))
    if model_type in ("gpt_oss", "llama4_text"):
        with pytest.raises(SchemeError, match="use --format moeplug"):
            api.export(tmp_path / "source", "int8", tmp_path / "other")
    else:
        api.export(tmp_path / "source", "int8", tmp_path / "other")
        moeplug.verify(tmp_path / "other", tmp_path / "source")


def test_our_own_form_says_experts_that_differ(tiny_checkpoint, tmp_path):
    text = (
        "api: 1\nname: mixed\nplugin: int8\nweights: {format: int8}\n"
        "overrides: [{experts: '0-2', weights: {format: int8, strategy: group, group_size: 32}}, "
        "{layers: '2', experts: '7', weights: null}]\n"
    )
    source, mixed = tiny_checkpoint("qwen3_moe"), Scheme.from_text(text)
    with pytest.raises(SchemeError, match="layer 0: compressed-tensors cannot say that experts differ; use --format"):
        api.export(source, mixed, tmp_path / "export")
    api.export(source, mixed, tmp_path / "export", "moeplug")
    loaded, direct = moeplug.load(tmp_path / "export", device="cpu"), moeplug.load(source, mixed, device="cpu")
    for index, experts in direct.layers.items():
        other = loaded.layers[index].state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in experts.state_dict().items())


def test_our_own_form_is_laid_out_anew_for_a_kernel_that_wants_another_layout(tiny_checkpoint, tmp_path, monkeypatch):
    from moeplug.kernels.cpu import CpuKernel
    from moeplug.moe.layout import interleaved

    source = tiny_checkpoint("qwen3_moe")
    made = scheme_of(SPECS["mxfp4"])
    with monkeypatch.context() as patch:
        patch.setattr(CpuKernel, "layout_for", lambda self, request: interleaved(True, False))
        patch.setattr(CpuKernel, "bind", lambda self, request, weights, scales: print)
        api.export(source, made, tmp_path / "export", "moeplug")
    assert read_manifest(tmp_path / "export")["made"]["layouts"] == [interleaved(True, False).name]
    loaded = moeplug.load(tmp_path / "export", device="cpu")
    direct = moeplug.load(source, made, device="cpu")
    for index, experts in direct.layers.items():
        other = loaded.layers[index].state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in experts.state_dict().items())


def test_what_a_form_cannot_say_is_refused_and_our_own_is_offered(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3_moe")
    nf4 = scheme_of(case("nf4", group_size=32)[0])
    for form in ("compressed-tensors", "fp8"):
        with pytest.raises(SchemeError, match="use --format .*moeplug"):
            api.export(source, nf4, tmp_path / "export", form)
    with pytest.raises(SchemeError, match="found int8 channel with int8 token activations; use --format compressed"):
        api.export(source, scheme("int8"), tmp_path / "export", "fp8")
    with pytest.raises(UsageError, match="format 'gguf' is not one of compressed-tensors, fp8, moeplug"):
        api.export(source, scheme("int8"), tmp_path / "export", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_family_without_a_tensor_per_expert_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    from moeplug.checkpoint import family

    found = next(f for f in family.known_families() if f.name == "qwen3_moe")
    monkeypatch.setitem(vars(found.descriptor), "disk", [form for form in found.descriptor.disk if form.gate_up])
    with pytest.raises(SchemeError, match="family qwen3_moe has its experts only fused"):
        api.export(tiny_checkpoint("qwen3_moe", fused=True), "int8", tmp_path / "export")
    api.export(tiny_checkpoint("qwen3_moe", fused=True), "int8", tmp_path / "export", "moeplug")


def test_weights_that_a_plugin_transforms_are_exported_in_our_own_form_alone(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(moeplug.registry.Registry, "answers", lambda self, plugin, stage: stage == "load")
    with pytest.raises(SchemeError, match="plugin 'int8' answers stage load itself"):
        api.export(tiny_checkpoint("qwen3_moe"), "int8", tmp_path / "export")


def test_buffers_that_a_plugin_makes_itself_are_not_exported(tiny_checkpoint, tmp_path, monkeypatch):
    from moeplug.pipeline import builder

    made = builder.create_scales

    def with_more(registry, ctx, store):
        return made(registry, ctx, store) | {"w2_sums": torch.zeros(3)}

    monkeypatch.setattr(builder, "create_scales", with_more)
    with pytest.raises(SchemeError, match="layer 0: has buffers beside weights, biases and scales"):
        api.export(tiny_checkpoint("qwen3_moe"), "int8", tmp_path / "export", "moeplug")
    assert list(tmp_path.iterdir()) == []


def test_an_export_worse_than_the_scheme_accepts_leaves_nothing(tiny_checkpoint, tmp_path):
    text = "api: 1\nname: x\nplugin: int8\nweights: {format: int8}\naccept: {relative_rms: 0.001}\n"
    for form in ("compressed-tensors", "moeplug"):
        with pytest.raises(RefusedError, match="above the scheme's accept: relative_rms: 0.001"):
            api.export(tiny_checkpoint("qwen3_moe"), Scheme.from_text(text), tmp_path / "export", form)
    assert list(tmp_path.iterdir()) == []


def test_other_files_come_along_and_weights_of_other_kinds_do_not(tiny_checkpoint, tmp_path):
    source = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    (source / "tokenizer.json").write_text("{}")
    for name in ("pytorch_model.bin", ".hidden", "model.gguf"):
        (source / name).write_text("x")
    api.export(source, "int8", tmp_path / "export")
    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "moeplug.json", "tokenizer.json")
    }
    assert (tmp_path / "export/tokenizer.json").read_text() == "{}"


def test_an_export_is_the_same_bytes_every_time_and_names_what_made_it(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3_moe", shards=3)
    for name in ("one", "two"):
        api.export(source, "int8-w8a8", tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    text = (tmp_path / "one/moeplug.json").read_text()
    made = json.loads(text)["made"]
    assert made["plugins"] == [
        {"name": "int8", "distribution": "moeplug-int8", "version": made["plugins"][0]["version"]}
    ]
    assert made["source"]["sha256_of_headers"] == Checkpoint.open(source).fingerprint()
    assert Scheme.from_text(made["scheme"]["yaml"]).sha256 == made["scheme"]["sha256"]
    assert str(tmp_path) not in text


MEMORY = """
import json, pathlib, sys
from moeplug import api
from moeplug.registry import Registry

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

tiny, wide, target, form = sys.argv[1:]
registry = Registry.discover()
api.export(tiny, "int8", target + "-tiny", form, device="cpu", registry=registry)  # imports what is imported late
layer = max(layer.bytes_after for layer in api.plan(wide, "int8", device="cpu", registry=registry).layers)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
exported = api.export(wide, "int8", target, form, device="cpu", registry=registry)
print(json.dumps([status("VmHWM") - before, layer, exported.bytes_before, exported.bytes_after]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", ["compressed-tensors", "moeplug"])
def test_an_export_never_has_the_model_in_memory(tiny_checkpoint, wide_experts, tmp_path, form):
    """151 MB of bf16 in, 75 MB of int8 out: 64 MiB are buffers and arithmetic, and our own form holds one layer."""
    arguments = [tiny_checkpoint("qwen3_moe"), wide_experts, tmp_path / "export", form]
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, layer, before, after = json.loads(done.stdout)
    shutil.rmtree(tmp_path / "export")
    assert before > 150_000_000
    assert after > 75_000_000
    assert layer < 20 * 2**20
    assert peak <= 64 * 2**20 + (layer if form == "moeplug" else 0)


def test_groups_that_do_not_fill_a_row_are_exported_in_our_own_form_alone(tiny_checkpoint, tmp_path):
    text = "api: 1\nname: x\nplugin: int8\nweights: {format: int8, strategy: group, group_size: 40, pad: true}\n"
    source = tiny_checkpoint("qwen3_moe")
    with pytest.raises(SchemeError, match="compressed-tensors has no shorter last group; use --format moeplug"):
        api.export(source, Scheme.from_text(text), tmp_path / "export")
    api.export(source, Scheme.from_text(text), tmp_path / "export", "moeplug")
    verify(tmp_path / "export", source)


def test_every_tensor_of_an_export_is_aligned(tiny_checkpoint, tmp_path):
    api.export(tiny_checkpoint("qwen3_moe"), scheme("nvfp4"), tmp_path / "export")
    for tensor in Checkpoint.open(tmp_path / "export").tensors.values():
        size = tensor.nbytes // max(1, torch.Size(tensor.shape).numel())
        assert tensor.offset % max(size, 1) == 0, tensor
