"""The moeplug command. Help, listing and checking import neither torch nor triton."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import click

from moeplug import __version__
from moeplug.errors import InputOutputError, MoeplugError, UsageError

if TYPE_CHECKING:
    from moeplug.api import Loaded
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
  143  ended by SIGTERM
"""


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="moeplug")
def cli() -> None:
    """Load Mixture-of-Experts checkpoints and quantize their experts while reading, under a YAML scheme.

    \b
    moeplug load                                     the demo checkpoint, in int8
    moeplug plan MODEL --scheme int8                 what would happen, without reading a weight
    moeplug load MODEL --scheme schemes/int8.yaml    do it
    moeplug generate MODEL --scheme int8             and talk to it

    MODEL is a local folder with config.json and *.safetensors files.
    """


def plugin_options(command: Command) -> Command:
    """Add the options that choose which plugins may be used."""
    return click.option("--disable", multiple=True, metavar="NAME", help="Block an installed plugin. May be repeated.")(
        command
    )


def model_options(command: Command) -> Command:
    """Add the argument and options of every command that plans a load."""
    decorators = [
        click.argument("model", required=False, type=click.Path(path_type=Path)),
        click.option(
            "--scheme", "-s", default="int8", show_default=True, metavar="FILE|NAME",
            help="A scheme file (with a / or .yaml), or the name of an installed one: see `moeplug schemes`.",
        ),
        click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N. Default: the first GPU, or the CPU."),
        click.option(
            "--budget", metavar="SIZE", callback=lambda ctx, param, value: None if value is None else parse_size(value),
            help="Refuse, before reading, a load that needs more device memory at its peak: 20GB (10^9), 16GiB (2^30).",
        ),
        click.option("--dummy", is_flag=True, help="Generated weights: only MODEL/config.json is needed."),
        click.option(
            "--runtime", type=click.Choice(["transformers", "none"]), default=None,
            help="What to build around the layers. Default: transformers; none with --dummy.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output, nothing else."),
        plugin_options,
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
def load(
    model: Path | None, scheme: str, device: str | None, budget: int | None, dummy: bool, runtime: str | None,
    as_json: bool, disable: tuple[str, ...], prompt: str | None, max_new_tokens: int, text: Path | None,
    report: Path | None, observe: tuple[str, ...],
) -> None:  # fmt: skip
    """Load MODEL, quantizing its experts while reading, and say what was done.

    Without MODEL the demo checkpoint is loaded: a small trained Qwen3-MoE that comes with moeplug. A report with
    everything that was done, and from what, is written as JSON.
    """
    from moeplug import api, terminal

    registry = _registry(disable)
    demo = model is None and not dummy
    if model is None:
        what = "dummy weights in the shape of the demo checkpoint" if dummy else "the demo checkpoint"
        terminal.note(f"no MODEL was given: loading {what} ({api.demo_checkpoint()})")
    if demo:
        prompt, text = prompt or terminal.DEMO_PROMPT, text or api.demo_checkpoint().parent / "heldout.txt"
    built = _runtime(runtime, dummy)
    if built is None and not demo and (prompt or text):
        raise UsageError("--prompt and --text need a model to run: use --runtime transformers, without --dummy")
    plan = api.plan(model, scheme, device=device, runtime=built, budget=budget, dummy=dummy, registry=registry)
    for name in observe:
        registry.observe(name)
    loaded = _execute(plan, registry, built, "loading")
    generated = None
    if built is not None and (prompt or text):
        generated = _use(loaded, prompt, max_new_tokens, text)
    loaded.report.write(report or terminal.default_report_path(plan))
    if as_json:
        terminal.print_json(loaded.report.as_dict() | {"prompt": prompt, "generated": generated})
    else:
        terminal.print_report(loaded.report, prompt, generated)


@cli.command()
@model_options
@click.option("--prompt", metavar="TEXT", help="Answer one prompt and end, instead of asking.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="How much to generate.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: the likeliest token.")
def generate(
    model: Path | None, scheme: str, device: str | None, budget: int | None, dummy: bool, runtime: str | None,
    as_json: bool, disable: tuple[str, ...], prompt: str | None, max_new_tokens: int, temperature: float,
) -> None:  # fmt: skip
    """Load MODEL and continue text: asks for prompts until Ctrl-D, or reads one per line from a pipe."""
    from moeplug import api, evaluation, terminal

    if dummy or runtime == "none":
        raise UsageError("generate needs a whole model: without --dummy, with --runtime transformers")
    registry = _registry(disable)
    plan = api.plan(model, scheme, device=device, runtime="transformers", budget=budget, registry=registry)
    loaded = _execute(plan, registry, "transformers", "loading")
    tokenizer = _tokenizer(plan)
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
    model: Path | None, scheme: str, device: str | None, budget: int | None, dummy: bool, runtime: str | None,
    as_json: bool, disable: tuple[str, ...],
) -> None:  # fmt: skip
    """Say everything that `load` would do, from headers alone: layers, bytes, peak, kernels and why not others."""
    from moeplug import api, terminal

    registry = _registry(disable)
    if model is None:
        terminal.note(f"no MODEL was given: planning the demo checkpoint ({api.demo_checkpoint()})")
    planned = api.plan(
        model, scheme, device=device, runtime=_runtime(runtime, dummy), budget=budget, dummy=dummy, registry=registry
    )
    if as_json:
        terminal.print_json(planned.as_dict())
    else:
        terminal.print_plan(planned)


@cli.command("eval")
@model_options
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text file. Default with the demo: its own.")
@click.option("--max-tokens", type=click.IntRange(2), help="Use only the first tokens of the text.")
def evaluate(
    model: Path | None, scheme: str, device: str | None, budget: int | None, dummy: bool, runtime: str | None,
    as_json: bool, disable: tuple[str, ...], text: Path | None, max_tokens: int | None,
) -> None:  # fmt: skip
    """Measure perplexity of MODEL unquantized and under the scheme, their ratio, and top-1 agreement."""
    from moeplug import api, terminal

    if dummy or runtime == "none":
        raise UsageError("eval needs a whole model: without --dummy, with --runtime transformers")
    if text is None:
        if model is not None:
            raise UsageError("eval needs --text FILE: the text to predict")
        terminal.note(f"no MODEL was given: measuring the demo checkpoint ({api.demo_checkpoint()})")
        text = api.demo_checkpoint().parent / "heldout.txt"
    registry = _registry(disable)
    planned = api.plan(model, scheme, device=device, runtime="transformers", budget=budget, registry=registry)
    loaded = _execute(planned, registry, "transformers", "loading")
    result = _evaluate(loaded, text, max_tokens)
    if as_json:
        terminal.print_json({"scheme": planned.scheme.name, "text": str(text), **result})
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


@cli.group(invoke_without_command=True)
@click.pass_context
def schemes(ctx: click.Context) -> None:
    """List installed schemes, or show one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(schemes_list)


@schemes.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_options
def schemes_list(as_json: bool = False, disable: tuple[str, ...] = ()) -> None:
    """List the schemes of installed plugins."""
    from moeplug import terminal
    from moeplug.scheme import find_scheme

    files = _registry(disable).scheme_files()
    rows = [(find_scheme(name, files), path) for name, path in files.items()]
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
    """Print a scheme as it is read: `extends:` resolved, defaults filled in."""
    from moeplug.scheme import find_scheme

    click.echo(find_scheme(name, _registry(disable).scheme_files()).to_yaml(), nl=False)


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


def parse_size(text: str) -> int:
    """Return bytes of "20GB" (10**9), "16GiB" (2**30), "512MB", "4096"."""
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units[letter + "B"], units[letter + "IB"] = 1000**power, 1024**power
    number = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
        if size > 0:
            return size
    except (ValueError, KeyError, OverflowError):
        pass
    raise UsageError(f"{text!r} is not a size; write for example 20GB (10^9 bytes) or 16GiB (2^30)")


def _registry(disable: tuple[str, ...]) -> Registry:
    from moeplug.registry import Registry, warn_about_unusable

    registry = Registry.discover(disable=disable)
    warn_about_unusable(registry)
    return registry


def _runtime(name: str | None, dummy: bool) -> Any:
    if dummy and name == "transformers":
        raise UsageError("--dummy makes experts alone: use --runtime none, or leave it out")
    return None if dummy or name == "none" else "transformers"


def _execute(plan: Plan, registry: Registry, runtime: Any, label: str) -> Loaded:
    from moeplug import api, terminal

    for line in plan.checkpoint.notes:
        terminal.note(line)
    with terminal.progress_bar(label) as progress:
        return api.execute(plan, registry, runtime=runtime, progress=progress)


def _tokenizer(plan: Plan) -> Any:
    from moeplug.integrations.transformers import tokenizer_of

    return tokenizer_of(plan.checkpoint.path)


def _use(loaded: Loaded, prompt: str | None, max_new_tokens: int, text: Path | None) -> str | None:
    """Generate and measure with a loaded model; the measurement goes into its report."""
    from moeplug import evaluation

    generated = None
    if prompt:
        tokenizer = _tokenizer(loaded.report.plan)
        generated = evaluation.generate(loaded.model, tokenizer, prompt, max_new_tokens)
    if text is not None:
        loaded.report.evaluation = {"text": str(text), **_evaluate(loaded, text, None)}
    return generated


def _evaluate(loaded: Loaded, text: Path, max_tokens: int | None) -> dict[str, Any]:
    from moeplug import evaluation, terminal
    from moeplug.integrations.transformers import reference_model

    plan = loaded.report.plan
    ids = evaluation.encode_file(_tokenizer(plan), text, max_tokens)
    with terminal.progress_bar(f"perplexity, {plan.scheme.name}", unit="tokens") as progress:
        scheme = evaluation.score_text(loaded.model, ids, progress)
    reference = reference_model(plan.checkpoint.path, plan.device)
    with terminal.progress_bar("perplexity, unquantized", unit="tokens") as progress:
        return evaluation.compare(evaluation.score_text(reference, ids, progress), scheme)


class Terminated(BaseException):
    """SIGTERM came."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def main() -> NoReturn:
    """Run the command line; every foreseen failure is one message on stderr and an exit code, never a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except MoeplugError as error:
        _stop(str(error), error.exit_code)
    except click.exceptions.Abort:
        _stop("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except Terminated:
        _stop("ended by SIGTERM", 143)
    except BrokenPipeError:  # the reader of a pipe went away: end as quietly as other tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        _stop(f"{error.filename or 'input/output'}: {error.strerror or error}", InputOutputError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if (
            isinstance(error, RuntimeError)
            and "out of memory" not in str(error)
            and "allocate memory" not in str(error)
        ):
            raise
        _stop(f"out of memory: {str(error).splitlines()[0]}; `moeplug plan` says what a load needs", 5)


def _stop(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
