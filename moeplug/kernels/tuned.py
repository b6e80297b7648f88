"""Tables of measured schedules: those that moeplug ships and the user's own. JSON, checked when read; never pickle."""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from moeplug.errors import InputOutputError
from moeplug.kernels.schedule import Blocks, Numbers, Schedule
from moeplug.kernels.select import Device
from moeplug.writing import write_whole

VERSION: Final = 1  # of the file; another one is refused
SHIPPED: Final = Path(__file__).parent / "tables"
MOST_BYTES: Final = 16 << 20  # of a file: 50,000 cells

log = logging.getLogger("moeplug")


@dataclass(frozen=True)
class Key:
    """What a schedule was measured for, the number of tokens apart. gate_up, down: `Numbers.kind`."""

    E: int
    H: int
    I: int
    T: int
    gate_up: str
    down: str

    @classmethod
    def of(cls, T: int, E: int, H: int, I: int, gate_up: Numbers, down: Numbers) -> Key:
        """Return the key of a call."""
        return cls(E, H, I, T, gate_up.kind, down.kind)


@dataclass(frozen=True)
class Cell:
    """One measurement: the fastest schedule for M tokens. run: the index of the run that found it."""

    key: Key
    M: int
    time_us: float
    sort: bool
    half: bool
    first: Blocks
    second: Blocks
    run: int = 0


@dataclass(frozen=True)
class Table:
    """What was measured on one kind of device. runs: how: command, date, seconds, versions."""

    device: str
    compute_capability: tuple[int, int]
    runs: tuple[Mapping[str, Any], ...] = ()
    cells: tuple[Cell, ...] = ()

    def with_cells(self, cells: Iterable[Cell], run: Mapping[str, Any]) -> Table:
        """Return a table with one more run, whose cells take the place of older ones for the same key and M.

        Runs that have no cell left are dropped.
        """
        kept = {(cell.key, cell.M): cell for cell in self.cells}
        kept |= {(cell.key, cell.M): replace(cell, run=len(self.runs)) for cell in cells}
        runs = [*self.runs, run]
        used = sorted({cell.run for cell in kept.values()})
        numbered = [replace(cell, run=used.index(cell.run)) for cell in kept.values()]
        return replace(self, runs=tuple(runs[i] for i in used), cells=tuple(sorted(numbered, key=_order)))

    def of(self, key: Key) -> tuple[Cell, ...]:
        """Return the key's cells."""
        return _by_key(self).get(key, ())


def _order(cell: Cell) -> tuple[Any, ...]:
    key = cell.key
    return key.gate_up, key.down, key.E, key.H, key.I, key.T, cell.M


@lru_cache(maxsize=64)
def _grouped(cells: tuple[Cell, ...]) -> dict[Key, tuple[Cell, ...]]:
    grouped: dict[Key, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.key, []).append(cell)
    return {key: tuple(found) for key, found in grouped.items()}


def _by_key(table: Table) -> dict[Key, tuple[Cell, ...]]:
    return _grouped(table.cells)


@dataclass(frozen=True)
class Row:
    """One schedule that was timed, whether it won or not."""

    key: Key
    M: int
    time_us: float
    schedule: Schedule

    @property
    def cell(self) -> Cell:
        """Return the row as a table keeps it."""
        schedule = self.schedule
        time_us = round(self.time_us, 2)
        return Cell(self.key, self.M, time_us, not schedule.pairs, schedule.half, schedule.first, schedule.second)


