"""Finished caches against a list that remembers everything."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.features import FeatureBuffer, FeatureRows
from runtime.kv.prefix_cache import PrefixCache, common_length
from runtime.models.base import causal
from runtime.models.toy import ToyCache, ToyModel

TOKENS = st.lists(st.integers(0, 1), max_size=12)


def cache_of(tokens: list[int], behind: int = 0) -> ToyCache:
    """Holds the text, and rows of a tree behind it."""
    cache = ToyCache(100)
    cache.append(len(tokens) + behind)
    cache.tokens[: len(tokens)] = tokens
    return cache


def shared(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


@given(TOKENS, TOKENS)
def test_common(a: list[int], b: list[int]) -> None:
    assert common_length(np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64)) == shared(
        a, b
    )


@given(st.lists(TOKENS, max_size=12), st.lists(TOKENS, max_size=3), TOKENS, st.integers(1, 4))
def test_without_a_limit_the_longest_of_all_is_found(
    texts: list[list[int]], live: list[list[int]], asked: list[int], least: int
) -> None:
    prefixes = PrefixCache(10**6, least)
    for text in texts:
        prefixes.keep(text, cache_of(text, behind=2))
    found = prefixes.longest(asked, [(text, cache_of(text)) for text in live])
    most = max((shared(asked[:-1], text) for text in [*texts, *live]), default=0)
    if most < least:
        assert found is None
    else:
        assert found is not None
        cache, length = found
        assert length == most
        assert isinstance(cache, ToyCache)
        assert cache.fork(length).tokens == asked[:length]


@given(st.lists(st.tuples(st.booleans(), TOKENS), max_size=20), st.integers(0, 30))
def test_the_budget_holds_and_the_least_recently_used_goes_first(
    history: list[tuple[bool, list[int]]], budget: int
) -> None:
    prefixes = PrefixCache(budget, min_tokens=2)
    oracle: list[list[int]] = []  # the least recently used first
    for keeps, text in history:
        if keeps:
            prefixes.keep(text, cache_of(text, behind=1))
            continued = [other for other in oracle if other[: len(text)] == text]
            if 2 <= len(text) <= budget and continued:
                oracle.remove(continued[0])
                oracle.append(continued[0])
            elif 2 <= len(text) <= budget:
                oracle = [other for other in oracle if text[: len(other)] != other] + [text]
                while sum(map(len, oracle)) > budget:
                    oracle.pop(0)
        elif prefixes.longest(text) is not None:
            used = max(oracle, key=lambda other: shared(text[:-1], other))
            oracle.remove(used)
            oracle.append(used)
        assert prefixes.slots == sum(map(len, oracle)) <= budget
        assert [kept.ids.tolist() for kept in prefixes.kept] == oracle
        assert all(kept.cache.length == len(kept.ids) for kept in prefixes.kept)


def test_a_text_that_goes_on_takes_the_place_of_its_beginning() -> None:
    prefixes = PrefixCache(100, min_tokens=2)
    for text in ([1, 2, 3], [9, 9, 9], [1, 2, 3, 4], [1, 2]):
        prefixes.keep(text, cache_of(text))
    assert [kept.ids.tolist() for kept in prefixes.kept] == [[9, 9, 9], [1, 2, 3, 4]]
    assert prefixes.slots == 7


def test_a_live_text_counts_as_far_as_its_cache_reaches() -> None:
    found = PrefixCache(0, min_tokens=2).longest(
        [1, 2, 3, 4, 5, 6], [([1, 2, 3, 4, 5], cache_of([1, 2, 3, 4]))]
    )
    assert found is not None
    assert found[1] == 4


def test_a_cache_without_the_text_is_refused() -> None:
    with pytest.raises(IndexError):
        PrefixCache(100, min_tokens=1).keep([1, 2, 3], cache_of([1, 2]))


def test_a_fork_reads_as_a_fresh_prefill_would() -> None:
    model, text = ToyModel(vocabulary=8), [1, 2, 3, 4, 5, 6]
    cache = model.new_cache()
    model.forward(cache, causal(np.asarray(text), 0))
    prefixes = PrefixCache(100, min_tokens=2)
    prefixes.keep(text, cache)
    found = prefixes.longest([1, 2, 3, 7, 7])
    assert found is not None
    kept, length = found
    fork = kept.fork(length)
    logits = model.forward(fork, causal(np.asarray([7]), length))
    assert np.array_equal(logits[0], model.logits([1, 2, 3, 7]))
    assert prefixes.slots == 6


class Roomy(ToyCache):
    """A cache that keeps the memory that it has taken once."""

    def __init__(self, capacity: int, taken: int = 0) -> None:
        super().__init__(capacity)
        self.taken = taken

    @property
    def room(self) -> int:
        return max(self.taken, self.length)


@pytest.mark.parametrize(("taken", "kept"), [(6, 6), (7, 3)])
def test_a_text_takes_at_most_twice_the_memory_that_it_needs(taken: int, kept: int) -> None:
    cache = Roomy(100, taken)
    cache.append(6)
    cache.tokens[:3] = [1, 2, 3]
    prefixes = PrefixCache(100, min_tokens=2)
    prefixes.keep([1, 2, 3], cache)
    assert prefixes.slots == kept
    found = prefixes.longest([1, 2, 3, 4])
    assert found is not None
    assert found[1] == 3
    assert isinstance(found[0], ToyCache)
    assert found[0].tokens == [1, 2, 3]
    assert (found[0] is cache) == (kept == taken)


def features_of(tokens: int) -> FeatureBuffer:
    features = FeatureBuffer((0,))
    features.append(FeatureRows(0, np.arange(2 * tokens, dtype=np.uint16).reshape(tokens, 2)))
    return features


def test_features_are_kept_for_the_tokens_of_their_text_and_found_by_its_cache() -> None:
    prefixes = PrefixCache(100, min_tokens=2)
    prefixes.keep([1, 2, 3], cache_of([1, 2, 3]), features_of(5))
    prefixes.keep([4, 5, 6], cache_of([4, 5, 6]))
    with_features, without = prefixes.longest([1, 2, 3, 9]), prefixes.longest([4, 5, 6, 9])
    assert with_features is not None
    assert without is not None
    found = prefixes.features_of(with_features[0])
    assert found is not None
    assert found.between(0, 9).rows.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found.end == 3
    assert prefixes.features_of(without[0]) is None
    assert prefixes.features_of(cache_of([1, 2, 3])) is None


def test_features_take_slots_too_rounded_up_and_push_out_what_is_old() -> None:
    prefixes = PrefixCache(12, min_tokens=2)
    prefixes.feature_slots = 0.5
    prefixes.keep([4, 5, 6], cache_of([4, 5, 6]))
    assert prefixes.slots == 3
    prefixes.keep([1, 2, 3], cache_of([1, 2, 3]), features_of(3))
    assert prefixes.slots == 3 + 3 + 2
    prefixes.keep([7, 8, 9], cache_of([7, 8, 9]), features_of(3))
    assert prefixes.slots == 9 + 3
    prefixes.keep([1, 1, 1], cache_of([1, 1, 1]))
    assert [kept.ids.tolist() for kept in prefixes.kept] == [[1, 2, 3], [7, 8, 9], [1, 1, 1]]
    assert prefixes.slots == 12


def test_a_common_beginning_of_too_few_tokens_is_not_looked_for() -> None:
    assert PrefixCache(100).min_tokens == 16
    prefixes = PrefixCache(100)
    long = list(range(20))
    prefixes.keep(long, cache_of(long))
    prefixes.keep(long[:15], cache_of(long[:15]))
    assert len(prefixes.kept) == 1
    found = prefixes.longest([*long[:16], 99, 99])
    assert found is not None
    assert found[1] == 16
    assert prefixes.longest([*long[:15], 99, 99]) is None
    assert prefixes.longest(long[:16]) is None, "the last token is always read"
    assert prefixes.longest(long[:17]) is not None
