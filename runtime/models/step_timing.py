"""Measures the time of a step by its rows: T(n) of a target, t(w) of a drafter, on their device."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from runtime.core.clock import Clock
from runtime.models.base import HiddenStateModel, Model, OutputSpec, PassInput, Rows
from runtime.models.prefill import prefill

TEXT_TOKENS = 64  # in the cache during a measurement
TYPICAL_ROWS = 8  # of a step


def step_times(
    model: Model, widths: Sequence[int], clock: Clock, repeats: int = 5
) -> dict[int, float]:
    """Return median seconds of a pass by its rows: a root and `width - 1` children.

    The time includes bringing logits to the CPU. Widths are interleaved over `repeats` rounds, so
    that other load on the machine affects all of them. The first round is not counted.
    """
    text = min(TEXT_TOKENS, model.context - 2)
    cache = model.new_cache()
    prefill(model, cache, np.zeros(text, dtype=np.int64))
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(repeats + 1):
        for width, found in seconds.items():
            rows = fan_rows(text, width)
            began = clock()
            float(model.forward(cache, rows)[0, 0])  # waits for the device
            found.append(clock() - began)
            cache.truncate(text)
    return {width: statistics.median(found[1:]) for width, found in seconds.items()}


def text_time(model: Model, texts: int, clock: Clock, repeats: int = 5) -> float:
    """Return the median seconds that each text beyond the first adds to a pass; never below 0.

    It compares one row each of `texts` texts with as many rows of one text.
    """
    length = min(TEXT_TOKENS, model.context - 2)
    caches = [model.new_cache() for _ in range(texts)]
    for cache in caches:
        prefill(model, cache, np.zeros(length, dtype=np.int64))
    differences = []
    for _ in range(repeats + 1):
        began = clock()
        rows = model.forward_all([PassInput(cache, fan_rows(length, 1), None) for cache in caches])
        float(rows[-1][0, 0])
        middle = clock()
        caches[0].truncate(length)
        float(model.forward(caches[0], fan_rows(length, texts))[0, 0])
        differences.append((middle - began) - (clock() - middle))
        for cache in caches:
            cache.truncate(length)
    return max(0.0, statistics.median(differences[1:]) / (texts - 1))


def branch_row_time(
    model: HiddenStateModel,
    output_spec: OutputSpec,
    branch_rows: int,
    clock: Clock,
    repeats: int = 5,
) -> float:
    """Return the median seconds that pseudo rows of `branch_rows` rows add to a pass; never below
    0.

    The pass has TYPICAL_ROWS rows.
    """
    text = min(TEXT_TOKENS, model.context - 2 - len(output_spec.branches))
    cache = model.new_cache()
    prefill(model, cache, np.zeros(text, dtype=np.int64))
    differences = []
    for _ in range(repeats + 1):
        times = []
        for chosen in (range(branch_rows), ()):
            began = clock()
            (output,) = model.forward_outputs(
                [PassInput(cache, fan_rows(text, TYPICAL_ROWS), None, chosen)], output_spec
            )
            float(output.logits[0, 0])
            times.append(clock() - began)
            cache.truncate(text)
        differences.append(times[0] - times[1])
    return max(0.0, statistics.median(differences[1:]))


def fan_rows(text: int, width: int) -> Rows:
    """Return a root after `text` tokens, and its children."""
    visible = np.eye(width, dtype=np.bool_)
    visible[:, 0] = True
    positions = np.full(width, text + 1, dtype=np.int64)
    positions[0] = text
    return Rows(np.zeros(width, dtype=np.int64), positions, text, visible)


def knee(times: Mapping[int, float]) -> int:
    """Return the largest measured number of rows that costs at most a quarter more than one row."""
    return max(width for width, seconds in times.items() if seconds <= 1.25 * times[1])
