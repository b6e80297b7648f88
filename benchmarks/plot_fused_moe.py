"""Read the cells of a fused-MoE benchmark and draw them: rooflines, a map of ratios, markdown tables.

A cell is what one contestant needed in one situation: a mapping with the FIELDS below, times in seconds.
`benchmarks/bench_fused_moe.py` writes them, and so does the peers' harness.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Cell = dict[str, Any]
FIELDS = ("shape", "scheme", "peer", "M", "graph", "eager", "limit", "bound", "bytes", "flops", "ok")
OURS = "moeplug"
LOST = 1.03  # slower than the fastest peer by more than the noise of two runs
MARKERS = "osD^vP*XhpdH<>"
LEAST_RATIO, LARGEST_RATIO = 0.5, 2.0  # where the colours of the map of ratios end


class Run(NamedTuple):
    """One benchmark's file: what it ran on, the ceilings of that device, and the cells that have a time."""

    about: dict[str, Any]
    physical: dict[str, float]
    cells: list[Cell]


class Pair(NamedTuple):
    """Our cell of a situation beside the fastest peer's; either is None where it has no right result."""

    ours: Cell | None
    peer: Cell | None

    @property
    def ratio(self) -> float | None:
        """Return the fastest peer's time / ours."""
        return time_of(self.peer) / time_of(self.ours) if self.ours and self.peer else None


def read(path: Path) -> Run:
    """Return a run from its JSON: a bench's, the harness's, or one that `reduce` wrote."""
    data = json.loads(path.read_text())
    cells = data.pop("cells")
    if "fields" in data:
        names = data.pop("fields")
        cells = [dict(zip(names, values, strict=True)) for values in cells]
    timed = [cell for cell in cells if cell.get("M") is not None and (cell.get("graph") or cell.get("eager"))]
    return Run(data, {k: v for k, v in data.get("physical", {}).items() if isinstance(v, float)}, timed)


def reduce(run: Run, path: Path) -> None:
    """Write what tables and plots need, a cell a line, numbers to 4 digits: raw logs are 10 times as large."""
    keep = ("device", "gpu", "smi", "versions", "argv", "command", "date", "elapsed_s", "shapes")
    about = {key: run.about[key] for key in keep if key in run.about}
    about |= {"physical": {key: _short(value) for key, value in run.physical.items()}, "fields": list(FIELDS)}
    rows = [json.dumps([_short(cell.get(field)) for field in FIELDS], separators=(",", ":")) for cell in run.cells]
    head = json.dumps(about, indent=1).removesuffix("\n}")
    path.write_text(head + ',\n "cells": [\n' + ",\n".join(rows) + "\n]}\n")


def time_of(cell: Cell) -> float:
    """Return seconds a call: replayed from a CUDA graph, or eager where a contestant (or a CPU) has none."""
    return float(cell.get("graph") or cell["eager"])


def pairs(cells: Iterable[Cell]) -> dict[tuple[str, str, int], Pair]:
    """Return ours and the fastest peer with right numbers, by (shape, scheme, M), in the order of the file."""
    found: dict[tuple[str, str, int], Pair] = {}
    for cell in cells:
        key = (cell["shape"], cell["scheme"], cell["M"])
        ours, peer = found.get(key, Pair(None, None))
        if cell.get("ok") is not False:
            if cell["peer"] == OURS:
                ours = cell
            elif peer is None or time_of(cell) < time_of(peer):
                peer = cell
        found[key] = Pair(ours, peer)
    return found


def is_4_bit(scheme: str) -> bool:
    """Return whether a scheme's name says that weights have 4 bits."""
    return re.search(r"(int|fp|nf)4|w4", scheme) is not None


def is_int8_w8a16(scheme: str) -> bool:
    """Return whether a scheme's name says 8-bit integer weights under 16-bit activations."""
    return scheme.startswith("int8") and "a8" not in scheme


def summary(run: Run) -> list[tuple[str, str]]:
    """Return what a run comes to, as (what, number)."""
    compared = pairs(run.cells)
    ratios = [pair.ratio for pair in compared.values() if pair.ratio]
    missing = [key for key, pair in compared.items() if pair.peer and not pair.ours]
    lost = [key for key, pair in compared.items() if pair.ratio and pair.ratio * LOST < 1]
    wrong = [cell for cell in run.cells if cell["peer"] == OURS and cell.get("ok") is False]
    ours = [pair.ours for pair in compared.values() if pair.ours]

    def to_limit(chosen: Callable[[str, int], bool]) -> str:
        return _geometric(time_of(c) / c["limit"] for c in ours if chosen(c["scheme"], c["M"]))

    def hard(scheme: str) -> bool:
        return is_4_bit(scheme) or is_int8_w8a16(scheme)

    captured = [c["eager"] / c["graph"] for c in ours if c["M"] <= 32 and c.get("graph") and c.get("eager")]
    rows = [
        ("cells measured / with a peer", f"{len(ours)} / {len(ratios)}"),
        (f"cells lost (slower than the fastest peer by more than {LOST - 1:.0%})", str(len(lost))),
        ("cells where only a peer has a right result / where ours is wrong", f"{len(missing)} / {len(wrong)}"),
        ("fastest peer / ours, geometric mean", _geometric(ratios)),
        ("ours / limit, M=1, without 4-bit weights", to_limit(lambda s, M: M == 1 and not is_4_bit(s))),
        ("ours / limit, M=1, 4-bit weights", to_limit(lambda s, M: M == 1 and is_4_bit(s))),
        ("ours / limit, M=8 to 128", to_limit(lambda _, M: 8 <= M <= 128)),
        ("ours / limit, M=512 to 2048, all", to_limit(lambda _, M: 512 <= M <= 2048)),
        ("the same without 4-bit weights and int8 W8A16", to_limit(lambda s, M: 512 <= M <= 2048 and not hard(s))),
        ("ours / limit, M=8192, all", to_limit(lambda _, M: M == 8192)),
        ("the same without 4-bit weights and int8 W8A16", to_limit(lambda s, M: M == 8192 and not hard(s))),
        ("ours / limit, 4-bit weights and int8 W8A16, M≥512", to_limit(lambda s, M: M >= 512 and hard(s))),
        ("eager / graph, M≤32", _geometric(captured)),
    ]
    return [(what, number) for what, number in rows if number != "-"]


