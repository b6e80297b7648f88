"""The moeplug command. Help, listing and checking import neither torch nor triton.

The commands stand in this package's modules by theme; here they become one command, and what ends it an exit code.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

from moeplug import __version__
from moeplug.cli import authoring, exports, installed, kernels, loading, planning, tuning
from moeplug.errors import InputOutputError, MoeplugError, is_out_of_memory

EXIT_CODES = """\b
Exit codes:
  0    done
  2    usage, or a scheme that is wrong
  3    the checkpoint is wrong, or verification failed
  4    a plugin is missing, broken or blocked
  5    input/output: not found, permission, disk full, out of memory
  6    refused by --budget or by the scheme's `accept:`
  130  interrupted with Ctrl-C
  141  the reader of the output went away, as in `moeplug plugins | head -1`
  143  ended by SIGTERM
"""


class ClosedPipe(BaseException):
    """The reader of our output went away. No OSError: click would end such a one with exit code 1."""


@contextmanager
def _closed_pipes() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipe from error


class Commands(click.Group):
    """The top group; a pipe that closes while it parses (and prints help) or runs leaves it as ClosedPipe."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the command line."""
        with _closed_pipes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _closed_pipes():
            return super().invoke(ctx)


@click.group(
    cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="moeplug")
def cli() -> None:
    """Load Mixture-of-Experts checkpoints and quantize their experts while reading, under a YAML scheme.

    \b
    moeplug load --scheme int8                       the demo checkpoint
    moeplug plan MODEL --scheme int8                 what would happen, without reading a weight
    moeplug explain MODEL --scheme int8              by whose code, on which kernel, and why not on another
    moeplug load MODEL --scheme schemes/int8.yaml    do it
    moeplug generate MODEL --scheme int8             and talk to it
    moeplug export MODEL --scheme int8 -o DIR        for other runtimes

    MODEL is a local folder with config.json and *.safetensors files.
    """


for command in (
    planning.plan, planning.explain,
    loading.load, loading.generate, loading.evaluate,
    exports.export, exports.verify,
    tuning.tune, kernels.tune_kernels,
    installed.plugins, installed.families, installed.schemes,
    authoring.check, authoring.schema, authoring.family_check, authoring.new_plugin,
):  # fmt: skip
    cli.add_command(command)


class Terminated(BaseException):
    """SIGTERM came."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def main() -> NoReturn:
    """Run the command line; every foreseen failure is one message on stderr and an exit code, never a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it was closed
            stream.reconfigure(errors="backslashreplace")  # paths and plugins' texts may hold any character
    try:
        with _closed_pipes():
            _run()
    except ClosedPipe:  # end as quietly as other tools do
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # Python flushes both at its end, and would complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(141)


def _run() -> NoReturn:
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except MoeplugError as error:
        _stop(str(error), error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _stop("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Terminated:
        _stop("ended by SIGTERM", 143)
    except BrokenPipeError:
        raise
    except OSError as error:
        _stop(f"{error.filename or 'input/output'}: {error.strerror or error}", InputOutputError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["no room for a Python object"])[0]
        _stop(f"out of memory: {reason}; `moeplug plan` says what a load needs", 5)


def _stop(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    if code > 128:  # by a signal: torch's objects are not looked through once more, 1.8 s of 2 (0.3 without)
        gc.freeze()
    sys.exit(code)
