"""The command line as a user meets it: output, exit codes, and one message instead of a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch

import moeplug
from moeplug import RefusedError
from moeplug.api import demo_checkpoint
from moeplug.cli import cli, main
from moeplug.registry import Plugin, Registry

ROOT = Path(__file__).parent.parent
INT8 = str(ROOT / "schemes" / "int8.yaml")


NEED_SCHEME = ("load", "plan", "eval", "generate")


@pytest.fixture
def run(run):
    """The command, under int8 where a scheme has to be named and the test names none."""

    def call(*arguments):
        if arguments and arguments[0] in NEED_SCHEME and not {"-s", "--scheme", "--help"} & set(arguments):
            arguments = (*arguments, "-s", "int8")
        return run(*arguments)

    return call


def test_load_without_a_model_loads_the_demo_and_says_so(run, tmp_path):
    code, out, err = run("load", "--scheme", INT8, "--max-new-tokens", "8")
    assert code == 0
    assert "no MODEL was given: loading the demo checkpoint" in err
    assert "loading" in err
    assert "10.6/10.6 MB" in err  # the progress bar's last state
    for part in ("layer", "before", "after", "worst", "mean", "error", "kernel", "int8 channel", "cpu-grouped"):
        assert part in out
    for part in ("peak memory", "GB/s", "unquantized", "ratio", "top-1 agreement", "report", "The :mod:`json` module"):
        assert part in out
    (report,) = (tmp_path / "state").rglob("*.json")
    assert str(report) in out
    written = json.loads(report.read_text())
    assert written["provenance"]["plugins"][0]["distribution"] == "moeplug-int8"
    assert 0.99 < written["evaluation"]["perplexity_ratio"] <= 1.002


def test_load_with_json_prints_json_alone(run, tiny_checkpoint, tmp_path):
    code, out, err = run("load", tiny_checkpoint("olmoe"), "-s", "int8", "--json", "--report", tmp_path / "r.json")
    assert code == 0
    printed = json.loads(out)
    assert [layer["layer"] for layer in printed["layers"]] == [0, 1]
    assert printed["report"] == str(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["worst_relative_rms"] == printed["worst_relative_rms"]
    assert "loading" in err


def test_plan_prints_layers_kernels_reasons_and_peak(run, tiny_checkpoint):
    code, out, _ = run("plan", tiny_checkpoint("qwen3_moe"), "-s", "int8-g32", "--device", "cpu")
    assert code == 0
    for part in (
        "int8 g32",
        "cpu-grouped",
        "not chosen: triton-fused-moe: needs a CUDA device",
        "48 expert weights",
        "peak",
    ):
        assert part in out
    code, out, _ = run("plan", tiny_checkpoint("qwen3_moe"), "--json", "--device", "cpu")
    assert json.loads(out)["layers"][1]["layer"] == 2


def test_dummy_needs_config_json_alone(run, tiny_checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_checkpoint("mixtral") / "config.json").read_bytes())
    code, out, err = run("load", tmp_path, "--dummy", "--device", "cpu", "--report", tmp_path / "r.json")
    assert code == 0
    assert "not loaded" in out
    assert "generated tensors" in err


def test_generate_answers_one_prompt(run):
    code, out, err = run("generate", "--device", "cpu", "--prompt", "The following", "--max-new-tokens", "6")
    assert code == 0
    assert "no MODEL was given: loading the demo checkpoint" in err
    assert out.startswith("The following")
    assert len(out) > len("The following")


def test_generate_reads_prompts_from_a_pipe(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Return the\n\nA list of\n"))
    code, out, _ = run("generate", "--device", "cpu", "--max-new-tokens", "4", "--json")
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["Return the", "A list of"]


def test_eval_prints_perplexity_ratio_and_agreement(run, tmp_path):
    code, out, _ = run("eval", "--device", "cpu", "--max-tokens", "600")
    assert code == 0
    for part in ("unquantized", "int8", "ratio", "top-1 agreement"):
        assert part in out
    text = tmp_path / "text.txt"
    text.write_text("The module defines the following functions.\n" * 30)
    code, out, _ = run("eval", "--device", "cpu", "--text", text, "--json")
    result = json.loads(out)
    assert result["text"] == str(text)
    assert result["perplexity_scheme"] > 1


def budget_for(experts):
    """Return a budget that leaves this many bytes for the demo's experts; readers and buffers depend on the cores."""
    planned = moeplug.plan(scheme="int8", device="cpu", runtime="transformers")
    return planned.peak_bytes - planned.expert_bytes_after + experts


