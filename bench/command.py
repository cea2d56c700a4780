"""The command `outrider bench` compares asynchronous speculation with every other way to use the
same models and cores of this machine."""

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
            help="model folder; default: the shipped target, widened to the cost of 88M parameters"
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="model folder, or a drafting method or its trained folder, such as eagle; "
            "default: the shipped draft"
        ),
    ] = None,
    llama_cpp: Annotated[
        bool,
        typer.Option(
            "--llama-cpp",
            help="llama.cpp takes part, on the GGUF file that --target names; it is compiled in an "
            "environment of its own at the first use (15 minutes)",
        ),
    ] = False,
    widen: Annotated[
        bool,
        typer.Option(
            "--widen", help="also widen --target (Llama models): same outputs, more computation"
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="prompt file (text, .json, .jsonl) or folder; default: questions for a chat "
            "model, held-out files for others"
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(help="number of prompts [default: 5]")] = None,
    repetitions: Annotated[
        int | None,
        typer.Option(help="runs of our own methods at the lowest temperature [default: 2]"),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="new tokens per prompt [default: 128]")
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="sampling temperature, repeatable [default: 0 and 0.8]"),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="batch size, repeatable [default: 4, 8, 16]; 0: no batches"),
    ] = None,
    dtype: Annotated[
        Precision,
        typer.Option(help="auto: bfloat16 if the processor supports it natively, else float32"),
    ] = Precision.auto,
    seed: Annotated[int, typer.Option(help="seed of prompts and sampling")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="a small run of every part, to check that it works")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="folder of the results; default: bench/results, or build/bench with --quick"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="name of the results; default: pair and dtype")
    ] = None,
) -> None:
    """Measure all methods on two cores, interleaved, and compare them."""
    from bench.core import options as sizes  # imports torch and Ray, not needed for --help
    from bench.core.machine import machine
    from bench.reports import report
    from bench.run import benchmark, differing_methods, gguf_of
    from runtime.deployment_builder import resolve_drafter

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
    method, model, layers = resolve_drafter(draft or theirs)
    if layers:
        raise InvalidRequest(
            f"draft {draft!r} is a choice of layers: give another drafter", "draft"
        )
    gguf = gguf_of(target or ours) if llama_cpp else None
    kind = sizes.choose_dtype(dtype.value, machine(2).flags)
    stem = "shipped" if target is None and draft is None else Path(target or ours).name
    wanted = sizes.BenchOptions(
        target=target or ours,
        draft=model,
        method=method,
        gguf=gguf,
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
        console.print(f"text differs from plain decoding: {', '.join(others)}", style="red")
        sys.exit(1)
