"""The command line: ``multicard`` or ``python -m multicard``.

Each command is a module with a thin function over the Python interface, registered below. Commands that start ranks
take the shared options of :mod:`multicard.cli.options`. Exit code 2 is invalid input, 1 a failed run, 130 Ctrl-C, each
with one line on standard error. With ``--json`` standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from multicard import errors
from multicard.cli import generate, image, info, run
from multicard.cli.interrupts import INTERRUPTED, Interrupts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("generate")(generate.generate)
app.command("image")(image.image)
app.command("info")(info.info)
app.command("run", context_settings=run.CONTEXT)(run.run)

BAD_INPUT = (errors.ConfigError, errors.UnsupportedError, errors.CheckpointError)


@app.callback()
def multicard() -> None:
    """Transformer inference on several cards at once."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command in ``args`` (None: the process's own) and exit with its code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported; ranks do the same
    _check_surroundings()
    interrupts = Interrupts()
    try:
        code = app(args=args, prog_name="multicard", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED)
    except BAD_INPUT as error:
        _fail(str(error), 2, error)
    except errors.MulticardError as error:
        _fail(str(error), 1, error)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # raised by typer: an unknown flag, an invalid value
        if usage is not None:
            _fail(f"{usage()} See `multicard --help`.", 2)
        _fail(_describe(error), 1, error)
    finally:
        interrupts.restore()
    if code == INTERRUPTED:  # typer has caught Ctrl-C itself
        _fail("interrupted", INTERRUPTED)
    sys.exit(code)


def _check_surroundings() -> None:
    """A shell may close the standard streams, its locale may lack an answer's characters, and in a folder that
    was deleted torch can't be imported.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the end
    if sys.stdout is None:
        _fail("standard output is closed: there is nowhere to print to", 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        os.getcwd()
    except FileNotFoundError:
        os.chdir("/")


def _describe(error: Exception) -> str:
    cause = error.__cause__
    if isinstance(cause, errors.RankError):
        return f"{cause}: {error}" if str(error) not in str(cause) else str(cause)
    return f"{type(error).__name__}: {error}"


def _fail(message: str, code: int, error: Exception | None = None) -> NoReturn:
    """Print one line; if MULTICARD_TRACEBACK is set, also the traceback and notes of ``error``."""
    if error is not None and os.environ.get("MULTICARD_TRACEBACK", "0") != "0":
        raise error
    line = message.strip().splitlines()[0] if message.strip() else "failed"
    print(f"multicard: {line}", file=sys.stderr)
    sys.exit(code)
