"""Prompt lookup on the target: what the index finds, and the chains that are guessed from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.sampler_reference import reference_sample
from runtime.drafters.ngram import MAX_NGRAM, MIN_NGRAM, lookup
from runtime.heads.ngram_head import MAX_CHAIN, NgramHead, NgramIndex, chain_nodes
from runtime.models.toy import ToyModel
from tests.support.harness import Lockstep, asking, plain
from tests.support.heads import headed


@pytest.mark.parametrize(
    ("tokens", "length", "next_tokens"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 3, [9]),
        ([1, 2, 7, 5, 1, 2, 8, 0, 1, 2], 2, [8, 7]),  # the latest first
        ([1, 2, 7, 5, 1, 2, 7, 0, 1, 2], 2, [7]),  # each token once
        ([1, 2, 6, 1, 2, 7, 1, 2, 8, 1, 2], 2, [8, 7]),  # not more than two
        ([5, 1, 2, 7, 0, 1, 2, 8, 5, 1, 2], 3, [7]),  # more agreement before a later place
        ([2, 1, 3, 1], 0, []),  # one token is no evidence
        ([7], 0, []),
    ],
)
def test_followers(tokens: list[int], length: int, next_tokens: list[int]) -> None:
    index = NgramIndex()
    index.extend(tokens)
    found, places = index.followers(tokens)
    assert (found, [tokens[place] for place in places]) == (length, next_tokens)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_the_index_agrees_with_a_search_of_the_text(tokens: list[int], cut: int) -> None:
    index = NgramIndex()
    index.extend(tokens[:cut])
    index.extend(tokens)
    length, places = index.followers(tokens)
    assert lookup(tokens) == ((tokens[places[0]], length) if places else None)


@given(st.integers(MIN_NGRAM, MAX_NGRAM), st.lists(st.lists(st.integers(0, 9)), max_size=3))
def test_chains_share_the_probability_of_the_root(length: int, rests: list[list[int]]) -> None:
    chains = [[10 + number, *rest] for number, rest in enumerate(rests)]
    nodes = chain_nodes(length, chains)
    assert nodes.tokens.tolist() == [token for chain in chains for token in chain]
    first = np.exp(nodes.scores[nodes.parents == 0])
    assert first.sum() < 1.0
    assert (np.diff(first) < 0).all()
    assert (nodes.scores < 0).all()


def test_a_text_that_repeats_itself_is_guessed_many_tokens_ahead() -> None:
    text = [*range(40), *range(10)]
    nodes = NgramHead().guess("s", text)
    assert nodes.tokens.tolist() == [*range(10, 10 + MAX_CHAIN)]
    assert nodes.parents.tolist() == [*range(MAX_CHAIN)]


def test_sessions_are_told_apart_and_forgotten() -> None:
    head = NgramHead()
    assert len(head.guess("a", [1, 2, 3, 1, 2]).tokens)
    assert not len(head.guess("b", [4, 1, 2]).tokens)
    head.close("a")
    assert [*head.indexes] == ["b"]


def test_the_target_takes_what_the_prompt_shows() -> None:
    model, request = ToyModel(vocabulary=5, memory=2), asking((3, 1, 4, 1), max_tokens=60)
    (found,) = Lockstep(headed(model, NgramHead(), chooser=reference_sample)).run(request)
    assert found.said() == plain(model, request).said()
    assert found.stats.by_drafter["h-0"] == found.stats.accepted > 0
