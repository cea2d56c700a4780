"""Scores come from what was observed, and from the drafter's own number as long as nothing was."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.tree import TokenTree
from runtime.scoring import agreement
from runtime.scoring.agreement import OPPOSED
from runtime.scoring.calibration import (
    BINS,
    INITIAL_COVERAGE,
    MAX_OBSERVATIONS,
    MAX_RANKS,
    PRIOR_WEIGHT,
    Calibration,
    Calibrations,
    TemperatureBucket,
    bin_index,
    drafter_kind,
)
from tests.support.harness import score_of


def test_bins_cover_all_scores_and_are_finer_near_certainty() -> None:
    scores = [
        math.log(p) if p else -math.inf for p in (1.0, 0.995, 0.98, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0)
    ]
    bins = [bin_index(score) for score in scores]
    assert bins == sorted(bins)
    assert (bins[0], bins[-1]) == (0, BINS - 1)
    assert {bin_index(math.log1p(-(((n + 0.5) / BINS) ** 2))) for n in range(BINS)} == set(
        range(BINS)
    )


@given(st.floats(-50.0, 0.0), st.integers(0, 40))
def test_without_observations_the_drafter_is_believed(score: float, rank: int) -> None:
    assert math.exp(score_of(Calibration(), rank, score)) == pytest.approx(
        max(1e-6, math.exp(score))
    )


@pytest.mark.parametrize("raw_logprob", [math.log(0.25), math.log(0.9), -math.inf])
def test_it_learns_the_rate_of_its_rank_and_bin_alone(raw_logprob: float) -> None:
    calibration = Calibration()
    for n in range(1000):
        calibration.observe(0, raw_logprob, n % 10 < 7)
    assert math.exp(score_of(calibration, 0, raw_logprob)) == pytest.approx(0.7, abs=0.01)
    assert math.exp(score_of(calibration, 1, raw_logprob)) == pytest.approx(
        max(1e-6, math.exp(raw_logprob))
    )
    assert math.exp(score_of(calibration, 0, math.log(0.5))) == pytest.approx(0.5)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(-20.0, 0.0), st.booleans()), max_size=60),
    st.integers(0, 20),
    st.floats(-60.0, 0.0),
)
def test_scores_are_logarithms_of_probabilities(
    seen: list[tuple[int, float, bool]], rank: int, raw_logprob: float
) -> None:
    calibration = Calibration()
    for observed in seen:
        calibration.observe(*observed)
    assert math.log(1e-6) <= score_of(calibration, rank, raw_logprob) <= 0.0
    assert score_of(calibration, rank, -math.inf) <= 0.0


def test_the_prior_weighs_as_so_many_observations() -> None:
    calibration = Calibration()
    for _ in range(int(PRIOR_WEIGHT)):
        calibration.observe(0, math.log(0.5), True)
    assert math.exp(score_of(calibration, 0, math.log(0.5))) == pytest.approx(0.75)


def test_far_ranks_share_a_row() -> None:
    calibration = Calibration()
    calibration.observe(MAX_RANKS + 5, -1.0, True)
    assert (
        score_of(calibration, MAX_RANKS - 1, -1.0)
        == score_of(calibration, MAX_RANKS + 9, -1.0)
        > -1.0
    )


def test_a_change_is_noticed_in_spite_of_a_long_history() -> None:
    calibration = Calibration()
    for n in range(int(20 * MAX_OBSERVATIONS)):
        calibration.observe(0, -0.5, n < 18 * MAX_OBSERVATIONS)
    assert math.exp(score_of(calibration, 0, -0.5)) < 0.2


def grown() -> TokenTree:
    """root -> 5, 6; 5 -> 7, 8; 6 -> 9; 7 -> 4; all by one drafter but 6 and 9."""
    tree = TokenTree(1, 0, 64, 8)
    for parent, token in ((0, 5), (0, 6), (1, 7), (1, 8), (2, 9), (3, 4)):
        tree.add(parent, token, -0.1, raw_logprob=-0.5, drafter="b-0" if token in (6, 9) else "a-1")
    return tree


def test_only_nodes_that_the_decision_passed_are_counted() -> None:
    """The decision is 5, 8, 1; it passes the root, 5 and 8, but not 6 and 7.

    At the root 5 and 6 are of different kinds, so the second was never alone.
    """
    bucket = TemperatureBucket()
    bucket.observe_path(grown(), [5, 8, 1])
    agreement.observe_path(bucket, grown(), [5, 8, 1])
    column = bin_index(-0.5)
    first, other = bucket.table("a-0"), bucket.table("b-9", OPPOSED)
    assert [row[column] for row in first.tries[:3]] == [2.0, 1.0, 0.0]
    assert [row[column] for row in first.hits[:3]] == [1.0, 1.0, 0.0]
    assert [row[column] for row in other.tries[:3]] == [0.0, 1.0, 0.0]
    assert sum(map(sum, first.tries)) + sum(map(sum, other.tries)) == 4.0
    assert (
        bucket.table("a", OPPOSED).tries[0, column]
        == bucket.table("a", OPPOSED).hits[0, column]
        == 1.0
    )
    assert {name: table.tries.sum() for name, table in bucket.tables.items()} == {
        "a": 3.0,
        "a opposed": 1.0,
        "b opposed": 1.0,
    }


def test_a_promise_is_the_share_of_expanded_nodes_whose_children_held_the_choice() -> None:
    bucket = TemperatureBucket()
    for _ in range(400):
        bucket.observe_path(
            grown(), [5, 8, 1]
        )  # at the root and at 5 it was among them; 8 was never expanded
    assert bucket.coverage == pytest.approx(1.0, abs=0.01)
    for _ in range(400):
        bucket.observe_path(grown(), [9])
    assert bucket.coverage == pytest.approx(0.0, abs=0.01)
    assert TemperatureBucket().coverage == INITIAL_COVERAGE


@pytest.mark.parametrize(
    ("name", "of"),
    [("draft-0", "draft"), ("draft-12", "draft"), ("a-b", "a-b"), ("ngram", "ngram"), ("x-", "x-")],
)
def test_drafters_of_a_pool_are_of_one_kind(name: str, of: str) -> None:
    assert drafter_kind(name) == of


def test_what_is_saved_can_be_restored() -> None:
    known = Calibrations()
    known.bucket(0.0).observe_path(grown(), [5, 8, 1])
    agreement.observe_path(known.bucket(0.81), grown(), [6])
    again = Calibrations.from_dict(json.loads(json.dumps(known.to_dict())))
    assert again.to_dict() == known.to_dict()
    assert (
        score_of(again.bucket(0.8).table("b-3", OPPOSED), 1, -0.5)
        == score_of(known.bucket(0.8).table("b", OPPOSED), 1, -0.5)
        > -0.5
    )
    assert (
        score_of(again.bucket(0.0).table("a"), 1, -0.5)
        == score_of(known.bucket(0.0).table("a"), 1, -0.5)
        > -0.5
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"warm": {}},
        {"0.0": {}},
        {"0.0": {"promise": "much", "tables": {}}},
        {"0.0": {"promise": 1.0, "tables": {"a": [[[0.0] * BINS] * MAX_RANKS]}}},
        {"0.0": {"promise": 1.0, "tables": {"a": [[[0.0]], [[0.0]]]}}},
        {"0.0": {"promise": 1.0, "tables": {"a": [[[math.nan] * BINS] * MAX_RANKS] * 2}}},
    ],
)
def test_what_was_not_saved_by_us_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Calibrations.from_dict(wrong)