def markdown(run: Run) -> str:
    """Return the tables of every scheme, the summary, and the cells lost, as markdown."""
    compared = pairs(run.cells)
    tokens = sorted({M for _, _, M in compared})
    lines = [
        "Microseconds a call from a CUDA graph (its ratio to the limit); then the fastest peer's time / ours, and who "
        "it was. **Bold**: lost.",
        "",
    ]
    for scheme in _unique(scheme for _, scheme, _ in compared):
        lines += [f"| {scheme} | " + " | ".join(f"M={M}" for M in tokens) + " |", "|---" * (len(tokens) + 1) + "|"]
        for shape in _unique(s for s, found, _ in compared if found == scheme):
            texts = [_entry(compared.get((shape, scheme, M))) for M in tokens]
            lines.append(f"| {shape} | " + " | ".join(texts) + " |")
        lines.append("")
    lines += ["| all cells | |", "|---|---|", *(f"| {what} | {number} |" for what, number in summary(run)), ""]
    lost = sorted((pair.ratio, key, pair) for key, pair in compared.items() if pair.ratio and pair.ratio * LOST < 1)
    if lost:
        texts = [
            f"{scheme} {shape} M={M} ({ratio:.2f}, {pair.peer['peer']})" for ratio, (shape, scheme, M), pair in lost
        ]
        lines += ["Lost, fastest peer / ours: " + ", ".join(texts) + ".", ""]
    ceilings = [f"{name} {value / 1e12:.2f}" for name, value in run.physical.items()]
    lines.append(f"Ceilings measured in the same run: {', '.join(ceilings)} (TB/s, TFLOP/s).")
    return "\n".join(lines)


def against_unquantized_peers(run: Run, unquantized: str) -> str:
    """Return a table, as markdown, of the fastest peer's time without quantization / ours with it; "" where none is."""
    compared = pairs(run.cells)
    tokens = sorted({M for _, _, M in compared})
    rows: dict[tuple[str, str], list[str]] = {}
    for (shape, scheme, M), pair in compared.items():
        peer = compared.get((shape, unquantized, M), Pair(None, None)).peer
        if scheme != unquantized and pair.ours and peer:
            texts = rows.setdefault((scheme, shape), [""] * len(tokens))
            texts[tokens.index(M)] = f"{time_of(peer) / time_of(pair.ours):.2f} {peer['peer']}"
    if not rows:
        return ""
    head = [f"| fastest {unquantized} peer / ours | " + " | ".join(f"M={M}" for M in tokens) + " |",
            "|---" * (len(tokens) + 1) + "|"]  # fmt: skip
    return "\n".join([*head, *(f"| {scheme} {shape} | " + " | ".join(t) + " |" for (scheme, shape), t in rows.items())])


def plot(run: Run, path: Path) -> list[Path]:
    """Draw the rooflines into path and, where there are peers, the map of ratios beside it; return both files."""
    import matplotlib

    matplotlib.use("Agg")
    written = [_save(_rooflines(run), path)]
    if any(pair.ratio for pair in pairs(run.cells).values()):
        written.append(_save(_ratios(run), path.with_stem(path.stem + "-ratio")))
    return written


