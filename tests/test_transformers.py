"""Four families, written by transformers, loaded by moeplug, beside transformers' own forward."""

from __future__ import annotations

import helpers
import pytest
import torch

import moeplug
from moeplug import CheckpointError, Scheme
from moeplug.checkpoint.family import find_family
from moeplug.integrations.family_check import save, tiny_model
from moeplug.integrations.transformers import reference_model, tokenizer_of
from moeplug.moe.experts import QuantizedExperts

FORMS = [pytest.param(False, id="per_expert"), pytest.param(True, id="fused")]
PLAIN = Scheme.from_text("api: 1\nname: plain\nweights: null\n")


def tokens():
    return torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits.double()


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("fused", FORMS)
@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_unquantized_logits_equal_those_of_transformers_to_rounding(tiny_checkpoint, model_type, fused):
    loaded = moeplug.load(tiny_checkpoint(model_type, fused), PLAIN, device="cpu", runtime="transformers")
    experts = [module for module in loaded.model.modules() if isinstance(module, QuantizedExperts)]
    assert len(experts) == len(loaded.layers) > 0
    expected = logits(helpers.tiny_model(model_type), tokens())
    # bfloat16 has 2**-9 per rounding, and ours rounds the intermediate once where transformers' eager rounds thrice;
    # a few layers deep, that is about one percent. A swapped gate and up, or a transposition, is above 0.1.
    assert relative(logits(loaded.model, tokens()), expected) < 0.015


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_in_float32_unquantized_logits_agree_to_six_digits(tmp_path, model_type):
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **helpers.TINY_CONFIGS[model_type] | {"dtype": "float32"})
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = moeplug.load(tmp_path, PLAIN, device="cpu", runtime="transformers")
    # float32 sums in another order. It is this comparison that proves the order of gate and up.
    assert relative(logits(loaded.model, tokens()), logits(model, tokens())) < 1e-5


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_int8_logits_stay_as_close_as_the_weights(tiny_checkpoint, model_type):
    loaded = moeplug.load(tiny_checkpoint(model_type, shards=3), "int8", device="cpu", runtime="transformers")
    expected = logits(helpers.tiny_model(model_type), tokens())
    assert relative(logits(loaded.model, tokens()), expected) < 0.05


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_per_expert_and_fused_files_of_one_model_give_the_same_bytes(tiny_checkpoint, model_type):
    for scheme in ("int8", "int8-g32"):
        one = moeplug.load(tiny_checkpoint(model_type), scheme, device="cpu").layers
        other = moeplug.load(tiny_checkpoint(model_type, fused=True), scheme, device="cpu").layers
        assert list(one) == list(other)
        for index, experts in one.items():
            for name, tensor in experts.state_dict().items():
                assert torch.equal(tensor, other[index].state_dict()[name]), (scheme, index, name)


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_dense_tensors_are_as_they_were(tiny_checkpoint, model_type):
    loaded = moeplug.load(tiny_checkpoint(model_type), "int8", device="cpu", runtime="transformers")
    original = helpers.tiny_model(model_type).state_dict()
    ours = loaded.model.state_dict()
    experts = {name for name in original if ".experts." in name}
    for name in original.keys() - experts:
        assert torch.equal(ours[name], original[name]), name
        assert ours[name].dtype == original[name].dtype
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("model_type", helpers.MODEL_TYPES)
def test_generate_works(tiny_checkpoint, model_type):
    loaded = moeplug.load(tiny_checkpoint(model_type), "int8", device="cpu", runtime="transformers")
    ids = tokens()[:1]
    out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert out.shape[0] == 1
    assert 11 < out.shape[1] <= 16


def test_computed_buffers_are_those_of_transformers(tiny_checkpoint):
    import transformers

    loaded = moeplug.load(tiny_checkpoint("qwen3_moe"), "int8", device="cpu", runtime="transformers")
    ours = dict(loaded.model.named_buffers())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3_moe"))
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours[name], buffer), name


def test_tied_weights_are_tied(tmp_path):
    import transformers

    config = helpers.TINY_CONFIGS["qwen3_moe"] | {"tie_word_embeddings": True}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen3_moe", **config))
    model.to(torch.bfloat16).eval().save_pretrained(tmp_path)
    loaded = moeplug.load(tmp_path, "int8", device="cpu", runtime="transformers")
    assert loaded.model.lm_head.weight.data_ptr() == loaded.model.model.embed_tokens.weight.data_ptr()
    assert relative(logits(loaded.model, tokens()), logits(model, tokens())) < 0.05


def test_a_tied_weight_may_be_there_under_both_names(tmp_path, tiny_checkpoint):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    helpers.edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    loaded = moeplug.load(folder, "int8", device="cpu", runtime="transformers")
    assert loaded.model.lm_head.weight.data_ptr() == loaded.model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    "change",
    [{"rope_parameters": {"rope_type": "zzz"}}, {"dtype": "foo"}, {"num_key_value_heads": 0}, {"vocab_size": "many"}],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_transformers_does_not_understand_is_refused_by_the_plan(tiny_checkpoint, tmp_path, change):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    helpers.edit_json(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match="makes no model of config.json"):
        moeplug.plan(folder, "int8", device="cpu", runtime="transformers")


