"""A folder that is not exactly the checkpoint it says is refused before a weight is read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moeplug.checkpoint.reader import Checkpoint, read_config
from moeplug.errors import CheckpointError, InputOutputError, UsageError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def damaged(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint in one file."""
    return helpers.copy_of(tiny_checkpoint("olmoe"), tmp_path)


@pytest.fixture
def damaged_shards(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint in several files with an index."""
    return helpers.copy_of(tiny_checkpoint("olmoe", shards=3), tmp_path)


def refusal(folder: Path, **options: Any) -> str:
    """Return the text of the CheckpointError that opening a folder raises."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, **options)
    return str(caught.value)


# What a good checkpoint gives


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_those_that_safetensors_finds(tiny_checkpoint: Callable[..., Path], shards: int) -> None:
    folder = tiny_checkpoint("qwen3_moe", shards=shards)
    checkpoint = Checkpoint.open(folder)
    found: dict[str, tuple[int, ...]] = {}
    for file in helpers.shard_files(folder):
        with safe_open(file, "np") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == found
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert list(checkpoint.files) == helpers.shard_files(folder)
    assert checkpoint.notes == ()
    assert (len(checkpoint.files) > 1) == (shards > 1)


def test_the_fingerprint_is_of_config_index_headers_and_sizes(damaged_shards: Path) -> None:
    before = Checkpoint.open(damaged_shards).fingerprint()
    assert Checkpoint.open(damaged_shards).fingerprint() == before
    shard = helpers.shard_files(damaged_shards)[0]
    helpers.edit_header(shard, lambda header: header["__metadata__"].update(note="x"))
    with_other_header = Checkpoint.open(damaged_shards).fingerprint()
    helpers.edit_json(damaged_shards / "config.json", lambda config: config.update(note="x"))
    with_other_config = Checkpoint.open(damaged_shards).fingerprint()
    assert len({before, with_other_header, with_other_config}) == 3


def test_reading_headers_and_listing_families_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from moeplug.checkpoint.family import known_families; import moeplug.checkpoint.reader; "
        "known_families(); print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_truncated_shard_is_refused_at_open_with_the_missing_bytes(damaged_shards: Path) -> None:
    shard = helpers.shard_files(damaged_shards)[1]
    os.truncate(shard, shard.stat().st_size - 100)
    message = refusal(damaged_shards)
    assert shard.name in message
    assert "truncated" in message
    assert "100 are missing" in message


def test_all_damaged_shards_are_named_at_once(damaged_shards: Path) -> None:
    shards = helpers.shard_files(damaged_shards)
    for shard in shards:
        os.truncate(shard, shard.stat().st_size - 1)
    message = refusal(damaged_shards)
    assert all(shard.name in message for shard in shards)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_alone_are_refused_with_the_way_to_convert_them(damaged: Path, name: str) -> None:
    (damaged / "model.safetensors").rename(damaged / name)
    message = refusal(damaged)
    assert name in message
    assert "save_pretrained" in message


def test_the_command_that_converts_pickles_does(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, folder = tiny_checkpoint("mixtral"), tmp_path / "somebody's model"
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    command = refusal(folder).splitlines()[-1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    converted = Checkpoint.open(tmp_path / "somebody's model-safetensors")
    assert converted.tensors.keys() == Checkpoint.open(source).tensors.keys()


BAD_FILE_NAMES = {
    "parent": "../model.safetensors",
    "absolute": "/etc/model.safetensors",
    "windows_drive": "C:\\model.safetensors",
    "drive_relative": "C:model.safetensors",
    "backslash": "..\\model.safetensors",
    "empty": "",
    "dots": "..",
    "nul": "model\0.safetensors",
    "not_text": 7,
    "nothing": None,
    "suffix": "model.bin",
    "only_suffix": ".safetensors",
    "folder": "sub/model.safetensors",
}


@pytest.mark.parametrize("case", BAD_FILE_NAMES)
def test_an_index_cannot_name_a_path_outside_its_folder(damaged_shards: Path, case: str) -> None:
    name = "lm_head.weight"
    helpers.edit_json(damaged_shards / INDEX, lambda index: index["weight_map"].update({name: BAD_FILE_NAMES[case]}))
    message = refusal(damaged_shards)
    assert name in message
    assert INDEX in message


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "{", "<html>", ""])
def test_an_index_without_a_map_is_refused(damaged_shards: Path, content: str) -> None:
    (damaged_shards / INDEX).write_text(content)
    assert INDEX in refusal(damaged_shards)


def test_an_index_that_names_a_tensor_twice_is_refused(damaged_shards: Path) -> None:
    (damaged_shards / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    assert "'a' is there twice" in refusal(damaged_shards)


def hub_cache(checkpoint: Path, cache: Path) -> Path:
    """Lay a checkpoint out as Hugging Face's cache does: snapshots/<revision>/ of links into ../../blobs/."""
    snapshot = cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        blob = cache / "blobs" / f"{number:064x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_the_links_of_a_hugging_face_cache_are_followed(damaged_shards: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(hub_cache(damaged_shards, tmp_path / "cache"))
    pieces = helpers.whole_tensors(checkpoint)
    total = sum(len(content) for _, content in checkpoint.stream(pieces, helpers.buffers_for(pieces)))
    assert total == checkpoint.total_bytes
    assert checkpoint.fingerprint() == Checkpoint.open(damaged_shards).fingerprint()


def test_a_link_to_another_file_of_the_folder_is_followed(damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "weights.data")
    (damaged / "model.safetensors").symlink_to("weights.data")
    assert Checkpoint.open(damaged).tensors


def test_a_link_out_of_the_folder_is_refused_unless_links_are_allowed(damaged: Path, tmp_path: Path) -> None:
    outside = (damaged / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (damaged / "model.safetensors").symlink_to(outside)
    message = refusal(damaged)
    assert str(outside) in message
    assert "symlink" in message
    assert Checkpoint.open(damaged, allow_symlinks=True).tensors


def test_a_cache_whose_blobs_folder_is_itself_a_link_is_refused(damaged: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(damaged, tmp_path / "cache")
    (tmp_path / "cache" / "blobs").rename(tmp_path / "elsewhere")
    (tmp_path / "cache" / "blobs").symlink_to(tmp_path / "elsewhere")
    assert "symlink" in refusal(snapshot)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_to_nothing_is_refused(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    (damaged / name).symlink_to("gone")
    assert "does not exist" in refusal(damaged)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "character device"])
def test_only_a_regular_file_is_read(damaged: Path, name: str, kind: str) -> None:
    path = damaged / name
    path.unlink()
    {"FIFO": os.mkfifo, "folder": os.mkdir, "character device": lambda p: p.symlink_to("/dev/zero")}[kind](path)
    assert f"is a {kind}" in refusal(damaged, allow_symlinks=True)


def test_all_missing_shards_are_named_at_once(damaged_shards: Path) -> None:
    shards = helpers.shard_files(damaged_shards)
    for shard in shards[1:]:
        shard.unlink()
    message = refusal(damaged_shards)
    assert f"{len(shards) - 1} of {len(shards)} shards are missing" in message
    assert all(shard.name in message for shard in shards[1:])


def test_a_tensor_that_only_the_index_knows_is_refused(damaged_shards: Path) -> None:
    file = helpers.shard_files(damaged_shards)[0].name
    helpers.edit_json(damaged_shards / INDEX, lambda index: index["weight_map"].update({"ghost.weight": file}))
    message = refusal(damaged_shards)
    assert "'ghost.weight'" in message
    assert file in message


def test_tensors_that_the_index_does_not_know_are_ignored_with_one_note(damaged_shards: Path) -> None:
    whole = Checkpoint.open(damaged_shards)
    names = list(whole.tensors)[:2]
    helpers.edit_json(damaged_shards / INDEX, lambda index: [index["weight_map"].pop(name) for name in names])
    checkpoint = Checkpoint.open(damaged_shards)
    assert set(whole.tensors) - set(checkpoint.tensors) == set(names)
    assert len(checkpoint.notes) == 1
    assert checkpoint.notes[0].startswith("ignored: 2 tensors that ")


def test_of_a_tensor_in_two_shards_the_one_that_the_index_names_counts(damaged_shards: Path) -> None:
    first, second = helpers.shard_files(damaged_shards)[:2]
    name = next(iter(helpers.load_file(first)))
    twin = helpers.load_file(first)[name]
    helpers.edit_tensors(second, lambda tensors: tensors.update({name: twin + 1}))
    checkpoint = Checkpoint.open(damaged_shards)
    assert checkpoint.tensors[name].file == first
    assert "ignored: 1 tensor that" in checkpoint.notes[0]
    (damaged_shards / INDEX).unlink()
    assert "download the index" in refusal(damaged_shards)


def test_stale_shards_beside_the_index_are_not_read(damaged_shards: Path) -> None:
    before = Checkpoint.open(damaged_shards)
    (damaged_shards / "consolidated.safetensors").write_bytes(b"rubbish")
    after = Checkpoint.open(damaged_shards)
    assert after.tensors == before.tensors
    assert after.fingerprint() == before.fingerprint()


def test_without_an_index_model_safetensors_counts_and_the_rest_is_noted(damaged: Path) -> None:
    (damaged / "consolidated.safetensors").write_bytes(b"rubbish")
    assert "consolidated.safetensors" in Checkpoint.open(damaged).notes[0]


def test_without_an_index_a_single_file_of_any_name_is_read(damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "weights.safetensors")
    assert [file.name for file in Checkpoint.open(damaged).files] == ["weights.safetensors"]


# MODEL and config.json


def test_a_hub_id_is_told_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputOutputError, match="hf download allenai/OLMoE-1B-7B --local-dir OLMoE-1B-7B"):
        Checkpoint.open("allenai/OLMoE-1B-7B")
    with pytest.raises(InputOutputError, match=r"no such folder$"):
        Checkpoint.open(tmp_path / "gone")


def test_a_file_in_place_of_a_folder_is_said(damaged: Path) -> None:
    with pytest.raises(UsageError, match="is a file; give the checkpoint's folder"):
        Checkpoint.open(damaged / "model.safetensors")


def test_what_the_system_refuses_is_an_input_output_error_with_path_and_reason(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # the superuser, as whom tests may run, is never refused
    with pytest.raises(InputOutputError, match=r"config\.json: Permission denied"):
        Checkpoint.open(damaged)


def test_a_folder_without_weights_or_config_says_which(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no .safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "a": 2}', "\ufeff{}", "<html>"])
def test_a_config_that_is_no_strict_json_object_is_refused(damaged: Path, content: str) -> None:
    (damaged / "config.json").write_text(content)
    assert "config.json" in refusal(damaged)


def test_a_config_may_hold_infinity_as_some_published_ones_do(damaged: Path) -> None:
    helpers.edit_json(damaged / "config.json", lambda config: config.update(time_step_limit=[0.0, float("inf")]))
    assert Checkpoint.open(damaged).config["time_step_limit"][1] == float("inf")


def test_read_config_needs_no_weights(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    assert read_config(damaged) == read_config(damaged / "config.json")
    assert read_config(damaged)["model_type"] == "olmoe"
