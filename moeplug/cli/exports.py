"""The commands for checkpoints that others read: export, verify."""

from __future__ import annotations

from pathlib import Path

import click

from moeplug.cli.options import json_option, note_the_demo, open_registry, plugin_options


@click.command()
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
@json_option
@plugin_options
def export(
    model: Path | None, scheme: str | None, target: Path, form: str, resume: bool, device: str | None, as_json: bool,
    disable: tuple[str, ...],
) -> None:  # fmt: skip
    """Quantize MODEL's experts into a new folder, and say which runtimes read it."""
    from moeplug import api, terminal

    registry = open_registry(disable)
    note_the_demo(model, "exporting")
    with terminal.progress_bar("exporting") as progress:
        exported = api.export(
            model, scheme, target, form, device=device, resume=resume, progress=progress, registry=registry
        )
    if as_json:
        terminal.print_json(exported.as_dict())
    else:
        terminal.print_exported(exported, model or api.demo_checkpoint())


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", type=click.Path(path_type=Path), help="Quantize it again and compare.")
@click.option("--device", metavar="DEVICE", help="Where to quantize again. Default: cpu.")
@json_option
@plugin_options
def verify(folder: Path, against: Path | None, device: str | None, as_json: bool, disable: tuple[str, ...]) -> None:
    """Read an export again: every file by its sha256, and with --against every tensor and error. Exit code 3 if not."""
    from moeplug import api, terminal, verifying

    registry, found = open_registry(disable), api.find_device(device or "cpu")
    with terminal.progress_bar("verifying") as progress:
        verified = verifying.verify(folder, against, registry=registry, device=found, progress=progress)
    if as_json:
        terminal.print_json(verified.as_dict())
    else:
        terminal.print_verified(verified)
