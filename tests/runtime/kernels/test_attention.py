"""Attention is softmax over the visible slots; a row depends on nothing else, bit for bit."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kernels.attention import DTYPES, Attention, has_attention, load_attention
from runtime.kernels.jit import compile_module, is_supported
from runtime.kernels.llvm_attention import AttentionProgram

# Scores reach 20: float32 rounds them by up to 1e-6, and so their weights; values reach 4.
TOLERANCE = 1e-5

Mask = npt.NDArray[np.float32]

pytestmark = pytest.mark.skipif(not is_supported(), reason="no kernel for this processor")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def causal_mask(rows: int, slots: int) -> Mask:
    mask = np.zeros((rows, slots), dtype=np.float32)
    mask[:, slots - rows :][np.triu(np.ones((rows, rows), dtype=np.bool_), 1)] = -np.inf
    return mask


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask | None
) -> torch.Tensor:
    (rows, heads, dim), kv_heads = queries.shape, len(keys)
    kernel = load_attention(keys.dtype, dim, dim**-0.5)
    attention = Attention(kernel, (rows, heads, kv_heads, dim), keys.shape[1], mask)
    return attention(queries, keys, values)


def exact(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask | None
) -> torch.Tensor:
    group = queries.shape[1] // len(keys)
    wide, of_values = (t.double().repeat_interleave(group, 0) for t in (keys, values))
    scores = queries.double().transpose(0, 1) @ wide.mT * queries.shape[2] ** -0.5
    if mask is not None:
        scores = scores + torch.from_numpy(mask).double()
    found: torch.Tensor = (scores.softmax(-1) @ of_values).transpose(0, 1).flatten(1)
    return found


def inputs(
    rows: int, slots: int, dtype: torch.dtype, shape: tuple[int, int, int], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, kv_heads, dim = shape
    random = torch.Generator().manual_seed(seed)
    queries = 3 * torch.randn(rows, heads, dim, generator=random)
    keys, values = torch.randn(2, kv_heads, slots, dim, generator=random).to(dtype)
    return queries, keys, values


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    before=st.integers(0, 150),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(9, 3, 64), (4, 4, 8), (8, 1, 24)]),
    seed=st.integers(0, 1000),
    hidden=st.floats(0, 0.9),
)
def test_it_is_attention(
    rows: int,
    before: int,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    seed: int,
    hidden: float,
) -> None:
    slots = before + rows
    mask = causal_mask(rows, slots)
    mask[np.random.default_rng(seed).random(mask.shape) < hidden] = -np.inf
    mask[np.arange(rows), before + np.arange(rows)] = 0  # a row sees itself
    texts = inputs(rows, slots, dtype, shape, seed)
    torch.testing.assert_close(
        attend(*texts, mask).double(), exact(*texts, mask), atol=TOLERANCE, rtol=1e-5
    )
    torch.testing.assert_close(
        attend(*texts, None).double(), exact(*texts, None), atol=TOLERANCE, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("several", [1, 2, 5])
def test_a_row_does_not_depend_on_other_rows_and_threads(dtype: torch.dtype, several: int) -> None:
    queries, keys, values = inputs(70, 171, dtype, (9, 3, 64))
    torch.set_num_threads(1)
    alone = [
        attend(queries[row : row + 1], keys[:, : 102 + row], values[:, : 102 + row], None)
        for row in range(70)
    ]
    torch.set_num_threads(several)
    for count in (1, 2, 5, 6, 16, 33, 70):
        slots = 101 + count
        found = attend(
            queries[:count], keys[:, :slots], values[:, :slots], causal_mask(count, slots)
        )
        assert torch.equal(found, torch.cat(alone[:count]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_branch_of_a_tree_is_the_text_without_the_others(dtype: torch.dtype) -> None:
    """Hidden slots hold anything, also what is no number."""
    queries, keys, values = inputs(8, 80, dtype, (9, 3, 64))
    path = [*range(40), 41, 45, 46, 60, 79]
    mask = np.full((8, 80), -np.inf, dtype=np.float32)
    mask[:, path] = 0
    hidden = [slot for slot in range(80) if slot not in path]
    keys[:, hidden[::2]], values[:, hidden[1::2]] = torch.nan, torch.inf
    expected = attend(queries, keys[:, path].contiguous(), values[:, path].contiguous(), None)
    assert torch.equal(attend(queries, keys, values, mask), expected)


def test_large_scores_and_equal_ones_are_no_special_case() -> None:
    keys, values = torch.zeros(1, 3, 8), torch.eye(3, 8)[None]
    keys[0, 1] = 1e4
    queries = torch.ones(2, 1, 8)
    queries[1] = 0
    found = attend(queries, keys, values, None)
    assert torch.equal(found[0], values[0, 1])
    torch.testing.assert_close(found[1, :3], torch.full((3,), 1 / 3))


def test_views_of_wider_tensors_are_read_in_place() -> None:
    queries, keys, values = inputs(5, 30, torch.bfloat16, (4, 2, 16))
    qkv = torch.randn(5, 8, 16)
    qkv[:, :4] = queries
    cache = torch.randn(2, 2, 50, 16).bfloat16()
    cache[0, :, :30], cache[1, :, :30] = keys, values
    assert torch.equal(
        attend(qkv[:, :4], cache[0, :, :30], cache[1, :, :30], None),
        attend(queries, keys, values, None),
    )


def test_other_devices_and_types_have_torchs_attention() -> None:
    assert has_attention(torch.device("cpu"), torch.bfloat16, 64, 0.125)
    assert not has_attention(torch.device("meta"), torch.bfloat16, 64, 0.125)
    assert not has_attention(torch.device("cpu"), torch.float64, 64, 0.125)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_program_compiles_for_shorter_registers(dtype: torch.dtype) -> None:
    module = AttentionProgram(dtype, 24, 0.2).module
    _, functions = compile_module(module, ("attend",), "haswell", "+avx2,+fma,+f16c")
    assert len(functions) == 1
