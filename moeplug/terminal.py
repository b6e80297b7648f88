"""What the command line shows: results on standard output, notes and progress on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import platformdirs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from moeplug.pipeline import Plan, Report
    from moeplug.registry import Registry
    from moeplug.scheme import Scheme

DEMO_PROMPT = "The :mod:`json` module"
MIN_WIDTH = 120  # of a table that is not on a terminal: wrapped cells are of no use to grep


def out() -> Console:
    """Return the console of results: as wide as the terminal, or wide enough for a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(MIN_WIDTH, console.width))


def note(message: str) -> None:
    """Say something beside the result."""
    click.echo(f"moeplug: {message}", err=True)


def print_json(data: Any) -> None:
    """Print JSON."""
    click.echo(json.dumps(data, indent=2))


@contextmanager
def progress_bar(label: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that moves a bar on standard error."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    amounts = [DownloadColumn(), Speed()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
    columns = [TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, refresh_per_second=8) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def default_report_path(plan: Plan) -> Path:
    """Return a new file in the user's state folder, named by model, scheme and time."""
    folder = platformdirs.user_state_path("moeplug", appauthor=False) / "reports"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return folder / f"{stamp}-{plan.checkpoint.path.resolve().name}-{plan.scheme.name}.json"


def print_report(report: Report, prompt: str | None, generated: str | None) -> None:
    """Print the table of a load, then its totals, perplexity and where the report is."""
    console, plan = out(), report.plan
    table = Table(title=f"{plan.checkpoint.path} under {plan.scheme.name} on {plan.device}", title_justify="left")
    for column, side in zip(
        ("layer", "experts", "before", "after", "worst error", "at", "mean error", "weights", "kernel"), "rrrrrlrll",
        strict=True,
    ):  # fmt: skip
        table.add_column(column, justify="right" if side == "r" else "left", no_wrap=True)
    for layer in report.layers:
        table.add_row(
            str(layer.plan.layer.index),
            str(layer.plan.layer.num_experts),
            size(layer.plan.bytes_before),
            size(layer.plan.bytes_after),
            f"{layer.errors.worst:.5f}",
            layer.errors.worst_where,
            f"{layer.errors.mean:.5f}",
            layer.weights,
            layer.kernels,
        )
    console.print(table)
    console.print("errors: relative RMS of an expert weight, ||weight - decoded|| / ||weight||", style="dim")
    before, after = plan.expert_bytes_before, plan.expert_bytes_after
    lines = [
        ("experts", f"{size(before)} → {size(after)} ({after / before:.1%})"),
        ("other weights", f"{size(plan.dense_bytes)}, as they were" if plan.with_dense else "not loaded"),
        ("peak memory", _peak(report)),
        ("time", f"{report.seconds:.2f} s, {report.gigabytes_per_second:.2f} GB/s of checkpoint"),
    ]
    if report.evaluation:
        lines.append(("perplexity", _perplexity(report.evaluation)))
    lines.append(("report", f"{report.path} (provenance: versions, hashes, device)"))
    for name, value in lines:
        console.print(f"{name:>14}  {escape(value)}", soft_wrap=True)
    if generated is not None:
        console.print(f"\n{escape(prompt or '')}[bold]{escape(generated.rstrip())}[/bold]", soft_wrap=True)


def print_plan(plan: Plan) -> None:
    """Print a plan: layers, kernels with the reasons against the others, and totals."""
    console = out()
    table = Table(title=f"{plan.checkpoint.path} under {plan.scheme.name} on {plan.device}", title_justify="left")
    for column in ("layer", "experts", "weights", "before", "after", "kernel"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("layer", "before", "after") else "left")
    for layer in plan.as_dict()["layers"]:
        for index, group in enumerate(layer["groups"]):
            shown = [str(layer["layer"]), "", size(layer["bytes_before"]), size(layer["bytes_after"])]
            first = shown if index == 0 else [""] * 4
            table.add_row(first[0], group["experts"], group["weights"], first[2], first[3], group["kernel"])
    console.print(table)
    reasons = {(n, r) for layer in plan.layers for group in layer.groups for n, r in group.against}
    for name, reason in sorted(reasons):
        console.print(f"  not chosen: {name}: {escape(reason)}", soft_wrap=True)
    before, after = plan.expert_bytes_before, plan.expert_bytes_after
    lines = [
        ("experts", f"{size(before)} → {size(after)} ({after / before:.1%}), {len(plan.sources):,} expert weights"),
        ("other weights", f"{len(plan.kept):,} tensors, {size(plan.dense_bytes)}, kept as they are"),
        ("peak", f"{size(plan.peak_bytes)} on {plan.device}, {size(plan.transient_bytes)} of it only while loading"),
    ]
    for name, value in lines:
        console.print(f"{name:>14}  {escape(value)}", soft_wrap=True)


def print_evaluation(scheme: str, result: dict[str, Any]) -> None:
    """Print what `eval` measured."""
    console = out()
    for name, value in (
        ("tokens", f"{result['tokens']:,}"),
        ("unquantized", f"perplexity {result['perplexity_reference']:.4f}"),
        (scheme, f"perplexity {result['perplexity_scheme']:.4f}"),
        ("ratio", f"{result['perplexity_ratio']:.5f}"),
        ("top-1 agreement", f"{result['top1_agreement']:.2%}"),
    ):
        console.print(f"{escape(name):>16}  {value}", soft_wrap=True)


def print_plugins(registry: Registry) -> None:
    """Print a block per installed plugin: what it is, its state and the reason, what it brings, where it lies."""
    console = out()
    if not registry.plugins:
        console.print("no plugin is installed; try: pip install moeplug-int8")
    for plugin in registry.plugins:
        shown = plugin.as_dict()
        console.print(f"[bold]{plugin.name}[/bold]  {plugin.state}  {plugin.distribution} {plugin.version}")
        lists = [(key, ", ".join(shown[key])) for key in ("formats", "kernels", "schemes", "capabilities")]
        for name, value in [("reason", plugin.reason), *lists, ("path", str(plugin.path))]:
            if value:
                console.print(f"  {name:12}  {escape(value)}", soft_wrap=True)


def print_schemes(rows: Sequence[tuple[Scheme, Path]]) -> None:
    """Print a line per installed scheme."""
    console = out()
    widths = [max((len(text) for text in texts), default=0) for texts in zip(*_names(rows), strict=True)] or [0, 0]
    for (scheme, _), (name, plugin) in zip(rows, _names(rows), strict=True):
        line = f"{name:{widths[0]}}  {plugin:{widths[1]}}  {scheme.description or ''}"
        console.print(escape(line), soft_wrap=True)
    if not rows:
        console.print("no scheme is installed; try: pip install moeplug-int8")


def _names(rows: Sequence[tuple[Scheme, Path]]) -> list[tuple[str, str]]:
    return [(scheme.name, scheme.plugin or "-") for scheme, _ in rows]


def prompts() -> Iterable[str]:
    """Yield what the user types, until Ctrl-D, or the lines of a pipe; empty lines are passed over."""
    terminal = sys.stdin.isatty()
    if terminal:
        note("write the beginning of a text and press Enter; Ctrl-D ends")
    while True:
        try:
            line = input("> ") if terminal else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line


def streamer(tokenizer: Any) -> Any:
    """Return what prints tokens as they come."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def size(count: float) -> str:
    """Return bytes for people, in decimal units as `--budget` reads them."""
    from moeplug.pipeline.plan import gigabytes

    return gigabytes(count)


def _peak(report: Report) -> str:
    host = f"{size(report.peak_host_bytes)} resident in this process"
    return host if report.peak_device_bytes is None else f"{size(report.peak_device_bytes)} on the GPU, {host}"


def _perplexity(evaluation: dict[str, Any]) -> str:
    return (
        f"{evaluation['perplexity_reference']:.4f} unquantized, {evaluation['perplexity_scheme']:.4f} quantized: "
        f"ratio {evaluation['perplexity_ratio']:.5f}, top-1 agreement {evaluation['top1_agreement']:.2%} "
        f"({evaluation['tokens']:,} tokens of {evaluation['text']})"
    )
