"""`python -m bench.soak` runs a served fleet for hours under mixed traffic and faults, and looks
whether it loses memory, files, threads or sessions, or changes a text."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.soak.growth import HOUR_S
from bench.soak.run import SoakOptions, run
from bench.soak.soak_plots import draw_soak
from runtime.core.errors import OutriderError
from runtime.model_paths import bundled_model


def main(
    hours: Annotated[float, typer.Option(min=0.001, help="duration, also a fraction")] = 12.0,
    clients: Annotated[int, typer.Option(min=1, help="concurrent clients")] = 6,
    targets: Annotated[int, typer.Option(min=1, help="the first is never hit")] = 2,
    drafters: Annotated[int, typer.Option(min=0, help="the first is never hit")] = 2,
    seed: Annotated[int, typer.Option(help="seed of requests and faults")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="tokens per answer")] = 64,
    every: Annotated[float, typer.Option(min=1, help="seconds between two faults")] = 60.0,
    sample: Annotated[float, typer.Option(min=0.1, help="seconds between two samples")] = 5.0,
    goal: Annotated[float, typer.Option(help="growth of memory allowed, MiB per hour")] = 1.0,
    target: Annotated[str, typer.Option(help="model")] = bundled_model("target"),
    draft: Annotated[str, typer.Option(help="model")] = bundled_model("draft"),
    out: Annotated[Path, typer.Option(help="write OUT.md, OUT.json and OUT.png")] = Path(
        "build/soak"
    ),
) -> None:
    """Exit with code 1 if something leaks or is left open, or an answer failed or differed."""
    logging.disable(logging.WARNING)  # losses are counted instead
    console = Console(highlight=False)
    options = SoakOptions(
        target,
        draft,
        hours * HOUR_S,
        clients,
        targets,
        drafters,
        tokens,
        seed,
        every,
        sample,
        goal,
    )
    with tempfile.TemporaryDirectory(prefix="outrider-soak-") as folder:
        os.environ["XDG_DATA_HOME"] = folder  # of its batch jobs
        try:
            with console.status("starting Ray") as status:
                note = status.update if console.is_terminal else console.log
                report = run(options, Path(folder), note)
        except OutriderError as error:
            console.print(str(error), style="red")
            raise typer.Exit(2) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    page, data, picture = (out.with_name(f"{out.name}.{kind}") for kind in ("md", "json", "png"))
    draw_soak(report, picture)
    page.write_text(report.markdown(picture.name))
    data.write_text(json.dumps(report.as_json()) + "\n")
    console.print(report.grid().terminal())
    console.print(report.growth_grid().terminal())
    for line in report.lines[:20]:
        console.print(line, markup=False)
    raise typer.Exit(0 if report.passed else 1)


if __name__ == "__main__":
    typer.run(main)
