"""Real pairs of models produce the target's own tokens, which are those of transformers."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from actors.compose import build_drafter, build_target
from runtime.config import DrafterConfig, TargetConfig
from runtime.core.messages import Request
from runtime.core.sampling_params import SamplingParams
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.model import ModelDrafter
from runtime.model_paths import bundled_model
from runtime.models.loader import load_model
from runtime.models.sampler import choose
from tests.support.harness import (
    Lockstep,
    Output,
    answer,
    asking,
    attached,
    engine_of,
    plain,
    transformers_greedy,
    transformers_replay,
)
from training.stdlib_corpus import prompts


def in_lockstep(
    target: str, draft: str, asked: Sequence[Sequence[int]], count: int, generated: int, passes: int
) -> float:
    """Asserts that drafts change nothing and that the output is that of transformers.

    transformers generates for the first `generated` prompts and scores the output of all. The
    first prompt runs alone, then all of them together. Returns the tokens per target step.
    """
    model, eos = load_model(target, "float32", "cpu"), end_of_text(target)
    drafter = ModelDrafter(load_model(draft, "float32", "cpu"), branches=2)
    requests = [
        asking(prompt, f"s{number}", max_tokens=count) for number, prompt in enumerate(asked)
    ]

    def guided(*requests: Request) -> list[Output]:
        draft_engine = DraftEngine(drafter, "d", 2 * len(requests))
        return Lockstep(engine_of(model, 8, eos, choose), draft_engine, passes=passes).run(
            *requests
        )

    found = guided(*requests)
    alone = Lockstep(engine_of(model, eos=eos, chooser=choose)).run(
        *(replace(request, speculation=False) for request in requests)
    )
    assert [on.said() for on in found] == [off.said() for off in alone]
    assert (
        guided(requests[0])[0].said()
        == plain(model, requests[0], eos, choose).said()
        == found[0].said()
    )
    for number, (prompt, on) in enumerate(zip(asked, found, strict=True)):
        assert on.tokens == transformers_replay(model.module, prompt, on.tokens)
        if number < generated:
            assert on.tokens == transformers_greedy(model.module, prompt, count)
    return sum(len(on.tokens) for on in found) / sum(on.stats.rounds for on in found)


def composed(target: str, draft: str, asked: Sequence[Sequence[int]], count: int) -> None:
    """Asserts that drafts change nothing with threads, scheduler and tokenizer in one process."""

    async def main() -> None:
        running_target = build_target(
            TargetConfig(model=target, dtype="float32", device="cpu")
        ).target
        host = build_drafter(
            DrafterConfig(name="d", model=draft, dtype="float32", device="cpu"), target
        )
        running_target.start()
        host.start()
        await attached(running_target, "d", host)
        for number, prompt in enumerate(asked):
            on, off = [
                await answer(
                    running_target,
                    Request(
                        f"{number}-{speculation}",
                        tuple(prompt),
                        SamplingParams(max_tokens=count),
                        speculation,
                    ),
                )
                for speculation in (True, False)
            ]
            assert on.said() == off.said()
            assert off.stats.drafted == 0
        await running_target.stop()
        await host.stop()

    asyncio.run(main())


def end_of_text(folder: str) -> frozenset[int]:
    settings = json.loads((Path(folder) / "generation_config.json").read_text())
    return frozenset({settings["eos_token_id"]})


@pytest.mark.parametrize(
    ("target", "draft"), [("stories260K", "llama2xs-500it"), ("babyllama361-as105", "babyllama105")]
)
def test_pairs_of_others_on_story_openings(shared: Path, target: str, draft: str) -> None:
    openings = json.loads((shared / "prompts" / "tinystories_20_openings.json").read_text())
    target, draft = str(shared / "models" / target), str(shared / "models" / draft)
    tokenizer = Tokenizer.from_file(f"{target}/tokenizer.json")
    asked = [tokenizer.encode(opening).ids for opening in openings]
    assert len(asked) == 20
    assert in_lockstep(target, draft, asked, 64, generated=5, passes=2) > 1.5
    composed(target, draft, asked[:3], 64)


@pytest.mark.slow
def test_the_shipped_pair_on_held_out_prompts() -> None:
    target, draft = bundled_model("target"), bundled_model("draft")
    asked = prompts(Tokenizer.from_file(str(Path(target) / "tokenizer.json")), 20, 32)
    assert len(asked) == 20
    assert in_lockstep(target, draft, asked, 128, generated=1, passes=4) > 1.5
    composed(target, draft, asked[:3], 64)
