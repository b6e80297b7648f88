"""`moeplug explain`: whose code, which kernel, and what other devices would get, without any of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

import moeplug
from moeplug import api
from moeplug.cli import cli
from moeplug.manifest import Manifest
from moeplug.registry import Registry

MIXED = """
api: 1
name: mixed
plugin: int4
weights: {format: int4, strategy: group, group_size: 32}
overrides:
  - {layers: "0", weights: null}
  - {layers: "2", experts: "0-3", plugin: fp8, weights: {format: fp8, strategy: channel}}
"""


def explained(model, scheme, device="cpu", **options):
    return api.explain(model, scheme, device=device, **options).as_dict()


def elsewhere(said):
    """Return compute capability → the kernel of each group of the first layers."""
    return {
        device["compute_capability"]: [group["kernel"] for group in device["layers"][0]["groups"]]
        for device in said["elsewhere"]
    }


def choices(groups):
    return [(g["experts"], g["weights"], g["kernel"], g["kernels_not_chosen"]) for g in groups]


def test_it_chooses_what_the_plan_chooses(tiny_checkpoint):
    model, scheme = tiny_checkpoint("qwen3_moe"), moeplug.Scheme.from_text(MIXED)
    planned, said = moeplug.plan(model, scheme, device="cpu").as_dict(), explained(model, scheme)
    assert {alike["layers"]: choices(alike["groups"]) for alike in said["layers"]} == {
        str(layer["layer"]): choices(layer["groups"]) for layer in planned["layers"]
    }  # no two layers are alike under this scheme
    assert [fmt["distribution"] for fmt in said["formats"]] == ["moeplug-fp8", "moeplug-int4"]


def test_layers_that_are_alike_are_one_entry(tiny_checkpoint):
    assert [alike["layers"] for alike in explained(tiny_checkpoint("qwen3_moe"), "int8")["layers"]] == ["0,2"]
    mixed = explained(tiny_checkpoint("qwen3_moe"), moeplug.Scheme.from_text(MIXED))
    assert [alike["layers"] for alike in mixed["layers"]] == ["0", "2"]


@pytest.mark.parametrize(("scheme", "first"), [("int8", "8.0"), ("fp8-w8a16", "8.0"), ("fp8", "8.9"), ("nvfp4", "8.9")])
def test_a_smaller_gpu_gets_no_kernel_that_it_cannot_run(scheme, first):
    kernels = elsewhere(explained(None, scheme))
    assert kernels == {
        capability: ["triton-fused-moe" if float(capability) >= float(first) else None]
        for capability in ("8.0", "8.9", "9.0", "10.0")
    }


def test_every_other_kernel_has_its_reason():
    said = explained(None, "fp8")
    a100 = next(device for device in said["elsewhere"] if device["compute_capability"] == "8.0")
    (group,) = a100["layers"][0]["groups"]
    assert "fp8 activations need compute capability 8.9" in group["kernels_not_chosen"]["triton-fused-moe"]
    assert "runs on a CPU" in group["kernels_not_chosen"]["cpu-grouped"]


def test_a_stage_is_answered_by_the_plugin_that_has_a_function_for_it():
    stages = {stage["stage"]: stage["answered_by"] for stage in explained(None, "int4-g128-search")["stages"]}
    (quantize,) = stages.pop("quantize")
    assert (quantize["distribution"], quantize["function"]) == ("moeplug-int4", "moeplug_int4.hooks.moeplug_quantize")
    assert {(a["distribution"], a["function"]) for answers in stages.values() for a in answers} == {("moeplug", None)}


def test_an_observer_is_among_the_wrappers_once_it_is_named():
    without, watched = explained(None, "int8"), explained(None, "int8", observe=["timings"])
    assert {"timings", "trace"} <= set(without["observers"]["installed"])
    assert not any(stage["watched_by"] for stage in without["stages"])
    assert [[w["plugin"] for w in stage["watched_by"]] for stage in watched["stages"]] == [["timings"]] * 5


@pytest.mark.parametrize(
    ("needs", "too_small"), [("cuda: {}", []), ("cuda: {compute_capability: '9.0'}", ["8.0", "8.9"])]
)
def test_what_a_plugin_needs_of_a_device_counts_before_its_kernels(needs, too_small):
    installed = Registry.discover()
    text = installed.usable()["int8"].path.read_text()
    manifest = Manifest.from_text(text[: text.index("needs:")] + "needs: {" + needs + "}\n")
    plugins = [replace(p, manifest=manifest) if p.name == "int8" else p for p in installed.plugins]
    said = explained(None, "int8", registry=Registry(plugins))
    (here,) = said["layers"][0]["groups"]
    assert here["kernel"] is None
    assert "plugin 'int8' (moeplug-int8 0.1.0) serves cuda, not cpu" in here["refused"]
    assert [capability for capability, kernels in elsewhere(said).items() if kernels == [None]] == too_small


def test_the_command_prints_stages_reasons_and_other_gpus_once():
    done = CliRunner().invoke(cli, ["explain", "--scheme", "fp8", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    for part in (
        "quantize      groups of fp8: moeplug 0.1.0, the core's default",
        "not triton-fused-moe: needs a CUDA device, not cpu",
        "kernels on cuda 8.0 (A100)\n",
        "experts 0-7, fp8 channel, fp8 token activations: none",
        "kernels on cuda 8.9 (L40S, RTX 4090); cuda 9.0 (H100, H200); cuda 10.0 (B200)",
        "observers that are not on: timings, trace (--observe NAME)",
    ):
        assert part in done.stdout


def test_json_and_config_json_alone(tiny_checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_checkpoint("mixtral") / "config.json").read_bytes())
    arguments = ["explain", str(tmp_path), "--scheme", "int8", "--dummy", "--json", "--device", "cpu"]
    said = json.loads(CliRunner().invoke(cli, arguments).stdout)
    assert said["model_type"] == "mixtral"
    assert said["layers"][0]["sizes"].startswith("E=4 H=64 I=96 T=2")
