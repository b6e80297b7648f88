"""The moeplug command. Help, listing and checking import neither torch nor triton."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import click

from moeplug import __version__
from moeplug.errors import (
    CheckpointError,
    InputOutputError,
    MoeplugError,
    UsageError,
    VerificationError,
    is_out_of_memory,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moeplug.api import Loaded
    from moeplug.evaluation import Inputs
    from moeplug.mixed import Sample, Task
    from moeplug.pipeline import Plan
    from moeplug.registry import Registry

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_CODES = """\b
Exit codes:
  0    done
  2    usage, or a scheme that is wrong
  3    the checkpoint is wrong, or verification failed
  4    a plugin is missing, broken or blocked
  5    input/output: not found, permission, disk full, out of memory
  6    refused by --budget or by the scheme's `accept:`
  130  interrupted with Ctrl-C
  141  the reader of the output went away, as in `moeplug plugins | head -1`
  143  ended by SIGTERM
"""


class ClosedPipe(BaseException):
    """The reader of our output went away. No OSError: click would end such a one with exit code 1."""


@contextmanager
def _closed_pipes() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipe from error


class Commands(click.Group):
    """The top group; a pipe that closes while it parses (and prints help) or runs leaves it as ClosedPipe."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the command line."""
        with _closed_pipes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _closed_pipes():
            return super().invoke(ctx)


@click.group(
    cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="moeplug")
def cli() -> None:
    """Load Mixture-of-Experts checkpoints and quantize their experts while reading, under a YAML scheme.

    \b
    moeplug load --scheme int8                       the demo checkpoint
    moeplug plan MODEL --scheme int8                 what would happen, without reading a weight
    moeplug explain MODEL --scheme int8              by whose code, on which kernel, and why not on another
    moeplug load MODEL --scheme schemes/int8.yaml    do it
    moeplug generate MODEL --scheme int8             and talk to it
    moeplug export MODEL --scheme int8 -o DIR        for other runtimes

    MODEL is a local folder with config.json and *.safetensors files.
    """


def plugin_options(command: Command) -> Command:
    """Add the options that choose which plugins may be used."""
    return click.option("--disable", multiple=True, metavar="NAME", help="Block an installed plugin. May be repeated.")(
        command
    )


def source_options(command: Command) -> Command:
    """Add the argument and options that say what is meant: a model, a scheme, a device."""
    decorators = [
        click.argument("model", required=False, type=click.Path(path_type=Path)),
        click.option(
            "--scheme", "-s", metavar="FILE|NAME",
            help="A scheme file (with a / or .yaml), or the name of an installed one: see `moeplug schemes`.",
        ),
        click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N. Default: the first GPU, or the CPU."),
        click.option("--dummy", is_flag=True, help="Generated weights: only MODEL/config.json is needed."),
        click.option(
            "--family", metavar="FILE|NAME",
            help="A family descriptor (with a / or .yaml), or a known family. Default: by config.json's model_type.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output, nothing else."),
        plugin_options,
    ]  # fmt: skip
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def model_options(command: Command) -> Command:
    """Add the argument and options of every command that plans a load."""
    decorators = [
        source_options,
        click.option(
            "--budget", metavar="SIZE", callback=lambda ctx, param, value: None if value is None else parse_size(value),
            help="Refuse, before reading, a load that needs more device memory at its peak: 20GB (10^9), 16GiB (2^30).",
        ),
        click.option(
            "--runtime", type=click.Choice(["transformers", "none"]), default=None,
            help="What to build around the layers. Default: transformers; none with --dummy.",
        ),
    ]  # fmt: skip
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


