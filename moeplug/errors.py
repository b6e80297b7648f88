"""Every error that moeplug raises on purpose, and the exit code that the command line gives it.

MoeplugError                 anything below; `except MoeplugError` catches all of them
├── UsageError          2    the call itself: an unknown device, an option that contradicts another
├── SchemeError         2    a scheme, or what a scheme asks for, is wrong
├── CheckpointError     3    config.json, an index, a shard or a weight is not what it has to be
│   └── VerificationError 3  what was loaded or written differs from what it was made from
├── PluginError         4    a plugin is missing, broken, blocked, or answered a hook wrongly
├── InputOutputError    5    the operating system refused: not found, permission, disk full, memory
└── RefusedError        6    everything is valid, but `--budget` or the scheme's `accept:` says no

Interrupts are not errors of ours: Ctrl-C ends the command with 130, SIGTERM with 143.
Each message says where, what was found, what was expected, and what to do.
"""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, of Python or of torch, says that memory ran out. Imports no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # Without a type of their own: torch's host memory, what the CUDA driver says, and a thread that finds no stack.
    text = str(error)
    return "DefaultCPUAllocator: " in text or text.startswith(("CUDA error: out of memory", "can't start new thread"))


class MoeplugError(Exception):
    """The root of all errors that moeplug raises on purpose."""

    exit_code = 1
    problems: tuple[object, ...] = ()  # moeplug.problems.Problem, one per mistake in a YAML file


class UsageError(MoeplugError):
    """The call itself is wrong."""

    exit_code = 2


class SchemeError(MoeplugError):
    """A scheme, or what it asks of this checkpoint or device, is wrong."""

    exit_code = 2


class CheckpointError(MoeplugError):
    """A checkpoint is not what it has to be; the message names the file and the tensor."""

    exit_code = 3


class VerificationError(CheckpointError):
    """What was loaded or written differs from what it was made from."""


class PluginError(MoeplugError):
    """A plugin is missing, broken, blocked, or answered a hook wrongly; the message names it."""

    exit_code = 4


class InputOutputError(MoeplugError):
    """The operating system refused a read or a write."""

    exit_code = 5


class RefusedError(MoeplugError):
    """Everything is valid, but a budget or an accept rule says no."""

    exit_code = 6
