"""The command that chooses how each expert is stored: tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from click.core import ParameterSource

from moeplug.cli.options import json_option, note_the_demo, open_registry, parse_size, plugin_options
from moeplug.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from moeplug.mixed import Sample, Task


@click.command()
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
@json_option
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
    from moeplug import api, evaluation, mixed, terminal
    from moeplug.writing import check_writable

    if data_free and (idle := _given("text", "max_tokens", "run_as")):
        raise UsageError(f"--data-free reads no text and runs no model: leave it out, or {' and '.join(idle)}")
    note_the_demo(model, "tuning for")
    if model is None and not data_free:
        text = text or api.demo_checkpoint().parent / "heldout.txt"
    if text is None and not data_free:
        raise UsageError("tune needs --text FILE, what the model reads while it is measured; or --data-free")
    mixed.require_solver()
    registry = open_registry(disable)
    wanted = None if candidates is None else mixed.find_candidates(candidates.split(","), registry)
    task = mixed.Task.open(
        model, wanted or mixed.default_candidates(registry), registry=registry, per=per, device=device,
        with_dense=runtime == "transformers", left_out=terminal.note if wanted is None else None,
    )  # fmt: skip
    task.require_possible(budget)
    check_writable(out)
    samples = None
    if text is not None:
        ids = evaluation.read_inputs(task.checkpoint.path, None, text, max_tokens).ids
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


def _given(*options: str) -> list[str]:
    """Return those of the running command's options that stand on its command line, as they do there."""
    context = click.get_current_context()
    on_it = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [f"--{name.replace('_', '-')}" for name in on_it]


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
