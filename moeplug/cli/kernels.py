"""The command that measures the GPU kernel's tilings: tune-kernels."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moeplug.cli.options import json_option, open_registry, plugin_options
from moeplug.errors import UsageError

if TYPE_CHECKING:
    from moeplug.registry import Registry


@click.command("tune-kernels")
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
@json_option
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

    registry = open_registry(disable)
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
        from moeplug.checkpoint.reader import read_config

        config = read_config(model)
        found += [
            (layer.num_experts, layer.hidden_size, layer.intermediate_size, layer.experts_per_token)
            for layer in registry.family_of(config).layers(config)
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