def test_tune_writes_a_scheme_that_loads_within_the_budget(run, tmp_path):
    text, scheme = tmp_path / "text.txt", tmp_path / "my.yaml"
    text.write_text("The module defines the following functions.\n" * 20)
    budget = budget_for(4_500_000)
    options = ("--budget", budget, "--candidates", "int8,mxfp4,none", "--device", "cpu")
    code, out, err = run("tune", *options, "--text", text, "--max-tokens", "90", "-o", scheme)
    assert code == 0
    for part in ("mixed", "over budget", "90 tokens, 40 experts", str(scheme)):
        assert part in out
    assert "no MODEL was given: tuning for the demo checkpoint" in err
    code, out, _ = run("plan", "--scheme", scheme, "--budget", budget, "--device", "cpu", "--json")
    assert code == 0
    planned = json.loads(out)
    code, out, _ = run("tune", *options, "--data-free", "-o", scheme, "--json")
    result = json.loads(out)
    assert (result["data_free"], result["experts"]) == (True, 40)
    assert sum(result["chosen"].values()) == 40
    for found in (planned["expert_bytes_after"], result["expert_bytes"]):
        assert 4_000_000 < found <= budget - planned["dense_bytes"] - planned["transient_bytes"]


def test_tune_runs_a_model_under_a_scheme_too(run, tmp_path):
    options = ("--candidates", "int8,int8-g32", "--per", "layer", "--max-tokens", "64", "--device", "cpu")
    options = ("--budget", budget_for(4_250_000), *options, "--run-as", "int8")
    code, out, err = run("tune", *options, "-o", tmp_path / "my.yaml", "--json")
    assert code == 0
    assert "loading, int8" in err
    layers = json.loads(out)["layers"]
    assert [list(options.values()) for options in layers.values()] == [["0-7"]] * 5


def test_tune_may_store_gate_up_and_down_of_an_expert_differently(run, tmp_path):
    options = ("--candidates", "mxfp4,mxfp8", "--per", "projection", "--device", "cpu", "--data-free")
    code, out, _ = run("tune", "--budget", budget_for(3_000_000), *options, "-o", tmp_path / "my.yaml")
    assert code == 0
    assert re.search(r"^(mxfp4 \+ mxfp8|mxfp8 \+ mxfp4) +[0-9]+", out, re.MULTILINE)
    assert "projections: [" in (tmp_path / "my.yaml").read_text()


