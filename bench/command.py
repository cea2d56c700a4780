"""`outrider bench`: what asynchronous speculation brings on this machine, beside every other way to use the same models and cores."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from runtime.core.errors import InvalidRequest


class Precision(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def bench(
    target: Annotated[
        str | None,
        typer.Option(
            help="folder of a model; default: the one that ships, widened to the cost of 88M"
        ),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="folder of a model; default: the one that ships")
    ] = None,
    widen: Annotated[
        bool,
        typer.Option("--widen", help="widen --target too (Llama models): same function, more work"),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="file (text, .json, .jsonl) or folder; default: held-out files"),
    ] = None,
    count: Annotated[int | None, typer.Option(help="prompts [default: 5]")] = None,
    repetitions: Annotated[
        int | None, typer.Option(help="of our own methods at the lowest temperature [default: 2]")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="[default: 128]")] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="repeatable [default: 0 and 0.8]")
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="prompts at a time, repeatable [default: 4, 8, 16]; 0: none"),
    ] = None,
    dtype: Annotated[
        Precision,
        typer.Option(help="auto: bfloat16 where the processor multiplies it, else float32"),
    ] = Precision.auto,
    seed: Annotated[int, typer.Option(help="of prompts and sampling")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="a little of everything, to see that it works")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="for results and page; default: bench/results, of a quick run build/bench"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="of results and page; default: pair and dtype")
    ] = None,
) -> None:
    """Measure all methods on two cores, in turns, and compare them."""
    from bench.core import options as sizes  # torch and Ray: `--help` and a wrong flag need neither
    from bench.core.machine import machine
    from bench.reports import report
    from bench.run import benchmark, differing_methods

    default = sizes.QUICK if quick else sizes.FULL
    size = sizes.Size(
        count=default.count if count is None else count,
        repetitions=default.repetitions if repetitions is None else repetitions,
        new_tokens=default.new_tokens if new_tokens is None else new_tokens,
        temperatures=tuple(temperature or default.temperatures),
        batches=default.batches if not batch else () if batch == [0] else tuple(batch),
    )
    if widen and target is None:
        raise InvalidRequest(
            "--widen without --target: the default target is widened anyway", "widen"
        )
    ours, theirs = sizes.shipped_pair()
    kind = sizes.choose_dtype(dtype.value, machine(2).flags)
    stem = "shipped" if target is None and draft is None else Path(target or ours).name
    wanted = sizes.BenchOptions(
        target=target or ours,
        draft=draft or theirs,
        widen=widen or target is None,
        dtype=kind,
        prompts=prompts,
        size=sizes.validated(size),
        seed=seed,
        quick=quick,
        folder=folder or sizes.folder_for(quick),
        name=name or f"{stem}-{kind}" + ("-quick" if quick else ""),
    )
    console = Console()
    found = benchmark(wanted, console)
    report.print_report(found, console)
    console.print(f"{wanted.folder / wanted.name}.md", highlight=False)
    if kind == "float32" and (others := differing_methods(found)):
        console.print(f"not the text of plain decoding: {', '.join(others)}", style="red")
        sys.exit(1)
