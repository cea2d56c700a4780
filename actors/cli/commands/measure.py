"""Measures models for `outrider plan`: step times, and guesses on the target's own texts."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from actors.cli.commands.doctor import PROMPTS
from actors.cli.commands.measure_guesses import TargetAnswer, measure_drafter, measure_head
from actors.compose import build_drafter, build_head
from actors.launch.prepare import context_length
from runtime.config import DrafterConfig, Dtype, HeadConfig, Placement
from runtime.core.sampling_params import SamplingParams
from runtime.models.acceptance import continuation, replay_draft
from runtime.models.hf import HFModel
from runtime.models.loader import load_model, load_tokenizer
from runtime.models.step_timing import step_times, text_time
from runtime.models.vocab_check import check_pair
from runtime.sim.pair_profile import PairProfile, positions
from runtime.sim.replayed_head import HeadProfile

PROFILE_ROW_COUNTS = (1, 2, 4, 8, 16, 17, 32, 33, 64)  # rows; kernels work in tiles of 16
BATCH_TEXTS = 8  # in a batched pass
MAX_TOKENS = 96  # generated for each prompt


def measure_models(
    target: str,
    drafters: Sequence[DrafterConfig],
    heads: Sequence[HeadConfig],
    dtype: Dtype,
    temperature: float,
    rtt: float,
    note: Callable[[str], None],
) -> tuple[list[PairProfile], list[HeadProfile], list[str]]:
    """Measures each drafter with the target, and each head on it, with one thread each.

    Returns the drafters' profiles (`rtt` in seconds), the heads' figures, and warnings about the
    pairs. `note` gets progress messages. Raises PairMismatch or ModelRefused if models cannot be
    used together.
    """
    note("loading models")
    tokenizer, context = load_tokenizer(target), context_length(target)
    warnings = [
        warning
        for drafter in drafters
        if drafter.method == "model"
        for warning in check_pair(
            tokenizer,
            load_tokenizer(drafter.model),
            (target, drafter.model),
            (context, context_length(drafter.model)),
        )
    ]
    large = load_model(target, dtype, threads=1)
    note("measuring the target's steps")
    times, text = (
        step_times(large, PROFILE_ROW_COUNTS, time.monotonic),
        text_time(large, BATCH_TEXTS, time.monotonic),
    )
    sampling = SamplingParams(temperature=temperature, max_tokens=min(MAX_TOKENS, context // 2))
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    answers: list[TargetAnswer] = [
        (prompt, continuation(large, prompt, sampling, frozenset())) for prompt in prompts
    ]
    found, sitting = [], []
    for head in heads:
        note(f"measuring {head.method}")
        sitting.append(
            measure_head(head.method, build_head(head, large, tokenizer), large, answers, sampling)
        )
    for drafter in drafters:
        name = Path(drafter.model).name or drafter.method
        note(f"measuring {name}")
        known = {
            "name": name,
            "target": times,
            "text": text,
            "rtt": rtt,
            **measure_draft(drafter, target, dtype, answers, sampling, large),
        }
        found.append(PairProfile.model_validate(known))
    return found, sitting, warnings


def measure_draft(
    drafter: DrafterConfig,
    target: str,
    dtype: Dtype,
    answers: Sequence[TargetAnswer],
    sampling: SamplingParams,
    large: HFModel,
) -> dict[str, object]:
    """Returns the draft's step times by rows, in seconds, and its guesses.

    Methods other than models are asked at each place of the texts.
    """
    if drafter.method in ("model", "layer-skip"):
        layers = drafter.layers if drafter.method == "layer-skip" else None
        small = load_model(drafter.model or target, dtype, threads=1, layers=layers)
        guessed = replay_draft(small, answers, sampling)
        return {
            "draft": step_times(small, PROFILE_ROW_COUNTS, time.monotonic),
            "positions": positions(guessed.ranks, guessed.scores),
        }
    here = Placement(cores=(min(os.sched_getaffinity(0)),))
    seconds, places = measure_drafter(
        build_drafter(drafter.model_copy(update={"placement": here}), target).draft_engine.drafter,
        answers,
        sampling,
        large,
    )
    return {"draft": seconds, "positions": places}
