"""Runs a command line. User errors end it with one line on standard error, not a traceback."""

import io
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer
from typer._click.exceptions import UsageError  # Typer bundles Click; constraints.txt pins it

from runtime.core.errors import OutriderError


def run(app: typer.Typer, arguments: Sequence[str]) -> NoReturn:
    """Runs the app and exits: with code 2 after a user error, with 130 after Ctrl-C."""
    escape_unencodable()
    try:
        sys.exit(app(list(arguments), standalone_mode=False))
    except UsageError as error:
        fail(f"{error.format_message()} (see outrider --help)")
    except OutriderError as error:
        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def escape_unencodable() -> None:
    """Makes standard output and error escape the characters that their encoding lacks.

    Leaves an error handler that the user has chosen in PYTHONIOENCODING.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def fail(why: str) -> NoReturn:
    sys.stderr.write(f"outrider: {' '.join(why.split())}\n")
    sys.exit(2)
