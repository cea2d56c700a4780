"""`python -m bench` runs `outrider bench`."""

import sys

import typer

from actors.launch.command_line import run
from bench.command import bench

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(bench)
    run(app, sys.argv[1:])