@cli.command()
@model_options
@click.option("--prompt", metavar="TEXT", help="Generate after the load.")
@click.option("--max-new-tokens", default=48, show_default=True, type=click.IntRange(1), help="How much to generate.")
@click.option("--text", type=click.Path(path_type=Path), help="Measure perplexity on this file too, as `eval` does.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="Where to write the report. Default: your state folder."
)
@click.option("--observe", multiple=True, metavar="NAME", help="Let an observer plugin watch the stages.")
@click.option("--timings", is_flag=True, help="Say where the time went, and what bounded it.")
@click.option("--exact-error", is_flag=True, help="Measure errors over all rows; else a sample of large weights.")
@click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write a Chrome trace, for ui.perfetto.dev: --observe trace with MOEPLUG_TRACE=FILE.",
)
def load(
    model: Path | None, scheme: str | None, device: str | None, budget: int | None, dummy: bool, runtime: str | None,
    family: str | None, as_json: bool, disable: tuple[str, ...], prompt: str | None, max_new_tokens: int,
    text: Path | None, report: Path | None, observe: tuple[str, ...], timings: bool, exact_error: bool,
    trace: Path | None,
) -> None:  # fmt: skip
    """Load MODEL, quantizing its experts while reading, and say what was done.

    Without MODEL the demo checkpoint is loaded: a small trained Qwen3-MoE that comes with moeplug. A report with
    everything that was done, and from what, is written as JSON.
    """
    from moeplug import api, terminal

    registry = _registry(disable)
    built = _runtime(runtime, dummy)
    if built is None and (prompt is not None or text is not None):
        raise UsageError("--prompt and --text need a model to run: use --runtime transformers, without --dummy")
    if model is None:
        what = "dummy weights in the shape of the demo checkpoint" if dummy else "the demo checkpoint"
        terminal.note(f"no MODEL was given: loading {what} ({api.demo_checkpoint()})")
        if built is not None:
            prompt = terminal.DEMO_PROMPT if prompt is None else prompt
            text = text or api.demo_checkpoint().parent / "heldout.txt"
    plan = api.plan(
        model, scheme, device=device, runtime=built, budget=budget, dummy=dummy, family=family, registry=registry
    )
    if trace is not None:
        terminal.check_writable(trace)
        os.environ["MOEPLUG_TRACE"] = str(trace)
    for name in (*observe, *["trace"] * (trace is not None)):
        registry.observe(name)
    inputs = None if prompt is None and text is None else _inputs(plan, prompt, text)
    if report is not None:
        terminal.check_writable(report)
    loaded = _execute(plan, registry, built, "loading", exact_error)
    generated = None if inputs is None else _use(loaded, inputs, max_new_tokens)
    unwritten = terminal.write_report(loaded.report, report or terminal.default_report_path(plan))
    if as_json:
        terminal.print_json(loaded.report.as_dict() | {"prompt": prompt, "generated": generated})
    else:
        terminal.print_report(loaded.report, prompt, generated, timings)
    if unwritten is not None and report is not None:
        raise unwritten
    if unwritten is not None:
        terminal.note(f"{unwritten}; --report FILE says where else")


@cli.command()
@model_options
@click.option("--prompt", metavar="TEXT", help="Answer one prompt and end, instead of asking.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="How much to generate.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: the likeliest token.")
def generate(
    model: Path | None, scheme: str | None, device: str | None, budget: int | None, dummy: bool, runtime: str | None,
    family: str | None, as_json: bool, disable: tuple[str, ...], prompt: str | None, max_new_tokens: int,
    temperature: float,
) -> None:  # fmt: skip
    """Load MODEL and continue text: asks for prompts until Ctrl-D, or reads one per line from a pipe."""
    from moeplug import api, evaluation, terminal

    if dummy or runtime == "none":
        raise UsageError("generate needs a whole model: without --dummy, with --runtime transformers")
    if prompt is None and sys.stdin is None:
        raise UsageError("standard input is closed, and no prompt can come from it: use --prompt")
    registry = _registry(disable)
    plan = api.plan(
        model, scheme, device=device, runtime="transformers", budget=budget, family=family, registry=registry
    )
    tokenizer = _inputs(plan, prompt, None).tokenizer
    loaded = _execute(plan, registry, "transformers", "loading")
    for line in [prompt] if prompt is not None else terminal.prompts():
        streamer = None if as_json else terminal.streamer(tokenizer)
        if streamer is not None:
            click.echo(line if prompt is not None or not sys.stdin.isatty() else "", nl=False)
        text = evaluation.generate(loaded.model, tokenizer, line, max_new_tokens, temperature, streamer)
        if as_json:
            click.echo(json.dumps({"prompt": line, "generated": text}))


@cli.command()
@model_options
def plan(
    model: Path | None, scheme: str | None, device: str | None, budget: int | None, dummy: bool, runtime: str | None,
    family: str | None, as_json: bool, disable: tuple[str, ...],
) -> None:  # fmt: skip
    """Say everything that `load` would do, from headers alone: layers, bytes, peak, kernels and why not others.

    For a model type that is not known it drafts a family descriptor on standard output, and refuses.
    """
    from moeplug import api, terminal
    from moeplug.checkpoint.family import UnknownModelType

    registry = _registry(disable)
    if model is None:
        terminal.note(f"no MODEL was given: planning the demo checkpoint ({api.demo_checkpoint()})")
    built = _runtime(runtime, dummy)
    try:
        planned = api.plan(
            model, scheme, device=device, runtime=built, budget=budget, dummy=dummy, family=family, registry=registry
        )
    except UnknownModelType as error:
        _draft_family(model, error)
    if as_json:
        terminal.print_json(planned.as_dict())
    else:
        terminal.print_plan(planned)


@cli.command("export")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--scheme", "-s", metavar="FILE|NAME", help="As for `load`.")
@click.option(
    "--output",
    "-o",
    "target",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder to make. It is there whole or not at all, and nothing is ever overwritten.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["compressed-tensors", "fp8", "moeplug"]),
    default="compressed-tensors",
    show_default=True,
    help="fp8: in blocks of 128 x 128, as DeepSeek's. moeplug: any scheme, in the layout of this device's kernels.",
)
@click.option("--resume", is_flag=True, help="Continue an export that was interrupted, after its last finished file.")
@click.option("--device", metavar="DEVICE", help="Where to quantize: cpu, cuda or cuda:N. Default: the first GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output, nothing else.")
@plugin_options
def export_(
    model: Path | None, scheme: str | None, target: Path, form: str, resume: bool, device: str | None, as_json: bool,
    disable: tuple[str, ...],
) -> None:  # fmt: skip
    """Quantize MODEL's experts into a new folder, and say which runtimes read it."""
    from moeplug import api, terminal

    registry = _registry(disable)
    if model is None:
        terminal.note(f"no MODEL was given: exporting the demo checkpoint ({api.demo_checkpoint()})")
    with terminal.progress_bar("exporting") as progress:
        exported = api.export(
            model, scheme, target, form, device=device, resume=resume, progress=progress, registry=registry
        )
    if as_json:
        terminal.print_json(exported.as_dict())
    else:
        terminal.print_exported(exported, model or api.demo_checkpoint())


