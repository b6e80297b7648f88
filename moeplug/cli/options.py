"""The arguments and options that several commands share, and what is made of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moeplug.errors import UsageError

if TYPE_CHECKING:
    from moeplug.api import Runtime
    from moeplug.registry import Registry

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """Add the option that prints what a program can read."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output, nothing else.")(command)


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
        json_option,
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


def open_registry(disable: tuple[str, ...]) -> Registry:
    """Return the installed plugins; the unusable ones are named on standard error."""
    from moeplug.registry import Registry, warn_about_unusable

    registry = Registry.discover(disable=disable)
    warn_about_unusable(registry)
    return registry


def find_runtime(name: str | None, dummy: bool) -> Runtime | None:
    """Return what --runtime and --dummy ask to build around the layers."""
    if dummy and name == "transformers":
        raise UsageError("--dummy makes experts alone: use --runtime none, or leave it out")
    return None if dummy or name == "none" else "transformers"


def note_the_demo(model: Path | None, doing: str) -> None:
    """Say that the demo checkpoint stands in, where no MODEL was given."""
    from moeplug import api, terminal

    if model is None:
        terminal.note(f"no MODEL was given: {doing} the demo checkpoint ({api.demo_checkpoint()})")
