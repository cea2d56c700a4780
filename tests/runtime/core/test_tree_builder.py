"""A tree of independent positions holds their most probable paths."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.tree_builder import MAX_NODES, MIN_PATH_LOGPROB, best_first


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.floats(-9.0, 0.0),
)
def test_the_most_probable_paths_are_taken_down_to_the_floor(
    places: int, k: int, seed: int, nodes: int, floor: float
) -> None:
    generator = np.random.default_rng(seed)
    scores = -np.sort(generator.exponential(1.5, (places, k)), axis=1)
    tokens = generator.permuted(np.tile(np.arange(100, 100 + k), (places, 1)), axis=1)
    paths = {
        ranks: sum(float(scores[place, rank]) for place, rank in enumerate(ranks))
        for depth in range(1, places + 1)
        for ranks in product(range(k), repeat=depth)
    }
    likely = sorted((ranks for ranks in paths if paths[ranks] >= floor), key=lambda r: -paths[r])
    found = best_first(tokens, scores, nodes, floor)
    rank_of = [{int(token): rank for rank, token in enumerate(row)} for row in tokens]
    made: list[tuple[int, ...]] = [()]
    for parent, token, score in zip(
        found.parents.tolist(), found.tokens.tolist(), found.scores.tolist(), strict=True
    ):
        assert parent < len(made), "parents first"
        above = made[parent]
        made.append((*above, rank_of[len(above)][token]))
        assert score == scores[len(above), made[-1][-1]]
    assert set(made[1:]) == set(likely[:nodes])
    assert len(made) - 1 == min(nodes, len(likely))
    assert found.roots == (1 if likely else None)


def test_without_places_or_guesses_there_is_no_tree() -> None:
    for shape in ((0, 3), (3, 0)):
        assert len(best_first(np.zeros(shape, np.int64), np.zeros(shape)).tokens) == 0
    tokens, scores = np.array([[5, 6]]), np.array([[-0.5, -np.inf]])
    assert best_first(tokens, scores).tokens.tolist() == [5]
    assert len(best_first(tokens, scores, floor=-0.4).tokens) == 0


def test_by_default_a_tree_has_so_many_nodes_of_so_much_probability() -> None:
    tokens, scores = np.arange(100)[None], np.linspace(-4.0, -5.0, 100)[None]
    assert len(best_first(tokens, scores).tokens) == MAX_NODES == 32
    assert pytest.approx(np.log(0.01)) == MIN_PATH_LOGPROB
    scores = np.linspace(-4.5, -4.7, 101)[None][:, :100]
    assert len(best_first(tokens, scores, nodes=100).tokens) == int((scores >= np.log(0.01)).sum())
