"""Other weights into the same storage: same bytes as a fresh load, same addresses, and never a mixture unnoticed."""

from __future__ import annotations

import math

import helpers
import pytest
import torch
from safetensors.torch import load_file

import moeplug
from moeplug import CheckpointError, UsageError
from moeplug.checkpoint.memory import MemoryCheckpoint
from moeplug.checkpoint.streaming import Piece

SCHEMES = ["int8", "int8-g32"]
DOWN = "model.layers.2.mlp.experts.7.down_proj.weight"


def scaled(folder, factor=-3.0):
    """Change every weight of a checkpoint in a way that changes scales and signs."""
    helpers.edit_tensors(folder / "model.safetensors", lambda tensors: [t.mul_(factor) for t in tensors.values()])
    return folder


@pytest.fixture
def other(tiny_checkpoint, tmp_path):
    """A checkpoint of the same model with other weights."""
    return scaled(helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path))


def states(loaded):
    return {(i, name): t.clone() for i, layer in loaded.layers.items() for name, t in layer.state_dict().items()}


def call(layer):
    g = torch.Generator().manual_seed(0)
    hidden, ids = torch.randn(5, 64, generator=g).bfloat16(), torch.randint(0, 8, (5, 2), generator=g)
    return layer(hidden, torch.rand(5, 2, generator=g), ids)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["folder", "tensors"])
def test_a_reload_gives_the_bytes_of_a_fresh_load_at_the_old_addresses(tiny_checkpoint, other, scheme, kind):
    loaded = moeplug.load(tiny_checkpoint("qwen3_moe"), scheme, device="cpu")
    before = [buffer.data_ptr() for layer in loaded.layers.values() for buffer in layer.buffers()]
    source = other if kind == "folder" else load_file(other / "model.safetensors")
    report = moeplug.reload(loaded, source)
    fresh = moeplug.load(other, scheme, device="cpu")
    assert same(states(loaded), states(fresh))
    assert [buffer.data_ptr() for layer in loaded.layers.values() for buffer in layer.buffers()] == before
    assert report.as_dict()["worst_relative_rms"] == fresh.report.as_dict()["worst_relative_rms"]
    for index, layer in fresh.layers.items():
        assert torch.equal(call(loaded.layers[index]), call(layer))


def test_a_reload_replaces_the_dense_weights_of_a_model_too(tiny_checkpoint, other):
    loaded = moeplug.load(tiny_checkpoint("qwen3_moe"), "int8", device="cpu", runtime="transformers")
    addresses = [parameter.data_ptr() for parameter in loaded.model.parameters()]
    moeplug.reload(loaded, other)
    fresh = moeplug.load(other, "int8", device="cpu", runtime="transformers")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, fresh.model(ids).logits)
    assert [parameter.data_ptr() for parameter in loaded.model.parameters()] == addresses


def test_a_reload_that_fails_midway_marks_the_layers_until_one_comes_to_its_end(tiny_checkpoint, other):
    loaded = moeplug.load(tiny_checkpoint("qwen3_moe"), "int8", device="cpu")
    tensors = load_file(other / "model.safetensors")
    tensors[DOWN][3, 4] = math.nan
    with pytest.raises(CheckpointError, match=f"{DOWN}: layer 2, expert 7, down: nan at row 3, column 4"):
        moeplug.reload(loaded, tensors)
    for layer in loaded.layers.values():
        with pytest.raises(UsageError, match=r"layer \d holds a mixture .* a reload from memory .* reload again"):
            call(layer)
        with pytest.raises(UsageError, match="mixture of weights"):
            layer.state_dict()
    moeplug.reload(loaded, other)
    assert same(states(loaded), states(moeplug.load(other, "int8", device="cpu")))


def missing(tensors):
    del tensors[DOWN]


def one_more_row(tensors):
    tensors[DOWN] = torch.zeros(65, 96, dtype=torch.bfloat16)


def another_dtype(tensors):
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [(missing, "1 of 24 expert tensors of layer 2 are missing"), (one_more_row, "expected .64, 96."),
     (another_dtype, "layer 0 has dtype float32; the model that is loaded has bfloat16. Nothing was changed")],
)  # fmt: skip
def test_weights_of_another_model_are_refused_before_a_byte_changes(tiny_checkpoint, change, message):
    loaded = moeplug.load(tiny_checkpoint("qwen3_moe"), "int8", device="cpu")
    before = states(loaded)
    tensors = load_file(tiny_checkpoint("qwen3_moe") / "model.safetensors")
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        moeplug.reload(loaded, tensors)
    assert same(states(loaded), before)
    call(loaded.layers[0])


def test_a_checkpoint_with_other_layers_is_refused(tiny_checkpoint):
    loaded = moeplug.load(tiny_checkpoint("qwen3_moe"), "int8", device="cpu")
    with pytest.raises(CheckpointError, match="has MoE layers 0-1; the model that is loaded has 0,2"):
        moeplug.reload(loaded, tiny_checkpoint("olmoe"))


def test_what_was_loaded_in_inference_mode_can_be_reloaded_outside_of_it(tiny_checkpoint, other):
    with torch.inference_mode():
        loaded = moeplug.load(tiny_checkpoint("qwen3_moe"), scheme="int8")
    assert not any(buffer.is_inference() for layer in loaded.layers.values() for buffer in layer.buffers())
    moeplug.reload(loaded, other)


def test_a_reload_that_is_refused_before_it_begins_marks_no_layer(tiny_checkpoint, monkeypatch):
    source = tiny_checkpoint("olmoe")
    loaded = moeplug.load(source, "int8", device="cpu", runtime="none")
    monkeypatch.setattr("moeplug.pipeline.memory.available_bytes", lambda: 0)
    with pytest.raises(moeplug.InputOutputError, match="Nothing was read"):
        moeplug.reload(loaded, source)
    assert all(layer.unfinished is None for layer in loaded.layers.values())


def test_tensors_that_do_not_lie_in_order_give_their_bytes_a_part_at_a_time():
    stack = torch.randn(4, 6, 8).mT
    checkpoint = MemoryCheckpoint.of({"experts": stack}, {})
    tensor, expected = checkpoint.tensors["experts"], stack.contiguous().view(-1).view(torch.uint8)
    for start, nbytes in ((0, 768), (192, 192), (300, 200)):
        assert torch.equal(checkpoint.content(Piece(tensor, start, nbytes)), expected[start : start + nbytes])