def _rooflines(run: Run) -> Any:
    """A panel a scheme, its two roofs, and a line a shape from few tokens to many; hollow: the fastest peer."""
    from matplotlib import pyplot, ticker

    compared = pairs(run.cells)
    schemes, shapes = _unique(s for _, s, _ in compared), _unique(s for s, _, _ in compared)
    columns = min(4, len(schemes))
    rows = -(-len(schemes) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, squeeze=False, sharex=True, sharey=True, figsize=(max(3.4 * columns, 6.5), 3.1 * rows + 0.8)
    )
    for i, (axis, scheme) in enumerate(zip(axes.flat, schemes, strict=False)):
        for j, shape in enumerate(shapes):
            found = [pair for (a, b, _), pair in compared.items() if (a, b) == (shape, scheme)]
            style = {"color": f"C{j}", "marker": MARKERS[i % len(MARKERS)]}
            _line(axis, [pair.peer for pair in found], **style, markerfacecolor="none", linestyle=":")
            _line(axis, [pair.ours for pair in found], **style, linestyle="-", label=shape, name_tokens=j == 0)
        _roofs(axis, run, [cell for cell in run.cells if cell["scheme"] == scheme])
        axis.set(xscale="log", yscale="log", title=scheme)
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(True, which="major", alpha=0.3)
    for axis in axes.flat[len(schemes) :]:
        axis.set_visible(False)
    figure.supxlabel("flop / byte", fontsize=9)
    figure.supylabel("TFLOP/s", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=8, frameon=False)
    device = run.about.get("device", "")
    figure.suptitle(f"moeplug (filled) and the fastest peer (hollow), {device}; labels: tokens", fontsize=9)
    return figure


def _line(axis: Any, cells: Sequence[Cell | None], *, name_tokens: bool = False, **style: Any) -> None:
    there = sorted((cell for cell in cells if cell), key=lambda cell: cell["M"])
    if not there:
        return
    xs = [cell["flops"] / cell["bytes"] for cell in there]
    ys = [cell["flops"] / time_of(cell) / 1e12 for cell in there]
    axis.plot(xs, ys, markersize=4, linewidth=0.8, **style)
    for cell, x, y in zip(there, xs, ys, strict=True) if name_tokens else ():
        axis.annotate(cell["M"], (x, y), xytext=(3, -8), textcoords="offset points", fontsize=6)


def _roofs(axis: Any, run: Run, cells: Sequence[Cell]) -> None:
    """Draw the bandwidth's slope, and the product's rate: what the cells' own limits say it is where they meet it."""
    xs = [cell["flops"] / cell["bytes"] for cell in cells]
    bandwidth = run.physical.get("bw") or max(c["bytes"] / c["limit"] for c in cells)
    rates = [cell["flops"] / cell["limit"] for cell in cells if cell["bound"] == "math"]
    rate = max(rates, default=math.inf)
    ridge, low, high = rate / bandwidth, min(xs) / 1.5, max(xs) * 1.5
    ends = sorted({low, min(max(ridge, low), high), high})
    axis.plot(ends, [min(x * bandwidth, rate) / 1e12 for x in ends], color="black", linewidth=1, zorder=0)


def _ratios(run: Run) -> Any:
    """A row a scheme and shape, a column a number of tokens: how many times as long the fastest peer takes."""
    from matplotlib import colors, pyplot

    compared = pairs(run.cells)
    tokens = sorted({M for _, _, M in compared})
    rows = [(scheme, shape) for scheme in _unique(s for _, s, _ in compared)
            for shape in _unique(a for a, b, _ in compared if b == scheme)]  # fmt: skip
    table = [[_ratio(compared.get((shape, scheme, M))) for M in tokens] for scheme, shape in rows]
    figure, axis = pyplot.subplots(figsize=(3.2 + 0.55 * len(tokens), 1.2 + 0.2 * len(rows)))
    colours = pyplot.get_cmap("RdBu").with_extremes(bad="lightgrey")
    norm = colors.TwoSlopeNorm(0, math.log2(LEAST_RATIO), math.log2(LARGEST_RATIO))
    logs = [[math.log2(value) if value else math.nan for value in row] for row in table]
    axis.imshow(logs, cmap=colours, norm=norm, aspect="auto")
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.2f}" if value else "", ha="center", va="center", fontsize=6)
    axis.set_xticks(range(len(tokens)), [str(M) for M in tokens], fontsize=7)
    axis.set_yticks(range(len(rows)), [f"{scheme}  {shape}" for scheme, shape in rows], fontsize=6)
    axis.set_xlabel("tokens", fontsize=7)
    axis.set_title("fastest peer's time / moeplug's (grey: no peer)", fontsize=8)
    return figure


def _save(figure: Any, path: Path) -> Path:
    """Write a figure with a palette of 64 colours, a third of the bytes; close it."""
    from matplotlib import pyplot
    from PIL import Image

    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64)
    small.save(path, optimize=True)
    return path


def _entry(pair: Pair | None) -> str:
    if pair is None or pair.ours is None:
        return "" if pair is None or pair.peer is None else f"- ({pair.peer['peer']} {_us(pair.peer)})"
    text = f"{_us(pair.ours)} ({time_of(pair.ours) / pair.ours['limit']:.2f})"
    if pair.ratio is None or pair.peer is None:
        return text
    ratio = f"{pair.ratio:.2f}"
    return f"{text} {f'**{ratio}**' if pair.ratio * LOST < 1 else ratio} {pair.peer['peer']}"


def _ratio(pair: Pair | None) -> float | None:
    return pair.ratio if pair else None


def _us(cell: Cell) -> str:
    return f"{time_of(cell) * 1e6:.4g}"


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _geometric(values: Iterable[float | None]) -> str:
    logs = [math.log(value) for value in values if value]
    return f"{math.exp(sum(logs) / len(logs)):.2f} ({len(logs)} cells)" if logs else "-"


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