def table_from_rows(
    rows: Iterable[Row], device: str, compute_capability: tuple[int, int], run: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a table, as JSON has it, of the fastest row for each key and M. run: how the rows were measured."""
    fastest: dict[tuple[Key, int], Row] = {}
    for row in rows:
        best = fastest.setdefault((row.key, row.M), row)
        if row.time_us < best.time_us:
            fastest[row.key, row.M] = row
    return as_dict(Table(device, compute_capability).with_cells([row.cell for row in fastest.values()], run))


def tables_for(device: Device) -> tuple[Table, ...]:
    """Return the tables that hold for a device, best first: the user's own, one of its name, one of its capability.

    The user's own holds for its device alone: a home directory may serve several machines. A shipped one is better than
    rules for a sibling too: an H200 has the multiprocessors of an H100.
    """
    user, shipped = _all_tables()
    named = [t for t in (*user, *shipped) if t.device == device.name]
    siblings = [t for t in shipped if t not in named and t.compute_capability == device.compute_capability]
    return (*named, *siblings)


@lru_cache(maxsize=1)
def _all_tables() -> tuple[tuple[Table, ...], tuple[Table, ...]]:
    """Return the user's tables and the shipped ones; a file that cannot be used is a warning, once."""
    return _read_folder(cache_folder()), _read_folder(SHIPPED)


def forget() -> None:
    """Read the tables anew when they are next asked for."""
    _all_tables.cache_clear()


def cache_folder() -> Path:
    """Return the folder of the user's tables."""
    return platformdirs.user_cache_path("moeplug", appauthor=False) / "tuning"


def cache_path(device: str) -> Path:
    """Return the file of the user's table for a device of this name."""
    return cache_folder() / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-') or 'gpu'}.json"


def _read_folder(folder: Path) -> tuple[Table, ...]:
    tables = []
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError:
        return ()
    for path in paths:
        try:
            tables.append(read_table(path))
        except (InputOutputError, ValueError) as error:
            log.warning("%s; it is not used: correct it, delete it, or run `moeplug tune-kernels` anew", error)
    return tuple(tables)


def read_table(path: Path) -> Table:
    """Return the table in a file; raise InputOutputError or, where the file is wrong, ValueError that names it."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path}: larger than {MOST_BYTES} bytes, which no table is")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputOutputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a tuning table: {error}") from error
    try:
        return parse_table(text)
    except ValueError as error:
        raise ValueError(f"{path}: not a tuning table: {error}") from error


def write_table(path: Path, table: Table) -> None:
    """Write a table, whole or not at all; raise InputOutputError."""
    data = as_dict(table)
    lists = {name: ",\n  ".join(map(json.dumps, data.pop(name))) for name in ("runs", "cells")}  # a cell is a line
    fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in data.items()]
    fields += [f'"{name}": [\n  {lines}\n ]' for name, lines in lists.items()]
    text = "{\n " + ",\n ".join(fields) + "\n}"
    write_whole(path, text + "\n")


def as_dict(table: Table) -> dict[str, Any]:
    """Return a table as JSON has it."""
    return {
        "version": VERSION,
        "device": table.device,
        "compute_capability": list(table.compute_capability),
        "runs": [dict(run) for run in table.runs],
        "cells": [
            {
                "E": cell.key.E, "H": cell.key.H, "I": cell.key.I, "T": cell.key.T,
                "gate_up": cell.key.gate_up, "down": cell.key.down, "M": cell.M, "time_us": cell.time_us,
                "sort": cell.sort, "half": cell.half, "first": str(cell.first), "second": str(cell.second),
                "run": cell.run,
            }
            for cell in table.cells
        ],
    }  # fmt: skip


def parse_table(text: str) -> Table:
    """Return the table that `write_table` wrote; raise ValueError that says where and what was expected."""
    try:
        table = _TableFile.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from error
    return Table(table.device, table.compute_capability, table.runs, tuple(cell.cell for cell in table.cells))


class _FileModel(BaseModel):
    """Types are not converted; keys of later versions are passed over."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


Size = Annotated[int, Field(gt=0)]
BlocksText = Annotated[Blocks, PlainValidator(lambda text: Blocks.parse(str(text)))]


class _CellFile(_FileModel):
    E: Size
    H: Size
    I: Size
    T: Size
    gate_up: str
    down: str
    M: Size
    time_us: Annotated[float, Field(gt=0)]
    sort: bool
    half: bool
    first: BlocksText
    second: BlocksText
    run: Annotated[int, Field(ge=0)] = 0

    @property
    def cell(self) -> Cell:
        values = dict(self)
        key = Key(**{field.name: values.pop(field.name) for field in fields(Key)})
        return Cell(key, **values)


class _TableFile(_FileModel):
    version: Literal[1]  # VERSION
    device: str
    compute_capability: tuple[int, int]
    runs: tuple[dict[str, Any], ...]
    cells: tuple[_CellFile, ...]

    @model_validator(mode="after")
    def _every_cell_has_its_run(self) -> _TableFile:
        for i, cell in enumerate(self.cells):
            if cell.run >= len(self.runs):
                raise ValueError(f"cells[{i}].run is {cell.run}, and there are {len(self.runs)} runs")
        return self


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    found = "" if first["type"] == "missing" else f" is {reprlib.repr(first['input'])}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}{found}: {message}" if where else message