def test_the_plan_refuses_what_the_load_would(tiny_checkpoint, tmp_path):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    helpers.edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    moeplug.plan(folder, "int8", device="cpu")
    with pytest.raises(CheckpointError, match=r"model.norm.weight"):
        moeplug.plan(folder, "int8", device="cpu", runtime="transformers")


def test_a_missing_dense_tensor_is_named(tiny_checkpoint, tmp_path):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    helpers.edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"1 parameters of Qwen3MoeForCausalLM have no tensor.*model.norm.weight"):
        moeplug.load(folder, "int8", device="cpu", runtime="transformers")


def test_a_tensor_that_the_model_has_no_place_for_is_named(tiny_checkpoint, tmp_path):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    extra = torch.ones(3)
    helpers.edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({"model.extra.weight": extra}))
    with pytest.raises(CheckpointError, match=r"model.extra.weight: .* has no parameter model.extra.weight"):
        moeplug.load(folder, "int8", device="cpu", runtime="transformers")


def test_a_dense_tensor_of_the_wrong_shape_is_refused_with_both_shapes(tiny_checkpoint, tmp_path):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    helpers.edit_tensors(
        folder / "model.safetensors", lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)})
    )
    with pytest.raises(CheckpointError, match=r"model.norm.weight: is \(63,\); model.norm.weight is \(64,\)"):
        moeplug.load(folder, "int8", device="cpu", runtime="transformers")


MIXED = {
    "linear": ("model.layers.0.self_attn.q_proj.weight", torch.float32),
    "embedding": ("model.embed_tokens.weight", torch.float16),
    "norm": ("model.norm.weight", torch.float32),
    "router": ("model.layers.2.mlp.gate.weight", torch.float32),
}


@pytest.mark.parametrize("case", MIXED)
def test_a_dense_dtype_with_which_the_first_token_would_fail_is_refused(tiny_checkpoint, tmp_path, case):
    folder, (name, dtype) = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path), MIXED[case]
    helpers.edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(
        CheckpointError, match=rf"'{name}': dtype F\d\d among weights of BF16: Qwen3MoeForCausalLM cannot"
    ):
        moeplug.plan(folder, "int8", device="cpu", runtime="transformers")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=str)
def test_a_dense_tensor_that_is_no_plain_weight_is_refused(tiny_checkpoint, tmp_path, dtype):
    folder, name = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path), "model.embed_tokens.weight"
    helpers.edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"'{name}': dtype .* is not what .* expected one of BF16, F16, F32"):
        moeplug.plan(folder, "int8", device="cpu", runtime="transformers")


def test_float32_is_kept_where_the_models_code_computes_with_it(tmp_path):
    family = find_family({"model_type": "deepseek_v3"})
    save(tiny_model(family, "deepseek_v3").to(torch.bfloat16), tmp_path)
    name = "model.layers.1.mlp.gate.weight"
    helpers.edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].float()}))
    loaded = moeplug.load(tmp_path, "int8", device="cpu", runtime="transformers")
    assert loaded.model.state_dict()[name].dtype == torch.float32
    assert bool(torch.isfinite(logits(loaded.model, tokens())).all())


# What config.json and the files beside it may not do


@pytest.mark.timeout(60)  # a watchdog: transformers would build them for minutes
def test_a_vision_tower_of_a_million_layers_is_refused_before_it_is_built(tmp_path):
    save(tiny_model(find_family({"model_type": "qwen3_vl_moe"}), "qwen3_vl_moe"), tmp_path)
    helpers.edit_json(tmp_path / "config.json", lambda config: config["vision_config"].update(depth=1_000_000))
    with pytest.raises(CheckpointError, match=r"config\.json: depth is 1000000; expected at most 1,000"):
        moeplug.plan(tmp_path, "int8", device="cpu", runtime="transformers")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_code_of_a_repository_that_config_json_names_is_not_asked_for(tiny_checkpoint, tmp_path, key):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    helpers.edit_json(folder / "config.json", lambda config: config.update({key: "someone/attention"}))
    loaded = moeplug.load(folder, "int8", device="cpu", runtime="transformers")
    expected = moeplug.load(tiny_checkpoint("qwen3_moe"), "int8", device="cpu", runtime="transformers")
    assert torch.equal(logits(loaded.model, tokens()), logits(expected.model, tokens()))
    assert torch.isfinite(logits(reference_model(folder, torch.device("cpu")), tokens())).all()


def test_code_that_config_json_points_at_is_never_imported(tiny_checkpoint, tmp_path):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    for name in ("configuration_mine.py", "modeling_mine.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    classes = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    helpers.edit_json(folder / "config.json", lambda config: config.update(auto_map=classes))
    moeplug.load(folder, "int8", device="cpu", runtime="transformers")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "vocab.txt"])
def test_a_file_beside_the_weights_that_links_out_of_the_folder_is_refused(tiny_checkpoint, tmp_path, name):
    folder = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    (tmp_path / "outside").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "outside")
    moeplug.plan(folder, "int8", device="cpu")  # reads none of them
    for read in (
        lambda: moeplug.plan(folder, "int8", device="cpu", runtime="transformers"),
        lambda: tokenizer_of(folder),
    ):
        with pytest.raises(CheckpointError, match=rf"{name}: is a symlink to .*outside the checkpoint's folder"):
            read()