@cli.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", type=click.Path(path_type=Path), help="Quantize it again and compare.")
@click.option("--device", metavar="DEVICE", help="Where to quantize again. Default: cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output, nothing else.")
@plugin_options
def verify_(folder: Path, against: Path | None, device: str | None, as_json: bool, disable: tuple[str, ...]) -> None:
    """Read an export again: every file by its sha256, and with --against every tensor and error. Exit code 3 if not."""
    from moeplug import api, terminal, verifying

    registry, found = _registry(disable), api.find_device(device or "cpu")
    with terminal.progress_bar("verifying") as progress:
        verified = verifying.verify(folder, against, registry=registry, device=found, progress=progress)
    if as_json:
        terminal.print_json(verified.as_dict())
    else:
        terminal.print_verified(verified)


@cli.command()
@source_options
@click.option("--observe", multiple=True, metavar="NAME", help="Show an observer plugin among the wrappers.")
def explain(
    model: Path | None, scheme: str | None, device: str | None, dummy: bool, family: str | None, as_json: bool,
    disable: tuple[str, ...], observe: tuple[str, ...],
) -> None:  # fmt: skip
    """Say who answers each stage, which kernel each layer gets and why not another, and what other GPUs would get.

    \b
    moeplug explain --scheme int8                    for the demo checkpoint
    moeplug explain MODEL --scheme fp8 --device cpu  from headers and config.json: no weight is read
    moeplug explain MODEL --scheme fp8 --dummy       from MODEL/config.json alone

    A stage is answered by the plugin that the scheme names; by moeplug's own default where the plugin has no function
    for it, or its function returns None. Kernels are asked in order, the plugin's own first, and the first without a
    reason against it is chosen. Other devices are judged by their compute capability alone: none has to be here.
    """
    from moeplug import api, terminal

    registry = _registry(disable)
    if model is None:
        terminal.note(f"no MODEL was given: explaining for the demo checkpoint ({api.demo_checkpoint()})")
    explanation = api.explain(
        model, scheme, device=device, dummy=dummy, family=family, observe=observe, registry=registry
    ).as_dict()
    if as_json:
        terminal.print_json(explanation)
    else:
        terminal.print_explanation(explanation)


def _draft_family(model: Path | None, error: MoeplugError) -> NoReturn:
    """Print a draft of the descriptor that is missing, and stop as the error would have."""
    from moeplug.checkpoint.guess import draft
    from moeplug.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(model or Path())
    text = draft(checkpoint.config, checkpoint.tensors)
    if text is None:
        raise CheckpointError(f"{error}. No tensor of this checkpoint looks like an expert's, so nothing is drafted")
    click.echo(text, nl=False)
    raise CheckpointError(
        f"{error}. A draft is on standard output. It is unproven: write it to a file, prove it with "
        "`moeplug family-check MODEL_TYPE --family FILE` if transformers has the model type, then use --family FILE"
    )


