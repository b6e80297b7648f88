"""docs/bad-inputs.md names tests that are there; the command ends with the code of its class and no traceback."""

from __future__ import annotations

import ast
import json
import os
import re
import struct
from pathlib import Path

import helpers
import pytest
import torch
from test_cli import run

import moeplug
from moeplug import MoeplugError, api
from moeplug.registry import Registry

__all__ = ["run"]  # a fixture

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "bad-inputs.md").read_text()
LINES = [line for line in PAGE.splitlines() if re.match(r"\| (?!-|#|found)", line)]
EXPERT = "model.layers.0.mlp.experts.3.gate_proj.weight"


def functions_in(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("line", LINES, ids=lambda line: "-".join(re.findall(r"\w+", line)[:7]))
def test_every_line_of_the_page_names_tests_that_are_there(line):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)(?:\[([\w-]+)\])?`", line)
    assert named
    for file, function, case in named:
        assert function in functions_in(TESTS / file)
        cases = (TESTS / file).read_text() + (TESTS / "kernel_cases.py").read_text()
        assert not case or re.search(rf"\b{case.removeprefix('ids-')}\b", cases), case


def test_the_page_has_every_number_once():
    numbers = [int(line.split("|")[1]) for line in LINES if line.split("|")[1].strip().isdigit()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) == 52


# One of each class, as a user meets it


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def lie(path):
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")


def index_out(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')


def tensors(change):
    return lambda folder: helpers.edit_tensors(folder / "model.safetensors", change)


DAMAGES = {
    "cut": (lambda f: os.truncate(f / "model.safetensors", 50_000), "are missing; download it again"),
    "lying_header": (lambda f: lie(f / "model.safetensors"), "announces a header of 9,223,372,036,854,775,808 bytes"),
    "path_in_the_index": (index_out, "'../../etc/passwd', is not a plain file name"),
    "fifo": (lambda f: fifo(f / "model.safetensors"), "is a FIFO (named pipe), not a regular file"),
    "fifo_for_config": (lambda f: fifo(f / "config.json"), "is a FIFO (named pipe), not a regular file"),
    "web_page_for_config": (lambda f: (f / "config.json").write_text("<!DOCTYPE html>"), "is a web page"),
    "missing_expert": (tensors(lambda t: t.pop(EXPERT)), f"gate of expert 3 ({EXPERT})"),
    "transposed_expert": (tensors(lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()})), f"'{EXPERT}': has shape"),
    "quantized_expert": (tensors(lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)})), "already quantized"),
    "nan": (tensors(lambda t: t[EXPERT][1:2, 2:3].fill_(torch.nan)), "expert 3, gate: nan at row 1, column 2"),
}
BOMB = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 21))
TAG = "api: 1\nname: !!python/object/apply:os.system [id]\n"
STRANGER = "api: 1\nname: x\nplugin: stranger\nweights: {format: x}\n"
COMMANDS = {
    **{name: (3, ("load", "MODEL", "--runtime", "none", "-s", "int8"), words) for name, (_, words) in DAMAGES.items()},
    "groups_do_not_divide": (2, ("plan", "MODEL", "-s", "int8-g64"), "K=96 is not a multiple of group_size=64"),
    "merge_keys": (2, ("plan", "MODEL", "-s", "bomb.yaml"), "are not allowed"),
    "tag": (2, ("check", "tag.yaml"), "tags ("),
    "target_is_the_model": (2, ("export", "MODEL", "-s", "int8", "-o", "MODEL"), "exists and is not empty"),
    "no_such_plugin": (4, ("plan", "MODEL", "-s", "stranger.yaml"), "plugin 'stranger' is not installed"),
    "no_such_folder": (5, ("plan", "gone", "-s", "int8"), "there is no such folder"),
    "no_such_scheme": (5, ("plan", "MODEL", "-s", "gone.yaml"), "no such file"),
    "over_budget": (6, ("plan", "MODEL", "-s", "int8", "--budget", "10kB"), "--budget allows"),
}


@pytest.mark.timeout(60)  # a watchdog: each takes a second at most
@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_ends_with_the_code_of_its_class(run, tiny_checkpoint, tmp_path, monkeypatch, case):
    expected, arguments, words = COMMANDS[case]
    model = helpers.copy_of(tiny_checkpoint("qwen3_moe"), tmp_path)
    if case in DAMAGES:
        DAMAGES[case][0](model)
    for name, text in {"bomb": BOMB, "tag": TAG, "stranger": STRANGER}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in model.iterdir())
    code, out, err = run(*[model if argument == "MODEL" else argument for argument in arguments])
    assert (code, out) == (expected, "")
    assert words in err
    assert sorted(path.name for path in model.iterdir()) == before


# What config.json may claim


VALUES = (None, 0, -1, 2, 2**31, 10**17, 0.5, 1e308, float("nan"), "", "../../etc", True, [], [1], ["x"], {}, {"a": 1})


@pytest.mark.timeout(300)  # a watchdog: 500 plans of 10 ms
@pytest.mark.parametrize("model_type", ["qwen3_moe", "jamba"])
def test_any_value_of_config_json_is_planned_or_refused(tiny_checkpoint, tmp_path, model_type):
    folder, registry = helpers.copy_of(tiny_checkpoint(model_type), tmp_path), Registry.discover()
    config = json.loads((folder / "config.json").read_text())
    refused = 0
    for key in config:
        for value in VALUES:
            (folder / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                moeplug.plan(folder, "int8", device="cpu", runtime="transformers", registry=registry)
            except MoeplugError:
                refused += 1
    assert refused > 100


def test_an_export_respects_the_umask(tiny_checkpoint, tmp_path):
    before = os.umask(0o027)
    try:
        folder = api.export(tiny_checkpoint("qwen3_moe"), "int8", tmp_path / "export").folder
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
