"""A made-up benchmark whose figures follow from a few numbers."""

import numpy as np

from bench.core.methods import (
    AMUSD,
    DRAFT,
    GREEDY,
    LIVING_METHODS,
    PLAIN_METHODS,
    TRANSFORMERS_METHODS,
    Method,
    OutriderMethod,
)
from bench.core.results import (
    Acceptance,
    Forecast,
    Machine,
    PairFacts,
    Profile,
    Results,
    Run,
    RunSettings,
    Steps,
)

SPEEDS = {  # tokens per second at temperature 0
    "plain": 40.0,
    "plain, 2 cores": 62.0,
    "sync chain": 84.0,
    "sync tree": 96.0,
    "sync tree, 2 cores": 121.0,
    "amusd": 88.0,
    "pearl": 91.0,
    "living": 116.0,
    "living + ngram": 119.0,
    "living, cold": 105.0,
    "living, no drafter": 39.6,
    "living, wrong drafter": 38.0,
    "transformers greedy": 25.0,
    "transformers greedy, 2 cores": 36.0,
    "assisted": 44.0,
    "assisted 3": 47.0,
    "assisted 5": 51.0,
    "assisted 8": 46.0,
    "prompt lookup": 33.0,
    "assisted, 2 cores": 57.0,
    "assisted 3, 2 cores": 60.0,
    "assisted 5, 2 cores": 64.0,
    "assisted 8, 2 cores": 58.0,
    "prompt lookup, 2 cores": 45.0,
}
SYNC = (
    Method("sync chain", OutriderMethod("sync", (("rows", 4),), (DRAFT,))),
    Method("sync tree", OutriderMethod("sync", (("rows", 15),), (DRAFT,))),
    Method("sync tree, 2 cores", OutriderMethod("sync", (("rows", 15),), (DRAFT,), (0, 1), (0, 1))),
    Method("pearl", OutriderMethod("pearl", (("passes", 12),), (DRAFT,))),
)
METHODS = (*PLAIN_METHODS, *SYNC, AMUSD, *LIVING_METHODS, *TRANSFORMERS_METHODS)
TOKENS, PROMPTS, REPETITIONS, PREFILL = 128, 6, 3, 0.25


def run(method: str, rate: float, prompt: int = 0, repetition: int = 0, **changes: object) -> Run:
    """A run that decodes with `rate` tokens per second after its first token."""
    seconds = PREFILL + (TOKENS - 1) / rate
    given = {
        "temperature": 0.0,
        "batch": 1,
        "tokens": TOKENS,
        "seconds": seconds,
        "first_tokens": 1,
        "first_seconds": PREFILL,
        "text": "a",
    }
    return Run.model_validate(
        {
            "method": method,
            "prompt": f"file_{prompt}.py:1",
            "repetition": repetition,
            **given,
            **changes,
        }
    )


def steps(
    decoding: float, compute: float = 0.88, wait: float = 0.08, bookkeeping: float = 0.02
) -> Steps:
    """Of a run whose decoding takes so many seconds."""
    times = {
        "computed": compute * decoding,
        "waited": wait * decoding,
        "bookkeeping": bookkeeping * decoding,
    }
    counts = {"rounds": 40, "drafted": 700, "verified": 500, "accepted": 88, "hits": 30}
    return Steps.model_validate(
        {**counts, **times, "by_drafter": {"model-0": 80, "ngram-0": 8}, "lead": 3.2}
    )


def synthetic() -> Results:
    draw = np.random.default_rng(0)
    runs = []
    for temperature, factor in ((0.0, 1.0), (0.8, 0.85)):
        for name, rate in SPEEDS.items():
            slower = factor if name not in ("plain", "transformers greedy") else 1.0
            for prompt in range(PROMPTS):
                easy = 0.85 + 0.06 * prompt
                for repetition in range(REPETITIONS):
                    found = rate * slower * easy * draw.normal(1, 0.02)
                    own = (
                        steps((TOKENS - 1) / found)
                        if name in SPEEDS
                        and "core" not in name
                        and not name.startswith(("assist", "tran", "prompt"))
                        else None
                    )
                    text = "b" if name.startswith("assisted") and prompt == 0 else "a"
                    runs.append(
                        run(
                            name,
                            found,
                            prompt,
                            repetition,
                            temperature=temperature,
                            steps=own,
                            text=text,
                        )
                    )
    for batch, factors in {4: (3.2, 2.1), 8: (5.4, 3.0), 16: (7.5, 2.8)}.items():
        for name, factor in zip(("plain", "living"), factors, strict=True):
            runs += [
                run(name, SPEEDS[name] * factor * (0.9 + 0.1 * prompt), prompt, batch=batch)
                for prompt in range(3)
            ]
        runs += [
            run(
                GREEDY.name,
                SPEEDS[GREEDY.name] * factors[0] * (0.9 + 0.1 * prompt),
                prompt,
                batch=batch,
            )
            for prompt in range(3)
        ]
    return Results(
        name="synthetic",
        machine=Machine(
            processor="A processor",
            flags=("avx2", "avx512f"),
            cores=2,
            memory_gib=15.6,
            python="3.11.7",
            torch="2.13.0",
            transformers="5.23.0",
            date="2026-01-01",
        ),
        pair=PairFacts(
            target="target-768x12",
            draft="draft",
            target_parameters=88_000_000,
            draft_parameters=1_700_000,
            dtype="bfloat16",
        ),
        settings=RunSettings(
            prompts="held-out files",
            count=PROMPTS,
            new_tokens=TOKENS,
            repetitions=REPETITIONS,
            seed=1,
        ),
        methods=tuple(method.facts for method in METHODS),
        profile=Profile(
            target={1: 0.025, 2: 0.0255, 4: 0.026, 8: 0.027, 16: 0.030, 32: 0.042, 64: 0.066},
            draft={1: 0.002, 2: 0.0021, 4: 0.0022, 8: 0.0026, 16: 0.0041, 32: 0.0072},
            acceptance=(
                Acceptance(temperature=0.0, ranks={1: 0.66, 2: 0.77, 4: 0.85, 8: 0.91}),
                Acceptance(temperature=0.8, ranks={1: 0.6, 2: 0.73, 4: 0.84, 8: 0.91}),
            ),
            floor=0.019,
        ),
        runs=tuple(runs),
        forecasts=(
            Forecast(method="plain", temperature=0.0, batch=1, tokens_per_second=39.0),
            Forecast(method="living", temperature=0.0, batch=1, tokens_per_second=130.0),
        ),
    )
