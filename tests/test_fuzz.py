"""Damaged and hostile files: many thousands, read in a watched process. Each tool is shown to notice what it is for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fuzz
import pytest
from mutate import Pairs, each_string_replaced, parse, write

from moeplug.checkpoint import safetensors_header
from moeplug.errors import CheckpointError

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory a process has")


def script(name: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts beside this file."""
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


# The mutants. More of them: python tests/fuzz.py --help


@pytest.mark.parametrize(("kind", "count"), [("headers", 14_000), ("index", 6_000), ("config", 1_000), ("yaml", 5_000)])
def test_a_damaged_file_is_accepted_or_refused_with_an_error_of_our_own(tmp_path: Path, kind: str, count: int) -> None:
    done = script("fuzz.py", kind, "--count", count, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    accepted, refused = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:accepted|refused)", done.stdout))
    assert accepted + refused == count
    assert accepted > count // 50
    assert refused > count // 2


def test_mutant_n_of_a_seed_is_always_the_same(tmp_path: Path) -> None:
    for kind, target in fuzz.TARGETS.items():
        (tmp_path / kind).mkdir()
        made = target(tmp_path / kind)
        first = [fuzz.mutant_of(made, 5, number) for number in range(200)]
        assert first == [fuzz.mutant_of(made, 5, number) for number in range(200)]
        assert len(set(first)) > 150


def wrong_headers(folder: Path) -> list[str]:
    """Return what is wrong with how headers are read now, by 600 mutants."""
    target, found = fuzz.Headers(folder), []
    for number in range(600):
        try:
            fuzz.accepts(target, fuzz.put(target, 1, number))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_nothing_is_wrong_with_headers_as_they_are_read(tmp_path: Path) -> None:
    assert wrong_headers(tmp_path) == []


@pytest.mark.parametrize("left_out", ["_require_exact_tiling", "_require_size"])
def test_a_check_that_safetensors_has_and_moeplug_has_not_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    monkeypatch.setattr(safetensors_header, left_out, lambda *args: None)
    assert any("safetensors refuses what moeplug accepts" in found for found in wrong_headers(tmp_path))


def test_a_tensor_that_is_read_differently_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(safetensors_header.DTYPE_BITS, "BF16", 16)
    read = safetensors_header._tensor

    def misread(name: str, entry: Any, *args: Any) -> Any:
        return read(name, entry | {"shape": entry["shape"][::-1]} if isinstance(entry, dict) else entry, *args)

    monkeypatch.setattr(safetensors_header, "_tensor", misread)
    assert any("moeplug reads" in found for found in wrong_headers(tmp_path))


class Naughty(fuzz.Target):
    """Files that say what the reader does wrong."""

    does: Callable[[], object]

    def make(self, chance: Random) -> fuzz.Mutant:
        return fuzz.Mutant("file", b"x")

    def read(self, path: Path) -> None:
        type(self).does()


def crash() -> None:
    raise KeyError("weights")


def hang() -> None:
    re.fullmatch("(a+)+b", "a" * 40)  # one call into C, which no Python signal handler interrupts


def allocate() -> None:
    bytearray(100 << 20)


def allocate_much() -> None:
    bytearray(3 << 30)


def read_elsewhere() -> None:
    os.close(os.open("/", os.O_RDONLY))


def say_nothing() -> None:
    raise CheckpointError(" ")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.parametrize(
    ("does", "said"),
    [
        (crash, "KeyError: 'weights'"),
        (hang, "died by signal"),
        (allocate, "bytes of memory for a file of 1"),
        (allocate_much, "MemoryError"),
        (read_elsewhere, "reading data caused"),
        (say_nothing, "CheckpointError says nothing"),
    ],
)
def test_what_is_wrong_is_reported_with_the_mutant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], does: Any, said: str
) -> None:
    calls = []

    def later() -> None:  # the first 50 fill caches, unwatched
        calls.append(1)
        if len(calls) > 50:
            does()

    monkeypatch.setitem(fuzz.TARGETS, "naughty", type("This", (Naughty,), {"does": staticmethod(later)}))
    monkeypatch.setattr(fuzz, "TIME_LIMIT_S", 0.5)
    assert fuzz.main("naughty", 100, 1, None, tmp_path) == 1
    assert said in capfd.readouterr().err
    assert (tmp_path / "fuzz-1-0-file").read_bytes() == b"x"


# Attacks in the place of strings


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("own", ("config.json", "model.safetensors.index.json", "a header", "a scheme", "a family", "plugin.yaml")),
        ("model", ("config.json by transformers", "tokenizer.json by transformers", "moeplug.json of an export")),
    ],
    ids=["own", "model"],
)
def test_no_string_of_a_file_is_run_imported_or_opened(tmp_path: Path, part: str, names: tuple[str, ...]) -> None:
    done = script("payloads.py", tmp_path, part, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["findings"] == []
    assert all(result["counts"][name] > 100 for name in names), result["counts"]


def test_the_guard_notices_each_thing_that_a_string_must_not_cause(tmp_path: Path) -> None:
    done = script("payloads.py", tmp_path, "prove", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "result.json").read_text())
    assert seen.pop("nothing") == []
    assert len(seen) >= 17
    for what, events in seen.items():
        assert any(event.startswith(what.split()[0]) for event in events), (what, events)
    assert (tmp_path / "canary").exists()


def test_each_string_of_a_tree_is_replaced_once() -> None:
    tree = parse('{"a": ["b", {"c": 1}], "d": "e"}')
    found = [write(changed) for _, changed in each_string_replaced(tree, "!")]
    assert found == [
        '{"!": ["b", {"c": 1}], "d": "e"}',
        '{"a": ["!", {"c": 1}], "d": "e"}',
        '{"a": ["b", {"!": 1}], "d": "e"}',
        '{"a": ["b", {"c": 1}], "!": "e"}',
        '{"a": ["b", {"c": 1}], "d": "!"}',
    ]
    assert isinstance(tree, Pairs)
    assert write(tree) == '{"a": ["b", {"c": 1}], "d": "e"}'
