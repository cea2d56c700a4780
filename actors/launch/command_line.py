"""Runs a command line. User errors end it with one line on standard error, not a traceback."""

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer
from typer._click.exceptions import UsageError  # Typer bundles Click; constraints.txt pins it

from runtime.core.errors import OutriderError


def run(app: typer.Typer, arguments: Sequence[str]) -> NoReturn:
    """Runs the app and exits: with code 2 after a user error, with 130 after Ctrl-C."""
    try:
        sys.exit(app(list(arguments), standalone_mode=False))
    except UsageError as error:
        fail(f"{error.format_message()} (see outrider --help)")
    except OutriderError as error:
        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def fail(why: str) -> NoReturn:
    sys.stderr.write(f"outrider: {' '.join(why.split())}\n")
    sys.exit(2)
