"""What the command line shows: results on standard output, notes and progress on standard error."""

from __future__ import annotations

import errno
import json
import os
import secrets
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import platformdirs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeplug.errors import InputOutputError, UsageError

if TYPE_CHECKING:
    from moeplug.checkpoint.family import Family
    from moeplug.exporting import Exported
    from moeplug.mixed import Choice
    from moeplug.pipeline import Plan, Report
    from moeplug.pipeline.builder import LayerErrors
    from moeplug.pipeline.flow import Timings
    from moeplug.registry import Registry
    from moeplug.scheme import Scheme
    from moeplug.verifying import Verified

DEMO_PROMPT = "The :mod:`json` module"
MIN_WIDTH = 120  # of a table that is not on a terminal: wrapped cells are of no use to grep
MIN_TERMINAL_WIDTH = 80  # the tables fit; a narrower terminal wraps lines itself
DIGITS_WIDTH = 49  # of a table's columns of numbers and of all gaps; what is left is for specs and kernels


class Output(Console):
    """A console that takes text as it is: paths and prompts may hold what rich reads as markup or emoji."""

    def __init__(self, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """Leave a closed pipe to `moeplug.cli.main`; rich would end with exit code 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def out() -> Output:
    """Return the console of results: as wide as the terminal, or wide enough for a file or a pipe."""
    console = Output()
    return Output(width=max(MIN_TERMINAL_WIDTH if console.is_terminal else MIN_WIDTH, console.width))


def note(message: str) -> None:
    """Say something beside the result."""
    click.echo(f"moeplug: {message}", err=True)


def print_json(data: Any) -> None:
    """Print JSON."""
    click.echo(json.dumps(data, indent=2))


@contextmanager
def progress_bar(label: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that moves a bar on standard error; there is none before the first call."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    amounts = [DownloadColumn(), Speed()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), *amounts, TimeRemainingColumn()]
    bar = Progress(*columns, console=Output(stderr=True), refresh_per_second=8)
    task = bar.add_task(label, total=None)

    def move(done: int, total: int) -> None:
        if not bar.live.is_started:
            begun.enter_context(bar)
        bar.update(task, completed=done, total=total)

    with ExitStack() as begun:
        yield move


def default_report_path(plan: Plan) -> Path:
    """Return a new file in the user's state folder, named by time, model and scheme; the rest makes it the only one."""
    folder = platformdirs.user_state_path("moeplug", appauthor=False) / "reports"
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    return folder / f"{stamp}-{plan.checkpoint.path.resolve().name}-{plan.scheme.name}.json"


def write_report(report: Report, path: Path) -> InputOutputError | None:
    """Write a report; return what went wrong, so that a finished load is shown first."""
    try:
        report.write(path)
    except InputOutputError as error:
        report.path = None
        return error
    return None


def print_report(report: Report, prompt: str | None, generated: str | None, timings: bool = False) -> None:
    """Print the table of a load, then its totals, perplexity and where the report is."""
    console, plan = out(), report.plan
    table = _table("layer", "before", "after", "worst\nerror", "mean\nerror", "weights", "kernel")
    for layer in report.layers:
        numbers = [size(layer.plan.bytes_before), size(layer.plan.bytes_after)]
        errors = [f"{layer.errors.worst:.5f}", f"{layer.errors.mean:.5f}"]
        # Layers with overrides have several groups; those of the same weights and kernel are one line.
        shown = [str(layer.plan.layer.index), *numbers, *errors]
        for texts in dict.fromkeys(_texts(console, group) for group in layer.plan.as_dict()["groups"]):
            table.add_row(*shown, *texts)
            shown = [""] * len(shown)
    _print_table(console, plan, table)
    rows = "" if all(layer.errors.exact for layer in report.layers) else ", over a sample of rows (all: --exact-error)"
    console.print(f"errors: relative RMS of an expert weight, ||weight - decoded|| / ||weight||{rows}", style="dim")
    worst = max(report.layers, key=lambda layer: layer.errors.worst)
    before, after = plan.expert_bytes_before, plan.expert_bytes_after
    _print_lines(
        console,
        ("worst error", f"{worst.errors.worst:.5f}: layer {worst.plan.layer.index}, {worst.errors.worst_where}"),
        ("experts", f"{size(before)} → {size(after)} ({after / before:.1%}), {_experts(plan)}"),
        ("other weights", f"{size(plan.dense_bytes)}, as they were" if plan.with_dense else "not loaded"),
        ("peak memory", _peak(report)),
        ("time", f"{report.seconds:.2f} s, {report.gigabytes_per_second:.2f} GB/s of checkpoint"),
        *(_timings(report.timings) if timings else ()),
        ("perplexity", _perplexity(report.evaluation) if report.evaluation else None),
        ("report", f"{report.path} (provenance: versions, hashes, device)" if report.path else "not written"),
    )
    if generated is not None:
        console.print()
        console.print(f"generated after {prompt!r}:")
        console.print(Text.assemble(prompt or "", (generated.rstrip(), "bold")), soft_wrap=True)


def print_plan(plan: Plan) -> None:
    """Print a plan: layers, kernels with the reasons against the others, and totals."""
    console = out()
    table = _table("layer", "before", "after", "experts", "weights", "kernel")
    for layer in plan.layers:
        shown = [str(layer.layer.index), size(layer.bytes_before), size(layer.bytes_after)]
        for group in layer.as_dict()["groups"]:
            table.add_row(*shown, _wrapped(group["experts"].replace(",", ", "), 16), *_texts(console, group))
            shown = [""] * len(shown)
    _print_table(console, plan, table)
    reasons = {(n, r) for layer in plan.layers for group in layer.groups for n, r in group.against}
    for name, reason in sorted(reasons):
        console.print(f"  not chosen: {name}: {reason}", soft_wrap=True)
    before, after = plan.expert_bytes_before, plan.expert_bytes_after
    weights = sum(source.role == "weight" and not source.of_bias for source in plan.sources)
    _print_lines(
        console,
        ("experts", f"{size(before)} → {size(after)} ({after / before:.1%}), {weights:,} expert weights"),
        *(
            []
            if plan.encoding is None
            else [("stored as", f"{plan.encoding.label}; kept where the scheme asks for it")]
        ),
        ("other weights", f"{len(plan.kept):,} tensors, {size(plan.dense_bytes)}, kept as they are"),
        ("peak", f"{size(plan.peak_bytes)} on {plan.device}, {size(plan.transient_bytes)} of it only while loading"),
    )


def print_exported(exported: Exported, model: Path) -> None:
    """Print what an export wrote, its worst error, and who reads it."""
    console = out()
    console.print(f"{model} → {exported.folder}, {exported.form}", style="italic", soft_wrap=True)
    before, after = exported.bytes_before, exported.bytes_after
    readers = [("read by" if i == 0 else "", reader) for i, reader in enumerate(exported.readers)]
    kept = f"{exported.continued} of the files were finished before" if exported.continued else None
    _print_lines(
        console,
        ("weights", f"{size(before)} → {size(after)} ({after / before:.1%})"),
        ("files", f"{exported.files}, with sha256 and provenance in moeplug.json"),
        ("continued", kept),
        ("worst error", _worst_error(exported.errors)),
        *readers,
    )


def print_verified(verified: Verified) -> None:
    """Print what was compared and found equal."""
    files, errors = f"{verified.files} files, {size(verified.bytes)}, sha256 as recorded", _worst_error(verified.errors)
    compared = f"{verified.tensors:,} tensors equal what the model's weights become" if verified.errors else None
    _print_lines(out(), ("equal", files), ("compared", compared), ("worst error", errors if verified.errors else None))


def _worst_error(errors: Mapping[int, LayerErrors]) -> str:
    if not errors:
        return "none: nothing is quantized"
    layer, worst = max(errors.items(), key=lambda item: item[1].worst)
    return f"{worst.worst:.5f}: layer {layer}, {worst.worst_where}"


def print_explanation(said: dict[str, Any]) -> None:
    """Print what `Explanation.as_dict` says: stages, wrappers, kernels here, kernels elsewhere."""
    console = out()
    scheme = said["scheme"]
    console.print(f"{said['model']} under {scheme['name']} on {said['device']}", style="italic", soft_wrap=True)
    console.print(f"scheme {scheme['name']}: {scheme['path'] or 'in memory'}", soft_wrap=True)
    for used in said["formats"]:
        console.print(f"format {used['format']}: {_shipped(used)}, {used['class']}", soft_wrap=True)
    console.print("\nstages, in running order", style="bold")
    for stage in said["stages"]:
        for answer in stage["answered_by"]:
            whose = f"groups of {answer['groups_of']}" if answer["groups_of"] else "unquantized groups"
            how = answer["function"] or "the core's default"
            console.print(f"  {stage['stage']:14}{whose}: {_shipped(answer)}, {how}", soft_wrap=True)
        for watcher in stage["watched_by"]:
            console.print(f"  {'':14}watched by {_shipped(watcher)}, {watcher['function']}", soft_wrap=True)
    observers = said["observers"]
    off = [name for name in observers["installed"] if name not in observers["on"]]
    if off:
        console.print(f"  observers that are not on: {', '.join(off)} (--observe NAME)", soft_wrap=True)
    console.print(f"\nkernels on {said['device']}", style="bold")
    _print_choices(console, said["layers"])
    unprinted = list(said["elsewhere"])
    while unprinted:  # devices of which the same is to be said share one block
        layers = unprinted[0]["layers"]
        alike = [other for other in unprinted if other["layers"] == layers]
        unprinted = [other for other in unprinted if other["layers"] != layers]
        console.print(f"\nkernels on {'; '.join(map(_device, alike))}", style="bold", soft_wrap=True)
        _print_choices(console, layers)


def _device(other: dict[str, Any]) -> str:
    if other["compute_capability"] is None:
        return str(other["device"])
    return f"{other['device']} {other['compute_capability']} ({other['for_example']})"


def _print_choices(console: Output, layers: Sequence[dict[str, Any]]) -> None:
    for alike in layers:
        console.print(f"  layers {alike['layers']}: {alike['sizes']}", soft_wrap=True)
        for group in alike["groups"]:
            chosen = "none" if group["kernel"] is None else f"{group['kernel']} ({_shipped(group['kernel_of'])})"
            console.print(f"    experts {group['experts']}, {group['weights']}: {chosen}", soft_wrap=True)
            if group["refused"]:
                console.print(f"      {group['refused']}", soft_wrap=True)
            for name, reason in group["kernels_not_chosen"].items():
                console.print(f"      not {name}: {reason}", soft_wrap=True)


def _shipped(thing: dict[str, Any]) -> str:
    return f"{thing['distribution']} {thing['version']}"


def print_task_scores(scheme: str, result: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print a line per task and metric: unquantized, under the scheme, and the difference."""
    console = out()
    table = _table("task", "metric", "unquantized", scheme, "difference")
    for task, reference in result["reference_scores"].items():
        for metric, value in reference.items():
            found = result["scheme_scores"][task][metric]
            table.add_row(task, metric, f"{value:.4f}", f"{found:.4f}", f"{found - value:+.4f}")
    console.print(table)


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
        console.print(f"{name:>16}  {value}", soft_wrap=True)


def print_choice(choice: Choice, file: Path) -> None:
    """Print what `tune` chose beside what each candidate alone would cost, and where the scheme is."""
    console, errors = out(), choice.errors
    counts = {option.name: count for option, count in choice.counts.items()}
    table = _table("experts", "chosen", "alone: bytes", "peak", "error", "")
    for row in choice.uniforms():
        fits = "" if choice.fits(row) else "over budget"
        costs = [size(row.expert_bytes), size(row.peak_bytes), f"{row.relative_rms:.5f}"]
        table.add_row(row.candidate.name, str(counts.pop(row.candidate.name, 0)), *costs, fits)
    for name, count in counts.items():  # gate_up and down as two candidates
        table.add_row(name, str(count))
    _print_wide(console, table)
    console.print("errors: root mean square over the layers of ||output - exact|| / ||exact||", style="dim")
    on = "the weights alone" if errors.data_free else f"{errors.tokens:,} tokens"
    without = f"; {errors.unreached} got none and were judged by their weights" if errors.unreached else ""
    before = choice.task.any_plan.expert_bytes_before
    _print_lines(
        console,
        ("mixed", f"{size(choice.expert_bytes)} of experts, unquantized {size(before)}"),
        ("error", f"{errors.relative_rms(choice.error):.5f}, the least possible sum is at most {choice.gap:.3%} below"),
        ("measured on", f"{on}, {len(errors.experts):,} experts{without}"),
        ("scheme", str(file)),
    )


def print_plugins(registry: Registry) -> None:
    """Print a block per installed plugin: what it is, its state and the reason, what it brings, where it lies."""
    console = out()
    if not registry.plugins:
        console.print("no plugin is installed; the official ones are distributions called moeplug-…")
    for plugin in registry.plugins:
        shown = plugin.as_dict()
        described = f"  {plugin.state}  {plugin.distribution} {plugin.version}"
        console.print(Text.assemble((plugin.name, "bold"), described), soft_wrap=True)
        lists = [(key, ", ".join(shown[key])) for key in ("formats", "kernels", "schemes", "families", "capabilities")]
        for name, value in [("reason", plugin.reason), *lists, ("path", str(plugin.path))]:
            if value:
                console.print(f"  {name:12}  {value}", soft_wrap=True)


def print_families(families: Sequence[Family]) -> None:
    """Print a line per family: name, who ships it, the model types that it serves."""
    console = out()
    name_width, origin_width = (max(len(getattr(f, key)) for f in families) for key in ("name", "origin"))
    for family in families:
        unproven = ", unproven" if family.descriptor.unproven else ""
        line = f"{family.name:{name_width}}  {family.origin:{origin_width}}  {', '.join(family.model_types)}{unproven}"
        console.print(line, soft_wrap=True)


def print_schemes(rows: Sequence[tuple[Scheme, Path]]) -> None:
    """Print a line per installed scheme."""
    console = out()
    widths = [max((len(text) for text in texts), default=0) for texts in zip(*_names(rows), strict=True)] or [0, 0]
    for (scheme, _), (name, plugin) in zip(rows, _names(rows), strict=True):
        console.print(f"{name:{widths[0]}}  {plugin:{widths[1]}}  {scheme.description or ''}", soft_wrap=True)
    if not rows:
        console.print("no scheme is installed; plugins bring them: see `moeplug plugins`")


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
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not {error.encoding}: {error.reason}") from error
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


def _print_table(console: Output, plan: Plan, table: Table) -> None:
    console.print(f"{plan.checkpoint.path} under {plan.scheme.name} on {plan.device}", style="italic", soft_wrap=True)
    _print_wide(console, table)


def _print_wide(console: Output, table: Table) -> None:
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, needed)  # rich would cut numbers where a table is wider than the console
    console.print(table)


def _print_lines(console: Output, *lines: tuple[str, str | None]) -> None:
    for name, value in lines:
        if value is not None:
            console.print(f"{name:>14}  {value}", soft_wrap=True)


def _table(*headers: str) -> Table:
    """Return a table without lines between columns: seven then fit 80 characters."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for header in headers:
        text = header in ("experts", "weights", "kernel")
        table.add_column(header, justify="left" if text else "right", no_wrap=True)
    return table


def _texts(console: Output, group: dict[str, Any]) -> tuple[str, str]:
    """Return a group's weights and kernel, each folded to its share of the console's width."""
    spare = console.width - DIGITS_WIDTH
    return _wrapped(group["weights"], spare // 2), _wrapped(group["kernel"], spare - spare // 2)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _experts(plan: Plan) -> str:
    counts = sorted({layer.layer.num_experts for layer in plan.layers})
    return f"{len(plan.layers)} layers of {' or '.join(map(str, counts))} experts"


def _peak(report: Report) -> str:
    host = f"{size(report.peak_host_bytes)} resident in this process, Python and torch included"
    return host if report.peak_device_bytes is None else f"{size(report.peak_device_bytes)} on the GPU, {host}"


def _timings(timings: Timings) -> Iterator[tuple[str, str]]:
    """Yield lines that say where the time went."""
    t, on_gpu = timings, timings.gpu_copy is not None
    yield "bounded by", t.bounded_by
    yield "reading", f"{t.read:.2f} s, threads: {t.readers}; waited for it {t.waited_for_reads:.2f} s"
    if on_gpu:
        busy = f"copied {t.gpu_copy:.2f} s, quantized {t.gpu_quantize:.2f} s"
        yield "GPU", f"{busy}; waited for it {t.waited_for_gpu:.2f} s"
    parts = (
        f"NaN check {t.check:.2f} s, quantize {t.quantize:.2f} s, error {t.error:.2f} s, beside these {t.other:.2f} s"
    )
    each = 1e6 * t.other / max(t.weights, 1)
    where = "queueing" if on_gpu else "quantizing"
    parts = parts if on_gpu else f"threads: {t.workers}; {parts}"
    yield where, f"{parts} ({each:.0f} µs for each of {t.weights:,} weights)"


def _perplexity(evaluation: dict[str, Any]) -> str:
    return (
        f"{evaluation['perplexity_reference']:.4f} unquantized, {evaluation['perplexity_scheme']:.4f} quantized: "
        f"ratio {evaluation['perplexity_ratio']:.5f}, top-1 agreement {evaluation['top1_agreement']:.2%} "
        f"({evaluation['tokens']:,} tokens of {evaluation['text']})"
    )
