"""The blockwise search for the highest against torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kernels.topk import BLOCK, topk


@given(
    st.integers(1, 4),
    st.integers(1, 12 * BLOCK),
    st.integers(1, 8),
    st.integers(0, 2**31),
    st.sampled_from([2.0, 1e3]),
)
@settings(max_examples=60, deadline=None)
def test_the_highest_in_falling_order(rows: int, n: int, k: int, seed: int, spread: float) -> None:
    """With a small spread there are many equal values: any of them will do."""
    scores = (torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * spread).round()
    values, indices = topk(scores, min(k, n))
    assert torch.equal(values, scores.topk(min(k, n), dim=-1).values)
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(set(row)) == len(row) for row in indices.tolist())


@pytest.mark.parametrize("n", [8 * BLOCK, 8 * BLOCK + 5])
def test_barred_tokens_come_last(n: int) -> None:
    scores = torch.full((1, n), -torch.inf)
    scores[0, n - 1] = 1.0
    values, indices = topk(scores, 3)
    assert indices[0, 0] == n - 1
    assert values.tolist() == [[1.0, -torch.inf, -torch.inf]]
