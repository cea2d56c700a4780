"""`outrider doctor`: checks a pair of models, and estimates its speed-up."""

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from actors.cli.commands.options import Dtype, ModelDtype
from runtime.core.sampling_params import SamplingParams
from runtime.model_paths import bundled_model

if TYPE_CHECKING:
    from runtime.models.hf import HFModel

ROW_COUNTS = (1, 4, 8, 16, 32)
PROMPTS = (
    "def read_lines(path):\n    with open(path) as file:\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n",
    "Once upon a time there was",
    "import os\nimport sys\n\n\ndef main(argv):\n",
)


def doctor(
    target: Annotated[
        str | None,
        typer.Option(help="model name, folder or .gguf file; default: the one that ships"),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="model name, folder or .gguf file; default: the one that ships"),
    ] = None,
    dtype: ModelDtype = Dtype.auto,
    temperature: float = 0.0,
) -> None:
    """Check whether target and draft match, time their steps, and estimate the speed-up.

    Each model uses one thread.
    """
    # torch and transformers are slow to import
    from actors.launch.prepare import context_length
    from runtime.models.acceptance import RANKS, acceptance
    from runtime.models.loader import load_model, load_tokenizer
    from runtime.models.step_timing import step_times
    from runtime.models.vocab_check import check_pair

    names = (target or bundled_model("target"), draft or bundled_model("draft"))
    contexts = (context_length(names[0]), context_length(names[1]))
    tokenizer = load_tokenizer(names[0])
    warnings = check_pair(tokenizer, load_tokenizer(names[1]), names, contexts)
    console, progress = Console(highlight=False), Console(stderr=True)
    with progress.status("loading both models") as status:
        large, small = (load_model(name, dtype.value, threads=1) for name in names)
        status.update("measuring steps")
        large_times, small_times = (
            step_times(large, ROW_COUNTS, time.monotonic),
            step_times(small, ROW_COUNTS, time.monotonic),
        )
        status.update("measuring acceptance")
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        sampling = SamplingParams(temperature=temperature, max_tokens=min(64, contexts[0] // 2))
        rates = acceptance(large, small, prompts, sampling, frozenset())
    console.print(
        f"The pair matches: {len(tokenizer)} tokens in both vocabularies, "
        f"context {contexts[0]} and {contexts[1]}."
    )
    for warning in warnings:
        console.print(f"note: {warning}", style="yellow")
    console.print(steps_table(large_times, small_times))
    console.print(f"kernel      {kernel_line(large)}", soft_wrap=True)
    console.print("acceptance  " + "  ".join(f"first {rank}: {rates[rank]:.2f}" for rank in RANKS))
    ratio = large_times[1] / small_times[1]
    console.print(f"c = T/t     {ratio:.1f}: the speed-up cannot exceed {1 + ratio:.1f}")
    console.print(
        f"expected    {expected_speedup(rates, large_times, small_times):.1f} times, with a device "
        "each"
    )


def kernel_line(model: "HFModel") -> str:
    """Name the kernels of a model's products, and the times by which they were chosen."""
    from runtime.kernels.kernel_choice import ROW_COUNTS as MEASURED_ROWS
    from runtime.models.fast_path import kernels_of

    kernels = kernels_of(model)
    names = sorted({choice.kernel for choice in kernels}) or ["torch"]
    line = f"{str(model.dtype).removeprefix('torch.')}, {' and '.join(names)}"
    measured = [choice for choice in kernels if choice.times]
    if not measured:
        return f"{line}: no other serves this type here"
    largest = max(measured, key=lambda choice: choice.shape[0] * choice.shape[1])
    times = ", ".join(
        f"{name} {'/'.join(f'{ms:.2f}' for ms in found)}" for name, found in largest.times.items()
    )
    return (
        f"{line}: ms for {'/'.join(map(str, MEASURED_ROWS))} rows of a "
        f"{largest.shape[0]} x {largest.shape[1]} matrix: {times}"
    )


def expected_speedup(
    rates: dict[int, float], large: dict[int, float], small: dict[int, float]
) -> float:
    """Estimates the speed-up over plain decoding by a rule of thumb.

    While a step of n rows runs, the draft grows by T(n)/t(4) levels of four children each. The
    target accepts the first level at the rate of rank 4, since siblings hedge, and each level below
    at the rate of rank 2. The best n counts.
    """
    best = 1.0
    for width in ROW_COUNTS[1:]:
        levels = int(min(width, large[width] / small[4]))
        reached = rates[4] * sum(rates[2] ** depth for depth in range(levels))
        best = max(best, (1.0 + reached) * large[1] / large[width])
    return min(best, 1.0 + large[1] / small[1])


def steps_table(large: dict[int, float], small: dict[int, float]) -> Table:
    found = Table(
        title="milliseconds per step", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    found.add_column("rows")
    for width in ROW_COUNTS:
        found.add_column(str(width), justify="right")
    for name, times in (("target T", large), ("draft t", small)):
        found.add_row(name, *(f"{1000 * times[width]:.1f}" for width in ROW_COUNTS))
    return found
