"""Print what each stage cost, by layer, when a load ends.

On a GPU a stage returns before its kernels have run. This observer waits for them before and after each stage, so that
a stage's time is its own; the load as a whole takes longer than without it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from typing import Any, NamedTuple

import torch

import moeplug

STAGES = ("allocate", "load", "quantize", "create_scales", "setup_kernel")
Wrapper = Generator[None, Any, Any]


class Span(NamedTuple):
    """A stage of one layer, or "read" or "copy" of some bytes."""

    what: str
    layer: int
    seconds: float
    nbytes: int


spans: list[Span] = []  # appended to by several threads


@moeplug.hookimpl(wrapper=True)
def moeplug_allocate(ctx: moeplug.StageContext) -> Wrapper:
    return (yield from _timed("allocate", ctx))


@moeplug.hookimpl(wrapper=True)
def moeplug_load(ctx: moeplug.StageContext) -> Wrapper:
    return (yield from _timed("load", ctx))


@moeplug.hookimpl(wrapper=True)
def moeplug_quantize(ctx: moeplug.StageContext) -> Wrapper:
    return (yield from _timed("quantize", ctx))


@moeplug.hookimpl(wrapper=True)
def moeplug_create_scales(ctx: moeplug.StageContext) -> Wrapper:
    return (yield from _timed("create_scales", ctx))


@moeplug.hookimpl(wrapper=True)
def moeplug_setup_kernel(ctx: moeplug.StageContext) -> Wrapper:
    return (yield from _timed("setup_kernel", ctx))


@moeplug.hookimpl
def moeplug_event(event: moeplug.LoadEvent) -> None:
    spans.append(Span(event.what if event.what != "load" else "all", -1, event.ended - event.started, event.nbytes))
    if event.what == "load":
        print(table(spans), file=sys.stderr)  # standard output is the command's own
        spans.clear()


def _timed(stage: str, ctx: moeplug.StageContext) -> Wrapper:
    _wait(ctx.device)
    started = time.perf_counter()
    result = yield
    _wait(ctx.device)
    spans.append(Span(stage, ctx.layer.index, time.perf_counter() - started, 0))
    return result


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def table(spans: list[Span]) -> str:
    """Return a line for each layer, then sums: milliseconds."""
    staged = [span for span in spans if span.what in STAGES]
    lines = [_line("ms", STAGES)]
    for layer in sorted({span.layer for span in staged}):
        own = [span for span in staged if span.layer == layer]
        lines.append(_line(f"layer {layer}", (f"{_milliseconds(own, stage):.2f}" for stage in STAGES)))
    lines.append(_line("all layers", (f"{_milliseconds(staged, stage):.2f}" for stage in STAGES)))
    for what in ("read", "copy", "all"):
        nbytes = sum(span.nbytes for span in spans if span.what == what)
        lines.append(f"{what:<12}{_milliseconds(spans, what):.2f} ms, {nbytes:,} bytes")  # no copies on a CPU: zeros
    return "\n".join(lines)


def _milliseconds(spans: list[Span], what: str) -> float:
    return 1e3 * sum(span.seconds for span in spans if span.what == what)


def _line(name: str, cells: Any) -> str:
    return f"{name:<12}" + "".join(f"{cell:>14}" for cell in cells)
