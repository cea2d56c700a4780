"""The oracle model itself: its logits depend on the visible tokens and on nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core.errors import InvalidRequest
from runtime.models.base import PassInput, Rows, causal
from runtime.models.prefill import prefill
from runtime.models.toy import ToyCache, ToyModel

TEXT = [3, 1, 4, 1, 5]


def fed(model: ToyModel, tokens: list[int]) -> ToyCache:
    cache = model.new_cache()
    prefill(model, cache, np.asarray(tokens))
    return cache


@given(st.lists(st.integers(1, 4), max_size=5))
@settings(max_examples=20)
def test_how_a_text_is_cut_into_passes_changes_nothing(cuts: list[int]) -> None:
    model, rows = ToyModel(), []
    cache = model.new_cache()
    for cut in [*cuts, len(TEXT)]:
        part = np.asarray(TEXT[cache.length : cache.length + cut])
        if len(part):
            rows.append(model.forward(cache, causal(part, cache.length)))
    expected = np.stack([model.logits(TEXT[:n]) for n in range(1, len(TEXT) + 1)])
    assert np.array_equal(np.concatenate(rows), expected)


def test_every_token_and_its_place_count() -> None:
    model = ToyModel()
    base = model.logits(TEXT)
    assert base.dtype == np.float32
    assert np.array_equal(base, ToyModel().logits(TEXT))
    for other in ([3, 1, 4, 5, 1], [1, 4, 1, 5], [2, 1, 4, 1, 5]):
        assert not np.array_equal(base, model.logits(other))
    assert np.array_equal(ToyModel(memory=2).logits(TEXT), ToyModel(memory=2).logits([9, 1, 5]))
    assert not ToyModel(sharpness=0.0).logits(TEXT).any()


def test_branches_of_a_tree_do_not_see_each_other() -> None:
    """Root 7 behind the text; 8 and 9 below it; 2 below 9."""
    model = ToyModel()
    cache = fed(model, TEXT)
    visible = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=np.bool_)
    logits = model.forward(
        cache, Rows(np.array([7, 8, 9, 2]), 5 + np.array([0, 1, 1, 2]), 5, visible)
    )
    paths = [[7], [7, 8], [7, 9], [7, 9, 2]]
    assert np.array_equal(logits, np.stack([model.logits([*TEXT, *path]) for path in paths]))
    cache.keep(6, [7, 8])
    after = model.forward(cache, causal(np.array([0]), 8))
    assert np.array_equal(after[0], model.logits([*TEXT, 7, 9, 2, 0]))
    cache.truncate(5)
    assert np.array_equal(
        model.forward(cache, causal(np.array([6]), 5))[0], model.logits([*TEXT, 6])
    )


def test_only_the_last_rows_where_no_more_are_wanted() -> None:
    model = ToyModel()
    logits = model.forward(model.new_cache(), causal(np.asarray(TEXT), 0), last=2)
    assert np.array_equal(logits, np.stack([model.logits(TEXT[:4]), model.logits(TEXT)]))
    assert model.forward(model.new_cache(), causal(np.asarray(TEXT), 0), last=99).shape == (5, 32)


@pytest.mark.parametrize("positions", [[6], [4], [-1]])
def test_a_wrong_position_is_an_error_and_not_another_text(positions: list[int]) -> None:
    model = ToyModel()
    with pytest.raises(ValueError, match="not contiguous"):
        model.forward(
            fed(model, TEXT), Rows(np.array([7]), np.array(positions), 5, np.ones((1, 1), np.bool_))
        )


def test_the_cache_keeps_its_promises_at_the_edges() -> None:
    model = ToyModel(context=8)
    cache = fed(model, TEXT)
    for prefix, slots in ((6, []), (2, [1]), (2, [5])):
        with pytest.raises(IndexError):
            cache.keep(prefix, slots)
    with pytest.raises(IndexError):
        cache.truncate(6)
    with pytest.raises(InvalidRequest, match="capacity"):
        cache.append(cache.capacity)
    assert cache.tokens == TEXT
    cache.keep(1, [4, 2])
    assert cache.tokens == [3, 5, 4]
    assert cache.length == 3


def test_several_texts_in_one_pass_bit_by_bit() -> None:
    model = ToyModel()
    parts = [
        PassInput(fed(model, TEXT[:length]), causal(np.array([7, length]), length), last)
        for length, last in ((1, None), (5, 1), (3, 0))
    ]
    logits = model.forward_all(parts)
    for found, length, rows in zip(logits, (1, 5, 3), (2, 1, 0), strict=True):
        both = [model.logits([*TEXT[:length], 7]), model.logits([*TEXT[:length], 7, length])]
        assert np.array_equal(found, np.reshape(both[2 - rows :], (rows, 32)))
    assert [part.cache.length for part in parts] == [3, 7, 5]
    assert model.forward_all([]) == []


def test_an_error_in_one_text_leaves_all_caches_as_they_were() -> None:
    model = ToyModel()
    caches = [fed(model, TEXT), fed(model, TEXT)]
    parts = [
        PassInput(caches[0], causal(np.array([7]), 5)),
        PassInput(caches[1], Rows(np.array([7]), np.array([9]), 5, np.ones((1, 1), np.bool_))),
    ]
    with pytest.raises(ValueError, match="not contiguous"):
        model.forward_all(parts)
    assert [cache.tokens for cache in caches] == [TEXT, TEXT]


def test_a_fork_goes_its_own_way() -> None:
    model = ToyModel()
    cache = fed(model, TEXT)
    other = cache.fork(3)
    assert np.array_equal(
        model.forward(other, causal(np.array([9]), 3))[0], model.logits([*TEXT[:3], 9])
    )
    assert (cache.tokens, other.tokens, other.capacity) == (TEXT, [*TEXT[:3], 9], cache.capacity)
    for length in (-1, 6):
        with pytest.raises(IndexError):
            cache.fork(length)
