"""Guesses of drafters of several kinds for the same places."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.tree import TokenTree
from runtime.scoring import agreement
from runtime.scoring.agreement import ECHOED, OPPOSED
from runtime.scoring.calibration import TemperatureBucket
from tests.support.harness import score_of

Guesses = Sequence[tuple[int, float]]  # tokens with their probabilities


def place(**guesses: Guesses) -> TokenTree:
    """A root with children by these drafters, in this order. NAME_1 stands for NAME-1."""
    tree = TokenTree(1, 0, 64, 8)
    for name, found in guesses.items():
        parents = np.full(len(found), tree.key[0], dtype=np.uint64)
        tokens, raw_logprob = np.array([token for token, _ in found]), np.log([p for _, p in found])
        tree.merge(
            parents,
            tokens,
            raw_logprob,
            name.replace("_", "-"),
            lambda ranks, raw_logprob: raw_logprob,
        )
    return tree


def learned(bucket: TemperatureBucket, tree: TokenTree, *tokens: int) -> TemperatureBucket:
    """From as many texts as there are `tokens`, by which they went on."""
    for token in tokens:
        bucket.observe_path(tree, [token])
        agreement.observe_path(bucket, tree, [token])
    return bucket


def chances(bucket: TemperatureBucket, tree: TokenTree) -> dict[int, float]:
    """By token."""
    return {
        tree.token[node]: math.exp(score)
        for node, score in agreement.combined_scores(bucket, tree, [0]).items()
    }


def test_nothing_changes_where_one_kind_guesses() -> None:
    bucket = TemperatureBucket()
    for tree in (
        place(draft=[(5, 0.5), (6, 0.2)]),
        place(draft_0=[(5, 0.5)], draft_1=[(5, 0.5), (6, 0.2)]),
    ):
        assert agreement.combined_scores(bucket, tree, [0]) == {}
        agreement.observe_path(bucket, tree, [5])
    assert bucket.tables == {}


def test_without_observations_opposed_guesses_keep_their_worth_and_echoes_average_odds() -> None:
    found = chances(
        TemperatureBucket(), place(draft=[(5, 0.8), (6, 0.1)], table=[(5, 0.2), (7, 0.3)])
    )
    assert found == pytest.approx({5: 0.5, 6: 0.1, 7: 0.3})  # odds of 4 and 1/4


def test_an_opposed_guess_is_worth_what_became_of_such() -> None:
    """The table is right at half of the places without a draft guess; else the draft is."""
    bucket, against = TemperatureBucket(), place(table=[(7, 0.5)], draft=[(5, 0.5)])
    alone = place(table=[(7, 0.5)])
    for _ in range(50):
        learned(bucket, alone, 7, 7, 9)
        learned(bucket, against, 5, 5, 7)
    assert math.exp(score_of(bucket.table("table"), 0, math.log(0.5))) == pytest.approx(
        0.5, abs=0.01
    )  # it came first in all of them
    found = chances(bucket, against)
    assert found[7] == pytest.approx(1 / 3, abs=0.03)
    assert found[5] == pytest.approx(2 / 3, abs=0.03)


def test_an_echoed_guess_is_likelier_than_either_knows() -> None:
    bucket = TemperatureBucket()
    same, other = (
        place(table=[(5, 0.5)], draft=[(5, 0.5)]),
        place(table=[(7, 0.5)], draft=[(5, 0.5)]),
    )
    for _ in range(40):
        learned(bucket, same, 5, 5, 5, 5, 9)
        learned(bucket, other, 5, 7, 9, 9, 9)
    assert chances(bucket, same)[5] == pytest.approx(0.8, abs=0.05)
    assert math.exp(score_of(bucket.table("table"), 0, math.log(0.5))) == pytest.approx(
        0.5, abs=0.02
    )


def test_what_is_seen_of_some_guesses_moves_those_of_other_confidence_but_not_of_other_rank() -> (
    None
):
    bucket, surer = TemperatureBucket(), place(table=[(7, 0.8), (8, 0.15)], draft=[(5, 0.5)])
    before = chances(bucket, surer)
    for _ in range(30):
        learned(bucket, place(table=[(7, 0.3)]), 7, 9, 9)
        learned(bucket, place(table=[(7, 0.3)], draft=[(5, 0.5)]), 5)
    after = chances(bucket, surer)
    assert after[7] < 0.6 * before[7]
    assert after[8] == pytest.approx(before[8], rel=0.01)


def test_who_came_second_is_not_counted_as_alone() -> None:
    bucket = learned(
        TemperatureBucket(), place(draft=[(5, 0.5)], table=[(5, 0.5), (7, 0.25)]), 5, 7
    )
    counted = {name: (table.tries.sum(), table.hits.sum()) for name, table in bucket.tables.items()}
    assert counted == {
        "draft": (2.0, 1.0),
        f"draft{ECHOED}": (2.0, 1.0),
        f"table{ECHOED}": (2.0, 1.0),
        f"table{OPPOSED}": (2.0, 1.0),
    }


GUESSES = st.lists(
    st.tuples(st.integers(0, 5), st.floats(1e-9, 1.0)), max_size=4, unique_by=lambda guess: guess[0]
)


@given(
    st.lists(st.tuples(st.lists(GUESSES, min_size=1, max_size=4), st.integers(0, 5)), max_size=12)
)
def test_scores_are_logarithms_of_probabilities_and_cover_shared_places(
    texts: list[tuple[list[list[tuple[int, float]]], int]],
) -> None:
    bucket = TemperatureBucket()
    for drafters, token in texts:
        tree = place(
            **{f"d{number}": found for number, found in zip("abcd", drafters, strict=False)}
        )
        scores = agreement.combined_scores(bucket, tree, [0])
        shared = len({name for node in range(1, len(tree)) for name in tree.drafters_of(node)}) > 1
        assert scores.keys() == (set(range(1, len(tree))) if shared else set())
        assert all(-15.0 < score < 0.0 for score in scores.values())
        tree.rescore(scores)
        learned(bucket, tree, token)
    assert all((table.hits <= table.tries).all() for table in bucket.tables.values())
