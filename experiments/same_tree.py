"""`python -m experiments.same_tree` counts each head's tokens per step with trees of equal size.

The living schedule verifies as many rows as make it fastest, and fewer if a head makes rows
expensive. Its results therefore depend on the machine as well as on the head. Papers measure on
hardware on which a step of many rows takes as long as a step of one. This experiment only counts
tokens, and drops no pseudo row for its cost, so the result is the same on any machine.
"""

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from actors.compose import build_head, stop_checker_factory
from bench.core.options import RESULTS
from bench.core.prompts import Prompt, held_out_prompts
from bench.methods.study import HEADS, LEARNING_PROMPTS, NEW_TOKENS, TEMPERATURES
from bench.reports.grid import Grid
from runtime.config import HeadConfig
from runtime.core.messages import Request, Stats
from runtime.core.sampling_params import SamplingParams
from runtime.model_paths import bundled_model
from runtime.models.hf import HFModel
from runtime.models.loader import load_model, load_tokenizer
from runtime.models.sampler import choose
from runtime.schedulers.fixed import Fixed
from runtime.target.engine import Engine
from runtime.target.head_runner import MountedHead
from runtime.target.target import Target
from runtime.target.verifier import Verifier

ROW_COUNTS = (4, 8, 16)  # verified per step, besides the root
FILE = "same-tree.md"


@dataclass(frozen=True, slots=True)
class StepCount:
    """The tokens and steps of one head after its guesses have been calibrated."""

    head: str
    temperature: float
    rows: int
    tokens: int
    steps: int

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps


async def collect_stats(
    engine: Engine, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Stats]:
    """Return the stats of each text, decoded one after the other."""
    target, found = (
        Target(engine, stop_checker_factory(load_tokenizer(bundled_model("target")), frozenset())),
        [],
    )
    target.start()
    try:
        for number, prompt in enumerate(prompts):
            async for chunk in target.generate(
                Request(str(number), tuple(prompt.tokens), sampling)
            ):
                found += [chunk.stats] if chunk.stats else []
    finally:
        await target.stop()
    return found


def count_steps(
    model: HFModel, name: str, temperature: float, rows: int, prompts: Sequence[Prompt]
) -> StepCount:
    """Count the steps; the clock is frozen, so slow heads are queried too."""
    head = build_head(HeadConfig(method=name), model, load_tokenizer(bundled_model("target")))
    engine = Engine(
        model,
        Verifier(choose, frozenset()),
        Fixed(rows),
        lambda: 0.0,
        heads={name: MountedHead(head)},
    )
    sampling = SamplingParams(
        temperature=temperature, seed=1, max_tokens=NEW_TOKENS, ignore_eos=True
    )
    stats = asyncio.run(collect_stats(engine, prompts, sampling))[LEARNING_PROMPTS:]
    return StepCount(
        name,
        temperature,
        rows,
        sum(one.completion_tokens for one in stats),
        sum(one.rounds for one in stats),
    )


def results_grid(all_: Sequence[StepCount]) -> Grid:
    """Return a row per head and temperature, and a column per number of rows."""
    by = {(one.temperature, one.head, one.rows): f"{one.tokens_per_step:.2f}" for one in all_}
    lines = dict.fromkeys((one.temperature, one.head) for one in all_)
    cells = tuple(
        (f"{at:g}", head, *(by.get((at, head, rows), "-") for rows in ROW_COUNTS))
        for at, head in lines
    )
    return Grid(
        "tokens per step",
        ("temperature", "head", *(f"{rows} rows" for rows in ROW_COUNTS)),
        cells,
        words=("head",),
    )


def results_page(all_: Sequence[StepCount], prompts: int) -> str:
    return (
        "# Heads with the same tree\n\n"
        "Tokens per step if every step verifies the given number of rows besides the root, on the "
        f"shipped target without a drafter; {prompts} held-out prompts, {NEW_TOKENS} new "
        "tokens each "
        "(`python -m experiments.same_tree`). Tokens are only counted, so the figures do not "
        "depend "
        "on the machine. [methods.md](methods.md) shows the speed if every row costs time.\n\n"
        + results_grid(all_).markdown()
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="prompts")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shipped = bundled_model("target")
    model = load_model(shipped, "float32", "cpu", 1)
    prompts = held_out_prompts(load_tokenizer(shipped), LEARNING_PROMPTS + arguments.count, 2)
    console, cases = (
        Console(),
        [(at, rows, head) for at in TEMPERATURES for rows in ROW_COUNTS for head in HEADS],
    )
    found = [
        count_steps(model, head, at, rows, prompts)
        for at, rows, head in track(cases, "heads with the same tree", console=console)
    ]
    found.sort(key=lambda one: (one.temperature, HEADS.index(one.head), one.rows))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / FILE).write_text(results_page(found, arguments.count), "utf-8")
    console.print(results_grid(found).terminal())
    console.print(arguments.folder / FILE)


if __name__ == "__main__":
    main()
