"""`python -m experiments.divergence` shows when speculation in bfloat16 changes the text.

A pass over several rows sums in another order than a pass over one row. In float32 this has never
changed a choice here. In bfloat16, which has eight significant bits, two nearly equal tokens may
swap. So each first difference must be a near-tie: in a replay of the common text the two logits are
only a few bfloat16 steps apart.
"""

import argparse
import asyncio
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from actors.launch.serving import local_service
from bench.core.outrider_runner import ask_all
from bench.core.prompts import held_out_prompts
from runtime import config
from runtime.core.messages import Request, Tokens
from runtime.core.sampling_params import SamplingParams
from runtime.deployment_builder import build_deployment
from runtime.model_paths import bundled_model
from runtime.models.base import causal
from runtime.models.hf import HFModel
from runtime.models.loader import load_model, load_tokenizer

BF16_STEP = 2.0**-7  # spacing of bfloat16 numbers relative to the power of two below them
MAX_TIE_STEPS = 8  # logits are sums of many rounded numbers


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first difference of two outputs: its position, the two tokens, and their logits in the
    replay."""

    place: int
    tokens: tuple[int, int]
    logits: tuple[float, float]

    @property
    def steps(self) -> float:
        """The distance of the logits in bfloat16 steps of their magnitude."""
        first, second = self.logits
        return abs(first - second) / (
            BF16_STEP * 2.0 ** math.floor(math.log2(max(abs(first), abs(second), 1e-30)))
        )

    @property
    def near_tie(self) -> bool:
        return self.steps <= MAX_TIE_STEPS


def first_divergence(
    model: HFModel, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]
) -> Divergence | None:
    """Return the first difference, or None if the outputs are equal or one is a prefix of the
    other.

    The replay is one causal pass over the common text.
    """
    place = next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None
    )
    if place is None:
        return None
    text = np.asarray([*prompt, *one[:place]])
    logits = model.forward(model.new_cache(), causal(text, 0), last=1)[0].float()
    tokens = one[place], other[place]
    return Divergence(place, tokens, (float(logits[tokens[0]]), float(logits[tokens[1]])))


async def answer_both_ways(
    deployment: config.Deployment, prompts: Sequence[Tokens], sampling: SamplingParams
) -> list[tuple[Tokens, Tokens]]:
    """Answer each prompt with speculation and without."""
    found = []
    async with local_service(deployment, lambda note: None) as service:
        for prompt in track(prompts, "writing", console=Console(stderr=True)):
            _, (guessed,) = await ask_all(service, [prompt], sampling)
            plain: list[int] = []
            async for chunk in service.generate(
                Request(uuid.uuid4().hex, prompt, sampling, speculation=False)
            ):
                plain += chunk.tokens
            found.append((tuple(guessed.tokens), tuple(plain)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default=bundled_model("target"))
    parser.add_argument("--draft", default=bundled_model("draft"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--count", type=int, default=20, help="held-out prompts")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per output")
    given = parser.parse_args()
    deployment = build_deployment(
        given.target, (given.draft,), 1, given.dtype, "auto", local=True, policy="sync"
    )
    prompts = [
        prompt.tokens
        for prompt in held_out_prompts(load_tokenizer(given.target), given.count, seed=1)
    ]
    written = asyncio.run(
        answer_both_ways(deployment, prompts, SamplingParams(max_tokens=given.tokens))
    )
    model = load_model(given.target, given.dtype)
    table = Table(
        title=f"{given.dtype}: texts that differ with and without speculation", title_justify="left"
    )
    for column in ("prompt", "equal tokens", "logits", "steps apart", "near-tie"):
        table.add_column(column, justify="right")
    found = [
        (number, first_divergence(model, prompt, *texts))
        for number, (prompt, texts) in enumerate(zip(prompts, written, strict=True))
    ]
    for number, one in found:
        if one is not None:
            figures = (
                str(one.place),
                f"{one.logits[0]:.4f} and {one.logits[1]:.4f}",
                f"{one.steps:.1f}",
                "yes" if one.near_tie else "NO",
            )
            table.add_row(str(number), *figures)
    console = Console()
    console.print(table)
    differ = [one for _, one in found if one is not None]
    console.print(
        f"{len(differ)} of {len(prompts)} texts differ; "
        f"{sum(one.near_tie for one in differ)} of these at a near-tie"
    )
    raise SystemExit(any(not one.near_tie for one in differ))


if __name__ == "__main__":
    main()
