"""`make demo`: the pair that ships writes Python, first the target alone, then with its drafter; same tokens, other speed."""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from actors.cli.prepare import prepare
from actors.cli.service import Opener, serving
from actors.cli.show import Progress, Stream, table, tokens_per_second
from runtime import config
from runtime.messages import Chunk, Request, Stats
from runtime.sampling import Sampling

PROMPTS = (
    'def read_config(path):\n    """Read the configuration from a file."""\n',
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "import unittest\n\n\nclass TestStack(unittest.TestCase):\n    def test_push(self):\n",
)
MAX_TOKENS = 128
TEMPERATURES = (0.0, 0.8)
WARM_UP = 2  # runs that are not counted: caches, and the runtime's own measurements


async def run(opener: Opener, prompts: Sequence[tuple[int, ...]], console: Console, progress: Progress) -> list[tuple[float, Stats, Stats]]:
    """(temperature, figures of the target alone, figures with drafts) of every prompt. Exits where the tokens differ."""
    found: list[tuple[float, Stats, Stats]] = []
    async with opener() as service:
        for number in range(WARM_UP):
            progress.note("warming up")
            sampling = Sampling(max_tokens=MAX_TOKENS)
            for speculation in (False, True):
                async for _ in service.generate(Request(f"warm-{number}-{speculation}", prompts[number], sampling, speculation)):
                    pass
        for temperature in TEMPERATURES:
            for number, prompt in enumerate(prompts):
                sampling = Sampling(temperature=temperature, seed=1, max_tokens=MAX_TOKENS)
                alone, drafted = Stream(progress, quiet=True), Stream(progress, quiet=False)
                console.rule(f"temperature {temperature:g}, prompt {number + 1} of {len(prompts)}", style="dim")
                plain = await collect(service, Request(f"off-{temperature}-{number}", prompt, sampling, speculation=False), alone)
                console.print(PROMPTS[number], style="dim", end="", highlight=False, markup=False)
                fast = await collect(service, Request(f"on-{temperature}-{number}", prompt, sampling), drafted)
                console.print()
                if (alone.tokens, alone.text) != (drafted.tokens, drafted.text):
                    console.print(f"the texts differ: {alone.text!r} without drafts", style="red")
                    sys.exit(1)
                console.print(table(fast, "the same text as the target alone"))
                found.append((temperature, plain, fast))
    return found


async def collect(service: object, request: Request, stream: Stream) -> Stats:
    last: Chunk | None = None
    async for chunk in service.generate(request):  # type: ignore[attr-defined]
        stream.show(chunk)
        last = chunk
    if last is None or last.stats is None:
        raise RuntimeError("the target ended the stream without its figures")
    return last.stats


def summary(results: Sequence[tuple[float, Stats, Stats]]) -> Table:
    found = Table(title="the same tokens, with and without the drafter", title_justify="left")
    for name in ("temperature", "target alone", "with drafts", "speed-up", "tokens per target step"):
        found.add_column(name, justify="right")
    for temperature, plain, fast in results:
        alone, drafted = tokens_per_second(plain), tokens_per_second(fast)
        steps = fast.completion_tokens / fast.rounds
        found.add_row(f"{temperature:g}", f"{alone:.1f} tokens/s", f"{drafted:.1f} tokens/s", f"{drafted / alone:.2f} x", f"{steps:.2f}")
    ratios = [tokens_per_second(fast) / tokens_per_second(plain) for _, plain, fast in results]
    found.add_section()
    found.add_row("median", "", "", f"{statistics.median(ratios):.2f} x", "")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-process", action="store_true", help="without Ray and sockets")
    arguments = parser.parse_args()
    target, draft = config.shipped("target"), config.shipped("draft")
    plan = config.deployment(target, (draft,), 1, "auto", "auto", local=True)
    prompts = [prepare(plan, prompt, Sampling(max_tokens=MAX_TOKENS)).prompt for prompt in PROMPTS]
    console = Console()
    console.print(
        "Target and drafter are Ray actors on a core each; they talk gRPC. Green: guessed by the drafter. White: the target's own."
    )
    with Progress(quiet=False) as progress, serving(plan, None, arguments.in_process, progress.note) as opener:
        results = asyncio.run(run(opener, prompts, console, progress))
    console.print(summary(results))


if __name__ == "__main__":
    main()
