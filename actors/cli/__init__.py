"""The command `outrider`."""

import sys

import typer
from typer._click.exceptions import UsageError  # Typer brings its own copy of Click; constraints.txt pins it

from actors.cli.commands.bench import bench
from actors.cli.commands.certs import certs
from actors.cli.commands.compare import compare
from actors.cli.commands.configure import configure
from actors.cli.commands.doctor import doctor
from actors.cli.commands.down import down
from actors.cli.commands.drain import drain
from actors.cli.commands.generate import generate
from actors.cli.commands.jobs import jobs
from actors.cli.commands.logs import logs
from actors.cli.commands.plan import plan
from actors.cli.commands.scale import scale
from actors.cli.commands.serve import serve
from actors.cli.commands.status import status
from actors.cli.commands.submit import submit
from actors.cli.commands.top import top
from actors.cli.commands.tracing import trace
from actors.cli.commands.train import train
from actors.cli.commands.tune import tune
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
app.command()(certs)
app.command()(submit)
app.command()(jobs)
app.command()(serve)
app.command()(status)
app.command()(top)
app.command()(scale)
app.command()(drain)
app.command()(logs)
app.command()(compare)
app.command("config")(configure)
app.command()(down)
app.add_typer(train, name="train")
app.add_typer(tune, name="tune")


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
