"""The command `outrider`."""

import sys

import typer

from actors.cli.commands.certs import certs
from actors.cli.commands.chat import chat
from actors.cli.commands.compare import compare
from actors.cli.commands.configure import configure
from actors.cli.commands.doctor import doctor
from actors.cli.commands.down import down
from actors.cli.commands.drain import drain
from actors.cli.commands.generate import generate
from actors.cli.commands.jobs import jobs
from actors.cli.commands.logs import logs
from actors.cli.commands.plan import plan
from actors.cli.commands.pull import pull
from actors.cli.commands.scale import scale
from actors.cli.commands.serve import serve
from actors.cli.commands.status import status
from actors.cli.commands.submit import submit
from actors.cli.commands.top import top
from actors.cli.commands.tracing import trace
from actors.cli.commands.train import train
from actors.cli.commands.tune import tune
from actors.launch.command_line import run
from bench.command import bench

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Asynchronous speculative decoding: drafters guess ahead on other devices, "
    "and the output is exactly the target's.",
)
app.command()(generate)
app.command()(chat)
app.command()(pull)
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
    """Runs the command of the arguments, --help if there are none. Exits as `command_line.run`."""
    run(app, sys.argv[1:] or ["--help"])