@cli.command("eval")
@model_options
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text file. Default with the demo: its own.")
@click.option("--max-tokens", type=click.IntRange(2), help="Use only the first tokens of the text.")
@click.option(
    "--lm-eval",
    "tasks",
    multiple=True,
    metavar="TASK",
    help="Run a task of the lm-evaluation-harness instead: its YAML file, or a name. May be repeated.",
)
@click.option("--limit", type=click.IntRange(1), help="Use only so many examples of each task.")
def evaluate(
    model: Path | None, scheme: str | None, device: str | None, budget: int | None, dummy: bool, runtime: str | None,
    family: str | None, as_json: bool, disable: tuple[str, ...], text: Path | None, max_tokens: int | None,
    tasks: tuple[str, ...], limit: int | None,
) -> None:  # fmt: skip
    """Measure perplexity of MODEL unquantized and under the scheme, their ratio, and top-1 agreement.

    With --lm-eval: the scores of tasks of EleutherAI's lm-evaluation-harness, unquantized and under the scheme.
    """
    from moeplug import api, terminal

    if dummy or runtime == "none":
        raise UsageError("eval needs a whole model: without --dummy, with --runtime transformers")
    if tasks and (text is not None or max_tokens is not None):
        raise UsageError("--text and --max-tokens measure perplexity, --lm-eval runs tasks; give one or the other")
    if limit is not None and not tasks:
        raise UsageError("--limit is for the tasks of --lm-eval; --max-tokens shortens a text")
    if tasks:
        planned, result = _run_tasks(model, scheme, device, budget, family, tasks, limit, _registry(disable))
        if as_json:
            terminal.print_json({"scheme": planned.scheme.name, **result})
        else:
            terminal.print_task_scores(planned.scheme.name, result)
        return
    if text is None:
        if model is not None:
            raise UsageError("eval needs --text FILE: the text to predict")
        terminal.note(f"no MODEL was given: measuring the demo checkpoint ({api.demo_checkpoint()})")
        text = api.demo_checkpoint().parent / "heldout.txt"
    registry = _registry(disable)
    planned = api.plan(
        model, scheme, device=device, runtime="transformers", budget=budget, family=family, registry=registry
    )
    inputs = _inputs(planned, None, text, max_tokens)
    loaded = _execute(planned, registry, "transformers", "loading")
    result = _evaluate(loaded, inputs)
    if as_json:
        terminal.print_json({"scheme": planned.scheme.name, **result})
    else:
        terminal.print_evaluation(planned.scheme.name, result)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_options
def plugins(as_json: bool, disable: tuple[str, ...]) -> None:
    """List installed plugins: state, reason, distribution, version, path, capabilities. Imports none of them."""
    from moeplug import terminal
    from moeplug.registry import Registry

    registry = Registry.discover(disable=disable)
    if as_json:
        terminal.print_json([plugin.as_dict() for plugin in registry.plugins])
    else:
        terminal.print_plugins(registry)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_options
def families(as_json: bool, disable: tuple[str, ...]) -> None:
    """List known model families: name, model types, who ships the descriptor. Imports no plugin."""
    from moeplug import terminal

    found = sorted(_registry(disable).families(), key=lambda family: family.name)
    if as_json:
        terminal.print_json(
            [{"name": f.name, "model_types": f.model_types, "origin": f.origin, "path": str(f.source)} for f in found]
        )
    else:
        terminal.print_families(found)


