"""The command `outrider`."""

import sys

import typer
from typer._click.exceptions import UsageError  # Typer brings its own copy of Click; constraints.txt pins it

from actors.cli.bench import bench
from actors.cli.doctor import doctor
from actors.cli.generate import generate
from actors.cli.plan import plan
from actors.cli.tracing import trace
from runtime.errors import OutriderError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Asynchronous speculative decoding: drafters guess ahead on other devices, the output is exactly the target's.",
)
app.command()(generate)
app.command()(doctor)
app.command()(plan)
app.command()(trace)
app.command()(bench)


def main() -> None:
    """Exit code 2 and one line for what the user can mend, 130 after Ctrl-C."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UsageError as error:
        fail(f"{error.format_message()} (see outrider --help)")
    except OutriderError as error:
        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def fail(why: str) -> None:
    sys.stderr.write(f"outrider: {' '.join(why.split())}\n")
    sys.exit(2)
