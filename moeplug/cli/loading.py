"""The commands that load a model and use it: load, generate, eval."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplug.cli.options import find_runtime, model_options, note_the_demo, open_registry
from moeplug.errors import UsageError

if TYPE_CHECKING:
    from moeplug.api import Loaded, Runtime
    from moeplug.evaluation import Inputs
    from moeplug.pipeline import Plan
    from moeplug.registry import Registry


@click.command()
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
    from moeplug.writing import check_writable

    registry = open_registry(disable)
    built = find_runtime(runtime, dummy)
    if built is None and (prompt is not None or text is not None):
        raise UsageError("--prompt and --text need a model to run: use --runtime transformers, without --dummy")
    note_the_demo(model, "loading dummy weights in the shape of" if dummy else "loading")
    if model is None and built is not None:
        prompt = terminal.DEMO_PROMPT if prompt is None else prompt
        text = text or api.demo_checkpoint().parent / "heldout.txt"
    plan = api.plan(
        model, scheme, device=device, runtime=built, budget=budget, dummy=dummy, family=family, registry=registry
    )
    if trace is not None:
        check_writable(trace)
        os.environ["MOEPLUG_TRACE"] = str(trace)
    for name in (*observe, *["trace"] * (trace is not None)):
        registry.observe(name)
    inputs = None if prompt is None and text is None else _inputs(plan, prompt, text)
    if report is not None:
        check_writable(report)
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


@click.command()
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
    registry = open_registry(disable)
    note_the_demo(model, "loading")
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


@click.command("eval")
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
    if model is not None and text is None and not tasks:
        raise UsageError("eval needs --text FILE: the text to predict")
    note_the_demo(model, "measuring")
    if tasks:
        planned, result = _run_tasks(model, scheme, device, budget, family, tasks, limit, open_registry(disable))
        if as_json:
            terminal.print_json({"scheme": planned.scheme.name, **result})
        else:
            terminal.print_task_scores(planned.scheme.name, result)
        return
    if text is None:
        text = api.demo_checkpoint().parent / "heldout.txt"
    registry = open_registry(disable)
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


def _execute(plan: Plan, registry: Registry, runtime: Runtime | None, label: str, exact_error: bool = False) -> Loaded:
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