@cli.command("family-check")
@click.argument("model_type")
@click.option("--family", metavar="FILE|NAME", help="The descriptor to prove. Default: the one that serves MODEL_TYPE.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_options
def family_check(model_type: str, family: str | None, as_json: bool, disable: tuple[str, ...]) -> None:
    """Prove a family descriptor by numbers: MODEL_TYPE's tiny random model, by transformers and by moeplug.

    Where they differ, changes of the descriptor are tried, and one that makes them agree is named.
    """
    from tempfile import TemporaryDirectory

    from moeplug import terminal
    from moeplug.integrations.family_check import prove

    registry = _registry(disable)
    serving = [f for f in registry.families() if model_type in f.model_types]
    if family is None and len(serving) != 1:
        found = "no family" if not serving else " and ".join(str(f.source) for f in serving)
        raise UsageError(f"{found} serves model type {model_type!r}; name one with --family: see `moeplug families`")
    chosen = serving[0] if family is None else registry.family(family)
    with TemporaryDirectory() as folder:
        proof = prove(chosen, model_type, Path(folder))
    if as_json:
        terminal.print_json(proof.as_dict())
    else:
        click.echo(proof.describe())
    if not proof.holds:
        raise VerificationError(f"{chosen.source}: the descriptor is not proven for {model_type}")


@cli.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_options
@click.pass_context
def schemes(ctx: click.Context, as_json: bool, disable: tuple[str, ...]) -> None:
    """List installed schemes, or show one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(schemes_list, as_json=as_json, disable=disable)


@schemes.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_options
def schemes_list(as_json: bool = False, disable: tuple[str, ...] = ()) -> None:
    """List the schemes of installed plugins. One that is wrong is a note on standard error, beside the others."""
    from moeplug import terminal
    from moeplug.scheme import find_scheme

    files, rows = _registry(disable).scheme_files(), []
    for name, path in files.items():
        try:
            rows.append((find_scheme(name, files), path))
        except MoeplugError as error:
            terminal.note(f"scheme '{name}' is not listed: {error}")
    if as_json:
        terminal.print_json(
            [{"name": s.name, "plugin": s.plugin, "description": s.description, "path": str(p)} for s, p in rows]
        )
    else:
        terminal.print_schemes(rows)


@schemes.command("show")
@click.argument("name")
@plugin_options
def schemes_show(name: str, disable: tuple[str, ...]) -> None:
    """Print a scheme with the schemes it `extends:` merged in. A field that is left out has its default."""
    click.echo(_registry(disable).scheme(name).to_yaml(), nl=False)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--as", "kind", type=click.Choice(["scheme", "plugin", "family"]), help="What the files are. Default: look inside."
)
@plugin_options
def check(files: tuple[Path, ...], kind: str | None, disable: tuple[str, ...]) -> None:
    """Check scheme, plugin.yaml or family FILES and report every problem with its line. Imports no plugin."""
    from moeplug.checking import check_file

    registry = _registry(disable)
    failed: MoeplugError | None = None
    for file in files:
        try:
            click.echo(f"{file}: {check_file(file, kind, registry)}")
        except MoeplugError as error:
            click.echo(f"Error: {error}", err=True)
            failed = failed or error
    if failed is not None:
        sys.exit(failed.exit_code)


@cli.command()
@click.argument("kind", type=click.Choice(["scheme", "plugin"]))
def schema(kind: Literal["scheme", "plugin"]) -> None:
    """Print the JSON Schema of schemes or of plugin.yaml, for editors and other tools."""
    from moeplug.schema import generate as generate_schema

    click.echo(json.dumps(generate_schema(kind), indent=2))


@cli.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "--budget",
    metavar="SIZE",
    required=True,
    callback=lambda ctx, param, value: parse_size(value),
    help="The most device memory that loading the result may need at its peak, as --budget of `plan` and `load`: 12GB "
    "(10^9), 12GiB (2^30). Weights outside the experts count unless --runtime none.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The scheme file to write.")
@click.option(
    "--candidates",
    metavar="NAME,...",
    help="Installed schemes or scheme files to choose from, and none for unquantized. Default: none, and every "
    "installed scheme that fits and leaves activations in 16 bits.",
)
@click.option(
    "--per",
    type=click.Choice(["layer", "expert", "projection"]),
    default="expert",
    show_default=True,
    help="Choose for whole layers, for each expert, or for each expert's gate_up and down. Finer is more accurate; "
    "each way of storing that a layer mixes is one more kernel call.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="A UTF-8 text like those the model will meet. Default with the demo: its own.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    default=4096,
    show_default=True,
    help="Use only the first tokens of the text. Each takes hidden size x 2 bytes a layer on the host.",
)
@click.option(
    "--run-as",
    metavar="FILE|NAME",
    default="none",
    show_default=True,
    help="How the model runs on the text: unquantized, or under a scheme where that does not fit, such as int8.",
)
@click.option("--data-free", is_flag=True, help="Judge by the weights alone: no text, and the model is not run.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N. Default: the first GPU, or the CPU.")
@click.option(
    "--runtime",
    type=click.Choice(["transformers", "none"]),
    default="transformers",
    show_default=True,
    help="What the result will be loaded with: what the budget counts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output, nothing else.")
@plugin_options
def tune(
    model: Path | None, budget: int, out: Path, candidates: str | None, per: Literal["layer", "expert", "projection"],
    text: Path | None, max_tokens: int, run_as: str, data_free: bool, device: str | None, runtime: str, as_json: bool,
    disable: tuple[str, ...],
) -> None:  # fmt: skip
    """Choose how each expert is stored so that MODEL fits a budget with the least error, and write the scheme.

    \b
    moeplug tune MODEL --budget 12GB --text FILE -o my.yaml
    moeplug tune MODEL --budget 12GB --text FILE -o my.yaml --candidates int8,int8-g32,none --per layer
    moeplug tune MODEL --budget 12GB --data-free -o my.yaml
    moeplug load MODEL --scheme ./my.yaml --budget 12GB

    The model reads the text, and what its experts are given is kept. Then the checkpoint is read once more, one expert
    at a time: each candidate quantizes it, and the error of its output on its own tokens, weighted by the router, is
    measured. A solver finds the choice with the least sum of errors within the budget. A budget that no choice fits is
    refused (exit code 6) before anything is read.

    This chooses numbers for weights. `moeplug tune-kernels` chooses tilings for a GPU, and changes no result.
    """
    from moeplug import api, mixed, terminal

    if data_free and text is not None:
        raise UsageError("--data-free uses no text: leave out --data-free or --text")
    if model is None:
        terminal.note(f"no MODEL was given: tuning for the demo checkpoint ({api.demo_checkpoint()})")
        text = text if text or data_free else api.demo_checkpoint().parent / "heldout.txt"
    if text is None and not data_free:
        raise UsageError("tune needs --text FILE, what the model reads while it is measured; or --data-free")
    mixed.require_solver()
    registry = _registry(disable)
    wanted = None if candidates is None else mixed.find_candidates(candidates.split(","), registry)
    task = mixed.Task.open(
        model, wanted or mixed.default_candidates(registry), registry=registry, per=per, device=device,
        with_dense=runtime == "transformers", left_out=terminal.note if wanted is None else None,
    )  # fmt: skip
    task.require_possible(budget)
    terminal.check_writable(out)
    samples = None
    if text is not None:
        ids = _inputs(task.any_plan, None, text, max_tokens).ids
        assert ids is not None
        samples = _capture(task, run_as, ids)
    with terminal.progress_bar("measuring experts") as progress:
        errors = mixed.measure(task, samples, progress)
    choice = mixed.choose(task, errors, budget)
    choice.write(out, text)
    if as_json:
        terminal.print_json(choice.as_dict() | {"scheme": str(out)})
    else:
        terminal.print_choice(choice, out)


def _capture(task: Task, run_as: str, ids: Tensor) -> dict[int, Sample]:
    """Return what each layer's experts are given on a text; the model is gone afterwards."""
    from moeplug import api, mixed, terminal

    scheme = mixed.unquantized().scheme if run_as == mixed.NONE else run_as
    with terminal.progress_bar(f"loading, {run_as}") as progress:
        loaded = api.load(
            task.checkpoint.path, scheme, device=task.device, runtime="transformers", progress=progress,
            registry=task.registry,
        )  # fmt: skip
    with terminal.progress_bar("reading the text", unit="tokens") as progress:
        return mixed.capture(loaded, ids, progress)


@cli.command("new-plugin")
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=Path(),
    help="The folder in which moeplug-NAME is made. Default: this one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the folder, its files and the next commands as JSON.")
