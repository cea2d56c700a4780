"""What `outrider plan` measures of models when it is given no figures: step times, and the draft's guesses on the target's texts."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from actors.cli.doctor import PROMPTS
from actors.cli.prepare import context_length
from runtime.models.acceptance import replay
from runtime.models.load import load_model, load_tokenizer
from runtime.models.pair import check_pair
from runtime.models.timing import step_times, text_time
from runtime.sampling import Sampling
from runtime.sim.measured import Measured, positions

WIDTHS = (1, 2, 4, 8, 16, 17, 32, 33, 64)  # rows; kernels work in tiles of 16
TEXTS = 8  # of a pass over several
TOKENS = 96  # of the target's text for each prompt


def measure(
    target: str, drafts: Sequence[str], dtype: str, temperature: float, rtt: float, note: Callable[[str], None]
) -> tuple[list[Measured], list[str]]:
    """Figures for each draft beside that target, one thread each; and what should be known of the pairs. `note` is told what is being done.

    Raises PairMismatch or ModelRefused for models that cannot be used together.
    """
    note("loading models")
    tokenizer, context = load_tokenizer(target), context_length(target)
    warnings = [
        warning
        for draft in drafts
        for warning in check_pair(tokenizer, load_tokenizer(draft), (target, draft), (context, context_length(draft)))
    ]
    large = load_model(target, dtype, threads=1)
    note("measuring the target's steps")
    times, text = step_times(large, WIDTHS, time.monotonic), text_time(large, TEXTS, time.monotonic)
    sampling = Sampling(temperature=temperature, max_tokens=min(TOKENS, context // 2))
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    found = []
    for draft in drafts:
        note(f"measuring {draft}")
        small = load_model(draft, dtype, threads=1)
        steps = step_times(small, WIDTHS, time.monotonic)
        guessed = replay(large, small, prompts, sampling, frozenset())
        found.append(
            Measured(
                name=Path(draft).name, target=times, draft=steps, text=text, positions=positions(guessed.ranks, guessed.scores), rtt=rtt
            )
        )
    return found, warnings
