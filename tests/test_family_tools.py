"""Descriptors from elsewhere work as built-in ones do; drafts are made, proven and refused by the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch

import moeplug
from moeplug import CheckpointError, SchemeError, UsageError
from moeplug.checkpoint.family import Family, UnknownModelType, _known, known_families
from moeplug.checkpoint.guess import draft
from moeplug.checkpoint.reader import Checkpoint
from moeplug.integrations import family_check
from moeplug.registry import Registry

OLMOE = next(family for family in known_families() if family.name == "olmoe")
# Families whose names on disk and rules are the usual ones, of every kind of form: a draft is right as it is.
DRAFTED = ("deepseek_v3", "gemma4_text", "hunyuan_v1_moe", "jamba", "lfm2_moe", "qwen2_moe", "qwen3_vl_moe")


@pytest.fixture
def renamed(tiny_checkpoint, tmp_path):
    """A checkpoint of a model type that nobody knows."""
    folder = helpers.copy_of(tiny_checkpoint("olmoe"), tmp_path)
    helpers.edit_json(folder / "config.json", lambda config: config.update(model_type="newmoe"))
    return folder


def their_descriptor(folder: Path, old: str = "[olmoe]", new: str = "[newmoe]") -> Path:
    path = folder / "newmoe.yaml"
    path.write_text(OLMOE.source.read_text().replace(old, new))
    return path


def install(site: Path, monkeypatch, text: str, **more: str) -> None:
    """Install a plugin that brings families alone: YAML files, no Python."""
    monkeypatch.syspath_prepend(str(site))
    package = site / "fake_families"
    (package / "families").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a family needs no import')")
    (package / "plugin.yaml").write_text("api: 1\nname: families\nfamilies: families\n")
    for name, content in {"newmoe": text, **more}.items():
        (package / "families" / f"{name}.yaml").write_text(content)
    metadata = site / "moeplug_families-2.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: moeplug-families\nVersion: 2.1\n")
    (metadata / "entry_points.txt").write_text("[moeplug]\nfamilies = fake_families:plugin.yaml\n")


def same_layers(one: moeplug.Loaded, other: moeplug.Loaded) -> bool:
    states = [{i: layer.state_dict() for i, layer in loaded.layers.items()} for loaded in (one, other)]
    return all(
        torch.equal(tensor, states[1][i][name]) for i, state in states[0].items() for name, tensor in state.items()
    )


def test_a_family_of_a_file_and_of_a_plugin_load_as_a_built_in_one_does(
    tiny_checkpoint, renamed, tmp_path, monkeypatch
):
    built_in = moeplug.load(tiny_checkpoint("olmoe"), "int8", device="cpu")
    file = their_descriptor(tmp_path)
    for family in (file, Family.load(file), "olmoe"):
        assert same_layers(moeplug.load(renamed, "int8", device="cpu", family=family), built_in)
    install(tmp_path / "site", monkeypatch, file.read_text())
    assert same_layers(moeplug.load(renamed, "int8", device="cpu"), built_in)
    assert moeplug.plan(renamed, "int8", device="cpu", dummy=True).family.origin == "moeplug-families 2.1"


def test_families_are_listed_with_who_ships_them_and_a_broken_one_harms_no_other(run, tmp_path, monkeypatch):
    text = their_descriptor(tmp_path).read_text()
    install(tmp_path / "site", monkeypatch, text, broken="api: 1\nmodel_types: []\n")
    code, out, err = run("families")
    assert code == 0
    assert "left out" in err
    assert "broken.yaml" in err
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines.keys() >= {"newmoe", *(family.name for family in known_families())}
    assert "moeplug-families 2.1" in lines["newmoe"]
    listed = json.loads(run("families", "--json")[1])
    assert {"name": "olmoe", "model_types": ["olmoe"], "origin": "moeplug", "path": str(OLMOE.source)} in listed
    plugins = json.loads(run("plugins", "--json")[1])
    assert next(p for p in plugins if p["name"] == "families")["families"] == ["broken", "newmoe"]


def test_two_families_of_one_model_type_are_refused_with_both_files(tiny_checkpoint, tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, OLMOE.source.read_text())
    with pytest.raises(CheckpointError, match=r"claimed by .*olmoe\.yaml and .*newmoe\.yaml"):
        moeplug.plan(tiny_checkpoint("olmoe"), "int8", device="cpu")
    assert moeplug.plan(tiny_checkpoint("olmoe"), "int8", device="cpu", family="olmoe").family == OLMOE


def test_an_unknown_family_is_refused_with_those_that_are_known(tiny_checkpoint):
    with pytest.raises(UsageError, match=r"family 'olmo' is not known.*'olmoe'"):
        moeplug.plan(tiny_checkpoint("olmoe"), "int8", device="cpu", family="olmo")


def test_plan_drafts_a_descriptor_for_an_unknown_model_type_and_load_takes_it_when_it_is_named(run, renamed, tmp_path):
    code, out, err = run("load", renamed, "-s", "int8", "--runtime", "none")
    assert (code, out) == (3, "")
    assert "`moeplug plan MODEL` drafts a descriptor" in err
    code, out, err = run("plan", renamed, "-s", "int8", "--runtime", "none")
    assert code == 3
    assert "unproven" in err
    assert "unproven: true" in out
    file = tmp_path / "mine.yaml"
    file.write_text(out)
    assert run("check", file)[0] == 0
    code, out, _ = run("load", renamed, "-s", "int8", "--runtime", "none", "--family", file, "--json")
    assert code == 0
    assert json.loads(out)["model_type"] == "mine"


@pytest.mark.parametrize(
    ("layer", "changed"),
    [("9" * 5000, {}), ("99999999", {"num_hidden_layers": None}), ("1", {"num_hidden_layers": 10**17})],
    ids=["5000_digits", "eight_digits", "a_config_of_10**17_layers"],
)
def test_a_draft_takes_no_number_from_a_file_for_the_length_of_a_list(tiny_checkpoint, layer, changed):
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    name = f"model.layers.{layer}.mlp.experts.1.up_proj.weight"
    tensors = {**checkpoint.tensors, name: next(iter(checkpoint.tensors.values()))}
    assert draft(checkpoint.config | changed, tensors) == draft(checkpoint.config, checkpoint.tensors)


def test_experts_that_do_not_begin_at_0_are_drafted_too(tiny_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if ".experts.0." not in name}
    assert draft(checkpoint.config, tensors) == draft(checkpoint.config, checkpoint.tensors)


def test_an_unproven_family_of_a_plugin_is_refused_until_it_is_named(renamed, tmp_path, monkeypatch):
    text = their_descriptor(tmp_path).read_text() + "unproven: true\n"
    install(tmp_path / "site", monkeypatch, text)
    with pytest.raises(CheckpointError, match=r"newmoe\.yaml: .*`unproven: true`; prove it with `moeplug family-check"):
        moeplug.plan(renamed, "int8", device="cpu")
    assert moeplug.plan(renamed, "int8", device="cpu", family="newmoe").layers


def test_a_checkpoint_without_experts_gets_no_draft(run, renamed):
    helpers.edit_tensors(
        renamed / "model.safetensors", lambda t: [t.pop(name) for name in list(t) if ".experts." in name]
    )
    code, out, err = run("plan", renamed, "-s", "int8")
    assert (code, out) == (3, "")
    assert "No tensor of this checkpoint looks like an expert's" in err


@pytest.mark.parametrize("model_type", DRAFTED)
def test_a_draft_of_a_usual_model_is_proven_by_numbers(model_type, tmp_path):
    family = next(family for family in known_families() if model_type in family.model_types)
    model = family_check.tiny_model(family, model_type)
    family_check.save(model, tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    guessed = Family.from_text(draft(checkpoint.config, checkpoint.tensors), "draft")
    assert guessed.descriptor.unproven
    tiny = guessed.descriptor.model_copy(update={"tiny": family.descriptor.tiny})
    proof = family_check.prove(replace(guessed, descriptor=tiny), model_type, tmp_path / "proof")
    assert proof.holds, proof.describe()
    config = model.config.to_dict()
    assert [layer.index for layer in guessed.layers(config)] == [layer.index for layer in family.layers(config)]
    assert guessed.descriptor.routing.weight == family.descriptor.routing.weight


def test_family_check_proves_a_family_and_names_a_mistake_with_exit_code_3(run, tmp_path):
    code, out, _ = run("family-check", "olmoe")
    assert code == 0
    assert "proven: 2 MoE layers" in out
    swapped = tmp_path / "swapped.yaml"
    text = OLMOE.source.read_text().replace("gate_proj", "x").replace("up_proj.weight", "gate_proj.weight")
    swapped.write_text(text.replace("{expert}.x", "{expert}.up_proj"))
    code, out, err = run("family-check", "olmoe", "--family", swapped)
    assert code == 3
    assert "WRONG" in out
    assert "it agrees with gate and up swapped" in out
    assert "swapped.yaml: the descriptor is not proven" in err
    assert json.loads(run("family-check", "olmoe", "--family", swapped, "--json")[1])["holds"] is False


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nonesuch",), "no family serves model type 'nonesuch'"),
        (("nonesuch", "--family", "olmoe"), "has no model type 'nonesuch'"),
        (("olmoe", "--family", "nothing.yaml"), "nothing.yaml"),
    ],
    ids=["unknown_type", "type_transformers_lacks", "no_such_file"],
)
def test_family_check_says_what_is_missing(run, arguments, expected):
    code, _, err = run("family-check", *arguments)
    assert code in (2, 5)
    assert expected in err


def test_a_kernel_that_knows_no_experts_without_a_gate_is_not_chosen(tmp_path):
    family = next(family for family in known_families() if family.name == "nemotron_h")
    family_check.save(family_check.tiny_model(family, "nemotron_h"), tmp_path)
    planned = moeplug.plan(tmp_path, "int8", device="cpu")
    group = planned.layers[0].groups[0].ctx
    assert group.layout.gate_up == "up"
    assert planned.expert_bytes_before == 2 * planned.sources[0].nbytes * 8 * len(planned.layers)

    from moeplug.kernels.cpu import CpuKernel
    from moeplug.kernels.select import select_kernel
    from moeplug.moe.layout import CONCATENATED

    class Old(CpuKernel):
        name = "old"

        def layout_for(self, request):
            return CONCATENATED

    assert select_kernel(group.request, [Old(), CpuKernel()]).kernel.name == "cpu-grouped"
    with pytest.raises(SchemeError, match="old: wants gate and up, but the experts have no gate"):
        select_kernel(group.request, [Old()])


def test_without_plugins_the_families_are_moeplugs_own():
    assert Registry([]).families() == list(known_families())


@pytest.mark.parametrize("model_type", [model_type for family in known_families() for model_type in family.model_types])
def test_a_family_is_found_without_reading_those_that_do_not_name_its_model_type(monkeypatch, model_type):
    made, make = [], Family.load
    monkeypatch.setattr(Family, "load", lambda path, origin="moeplug": made.append(path) or make(path, origin))
    _known.cache_clear()
    assert model_type in Registry([]).family_of({"model_type": model_type}).model_types
    assert 1 <= len(made) <= 4  # "llama4" stands in llama4_text.yaml too


def test_of_an_unknown_model_type_all_that_are_known_are_named():
    with pytest.raises(UnknownModelType, match="'mixtrall' is not known; known: dbrx, .*, qwen3_vl_moe"):
        Registry([]).family_of({"model_type": "mixtrall"})


def test_the_page_about_families_names_every_family():
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    table = page[page.index("| family |") :].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    named = [name.strip() for row in rows for name in row.split(",")]
    assert sorted(named) == sorted(t for family in known_families() for t in family.model_types)