def new_plugin(name: str, into: Path, as_json: bool) -> None:
    """Write a plugin to start from: a distribution moeplug-NAME that installs, loads and passes its tests.

    \b
    moeplug new-plugin mine
    cd moeplug-mine
    pip install -e ".[test]"
    moeplug load --scheme mine
    pytest

    It has a pyproject.toml with the entry point, plugin.yaml, hooks.py with a number format, a scheme, the conformance
    tests and a CI file. NAME is what schemes will say under `plugin:`: a-z, 0-9 and '-'. Nothing is overwritten.
    """
    from moeplug.registry import Registry
    from moeplug.scaffold import new_plugin as write

    registry = Registry.discover()
    formats = [fmt for manifest in registry.manifests().values() for fmt in manifest.formats]
    files = write(name, into, {*(plugin.name for plugin in registry.plugins), *formats, *registry.scheme_files()})
    folder = into / f"moeplug-{name}"
    commands = [f"cd {shlex.quote(str(folder))}", 'pip install -e ".[test]"', f"moeplug load --scheme {name}", "pytest"]
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "files": [str(f) for f in files], "next": commands}, indent=2))
        return
    for file in files:
        click.echo(file)
    click.echo("\nNext:\n" + "\n".join(f"  {command}" for command in commands))


@cli.command("tune-kernels")
@click.option(
    "--scheme",
    "-s",
    metavar="FILE|NAME",
    required=True,
    help="What the kernels multiply: a scheme file (with a / or .yaml), or an installed scheme's name.",
)
@click.option(
    "--model", type=click.Path(path_type=Path), help="Take the sizes of this model's layers: config.json only."
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="E,H,I,T",
    help="Experts, hidden size, intermediate size, experts per token: 128,2048,768,8. May be repeated.",
)
@click.option("--m", "tokens", metavar="M,...", help="Numbers of tokens. Default: the powers of two from 1 to 8192.")
@click.option("--device", metavar="DEVICE", help="cuda or cuda:N. Default: the first GPU.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Which table to write. Default: your cache folder's, which is used."
)
@click.option("--dry-run", is_flag=True, help="Say what would be measured and written; needs no GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON on standard output, nothing else.")
@plugin_options
def tune_kernels(
    scheme: str, model: Path | None, shapes: tuple[str, ...], tokens: str | None, device: str | None, out: Path | None,
    dry_run: bool, as_json: bool, disable: tuple[str, ...],
) -> None:  # fmt: skip
    """Measure the Triton kernel's tiles on this GPU for a model's sizes, and keep the fastest.

    It changes speed alone; `moeplug tune` chooses how experts are stored.

    \b
    moeplug tune-kernels --scheme int8 --model MODEL               for a model
    moeplug tune-kernels --scheme int8 --shape 128,2048,768,8      for sizes
    moeplug tune-kernels --scheme int8 --model MODEL --m 1,8,64    for these numbers of tokens alone

    At most a dozen tilings for each number of tokens are compiled and timed, on random weights and tokens; Ctrl-C keeps
    what is done. The table is JSON. Sizes that no table has are served by rules, so this is never needed for a right
    result, only for the last few percent.
    """
    from moeplug.kernels import tuned, tuning

    registry = _registry(disable)
    wanted = _shapes(model, shapes, registry)
    counts = _numbers("--m", tokens) if tokens is not None else tuple(2**i for i in range(14))
    if dry_run:
        registry.scheme(scheme)  # what would be refused is refused
        for shape in wanted:
            click.echo("E={} H={} I={} T={}: M = {}".format(*shape, ", ".join(map(str, counts))))
        where = out or tuned.cache_folder() / "GPU-NAME.json"
        click.echo(
            f"{len(wanted) * len(counts)} cells, at most {tuning.MOST_CANDIDATES + 1} timings each, into {where}"
        )
        return
    _tune(scheme, wanted, counts, device, out, as_json, registry)


