"""Refuse, before it begins, what this machine's memory cannot hold; and say what was planned where memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moeplug.errors import InputOutputError, is_out_of_memory
from moeplug.pipeline.plan import gigabytes


@contextmanager
def within_memory(needed: int, device: torch.device) -> Iterator[None]:
    """Run what needs this many bytes of a device.

    Raises InputOutputError before it where a CPU's memory has less, and after it where memory ran out all the same.
    """
    left = available_bytes() if device.type == "cpu" else None
    if left is not None and needed > left:
        raise InputOutputError(
            f"out of memory: {gigabytes(needed)} are needed at the peak, and this machine, or what this process may "
            f"take of it, has {gigabytes(left)} left, swap included. Nothing was read: end other programs, raise the "
            "limit, or take a scheme with fewer bits"
        )
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["no room for a Python object"])[0]
        raise InputOutputError(
            f"out of memory: {reason}; {gigabytes(needed)} on {device} were planned at the peak, beside what Python "
            "and torch take"
        ) from error


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return what this process may still take: of the machine's memory, of its cgroups', and swap. None: not known."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        memory = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}
        left = min([memory["MemAvailable"], *_left_of_cgroups(root)])
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return left + memory.get("SwapFree", 0)


def _left_of_cgroups(root: Path) -> Iterator[int]:
    """Yield what each cgroup around this process leaves it; cached files count as free, as in MemAvailable."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        number, controllers, name = line.split(":", 2)
        if number == "0":
            top, limit, used, prefix = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"
        else:
            continue
        folder = top / name.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top) and (group / limit).is_file():  # a container sees its own group at the top
                allowed = (group / limit).read_text().strip()
                if allowed != "max":
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    cached = int(stat[f"{prefix}active_file"]) + int(stat[f"{prefix}inactive_file"])
                    yield int(allowed) - int((group / used).read_text()) + cached
