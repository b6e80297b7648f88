"""The commands that say what a load would do, from headers alone: plan, explain."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import click

from moeplug.cli.options import find_runtime, model_options, note_the_demo, open_registry, source_options
from moeplug.errors import CheckpointError, MoeplugError


@click.command()
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

    registry = open_registry(disable)
    note_the_demo(model, "planning")
    built = find_runtime(runtime, dummy)
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


@click.command()
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

    registry = open_registry(disable)
    note_the_demo(model, "explaining for")
    explanation = api.explain(
        model, scheme, device=device, dummy=dummy, family=family, observe=observe, registry=registry
    ).as_dict()
    if as_json:
        terminal.print_json(explanation)
    else:
        terminal.print_explanation(explanation)
