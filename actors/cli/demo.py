"""`make demo`: compares a target alone with the target and what drafts for it.

The target is a chat model, which is fetched if it can be had, or else the bundled target. Both
ways generate the same text; only the speed differs.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from actors.cli.conversation import Conversation
from actors.cli.views.download_view import DownloadProgress
from actors.cli.views.generation_view import Progress, Stream, stats_table
from actors.launch.command_line import escape_unencodable
from actors.launch.model_download import pull
from actors.launch.prepare import check_models, prepare
from actors.launch.serving import OpenService, Service, serving
from actors.openai.usage import tokens_per_second
from bench.core.subprocess_call import call_in_subprocess
from bench.core.widen import widen_to_small
from runtime.config import Deployment
from runtime.core.errors import ModelRefused
from runtime.core.messages import Chunk, Request, Stats, Tokens
from runtime.core.sampling_params import SamplingParams
from runtime.deployment_builder import build_deployment
from runtime.model_paths import bundled_model, default_drafts
from runtime.models.catalogue import CATALOGUE, CHAT_MODEL

# Another question than those that count: token recycling remembers what it has read.
WARM_UP_QUESTION = "What is a glacier, and how does it form?"
QUESTIONS = ("Explain step by step how a bicycle stays upright, in simple words.",)
PYTHON = (
    'def read_config(path):\n    """Read the configuration from a file."""',
    'def copy_file(src, dst):\n    with open(src, "rb") as f:',
    "import os\nimport sys\n\n\ndef main(args):\n    if not args:",
)
MAX_TOKENS = {"chat": 160, "python": 96}
WARM_UP = 2  # uncounted runs, which fill caches and the runtime's measurements


@dataclass(frozen=True, slots=True)
class Comparison:
    """The stats of one prompt under one setting: with the target alone, and with drafts."""

    setting: str
    plain: Stats
    fast: Stats


@dataclass(frozen=True, slots=True)
class Demo:
    """What is shown.

    texts     what stands above each output
    prompts   the same as token ids
    settings  sampling parameters by name
    warm_up   the prompt of the uncounted runs
    """

    plan: Deployment
    texts: tuple[str, ...]
    prompts: tuple[Tokens, ...]
    settings: dict[str, SamplingParams]
    warm_up: Tokens


async def run(
    opener: OpenService, demo: Demo, console: Console, progress: Progress
) -> list[Comparison]:
    """Returns the stats of every prompt under every setting. Exits if the tokens differ."""
    prompts = demo.prompts
    found: list[Comparison] = []
    async with opener() as service:
        for number in range(WARM_UP):
            progress.note("warming up")
            for name, sampling in demo.settings.items():
                for speculation in (False, True):
                    await collect_stats(
                        service,
                        Request(
                            f"warm-{number}-{name}-{speculation}",
                            demo.warm_up,
                            sampling,
                            speculation,
                        ),
                        Stream(progress, quiet=True),
                    )
        for name, sampling in demo.settings.items():
            for number, prompt in enumerate(prompts):
                alone, drafted = Stream(progress, quiet=True), Stream(progress, quiet=False)
                console.rule(f"{name}, prompt {number + 1} of {len(prompts)}", style="dim")
                plain = await collect_stats(
                    service,
                    Request(f"off-{name}-{number}", prompt, sampling, speculation=False),
                    alone,
                )
                console.print(
                    demo.texts[number], style="dim", end="", highlight=False, markup=False
                )
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
    found = Table(title="the same tokens, with and without drafts", title_justify="left")
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


def chat_demo(console: Console) -> Demo:
    """Fetches the chat model unless it is here. Raises ModelRefused if it cannot be had."""
    with DownloadProgress(quiet=False) as progress:
        pull(CHAT_MODEL, progress.note, progress.report)
    plan = build_deployment(CHAT_MODEL, default_drafts(CHAT_MODEL), 1, "auto", "auto", local=True)
    found = check_models(plan)
    settings = settings_of(MAX_TOKENS["chat"])
    talk = Conversation(found.tokenizer, found.context, MAX_TOKENS["chat"])
    warm_up, *prompts = (
        talk.tokens([{"role": "user", "content": question}])
        for question in (WARM_UP_QUESTION, *QUESTIONS)
    )
    model = CATALOGUE[CHAT_MODEL]
    console.print(f"{model.summary}. {describe(plan)}")
    texts = tuple(f"{question}\n\n" for question in QUESTIONS)
    return Demo(plan, texts, tuple(prompts), settings, warm_up)


def bundled_demo(console: Console, small: bool) -> Demo:
    target, draft = bundled_model("target"), bundled_model("draft")
    if not small:
        with console.status("widening the target"):
            target = str(call_in_subprocess(widen_to_small, (target, "float32")))
        console.print(
            "The bundled target is widened to the cost of 88 million parameters; the added weights "
            "are zero."
        )
    plan = build_deployment(target, (draft,), 1, "auto", "auto", local=True)
    settings = settings_of(MAX_TOKENS["python"])
    prompts = tuple(prepare(plan, prompt, settings["greedy"]).prompt for prompt in PYTHON)
    console.print(describe(plan))
    return Demo(plan, PYTHON, prompts, settings, prompts[0])


def settings_of(max_tokens: int) -> dict[str, SamplingParams]:
    # Small models repeat themselves in greedy decoding; a mild penalty avoids that.
    return {
        "greedy": SamplingParams(repetition_penalty=1.1, max_tokens=max_tokens),
        "temperature 0.8": SamplingParams(temperature=0.8, seed=1, max_tokens=max_tokens),
    }


def describe(plan: Deployment) -> str:
    """Says where target and drafters run, and what the colours mean."""
    names = [*(head.method for head in plan.target.heads), *(pool.name for pool in plan.pools)]
    where = (
        "Target and drafter are Ray actors with cores of their own, connected by gRPC."
        if plan.pools
        else "The target is a Ray actor; the drafting method runs inside it."
    )
    return (
        f"{where} Drafts come from {', '.join(names)}. "
        "Green: guessed by the drafter. White: by the target."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-process", action="store_true", help="run without Ray and sockets")
    parser.add_argument(
        "--shipped", action="store_true", help="use the bundled pair, and no network"
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="use the bundled target as it is, which is hardly slower than the draft",
    )
    arguments = parser.parse_args()
    escape_unencodable()
    console = Console()
    if arguments.shipped or arguments.small:
        demo = bundled_demo(console, arguments.small)
    else:
        try:
            demo = chat_demo(console)
        except ModelRefused as error:
            console.print(f"{error}. This demo uses the bundled pair instead.", style="yellow")
            demo = bundled_demo(console, small=False)
    with (
        Progress(quiet=False) as progress,
        serving(demo.plan, None, arguments.in_process, progress.note) as opener,
    ):
        results = asyncio.run(run(opener, demo, console, progress))
    console.print(summary_table(results))


if __name__ == "__main__":
    main()
