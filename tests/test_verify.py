"""`moeplug verify` finds every difference between an export, its manifest, and the model it was made from."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import helpers
import pytest
import torch
from click.testing import CliRunner
from formats import SPECS, scheme_of
from safetensors.torch import load_file, save_file

from moeplug import CheckpointError, MoeplugError, UsageError, VerificationError, api
from moeplug.cli import cli
from moeplug.verifying import verify

FORMS = ["compressed-tensors", "moeplug"]


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return tiny_checkpoint("qwen3_moe", shards=3)


@pytest.fixture(scope="module")
def originals(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {form: api.export(source, "int8-g32", folder / form, form).folder for form in FORMS}


@pytest.fixture(params=FORMS)
def exported(request, originals, tmp_path):
    """A copy of an export that a test may damage."""
    return helpers.copy_of(originals[request.param], tmp_path)


def record(folder):
    """Write moeplug.json anew, as someone who wants to deceive would."""

    def change(manifest):
        for name, facts in manifest["files"].items():
            content = (folder / name).read_bytes()
            facts |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    helpers.edit_json(folder / "moeplug.json", change)


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    record(folder)


def an_expert(tensors):
    return next(name for name in tensors if re.search(r"experts\.(0\.up_proj\.weight_packed|groups\.0\.w13)$", name))


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-tensor", "int4-g32-asym", "mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("model_type", ["mixtral", "jamba"])
@pytest.mark.parametrize("form", FORMS)
def test_an_export_equals_what_its_model_becomes(tiny_checkpoint, tmp_path, form, model_type, name):
    source = tiny_checkpoint(model_type, True)
    exported = api.export(source, scheme_of(SPECS[name]), tmp_path / "export", form)
    verified = verify(tmp_path / "export", source)
    assert verified.errors == exported.errors
    assert verified.tensors == len(load_file(tmp_path / "export/model.safetensors"))


def test_an_fp8_checkpoint_is_verified_too(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("olmoe")
    api.export(source, scheme_of(SPECS["fp8-block"]), tmp_path / "export", "fp8")
    verify(tmp_path / "export", source)


def test_without_a_model_the_files_are_compared(exported):
    verified = verify(exported)
    assert (verified.files, verified.errors) == (3, {})


@pytest.mark.parametrize("offset", [0, 9, -1], ids=["length", "header", "last_byte"])
def test_a_changed_byte_is_found(exported, offset):
    path = exported / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"1 difference: model.safetensors is not the file that was written"):
        verify(exported)


def test_missing_and_foreign_files_are_found_all_at_once(exported):
    (exported / "config.json").unlink()
    (exported / "README.md").write_text("mine")  # people add such files
    shutil.copy(exported / "model.safetensors", exported / "more.safetensors")
    with pytest.raises(VerificationError, match=r"2 differences: config.json is missing, more.safetensors is not in"):
        verify(exported)


def test_a_changed_weight_under_a_forged_manifest_is_found_against_the_model(exported, source):
    def change(tensors):
        tensors[an_expert(tensors)].view(-1)[5] += 1

    change_tensors(exported, change)
    verify(exported)
    with pytest.raises(VerificationError, match=r"is not what its weights become"):
        verify(exported, source)


def test_experts_that_changed_places_are_found(originals, source, tmp_path):
    folder = helpers.copy_of(originals["compressed-tensors"], tmp_path)

    def swap(tensors):
        for name in [name for name in tensors if ".experts.0.up_proj." in name]:
            other = name.replace(".experts.0.", ".experts.1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    change_tensors(folder, swap)
    with pytest.raises(
        VerificationError, match=r"expert [01], up: decodes with a relative error of 1\.[34]\d+; expected"
    ):
        verify(folder, source)


def test_a_tensor_too_few_or_too_many_is_found(exported, source):
    def change(tensors):
        tensors["extra"] = tensors.pop(an_expert(tensors))

    change_tensors(exported, change)
    with pytest.raises(VerificationError, match=r"2 differences: .* is missing, extra belongs to no weight"):
        verify(exported, source)


def test_a_changed_dense_tensor_is_found(exported, source):
    def change(tensors):
        tensors["model.norm.weight"][3] += 1

    change_tensors(exported, change)
    with pytest.raises(VerificationError, match=r"model.norm.weight is not what its weights become"):
        verify(exported, source)


def test_recorded_errors_that_are_not_the_measured_ones_are_found(exported, source):
    def change(manifest):
        manifest["files"]["model.safetensors"]["errors"]["0"]["worst"] *= 0.9

    helpers.edit_json(exported / "moeplug.json", change)
    with pytest.raises(
        VerificationError, match=r"the errors that moeplug.json records are not those that are measured"
    ):
        verify(exported, source)


def put(path, value):
    def change(manifest):
        *parents, last = path
        for key in parents:
            manifest = manifest[key]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("api",), 2, "is not the manifest of an export, api 1"),
        (("files",), [], "is not the manifest of an export, api 1"),
        (("made",), {}, "made.format"),
        (("made", "format"), "gguf", "format 'gguf' is not one of compressed-tensors"),
        (("made", "scheme", "yaml"), 3, "made.scheme.yaml"),
        (("made", "scheme", "yaml"), "api: 1", "name"),
        (("made", "dtypes"), {}, "knows nothing of layer 0"),
        (("made", "dtypes", "0"), "int8", "made.dtypes.0"),
        (("made", "shard_bytes"), "many", "made.shard_bytes"),
        (("files", "../config.json"), {"bytes": 1, "sha256": "0" * 64}, "is no plain file name"),
        (("files", "model.safetensors", "errors", "0", "worst"), float("nan"), "is not JSON"),
        (("files", "model.safetensors", "errors", "0", "weights"), 0, "weights"),
        (("files", "model.safetensors", "errors"), {}, "knows nothing of layer 0|measured"),
        (("files", "model.safetensors", "sha256"), None, "sha256"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)
def test_a_manifest_that_no_export_wrote_is_refused(originals, source, tmp_path, path, value, message):
    folder = helpers.copy_of(originals["moeplug"], tmp_path)
    helpers.edit_json(folder / "moeplug.json", put(path, value))
    refused = []
    for read in (lambda: verify(folder, source), lambda: api.load(folder, device="cpu")):
        try:
            read()
        except MoeplugError as error:
            refused.append(str(error))
    assert refused
    assert any(re.search(message, text) for text in refused), refused


@pytest.mark.parametrize("said", [b"", b"{}", b"[]", b"\xff", b'{"layout": "x", "version": 1}'])
def test_a_layout_that_cannot_be_read_is_refused(originals, tmp_path, said):
    folder = helpers.copy_of(originals["moeplug"], tmp_path)

    def change(tensors):
        for name in [name for name in tensors if name.endswith("_extra_state")]:
            tensors[name] = torch.tensor(list(said), dtype=torch.uint8)

    change_tensors(folder, change)
    with pytest.raises(MoeplugError, match="layer 0|experts: the state has None|scale is missing"):
        api.load(folder, device="cpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_of_an_export_that_is_not_finite_is_refused_by_a_load(originals, tmp_path, bad):
    folder = helpers.copy_of(originals["moeplug"], tmp_path)
    name = "model.layers.2.mlp.experts.groups.0.w2_scale"
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[9:10].fill_(bad))
    with pytest.raises(CheckpointError, match=f"model.safetensors: {name}: holds NaN or an infinity"):
        api.load(folder, device="cpu")


def test_a_tensor_too_many_in_an_export_is_refused_by_its_plan(originals, tmp_path):
    folder = helpers.copy_of(originals["moeplug"], tmp_path)
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.experts.groups.1.w2": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.experts.groups.1.w2' belongs to no group"):
        api.plan(folder, device="cpu")


def test_a_layer_of_an_export_that_config_json_calls_dense_is_not_left_out(originals, tmp_path):
    folder = helpers.copy_of(originals["moeplug"], tmp_path)
    helpers.edit_json(folder / "config.json", lambda config: config.update(mlp_only_layers=[1, 2]))
    with pytest.raises(CheckpointError, match=r"config.json knows nothing of layer 2, which moeplug.json has"):
        api.plan(folder, device="cpu")


def test_another_model_is_said_to_be_another(exported, tiny_checkpoint):
    with pytest.raises(VerificationError, match="is not the model it was made from"):
        verify(exported, tiny_checkpoint("qwen3_moe"))


def test_weights_that_changed_under_the_same_headers_are_found(exported, source, tmp_path):
    changed = helpers.copy_of(source, tmp_path)
    path = helpers.shard_files(changed)[0]
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match="the model's weights are not those that it was made from"):
        verify(exported, changed)


def test_a_folder_that_is_no_export_is_said_to_be_none(source):
    with pytest.raises(CheckpointError, match="has no moeplug.json, so it is no export of moeplug"):
        verify(source)


def test_layouts_of_another_device_are_refused(originals, source, tmp_path):
    folder = helpers.copy_of(originals["moeplug"], tmp_path)
    helpers.edit_json(folder / "moeplug.json", lambda manifest: manifest["made"].update(layouts=["interleaved-w13"]))
    with pytest.raises(UsageError, match="the export holds the layouts interleaved-w13"):
        verify(folder, source)


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_commands_export_and_verify_and_say_who_reads_it(source, tmp_path):
    done = run("export", source, "--scheme", "int8-w8a8", "-o", tmp_path / "export")
    assert done.exit_code == 0, done.output
    assert re.search(r"files +1, with sha256 and provenance", done.stdout)
    assert "SGLang 0.5.23: only with --quantization w8a8_int8" in done.stdout
    done = run("verify", tmp_path / "export", "--against", source, "--json")
    assert done.exit_code == 0, done.output
    assert [layer["layer"] for layer in json.loads(done.stdout)["layers"]] == [0, 2]
    (tmp_path / "export/config.json").write_text("{}")
    assert isinstance(run("verify", tmp_path / "export").exception, VerificationError)


def test_exporting_an_export_is_refused(originals, tmp_path):
    with pytest.raises(CheckpointError, match="already quantized"):
        api.export(originals["moeplug"], "int8", tmp_path / "again")


def test_a_nan_in_the_source_leaves_nothing(source, tmp_path):
    broken = helpers.copy_of(source, tmp_path)

    def change(tensors):
        tensors[max(tensors)].view(-1)[7] = torch.nan

    helpers.edit_tensors(helpers.shard_files(broken)[-1], change)
    for form in FORMS:
        with pytest.raises(CheckpointError, match="nan|NaN"):
            api.export(broken, "int8", tmp_path / "export", form)
    assert [path.name for path in tmp_path.iterdir()] == [broken.name]
