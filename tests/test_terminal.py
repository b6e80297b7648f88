"""The parts of the command line: tables that fit 80 columns, sizes, streams."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import moeplug
from moeplug import UsageError, terminal
from moeplug.cli.options import parse_size

SCHEMES = {
    "one_spec": "weights: {format: int8, strategy: channel}\n",
    "overrides": (
        "weights: {format: int8, strategy: channel}\n"
        "overrides:\n"
        "  - {layers: '0', weights: null}\n"
        "  - {experts: '0,2', projections: [down], weights: "
        "{format: int8, strategy: group, group_size: 32, symmetric: false}}\n"
    ),
}
NUMBER = r" +\d+\.\d\d [kMG]?B" * 2


@pytest.fixture(params=SCHEMES)
def loaded(request, tiny_checkpoint, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(f"api: 1\nname: s\nplugin: int8\n{SCHEMES[request.param]}")
    return moeplug.load(tiny_checkpoint("olmoe"), file, device="cpu")


@pytest.fixture
def table(monkeypatch, capsys):
    """A function that prints at a console width and returns the lines of the table, without path and totals."""

    def show(width, print_it, *arguments):
        monkeypatch.setattr(terminal, "out", lambda: terminal.Output(width=width))
        print_it(*arguments)
        lines = capsys.readouterr().out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("layer"))
        end = next(
            i for i, line in enumerate(lines) if line.startswith(("errors:", "  not chosen", " ")) and ":" in line
        )
        return [line.rstrip() for line in lines[start:end]]

    return show


def wide(plan):
    """Return a plan with sizes, layer numbers and kernel names as long as they come."""
    layers = []
    for layer in plan.layers:
        spec = replace(layer.layer, index=100 + layer.layer.index, hidden_size=2**17, intermediate_size=2**16)
        layers.append(replace(layer, layer=spec))
    return replace(plan, layers=tuple(layers))


def test_the_table_of_a_load_fits_80_columns(loaded, table):
    report = loaded.report
    report.plan = wide(report.plan)
    report.layers = tuple(replace(r, plan=p) for r, p in zip(report.layers, report.plan.layers, strict=True))
    lines = table(80, terminal.print_report, report, None, None)
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if re.match(r" +10\d ", line)]
    assert len(rows) == len(report.layers)
    for row in rows:
        assert re.match(rf"  10\d{NUMBER}  \d\.\d{{5}}  \d\.\d{{5}}  (int8|bfloat16).*  cpu-grouped$", row), row
    assert "…" not in "".join(lines)


def test_the_table_of_a_plan_fits_80_columns(loaded, table):
    lines = table(80, terminal.print_plan, wide(loaded.report.plan))
    assert max(map(len, lines)) <= 80
    assert sum(re.match(rf"  10\d{NUMBER}  0.*  cpu-grouped$", line) is not None for line in lines) == 2
    assert "…" not in "".join(lines)


def test_a_narrow_console_gets_whole_numbers_too(loaded, table):
    lines = table(60, terminal.print_report, loaded.report, None, None)
    assert all(re.match(rf" +\d{NUMBER}  \d\.\d{{5}}  \d\.\d{{5}}  ", line) for line in lines[1:] if line[4] != " ")


def test_the_footer_names_the_worst_weight_of_all(loaded, capsys):
    terminal.print_report(loaded.report, None, None)
    worst = max(loaded.report.layers, key=lambda layer: layer.errors.worst)
    where = f"layer {worst.plan.layer.index}, {worst.errors.worst_where}"
    assert f"worst error  {worst.errors.worst:.5f}: {where}" in capsys.readouterr().out


def test_a_default_report_path_is_new_each_time(loaded):
    paths = {terminal.default_report_path(loaded.report.plan) for _ in range(20)}
    assert len(paths) == 20
    assert all(isinstance(path, Path) and path.name.endswith("-s.json") for path in paths)


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9), ("16GiB", 16 * 2**30), ("1.5 MB", 1_500_000), ("4096", 4096), ("2kb", 2000), ("7 B", 7),
        ("1KIB", 1024), ("3tb", 3 * 10**12), ("0.1TiB", 2**40 // 10), (" 5 kiB ", 5120),
    ],
)  # fmt: skip
def test_sizes_are_decimal_or_binary_by_their_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "20 XB", "-", "1e400GB", "20 G B", "nan", "-5GB", "0", "0GB", "0.1B", "16Gi", "5G", "5iB", "1_0GB",
     "\uff15GB", "5\u212aB", "1." + "9" * 99, "5GB5"],
)  # fmt: skip
def test_a_size_that_is_none_is_a_usage_error(text):
    with pytest.raises(UsageError, match="is not a size; write for example 20GB .* units: B, kB"):
        parse_size(text)


# Streams


@pytest.mark.parametrize("arguments", ["schema scheme", "plugins", "schemes list", "--help", "no-such-command"])
def test_a_pipe_that_closes_early_ends_quietly_with_141(arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "moeplug", *arguments.split()]
    streams = {"stdout": subprocess.PIPE, "stderr": write} if arguments == "no-such-command" else {"stdout": write}
    done = subprocess.run(command, text=True, check=False, **({"stderr": subprocess.PIPE} | streams))
    os.close(write)
    assert done.returncode == 141
    assert not done.stdout
    assert not done.stderr


def test_ascii_output_escapes_what_it_cannot_show(tiny_checkpoint, tmp_path):
    folder = tmp_path / "café"
    folder.symlink_to(tiny_checkpoint("olmoe"))
    command = [sys.executable, "-m", "moeplug", "plan", str(folder), "-s", "int8", "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"caf\\xe9 under int8" in done.stdout


def test_timings_are_shown_when_they_are_asked_for(loaded, capsys):
    terminal.print_report(loaded.report, None, None)
    assert "bounded by" not in capsys.readouterr().out
    terminal.print_report(loaded.report, None, None, timings=True)
    shown = capsys.readouterr().out
    assert re.search(r"bounded by  (disk|quantize|Python)\n +reading  \d+\.\d\d s, threads: \d+; waited", shown)
    on_gpu = replace(loaded.report.timings, gpu_copy=1.0, gpu_quantize=2.0, waited_for_gpu=9.0)
    terminal.print_report(replace(loaded.report, timings=on_gpu), None, None, timings=True)
    assert "GPU  copied 1.00 s, quantized 2.00 s; waited for it 9.00 s" in capsys.readouterr().out


def test_a_bar_is_shown_once_it_moves(capsys):
    with pytest.raises(KeyError), terminal.progress_bar("exporting"):
        raise KeyError  # planning failed
    assert capsys.readouterr().err == ""
    with terminal.progress_bar("exporting") as progress:
        progress(10, 20)
    assert "10/20 bytes" in capsys.readouterr().err
