"""`moeplug tune-kernels`: what it refuses, what it says it would do, and what it keeps; times are made up, no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import click
import pytest
import torch

from moeplug.api import demo_checkpoint
from moeplug.cli import cli
from moeplug.errors import InputOutputError, UsageError
from moeplug.kernels import tuned, tuning
from moeplug.kernels.schedule import Numbers
from moeplug.kernels.select import Device

pytest.importorskip("triton", reason="triton is not installed")

from moeplug.kernels import tune

H100 = Device("cuda", 0, (9, 0), "NVIDIA H100 80GB HBM3")
E, H, I, T = 128, 2048, 768, 8
BF16 = Numbers(16, "bfloat16")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The user's cache is empty, and another one than the developer's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuned.forget()
    tuning.choose_schedule.cache_clear()
    yield
    tuned.forget()
    tuning.choose_schedule.cache_clear()


@pytest.fixture
def run(run):
    """The command `tune-kernels`."""
    return partial(run, "tune-kernels")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_and_the_message_says_what_can_be_done(run):
    code, out, err = run("--scheme", "int8", "--shape", "128,2048,768,8")
    assert (code, out) == (2, "")
    assert "tune-kernels measures on a GPU, and this torch sees none; --dry-run says what it would do" in err


def test_a_dry_run_says_what_would_be_measured_and_where_it_would_go(run, tmp_path):
    code, out, err = run(
        "-s", "int8", "--shape", "128,2048,768,8", "--model", demo_checkpoint(), "--m", "1,64", "--dry-run"
    )
    assert (code, err) == (0, "")
    assert "E=128 H=2048 I=768 T=8: M = 1, 64" in out
    assert len(out.splitlines()) == 3  # the demo's layers are all of one size
    assert "4 cells, at most 12 timings each" in out
    assert str(tmp_path / "cache" / "moeplug" / "tuning") in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "needs sizes: --model MODEL, or --shape E,H,I,T"),
        (
            ["--shape", "128,2048,768"],
            "--shape '128,2048,768': expected positive integers, four, for example",
        ),
        (["--shape", "8,64,64,9"], "T is at most E"),
        (["--shape", "8,64,64,2", "--m", "1,,2"], "--m '1,,2': expected positive integers, for example 1,8,64"),
        (["--shape", "8,64,64,2", "--m", "0"], "--m '0': expected positive integers"),
    ],
)
def test_wrong_sizes_are_refused_with_an_example(run, arguments, reason):
    code, _, err = run("-s", "int8", *arguments, "--dry-run")
    assert code == 2
    assert reason in err


def test_an_unknown_scheme_is_refused_by_a_dry_run_too(run):
    code, _, err = run("-s", "int9", "--shape", "8,64,64,2", "--dry-run")
    assert code == 2
    assert "int9" in err


def test_a_dry_run_imports_neither_torch_nor_triton():
    code = (
        "import sys\n"
        "from moeplug.cli import cli\n"
        "cli.main(['tune-kernels', '-s', 'int8', '--shape', '8,64,64,2', '--dry-run'], standalone_mode=False)\n"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_help_teaches():
    command = cli.commands["tune-kernels"]
    text = command.get_help(click.Context(command, info_name="tune-kernels"))
    for part in ("--model", "--shape", "Ctrl-C keeps", "JSON", "never needed for a right result"):
        assert part in " ".join(text.split())


@pytest.fixture
def timed(monkeypatch):
    """Replace the GPU: bound kernels hold their schedule, and a function of it is its time."""
    times = {}

    def use(time_of):
        times["of"] = time_of

    def time(bound, inputs, best, required):
        return times["of"](bound.schedule)

    weight = torch.empty(1)
    operands = (SimpleNamespace(weight=weight, N=2 * I, K=H), SimpleNamespace(weight=weight, N=H, K=I))
    request = SimpleNamespace(device=H100)
    monkeypatch.setattr(tune, "TritonExperts", lambda request, up, down, schedule: SimpleNamespace(schedule=schedule))
    monkeypatch.setattr(tune, "_time", time)
    monkeypatch.setattr(tune, "_numbers", lambda experts, inputs: (BF16, BF16))
    monkeypatch.setattr(tune, "_inputs", lambda *_: [None])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    use.experts = SimpleNamespace(_E=E, _operands=operands, _request=request)
    return use


def microseconds(us):
    return tune.Timing(us, us * 0.99, us * 1.01)


def test_the_fastest_schedule_wins_and_is_compared_with_the_rules(timed):
    rules = tuning.heuristic(32, T, E, H, I, BF16, BF16, H100)
    timed(lambda schedule: microseconds(2.0 if schedule == rules else 3.0))
    result = tune.tune(timed.experts, T, 32)
    assert (result.row.schedule, result.timing.median, result.rules_us) == (rules, 2.0, 2.0)
    assert "as the rules say" in result.describe()
    timed(lambda schedule: microseconds(2.0 if schedule == rules else 1.5))
    result = tune.tune(timed.experts, T, 32)
    assert result.row.schedule != rules
    assert "M=32: 1.5 µs (1.5 to 1.5, by the rules 2.0)" in result.describe()


def test_the_best_launches_of_both_products_are_put_together(timed):
    rules = tuning.heuristic(32, T, E, H, I, BF16, BF16, H100)
    several = tuning.candidates(32, T, E, H, I, BF16, BF16, H100)
    first = next(s.first for s in several if s.first != rules.first and s.second == rules.second)
    second = next(s.second for s in several if s.second != rules.second and s.first == rules.first)
    timed(lambda s: microseconds(10.0 - (s.first == first) - (s.second == second)))
    result = tune.tune(timed.experts, T, 32)
    assert (result.row.schedule.first, result.row.schedule.second) == (first, second)
    assert result.measured <= 12


def test_what_does_not_compile_or_spills_is_passed_over_and_said(timed):
    rules = tuning.heuristic(32, T, E, H, I, BF16, BF16, H100)

    def time(schedule):
        if schedule.first != rules.first:
            raise RuntimeError("out of resource: shared memory")
        if schedule.second != rules.second:
            raise tune._Skipped("spills 8 registers")
        return microseconds(2.0)

    timed(time)
    result = tune.tune(timed.experts, T, 32)
    assert result.row.schedule == rules
    assert any("shared memory" in text for text in result.skipped)
    assert any("spills 8 registers" in text for text in result.skipped)


def test_a_cuda_error_ends_the_run(timed):
    def time(schedule):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    timed(time)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.tune(timed.experts, T, 32)


def test_each_cell_is_written_at_once_and_used_from_then_on(timed):
    timed(lambda schedule: microseconds(1.0 if schedule.first.num_stages == 3 else 2.0))
    session = tune.Session.open(None, H100, "moeplug tune-kernels")
    assert session.path == tuned.cache_path(H100.name)
    for done, M in enumerate((16, 32), start=1):
        result = tune.tune(timed.experts, T, M)
        session.add(result)
        table = json.loads(session.path.read_text())  # Ctrl-C here keeps what is done
        assert [cell["M"] for cell in table["cells"]] == [16, 32][:done]
        assert tuning.choose_schedule(M, T, E, H, I, BF16, BF16, H100) == result.row.schedule
    assert table["device"] == H100.name
    assert set(table["runs"][0]) >= {"command", "date", "seconds", "torch", "triton", "moeplug"}


def test_a_later_run_keeps_the_cells_that_it_does_not_measure(timed, tmp_path):
    timed(lambda schedule: microseconds(1.0))
    for M in (1, 64):
        tune.Session.open(tmp_path / "t.json", H100, f"run {M}").add(tune.tune(timed.experts, T, M))
    table = tuned.read_table(tmp_path / "t.json")
    assert [cell.M for cell in table.cells] == [1, 64]
    assert [run["command"] for run in table.runs] == ["run 1", "run 64"]


def test_a_table_of_another_device_and_a_broken_one_are_not_written_over(tmp_path):
    path = tmp_path / "t.json"
    tuned.write_table(path, tuned.Table("another", (8, 0)))
    with pytest.raises(UsageError, match="measured on another, not on NVIDIA H100"):
        tune.Session.open(path, H100, "")
    path.write_text("{")
    with pytest.raises(InputOutputError, match="delete it, or name another file with --out"):
        tune.Session.open(path, H100, "")


def test_another_kernel_has_nothing_to_tune():
    with pytest.raises(UsageError, match="only moeplug's Triton kernel is tuned"):
        tune.tunable(lambda *_: None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_command_writes_a_table_that_is_used(run, tmp_path):
    code, out, err = run("-s", "int8", "--shape", "8,256,256,2", "--m", "1,64", "--out", tmp_path / "t.json")
    assert code == 0, err
    assert "2 cells in" in out
    assert [cell.M for cell in tuned.read_table(tmp_path / "t.json").cells] == [1, 64]