def _tune(
    scheme: str, shapes: Sequence[tuple[int, ...]], counts: tuple[int, ...], device: str | None, out: Path | None,
    as_json: bool, registry: Registry,
) -> None:  # fmt: skip
    """Measure, writing the table after each cell."""
    from moeplug import api, terminal
    from moeplug.pipeline.setup_kernel import device_of

    resolved, found = api.resolve_scheme(scheme, registry), api.find_device(device)
    if found.type != "cuda":
        raise UsageError("tune-kernels measures on a GPU, and this torch sees none; --dry-run says what it would do")
    from moeplug.kernels import tune

    command = " ".join(["moeplug", *sys.argv[1:]])
    session = tune.Session.open(out, device_of(found), command)
    total, done = len(shapes) * len(counts), 0
    with terminal.progress_bar("tuning", unit="cells") as progress:
        progress(done, total)
        for E, H, I, T in shapes:
            w13, w2 = tune.random_weights(E, H, I, found)
            layer = api.quantize_experts(w13, w2, resolved, experts_per_token=T, registry=registry)
            del w13, w2
            for M in counts:
                for result in tune.tune_layer(layer, T, M):
                    session.add(result)
                    terminal.note(result.describe())
                done += 1
                progress(done, total)
    if as_json:
        terminal.print_json(session.as_dict())
    else:
        click.echo(f"{len(session.cells)} cells in {session.run['seconds']} s: {session.path}")


def _shapes(model: Path | None, shapes: tuple[str, ...], registry: Registry) -> list[tuple[int, ...]]:
    """Return the distinct (E, H, I, T) that are asked for."""
    found = [_numbers("--shape", shape, 4) for shape in shapes]
    if any(T > E for E, _, _, T in found):
        raise UsageError("--shape E,H,I,T: T experts for each token of E experts in all, so T is at most E")
    if model is not None:
        from moeplug.checkpoint.family import find_family
        from moeplug.checkpoint.reader import read_config

        config = read_config(model)
        found += [
            (layer.num_experts, layer.hidden_size, layer.intermediate_size, layer.experts_per_token)
            for layer in find_family(config, registry.families()).layers(config)
        ]
    if not found:
        raise UsageError("tune-kernels needs sizes: --model MODEL, or --shape E,H,I,T, for example 128,2048,768,8")
    return list(dict.fromkeys(found))


def _numbers(option: str, text: str, count: int | None = None) -> tuple[int, ...]:
    """Return positive integers of "1,8,64"."""
    parts = text.split(",")
    right = all(re.fullmatch(r" *[0-9]{1,7} *", part, re.ASCII) and int(part) > 0 for part in parts)
    if right and (count is None or count == len(parts)):
        return tuple(map(int, parts)) if count else tuple(dict.fromkeys(map(int, parts)))
    expected = "four, for example 128,2048,768,8" if count else "for example 1,8,64"
    raise UsageError(f"{option} {text!r}: expected positive integers, {expected}")


def parse_size(text: str) -> int:
    """Return bytes of "20GB" (10**9), "16GiB" (2**30), "512MB", "4096"."""
    # ASCII: re.IGNORECASE would take the Kelvin sign for a k, and \d any script's digits
    pattern = r"([0-9]{1,30}(?:\.[0-9]{1,30})?) *(?:B|([KMGT])(I?)B)?"
    match = re.fullmatch(pattern, text.strip(), re.ASCII | re.IGNORECASE)
    if match is not None:
        number, letter, binary = match.groups(default="")
        size = int(Fraction(number) * (1024 if binary else 1000) ** " KMGT".index(letter.upper() or " "))
        if size > 0:
            return size
    raise UsageError(
        f"--budget {text!r} is not a size; write for example 20GB (10^9 bytes) or 16GiB (2^30); "
        "units: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
    )


