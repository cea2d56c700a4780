"""Expectations count as long as the outcomes bear them out."""

import numpy as np
import pytest

from runtime.scoring.expected_tokens import ExpectedTokens


def judged(expected: float, accepted: list[int]) -> float:
    """Return the guesses that these steps count for in all, each expected to bring as many."""
    one, total = ExpectedTokens(), 0.0
    for outcome in accepted:
        guesses, too_much = one.judge(expected, outcome)
        total += guesses - too_much
    return total


@pytest.mark.parametrize("expected", [0.3, 1.0, 4.0])
def test_who_is_always_wrong_is_soon_not_believed(expected: float) -> None:
    """What was counted before is taken back."""
    assert judged(expected, [0] * 4) > 1.5 * expected
    assert judged(expected, [0] * 12) < 0.6 * expected
    assert judged(expected, [0] * 200) < 2.0 * expected


def test_chance_counts_for_less() -> None:
    """Ten steps, each of which accepts one guess in the mean."""
    random = np.random.default_rng(0)
    outcomes = random.geometric(0.5, size=(200, 10)) - 1
    totals = [judged(1.0, one.tolist()) for one in outcomes]
    assert np.std(totals) < 0.5 * outcomes.sum(axis=1).std()
    assert 8.0 < np.mean(totals) < 10.0


def test_more_than_expected_counts_as_expected() -> None:
    assert judged(1.0, [2] * 10) == pytest.approx(10.0)


def test_expectations_that_are_a_little_too_high_are_scaled() -> None:
    one = ExpectedTokens()
    for _ in range(400):
        one.judge(1.0, 0.8)
    assert one.scale == pytest.approx(0.8, abs=0.02)
