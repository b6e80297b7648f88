"""Write what a load did, and when, as Chrome trace JSON: open the file in https://ui.perfetto.dev.

MOEPLUG_TRACE names the file; else it is moeplug-trace.json in the working folder. Reading, copying to a GPU and each
stage have a track of their own, one for each thread that does it, and memory is a counter. On a GPU a stage's bar is
the time in which Python launched its kernels, which run behind it: nothing is waited for, so the load goes as it does
without this observer.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import torch

import moeplug

TRACKS = ("read", "copy", "allocate", "load", "quantize", "create_scales", "setup_kernel")  # from top to bottom
Wrapper = Generator[None, Any, Any]

recorded: list[dict[str, Any]] = []  # a second load of the process goes behind the first
tids: dict[tuple[str, int], int] = {}  # (track, thread) → its number in the file
numbers = itertools.count(1)


@moeplug.hookimpl(wrapper=True)
def moeplug_allocate(ctx: moeplug.StageContext) -> Wrapper:
    result = yield from _stage("allocate", ctx, f"layer {ctx.layer.index}")
    _sample_memory(ctx.device)
    return result


@moeplug.hookimpl(wrapper=True)
def moeplug_load(ctx: moeplug.StageContext, projection: str, experts: Any) -> Wrapper:
    return (yield from _stage("load", ctx, _weights(ctx, projection, experts)))


@moeplug.hookimpl(wrapper=True)
def moeplug_quantize(ctx: moeplug.StageContext, projection: str, experts: Any) -> Wrapper:
    return (yield from _stage("quantize", ctx, _weights(ctx, projection, experts)))


@moeplug.hookimpl(wrapper=True)
def moeplug_create_scales(ctx: moeplug.StageContext) -> Wrapper:
    return (yield from _stage("create_scales", ctx, f"layer {ctx.layer.index}"))


@moeplug.hookimpl(wrapper=True)
def moeplug_setup_kernel(ctx: moeplug.StageContext) -> Wrapper:
    result = yield from _stage("setup_kernel", ctx, f"layer {ctx.layer.index}")
    _sample_memory(ctx.device)
    return result


@moeplug.hookimpl
def moeplug_event(event: moeplug.LoadEvent) -> None:
    if event.what == "load":
        _write()
    else:
        _record(event.what, event.tensor, event.started, event.ended, bytes=event.nbytes)


def _stage(stage: str, ctx: moeplug.StageContext, name: str) -> Wrapper:
    started = time.perf_counter()
    result = yield
    _record(stage, name, started, time.perf_counter(), plugin=ctx.plugin, kernel=ctx.kernel.name)
    return result


def _weights(ctx: moeplug.StageContext, projection: str, experts: Any) -> str:
    return f"layer {ctx.layer.index} {projection} of {', '.join(map(str, experts))}"


def _record(track: str, name: str, started: float, ended: float, **details: Any) -> None:
    _file()  # a file that cannot be written ends the load at its first event, not at its last
    tid = tids.setdefault((track, threading.get_ident()), next(numbers))
    span = {"ph": "X", "pid": 1, "tid": tid, "name": name, "cat": track}
    recorded.append(span | {"ts": 1e6 * started, "dur": 1e6 * (ended - started), "args": details})


def _sample_memory(device: str) -> None:
    values = {"resident": psutil.Process().memory_info().rss}
    if device.startswith("cuda"):
        values["on the GPU"] = torch.cuda.memory_allocated(device)
    for name, value in values.items():
        counter = {"ph": "C", "pid": 1, "name": f"memory {name}", "ts": 1e6 * time.perf_counter()}
        recorded.append(counter | {"args": {"bytes": value}})


@functools.cache
def _file() -> Path:
    """Return where the trace goes, once it is known to be writable."""
    path = Path(os.environ.get("MOEPLUG_TRACE") or "moeplug-trace.json")
    try:
        path.open("w").close()
    except OSError as error:
        raise moeplug.InputOutputError(
            f"{path}: the trace cannot be written: {error.strerror}; MOEPLUG_TRACE=FILE says where else"
        ) from error
    return path


def _write() -> None:
    names: list[dict[str, Any]] = []
    for (track, _), tid in tids.items():
        place = {"ph": "M", "pid": 1, "tid": tid}
        names.append(place | {"name": "thread_name", "args": {"name": track}})
        names.append(place | {"name": "thread_sort_index", "args": {"sort_index": TRACKS.index(track)}})
    _file().write_text(json.dumps({"traceEvents": [*names, *recorded]}))
    print(f"trace: {_file()}: open it in https://ui.perfetto.dev", file=sys.stderr)
