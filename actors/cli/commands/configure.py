"""`outrider config`: checks a deployment file, or prints an example."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from actors.cli.commands.options import Json
from runtime import config
from runtime.core.errors import InvalidRequest

EXAMPLE = Path(__file__).with_name("example.yaml")


def configure(
    file: Annotated[Path | None, typer.Argument(help="deployment file to check")] = None,
    example: Annotated[
        bool, typer.Option("--example", help="print a commented example with every field")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a deployment file, or print an example."""
    if (file is not None) == example:
        raise InvalidRequest("give either a deployment file or --example", "file")
    if file is None:
        sys.stdout.write(EXAMPLE.read_text("utf-8"))
        return
    plan = config.load_deployment(file)
    if as_json:
        sys.stdout.write(plan.model_dump_json() + "\n")
    else:
        pools = (
            ", ".join(
                f"{pool.name} ({pool.count} of {pool.model or pool.method})" for pool in plan.pools
            )
            or "none"
        )
        sys.stdout.write(
            f"{file} is valid: target {plan.target.model}, {plan.target.replicas} replicas; "
            f"pools: {pools}\n"
        )
