"""The commands for those who write schemes, plugins and descriptors: check, schema, new-plugin, family-check."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Literal

import click

from moeplug.cli.options import json_option, open_registry, plugin_options
from moeplug.errors import MoeplugError, UsageError, VerificationError


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--as", "kind", type=click.Choice(["scheme", "plugin", "family"]), help="What the files are. Default: look inside."
)
@plugin_options
def check(files: tuple[Path, ...], kind: str | None, disable: tuple[str, ...]) -> None:
    """Check scheme, plugin.yaml or family FILES and report every problem with its line. Imports no plugin."""
    from moeplug.checking import check_file

    registry = open_registry(disable)
    failed: MoeplugError | None = None
    for file in files:
        try:
            click.echo(f"{file}: {check_file(file, kind, registry)}")
        except MoeplugError as error:
            click.echo(f"Error: {error}", err=True)
            failed = failed or error
    if failed is not None:
        sys.exit(failed.exit_code)


@click.command("family-check")
@click.argument("model_type")
@click.option("--family", metavar="FILE|NAME", help="The descriptor to prove. Default: the one that serves MODEL_TYPE.")
@json_option
@plugin_options
def family_check(model_type: str, family: str | None, as_json: bool, disable: tuple[str, ...]) -> None:
    """Prove a family descriptor by numbers: MODEL_TYPE's tiny random model, by transformers and by moeplug.

    Where they differ, changes of the descriptor are tried, and one that makes them agree is named.
    """
    from tempfile import TemporaryDirectory

    from moeplug import terminal
    from moeplug.integrations.family_check import prove

    registry = open_registry(disable)
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


@click.command()
@click.argument("kind", type=click.Choice(["scheme", "plugin"]))
def schema(kind: Literal["scheme", "plugin"]) -> None:
    """Print the JSON Schema of schemes or of plugin.yaml, for editors and other tools."""
    from moeplug.schema import generate as generate_schema

    click.echo(json.dumps(generate_schema(kind), indent=2))


@click.command("new-plugin")
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