def _registry(disable: tuple[str, ...]) -> Registry:
    from moeplug.registry import Registry, warn_about_unusable

    registry = Registry.discover(disable=disable)
    warn_about_unusable(registry)
    return registry


def _runtime(name: str | None, dummy: bool) -> Any:
    if dummy and name == "transformers":
        raise UsageError("--dummy makes experts alone: use --runtime none, or leave it out")
    return None if dummy or name == "none" else "transformers"


def _execute(plan: Plan, registry: Registry, runtime: Any, label: str, exact_error: bool = False) -> Loaded:
    from moeplug import api, terminal

    for line in plan.checkpoint.notes:
        terminal.note(line)
    with terminal.progress_bar(label) as progress:
        return api.execute(plan, registry, runtime=runtime, progress=progress, exact_error=exact_error)


def _inputs(plan: Plan, prompt: str | None, text: Path | None, max_tokens: int | None = None) -> Inputs:
    from moeplug.evaluation import read_inputs

    return read_inputs(plan.checkpoint.path, prompt, text, max_tokens)


def _use(loaded: Loaded, inputs: Inputs, max_new_tokens: int) -> str | None:
    """Generate and measure with a loaded model; the measurement goes into its report."""
    from moeplug import evaluation

    generated = None
    if inputs.prompt is not None:
        generated = evaluation.generate(loaded.model, inputs.tokenizer, inputs.prompt, max_new_tokens)
    if inputs.ids is not None:
        loaded.report.evaluation = _evaluate(loaded, inputs)
    return generated


def _evaluate(loaded: Loaded, inputs: Inputs) -> dict[str, Any]:
    from moeplug import evaluation, terminal
    from moeplug.integrations.transformers import reference_model

    plan = loaded.report.plan
    assert inputs.ids is not None
    with terminal.progress_bar(f"perplexity, {plan.scheme.name}", unit="tokens") as progress:
        scheme = evaluation.score_text(loaded.model, inputs.ids, progress)
    reference = reference_model(plan.checkpoint.path, plan.device)
    with terminal.progress_bar("perplexity, unquantized", unit="tokens") as progress:
        score = evaluation.score_text(reference, inputs.ids, progress)
    return {"text": str(inputs.text), **evaluation.compare(score, scheme)}


def _run_tasks(
    model: Path | None, scheme: str | None, device: str | None, budget: int | None, family: str | None,
    tasks: tuple[str, ...], limit: int | None, registry: Registry,
) -> tuple[Plan, dict[str, Any]]:  # fmt: skip
    """Return the plan and {"scheme_scores", "reference_scores"} of the harness's tasks."""
    from moeplug import api, evaluation
    from moeplug.integrations import lm_eval
    from moeplug.integrations.transformers import reference_model

    found = lm_eval.Tasks(tasks)
    plan = api.plan(
        model, scheme, device=device, runtime="transformers", budget=budget, family=family, registry=registry
    )
    tokenizer = evaluation.load_tokenizer(plan.checkpoint.path)
    loaded = _execute(plan, registry, "transformers", "loading")
    scores = found.scores(loaded.model, tokenizer, limit)
    reference = found.scores(reference_model(plan.checkpoint.path, plan.device), tokenizer, limit)
    return plan, {"scheme_scores": scores, "reference_scores": reference}


class Terminated(BaseException):
    """SIGTERM came."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def main() -> NoReturn:
    """Run the command line; every foreseen failure is one message on stderr and an exit code, never a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it was closed
            stream.reconfigure(errors="backslashreplace")  # paths and plugins' texts may hold any character
    try:
        with _closed_pipes():
            _run()
    except ClosedPipe:  # end as quietly as other tools do
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # Python flushes both at its end, and would complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(141)


def _run() -> NoReturn:
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except MoeplugError as error:
        _stop(str(error), error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _stop("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Terminated:
        _stop("ended by SIGTERM", 143)
    except BrokenPipeError:
        raise
    except OSError as error:
        _stop(f"{error.filename or 'input/output'}: {error.strerror or error}", InputOutputError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["no room for a Python object"])[0]
        _stop(f"out of memory: {reason}; `moeplug plan` says what a load needs", 5)


def _stop(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    if code > 128:  # by a signal: torch's objects are not looked through once more, 1.8 s of 2 (0.3 without)
        gc.freeze()
    sys.exit(code)