def test_a_budget_that_tune_cannot_meet_is_refused_before_reading(run, tmp_path):
    scheme = tmp_path / "my.yaml"
    code, _, err = run("tune", "--budget", "3MB", "--candidates", "int8,none", "--data-free", "-o", scheme)
    assert code == 6
    assert "no choice fits --budget 3.00 MB: the smallest budget that one fits is " in err
    assert not scheme.exists()
    smallest = re.search("one fits is ([0-9]+) bytes", err)[1]
    code, _, _ = run("tune", "--budget", smallest, "--candidates", "int8,none", "--data-free", "-o", scheme)
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MODEL", "--budget", "1GB", "-o", "x.yaml"), "tune needs --text FILE"),
        (("--budget", "1GB", "-o", "x.yaml", "--data-free", "--text", "t"), "leave it out, or --text"),
        (("--budget", "1GB", "-o", "x.yaml", "--data-free", "--run-as", "int8"), "leave it out, or --run-as"),
        (
            ("--budget", "1GB", "-o", "x.yaml", "--data-free", "--max-tokens", "9", "--text", "t"),
            "--data-free reads no text and runs no model: leave it out, or --text and --max-tokens",
        ),
        (("--budget", "1GB", "-o", "x.yaml", "--candidates", ""), "--candidates names nothing"),
        (("--budget", "1GB", "-o", "x.yaml", "--candidates", "int8,intt8"), "no scheme is called 'intt8'"),
        (("--budget", "1 zebra", "-o", "x.yaml"), "--budget '1 zebra' is not a size"),
    ],
    ids=[
        "no_text",
        "data_free_text",
        "data_free_run_as",
        "data_free_max_tokens",
        "no_candidates",
        "unknown_candidate",
        "no_size",
    ],
)
def test_what_tune_cannot_do_is_one_message(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("tune", *arguments)
    assert code == 2
    assert message in err
    assert list(tmp_path.glob("*.yaml")) == []


def test_without_scipy_tune_says_what_to_install_before_it_reads(run, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("tune", "--budget", "1GB", "--data-free", "-o", tmp_path / "x.yaml")
    assert code == 2
    assert "pip install 'moeplug[tune]'" in err


def test_plugins_lists_state_distribution_and_capabilities(run):
    code, out, _ = run("plugins")
    assert code == 0
    for part in ("int8", "active", "moeplug-int8 0.1.0", "per_channel", "plugin.yaml"):
        assert part in out
    code, out, _ = run("plugins", "--json", "--disable", "int8")
    (listed,) = [plugin for plugin in json.loads(out) if plugin["name"] == "int8"]
    assert listed["state"] == "blocked"
    assert listed["reason"] == "--disable names it"
    assert set(listed) >= {"name", "state", "reason", "distribution", "version", "path", "capabilities"}


def test_schemes_lists_and_shows(run):
    code, out, _ = run("schemes")
    assert code == 0
    assert "int8-g128" in out
    code, out, _ = run("schemes", "--json")
    assert json.loads(out)
    code, out, _ = run("schemes", "list", "--json")
    assert {"int8", "int8-g128"} <= {scheme["name"] for scheme in json.loads(out)}
    code, out, _ = run("schemes", "show", "int8-g128")
    assert code == 0
    assert "group_size: 128" in out


@pytest.mark.parametrize("option", [["--json"], ["--disable", "int8"]], ids=["json", "disable"])
def test_options_that_schemes_would_not_hand_on_are_refused(run, option):
    code, out, err = run("schemes", *option, "show", "int8")
    assert (code, out) == (2, "")
    assert "the options of `schemes show` come after it, not before" in err


def test_check_tells_the_three_kinds_apart(run):
    plugin = ROOT / "plugins" / "moeplug-int8" / "src" / "moeplug_int8" / "plugin.yaml"
    family = ROOT / "moeplug" / "checkpoint" / "families" / "jamba.yaml"
    code, out, _ = run("check", INT8, plugin, family)
    assert code == 0
    assert [line.split(": ")[1].split(" ")[0] for line in out.splitlines()] == ["scheme", "plugin", "family"]


def test_check_reports_every_problem_with_line_column_and_caret(run, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("api: 1\nname: t\nplugin: int8\nweights: {fromat: int8, strategy: chanel}\n")
    code, _, err = run("check", file)
    assert code == 2
    assert f"{file}:4:11:" in err
    assert "did you mean 'format'" in err
    assert "did you mean 'channel'" in err
    assert "^" in err


@pytest.mark.parametrize("kind", ["scheme", "plugin"])
def test_schema_prints_json_schema(run, kind):
    code, out, _ = run("schema", kind)
    assert code == 0
    assert json.loads(out)["$id"].endswith(f"{kind}.schema.json")


# Exit codes


def spoiled(tiny_checkpoint, tmp_path, change):
    folder = helpers.copy_of(tiny_checkpoint("olmoe"), tmp_path)
    change(folder)
    return folder


def test_exit_code_2_is_for_usage(run, tiny_checkpoint):
    model = tiny_checkpoint("olmoe")
    for arguments in (
        ["lod"],
        ["load", "--no-such-option"],
        ["load", model, "--budget", "much"],
        ["load", model, "--device", "tpu"],
        ["load", model, "--dummy", "--prompt", "x"],
        ["load", model, "--disable", "nobody"],
        ["eval", model],
        ["generate", model, "--dummy"],
        ["load", model / "config.json"],
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert "Error" in err


@pytest.mark.parametrize("command", NEED_SCHEME)
def test_there_is_no_default_scheme_and_the_installed_ones_are_named(capsys, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["moeplug", command, *(["--text", INT8] if command == "eval" else [])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no scheme was named" in (err := capsys.readouterr().err)
    assert ", int8, int8-g128, " in err.rpartition("; installed: ")[2]


def test_exit_code_2_is_for_schemes(run, tiny_checkpoint, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("api: 1\nname: bad\nplugin: int8\nweights: {format: int9}\n")
    for scheme in (file, "no-such-scheme", "int8-g128"):  # K=96 in the tiny model: no multiple of 128
        code, _, err = run("load", tiny_checkpoint("olmoe"), "--scheme", scheme, "--device", "cpu")
        assert code == 2
        assert "Error" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors"),
        (lambda f: helpers.edit_json(f / "config.json", lambda c: c.update(model_type="gpt9")), "'gpt9' is not known"),
        (lambda f: helpers.edit_tensors(f / "model.safetensors", lambda t: t.pop(GATE)), "1 of 12 expert tensors"),
    ],
    ids=["no_config", "truncated", "unknown_model_type", "missing_expert"],
)
def test_exit_code_3_is_for_checkpoints(run, tiny_checkpoint, tmp_path, change, message):
    code, out, err = run("load", spoiled(tiny_checkpoint, tmp_path, change), "--device", "cpu")
    assert (code, out) == (3, "")
    assert message in err
    assert not (tmp_path / "state").exists()  # no report of a load that did not happen


GATE = "model.layers.0.mlp.experts.3.gate_proj.weight"


def test_exit_code_4_is_for_plugins(run, tiny_checkpoint, tmp_path):
    code, _, err = run("load", tiny_checkpoint("olmoe"), "--disable", "int8", "--scheme", INT8)
    assert code == 4
    assert "plugin 'int8' (moeplug-int8 0.1.0) is blocked: --disable names it" in err
    file = tmp_path / "theirs.yaml"
    file.write_text("api: 1\nname: theirs\nplugin: theirs\nweights: {format: theirs}\n")
    code, _, err = run("load", tiny_checkpoint("olmoe"), "--scheme", file)
    assert code == 4
    assert "plugin 'theirs' is not installed" in err


def test_exit_code_5_is_for_input_and_output(run, tiny_checkpoint, tmp_path):
    code, _, err = run("load", tmp_path / "gone")
    assert code == 5
    assert "there is no such folder" in err
    (tmp_path / "file").write_text("")
    model = tiny_checkpoint("olmoe")
    code, _, err = run("load", model, "--device", "cpu", "--report", tmp_path / "file" / "report.json")
    assert code == 5
    assert "cannot be written" in err
    code, _, err = run("eval", "--device", "cpu", "--text", tmp_path / "gone.txt")
    assert code == 5


def test_exit_code_6_is_for_budget_and_accept(run, tiny_checkpoint, tmp_path):
    code, _, err = run("load", tiny_checkpoint("olmoe"), "--budget", "10kB", "--device", "cpu")
    assert code == RefusedError.exit_code == 6
    assert "--budget allows 10.00 kB" in err
    file = tmp_path / "strict.yaml"
    file.write_text("api: 1\nname: strict\nextends: int8\naccept: {relative_rms: 0.0001}\n")
    code, _, err = run("load", tiny_checkpoint("olmoe"), "--scheme", file, "--device", "cpu")
    assert code == 6
    assert "above the scheme's accept" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_in_the_middle_ends_with_its_code_and_no_traceback(tiny_checkpoint, tmp_path, number, code):
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "moeplug", "generate", "-s", "int8", "--device", "cpu", "--max-new-tokens", "4"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    process.stdin.write("The\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # it has loaded, answers, and then waits for the next prompt
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err


def test_help_shows_the_exit_codes_and_every_command_has_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for number in ("0", "2", "3", "4", "5", "6", "130", "141", "143"):
        assert f"\n    {number} " in out
    for name, command in cli.commands.items():
        assert command.get_short_help_str(), name
        code, out, _ = run(name, "--help")
        assert code == 0
        assert "Usage: " in out


# What the user asked for is found wrong before a weight is read


@pytest.fixture
def no_weight_is_read(monkeypatch):
    """Any load that starts fails the test."""
    from moeplug import api

    monkeypatch.setattr(api, "execute", lambda *args, **kwargs: pytest.fail("the load started"))


def demo_with(tmp_path, change):
    folder = helpers.copy_of(demo_checkpoint(), tmp_path)
    change(folder)
    return folder


@pytest.mark.parametrize("prompt", ["", " \n", "caf\udce9"], ids=["empty", "blank", "not_UTF-8"])
@pytest.mark.parametrize("command", ["load", "generate"])
def test_a_prompt_that_no_model_can_read_is_a_usage_error(run, no_weight_is_read, command, prompt):
    code, out, err = run(command, "--device", "cpu", "--prompt", prompt)
    assert (code, out) == (2, "")
    assert "the prompt is" in err


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [(None, 5, "cannot be read"), (b"\xff\xfe", 2, "byte 0 is not UTF-8"), (b"", 2, "at least 2 are needed")],
    ids=["missing", "not_UTF-8", "too_short"],
)
@pytest.mark.parametrize("command", ["load", "eval"])
def test_a_text_that_cannot_be_measured_is_found_before_the_load(
    run, no_weight_is_read, tmp_path, command, content, code, message
):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    ended, out, err = run(command, "--device", "cpu", "--text", file)
    assert (ended, out) == (code, "")
    assert message in err


@pytest.mark.parametrize(
    "change",
    [
        lambda f: [file.unlink() for file in f.glob("tokenizer*")],
        lambda f: (f / "tokenizer.json").unlink(),
        lambda f: (f / "tokenizer.json").write_text("{}"),
        lambda f: (f / "tokenizer.json").write_text('{"ver'),
    ],
    ids=["no_file_at_all", "no_tokenizer_json", "not_a_tokenizer", "cut_off"],
)
@pytest.mark.parametrize("command", ["load", "generate"])
def test_a_checkpoint_without_a_tokenizer_is_found_before_the_load(run, no_weight_is_read, tmp_path, command, change):
    model = demo_with(tmp_path, change)
    code, out, err = run(command, model, "--device", "cpu", "--prompt", "hello")
    assert (code, out) == (3, "")
    assert "tokenizer" in err
    assert str(model) in err


@pytest.mark.parametrize("values", [{"num_beams": "x"}, {"repetition_penalty": 0}, {"eos_token_id": "x"}], ids=str)
def test_a_generation_config_that_no_model_can_follow_is_a_checkpoint_error(run, tmp_path, values):
    model = demo_with(tmp_path, lambda f: helpers.edit_json(f / "generation_config.json", lambda c: c.update(values)))
    code, _, err = run("generate", model, "--device", "cpu", "--prompt", "Return the")
    assert code == 3
    assert "cannot generate with the model's generation_config.json" in err


def test_a_generation_config_that_asks_for_another_form_of_answer_changes_nothing(run, tmp_path):
    change = lambda c: c.update(return_dict_in_generate=True)  # noqa: E731
    model = demo_with(tmp_path, lambda f: helpers.edit_json(f / "generation_config.json", change))
    code, out, _ = run("generate", model, "--device", "cpu", "--prompt", "Return the", "--max-new-tokens", "3")
    assert code == 0
    assert out.startswith("Return the")


@pytest.mark.parametrize("options", [["--runtime", "none"], ["--dummy"]], ids=["runtime_none", "dummy"])
@pytest.mark.parametrize("use", [["--prompt", "hello"], ["--text", INT8]], ids=["prompt", "text"])
def test_a_prompt_or_text_without_a_model_to_run_is_a_usage_error_for_the_demo_too(run, options, use):
    code, out, err = run("load", *options, *use)
    assert (code, out) == (2, "")
    assert "--prompt and --text need a model to run" in err


def test_the_demo_loads_without_a_runtime(run):
    code, out, _ = run("load", "--runtime", "none", "--device", "cpu", "--json")
    assert code == 0
    assert json.loads(out)["prompt"] is None


# Standard input and characters


def test_a_closed_standard_input_is_a_usage_error(run, no_weight_is_read, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = run("generate", "--device", "cpu")
    assert code == 2
    assert "standard input is closed" in err


def test_a_line_of_standard_input_that_is_not_text_is_a_usage_error(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    code, _, err = run("generate", "--device", "cpu")
    assert code == 2
    assert "standard input is not utf-8" in err


@pytest.mark.parametrize("name", ["x[", "a[bold]x", "[b]a[/b]", "a[/b]x", ":smile:", b"caf\xe9"], ids=ascii)
def test_a_model_path_is_shown_as_it_is(run, tiny_checkpoint, tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(tiny_checkpoint("olmoe"))
    shown = os.fsdecode(name).replace("\udce9", "\\udce9")
    for command in (["plan"], ["load", "--runtime", "none"]):
        code, out, _ = run(*command, folder, "--device", "cpu")
        assert code == 0
        assert f"{shown} under int8 on cpu" in out


# Reports


def unwritable_state(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))


def test_a_state_folder_that_cannot_be_written_costs_the_report_alone(run, tiny_checkpoint, monkeypatch, tmp_path):
    unwritable_state(monkeypatch, tmp_path)
    load = ["load", tiny_checkpoint("olmoe"), "--runtime", "none", "--device", "cpu"]
    code, out, err = run(*load)
    assert code == 0
    assert "int8 channel" in out
    assert "report  not written" in out
    assert "cannot be written: Not a directory; --report FILE" in err
    code, out, err = run(*load, "--json")
    assert code == 0
    assert json.loads(out)["report"] is None


@pytest.mark.parametrize("name", [".", "file/report.json", "pipe"])
def test_a_report_that_cannot_be_written_is_found_before_the_load(run, no_weight_is_read, tmp_path, name):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    code, out, err = run("load", "--runtime", "none", "--device", "cpu", "--report", tmp_path / name)
    assert (code, out) == (5, "")
    assert "cannot be written" in err


def test_a_report_that_fails_after_the_load_comes_after_the_result(run, tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("moeplug.writing.check_writable", lambda path: None)
    model = tiny_checkpoint("olmoe")
    for json_option in ([], ["--json"]):
        code, out, err = run("load", model, "--runtime", "none", "--device", "cpu", "--report", tmp_path, *json_option)
        assert code == 5
        assert "cannot be written" in err
        assert "int8 channel" in out
        assert not json_option or json.loads(out)["report"] is None


# Plugins and schemes


@pytest.mark.parametrize("command", [["plan"], ["load"], ["generate"], ["eval"], ["schemes", "show", "int8"]])
def test_a_scheme_of_a_blocked_plugin_names_the_plugin(run, command):
    code, out, err = run(*command, "--disable", "int8")
    assert (code, out) == (4, "")
    assert "plugin 'int8' (moeplug-int8 0.1.0) is blocked: --disable names it. scheme 'int8' needs it" in err


def test_a_scheme_of_a_broken_plugin_names_the_plugin(run, monkeypatch):
    plugin = Plugin("theirs", "broken", "plugin.yaml: no", "moeplug-theirs", "1.0", None)
    monkeypatch.setattr(Registry, "discover", classmethod(lambda cls, disable=(): Registry([plugin])))
    code, _, err = run("plan", "--scheme", "theirs")
    assert code == 4
    assert "plugin 'theirs' (moeplug-theirs 1.0) is broken: plugin.yaml: no" in err
    assert run("plan", "--scheme", "others")[0] == 2


@pytest.mark.parametrize("options", [["--trace", "t.json"], ["--observe", "trace"]], ids=["trace", "observe"])
def test_an_official_observer_that_is_not_installed_says_what_to_install(run, monkeypatch, tmp_path, options):
    there = [plugin for plugin in Registry.discover().plugins if plugin.distribution != "moeplug-observers"]
    monkeypatch.setattr(Registry, "discover", classmethod(lambda cls, disable=(): Registry(there)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEPLUG_TRACE", "")  # --trace sets it; so it is as before afterwards
    code, out, err = run("load", "--runtime", "none", "--device", "cpu", *options)
    assert (code, out) == (4, "")
    assert "--observe trace: no plugin 'trace' is installed; installed observers: none. " in err
    assert "`pip install moeplug-observers`" in err


def test_a_bad_scheme_file_does_not_hide_the_others(run, monkeypatch, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("api: 1\nname: bad\nplugin: int8\nweights: {fromat: int8}\n")
    files = Registry.scheme_files
    monkeypatch.setattr(Registry, "scheme_files", lambda self: {"bad": bad} | files(self))
    code, out, err = run("schemes")
    assert code == 0
    assert "int8-g128" in out
    assert "bad" not in out
    assert f"scheme 'bad' is not listed: {bad}:4:11" in err
    code, out, _ = run("schemes", "--json")
    assert json.loads(out)
    code, out, _ = run("schemes", "list", "--json")
    assert "int8" in {scheme["name"] for scheme in json.loads(out)}


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_exit_code_5_is_for_memory(run, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("moeplug.api.execute", fail)
    code, _, err = run("load", "--device", "cpu", "--runtime", "none")
    assert code == 5
    assert "Error: out of memory: " in err
    assert "`moeplug plan` says what a load needs" in err


def test_a_bug_that_speaks_of_memory_is_not_called_out_of_memory(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("cannot allocate memory format; the order ran out of memory formats")

    monkeypatch.setattr("moeplug.api.execute", fail)
    monkeypatch.setattr(sys, "argv", ["moeplug", "load", "-s", "int8", "--device", "cpu", "--runtime", "none"])
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(RuntimeError, match="memory formats"):
        main()
