"""`python -m bench.chaos` kills and stops targets and drafters, or changes their number, while
clients compare every token."""

import json
import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.chaos.run import ChaosOptions, run
from runtime.core.errors import OutriderError
from runtime.model_paths import bundled_model


def main(
    streams: Annotated[int, typer.Option(min=1, help="concurrent clients")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="duration")] = 120.0,
    targets: Annotated[int, typer.Option(min=1)] = 2,
    drafters: Annotated[int, typer.Option(min=0)] = 3,
    seed: Annotated[int, typer.Option(help="seed of requests and faults")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="tokens per answer")] = 96,
    every: Annotated[
        float, typer.Option(min=0.01, help="seconds between two faults or changes")
    ] = 1.0,
    scale: Annotated[
        int | None,
        typer.Option(min=1, help="inject no faults; vary the drafters from 0 to this number"),
    ] = None,
    target: Annotated[str, typer.Option(help="model")] = bundled_model("target"),
    draft: Annotated[str, typer.Option(help="model")] = bundled_model("draft"),
    out: Annotated[
        Path | None, typer.Option("--json", help="write the result into this file")
    ] = None,
) -> None:
    """Exit with code 1 if an answer failed, differed or did not arrive."""
    logging.disable(logging.WARNING)  # losses are counted instead
    console = Console(highlight=False)
    options = ChaosOptions(
        target, draft, streams, seconds, targets, drafters, tokens, seed, every, scale, streams
    )
    try:
        with console.status("starting Ray") as status:
            outcome = run(options, status.update if console.is_terminal else console.log)
    except OutriderError as error:
        console.print(str(error), style="red")
        raise typer.Exit(2) from error
    console.print(outcome.grid().terminal())
    for line in outcome.wrong[:20]:
        console.print(line, markup=False)
    if out is not None:
        out.write_text(json.dumps(outcome.as_json(), indent=1) + "\n")
    raise typer.Exit(0 if outcome.passed else 1)


if __name__ == "__main__":
    typer.run(main)
