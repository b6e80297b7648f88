"""The commands that list what is installed: plugins, families, schemes."""

from __future__ import annotations

import click

from moeplug.cli.options import json_option, open_registry, plugin_options
from moeplug.errors import MoeplugError, UsageError


@click.command()
@json_option
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


@click.command()
@json_option
@plugin_options
def families(as_json: bool, disable: tuple[str, ...]) -> None:
    """List known model families: name, model types, who ships the descriptor. Imports no plugin."""
    from moeplug import terminal

    found = sorted(open_registry(disable).families(), key=lambda family: family.name)
    if as_json:
        terminal.print_json(
            [{"name": f.name, "model_types": f.model_types, "origin": f.origin, "path": str(f.source)} for f in found]
        )
    else:
        terminal.print_families(found)


@click.group(invoke_without_command=True)
@json_option
@plugin_options
@click.pass_context
def schemes(ctx: click.Context, as_json: bool, disable: tuple[str, ...]) -> None:
    """List installed schemes, or show one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(schemes_list, as_json=as_json, disable=disable)
    elif as_json or disable:
        raise UsageError(f"the options of `schemes {ctx.invoked_subcommand}` come after it, not before")


@schemes.command("list")
@json_option
@plugin_options
def schemes_list(as_json: bool = False, disable: tuple[str, ...] = ()) -> None:
    """List the schemes of installed plugins. One that is wrong is a note on standard error, beside the others."""
    from moeplug import terminal
    from moeplug.scheme import find_scheme

    files, rows = open_registry(disable).scheme_files(), []
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
    click.echo(open_registry(disable).scheme(name).to_yaml(), nl=False)
