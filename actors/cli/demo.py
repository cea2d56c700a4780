"""`make demo`: compares the bundled target alone with the target and its drafter.

Both generate the same Python; only the speed differs.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from actors.cli.views.generation_view import Progress, Stream, stats_table
from actors.launch.prepare import prepare
from actors.launch.serving import OpenService, Service, serving
from actors.openai.usage import tokens_per_second
from bench.core.subprocess_call import call_in_subprocess
from bench.core.widen import widen_to_small
from runtime.core.messages import Chunk, Request, Stats
from runtime.core.sampling_params import SamplingParams
from runtime.deployment_builder import build_deployment
from runtime.model_paths import bundled_model

PROMPTS = (
    'def read_config(path):\n    """Read the configuration from a file."""',
    'def copy_file(src, dst):\n    with open(src, "rb") as f:',
    "import os\nimport sys\n\n\ndef main(args):\n    if not args:",
)
MAX_TOKENS = 96
# Small models repeat themselves in greedy decoding; a mild penalty avoids that.
SETTINGS = {
    "greedy": SamplingParams(repetition_penalty=1.1, max_tokens=MAX_TOKENS),
    "temperature 0.8": SamplingParams(temperature=0.8, seed=1, max_tokens=MAX_TOKENS),
}
WARM_UP = 2  # uncounted runs, which fill caches and the runtime's measurements


@dataclass(frozen=True, slots=True)
class Comparison:
    """The stats of one prompt under one setting: with the target alone, and with drafts."""

    setting: str
    plain: Stats
    fast: Stats


async def run(
    opener: OpenService, prompts: Sequence[tuple[int, ...]], console: Console, progress: Progress
) -> list[Comparison]:
    """Returns the stats of every prompt under every setting. Exits if the tokens differ."""
    found: list[Comparison] = []
    async with opener() as service:
        for number in range(WARM_UP):
            progress.note("warming up")
            for name, sampling in SETTINGS.items():
                for speculation in (False, True):
                    await collect_stats(
                        service,
                        Request(
                            f"warm-{number}-{name}-{speculation}",
                            prompts[number],
                            sampling,
                            speculation,
                        ),
                        Stream(progress, quiet=True),
                    )
        for name, sampling in SETTINGS.items():
            for number, prompt in enumerate(prompts):
                alone, drafted = Stream(progress, quiet=True), Stream(progress, quiet=False)
                console.rule(f"{name}, prompt {number + 1} of {len(prompts)}", style="dim")
                plain = await collect_stats(
                    service,
                    Request(f"off-{name}-{number}", prompt, sampling, speculation=False),
                    alone,
                )
                console.print(PROMPTS[number], style="dim", end="", highlight=False, markup=False)
                fast = await collect_stats(
                    service, Request(f"on-{name}-{number}", prompt, sampling), drafted
                )
                console.print()
                if (alone.tokens, alone.text) != (drafted.tokens, drafted.text):
                    console.print(f"the texts differ: {alone.text!r} without drafts", style="red")
                    sys.exit(1)
                console.print(stats_table(fast, "same text as the target alone"))
                found.append(Comparison(name, plain, fast))
    return found


async def collect_stats(service: Service, request: Request, stream: Stream) -> Stats:
    last: Chunk | None = None
    async for chunk in service.generate(request):
        stream.show(chunk)
        last = chunk
    if last is None or last.stats is None:
        raise RuntimeError("the target ended the stream without stats")
    return last.stats


def summary_table(results: Sequence[Comparison]) -> Table:
    found = Table(title="the same tokens, with and without the drafter", title_justify="left")
    for name in ("", "target alone", "with drafts", "speed-up", "tokens/step"):
        found.add_column(name, justify="right")
    for pair in results:
        alone, drafted = tokens_per_second(pair.plain), tokens_per_second(pair.fast)
        steps = pair.fast.completion_tokens / pair.fast.rounds
        found.add_row(
            pair.setting,
            f"{alone:.1f} tokens/s",
            f"{drafted:.1f} tokens/s",
            f"{drafted / alone:.2f} x",
            f"{steps:.2f}",
        )
    ratios = [tokens_per_second(pair.fast) / tokens_per_second(pair.plain) for pair in results]
    found.add_section()
    found.add_row(
        "median",
        "",
        "",
        f"{statistics.median(ratios):.2f} x",
        f"{min(ratios):.2f} to {max(ratios):.2f} x",
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-process", action="store_true", help="run without Ray and sockets")
    parser.add_argument(
        "--small",
        action="store_true",
        help="use the bundled target as it is, which is hardly slower than the draft",
    )
    arguments = parser.parse_args()
    target, draft = bundled_model("target"), bundled_model("draft")
    console = Console()
    if not arguments.small:
        with console.status("widening the target"):
            target = str(call_in_subprocess(widen_to_small, (target, "float32")))
        console.print(
            "The bundled target is widened to the cost of 88 million parameters; the added weights "
            "are zero."
        )
    plan = build_deployment(target, (draft,), 1, "auto", "auto", local=True)
    prompts = [prepare(plan, prompt, SETTINGS["greedy"]).prompt for prompt in PROMPTS]
    console.print(
        "Target and drafter are Ray actors with a core each, connected by gRPC. "
        "Green: guessed by the drafter. White: by the target."
    )
    with (
        Progress(quiet=False) as progress,
        serving(plan, None, arguments.in_process, progress.note) as opener,
    ):
        results = asyncio.run(run(opener, prompts, console, progress))
    console.print(summary_table(results))


if __name__ == "__main__":
    main()
