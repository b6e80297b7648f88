"""Each tensor of small checkpoints is damaged in turn, and each time the load is refused before it begins, by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import helpers
import pytest
from test_prequantized import CASES, MXFP4, gpt_oss, quantized_copy, scheme_of

import moeplug
from moeplug import CheckpointError, Scheme, api
from moeplug.checkpoint.safetensors_header import DTYPE_BITS
from moeplug.registry import Registry

__all__ = ["gpt_oss"]  # a fixture

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name → dtype and shape, in the file's order
PLAIN = Scheme.from_text("api: 1\nname: plain\nweights: null\n")
DTYPES = ("BF16", "F16", "F32", "F64", "I8", "F8_E4M3", "F4", "I32", "BOOL")
FLOATS = ("BF16", "F16", "F32")


def tensors_of(folder: Path) -> Tensors:
    header, _ = helpers.read_header(folder / "model.safetensors")
    return {n: (entry["dtype"], tuple(entry["shape"])) for n, entry in header.items() if n != "__metadata__"}


def write_header(folder: Path, tensors: Tensors) -> None:
    """Write a valid file whose weights are a hole in the disk: nothing here may depend on them."""
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    path = folder / "model.safetensors"
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


def dropped(tensors: Tensors, name: str) -> Iterator[tuple[Tensors, set[str]]]:
    yield {n: t for n, t in tensors.items() if n != name}, {name}


def renamed(tensors: Tensors, name: str) -> Iterator[tuple[Tensors, set[str]]]:
    module, _, last = name.rpartition(".")
    for other in (f"{module}.x{last}", f"{module}x.{last}", name.upper()):
        yield {other if n == name else n: t for n, t in tensors.items()}, {name, other}


def transposed(tensors: Tensors, name: str) -> Iterator[tuple[Tensors, set[str]]]:
    dtype, shape = tensors[name]
    if len(shape) > 1 and shape[-1] != shape[-2]:
        yield tensors | {name: (dtype, (*shape[:-2], shape[-1], shape[-2]))}, {name}


def exchanged(tensors: Tensors, name: str) -> Iterator[tuple[Tensors, set[str]]]:
    """Give two tensors of different shapes each other's name; of one shape nothing in a header tells them apart."""
    for kind in ("of the experts", "another"):
        others = (n for n in tensors if ("experts" in n) == (kind == "of the experts") and n != name)
        other = next((n for n in others if tensors[n][1] != tensors[name][1]), None)
        if other is not None:
            yield tensors | {name: tensors[other], other: tensors[name]}, {name, other}


def of_another_dtype(tensors: Tensors, name: str) -> Iterator[tuple[Tensors, set[str]]]:
    dtype, shape = tensors[name]
    for other in DTYPES:
        if other != dtype and math.prod(shape) * DTYPE_BITS[other] % 8 == 0:
            yield tensors | {name: (other, shape)}, {name}


DAMAGES = (dropped, renamed, transposed, exchanged, of_another_dtype)


@pytest.fixture
def refused_by_name(tmp_path, monkeypatch) -> Callable[..., int]:
    """A function (folder, scheme, runtime, damage, which tensors, what is no damage) → how many mutants were refused.

    Each raises CheckpointError with the tensor's name, and no load begins.
    """
    monkeypatch.setattr(api, "execute", lambda *args, **kwargs: pytest.fail("the load began"))
    registry = Registry.discover()

    def check(folder, scheme, damage, *, runtime=None, which=lambda name: True, harmless=lambda name, tensor: False):
        copy = tmp_path / "model"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
        tensors, count = tensors_of(folder), 0
        for name in filter(which, tensors):
            for mutant, named in damage(tensors, name):
                if harmless(name, mutant.get(name)):
                    continue
                write_header(copy, mutant)
                with pytest.raises(CheckpointError) as caught:
                    moeplug.load(copy, scheme, device="cpu", runtime=runtime, registry=registry)
                assert any(part in str(caught.value) for part in named), (named, str(caught.value))
                count += 1
        write_header(copy, tensors)
        with pytest.raises(pytest.fail.Exception, match="the load began"):  # undamaged
            moeplug.load(copy, scheme, device="cpu", runtime=runtime, registry=registry)
        return count

    return check


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
def test_every_tensor_of_a_model_is_missed_by_name(tiny_checkpoint, refused_by_name, fused, damage):
    model = tiny_checkpoint("qwen3_moe", fused)
    assert refused_by_name(model, "int8", damage, runtime="transformers") >= 11


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_expert_tensor_is_missed_by_name_where_only_layers_are_loaded(tiny_checkpoint, refused_by_name, damage):
    """Without a runtime the tensors outside the experts are not read, and nothing is asked of them."""
    assert refused_by_name(tiny_checkpoint("mixtral"), "int8", damage, which=lambda name: ".experts." in name) >= 24


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_stacked_weight_and_bias_is_missed_by_name(gpt_oss, refused_by_name, damage):
    assert refused_by_name(gpt_oss[0], PLAIN, damage, which=lambda name: ".experts." in name) >= 2


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("case", ["int8-g32-asym", "int4-g32-asym", "fp8-block"])
def test_every_part_of_a_quantized_weight_is_missed_by_name(tiny_checkpoint, refused_by_name, tmp_path, case, damage):
    spec, write, config = CASES[case]
    folder = quantized_copy(tiny_checkpoint("qwen3_moe"), tmp_path / case, spec, write, config)
    one = ".layers.2.mlp.experts.5."  # all are alike; each is a tensor of 500 here

    def harmless(name, tensor):  # a scale may be of any float type; the shape that is stored beside says nothing new
        is_scale = "weight_scale" in name and tensor is not None and tensor[0] in FLOATS
        return name.endswith("weight_shape") or (is_scale and damage is of_another_dtype)

    count = refused_by_name(folder, scheme_of(spec), damage, which=lambda name: one in name, harmless=harmless)
    assert count >= 3


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_block_and_scale_of_mxfp4_is_missed_by_name(gpt_oss, refused_by_name, damage):
    which = lambda name: ".experts." in name  # noqa: E731
    assert refused_by_name(gpt_oss[1], scheme_of(MXFP4), damage, which=which) >= 2


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_tensor_of_an_export_is_missed_by_name(tiny_checkpoint, tmp_path, refused_by_name, damage):
    exported = api.export(tiny_checkpoint("qwen3_moe"), "int8-g32", tmp_path / "export", "moeplug").folder
    assert refused_by_name(exported, None, damage, runtime="transformers") >= 15
