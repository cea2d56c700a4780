"""Norms, gates and rotations are those of torch; a row does not depend on others."""

import ctypes
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kernels.jit import is_supported
from runtime.kernels.llvm_rows import RowArguments
from runtime.kernels.rowwise import has_kernel, load_row_kernels, rms_norm, rotate, silu_gate

pytestmark = pytest.mark.skipif(not is_supported(), reason="no kernel for this processor")
EPSILON = 1e-5
sizes = st.integers(16, 200)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(size=sizes, rows=st.integers(1, 5), pieces=st.integers(1, 3), seed=st.integers(0, 1000))
def test_norms(size: int, rows: int, pieces: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    wide = 9 * torch.randn(rows, pieces + 2, size, generator=random)
    weight, x = torch.randn(pieces, size, generator=random), wide[:, :pieces]
    expected = F.rms_norm(x.double(), (size,), None, EPSILON) * weight
    torch.testing.assert_close(
        rms_norm(x, weight, EPSILON).double(), expected, atol=2e-6, rtol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(size=sizes, rows=st.integers(1, 5), scale=st.sampled_from([1.0, 30.0, 1e3]))
def test_gates(size: int, rows: int, scale: float) -> None:
    x = scale * torch.randn(rows, 2 * size)
    gate, up = x.double().chunk(2, -1)
    torch.testing.assert_close(
        silu_gate(x).double(), F.silu(gate) * up, atol=1e-30 * scale, rtol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(half=st.integers(8, 70), rows=st.integers(1, 5), heads=st.integers(1, 4))
def test_rotations(half: int, rows: int, heads: int) -> None:
    x, angles = torch.randn(rows, heads + 2, 2 * half), torch.randn(rows, 2, 1, 2 * half)
    expected = x.clone()
    own = x[:, :heads].double()
    expected[:, :heads] = own * angles[:, 0] + own.roll(half, -1) * angles[:, 1]
    rotate(x[:, :heads], angles)
    torch.testing.assert_close(x, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [16, 17, 40, 129])
def test_conversions_are_those_of_torch(dtype: torch.dtype, size: int) -> None:
    numbers = torch.randn(3, 2, size) * torch.logspace(-44, 38, size)
    numbers[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 65520.0, -0.0])
    numbers[1] = numbers[1].bfloat16() * (1 + 2**-8)  # halfway between two in bfloat16
    numbers[2, 1, -1] = torch.nan
    out = torch.full((2, 5, size + 3), 7, dtype=dtype)  # pieces, rows
    arguments = RowArguments(
        rows=numbers.data_ptr(),
        stride=numbers.stride(0),
        out=out[:, 1].data_ptr(),
        count=3,
        pieces=2,
        size=size,
        out_stride=out.stride(1),
        piece_stride=out.stride(0),
        work_items=1,
    )
    load_row_kernels().convert[dtype](ctypes.addressof(arguments))
    expected = torch.full_like(out, 7)
    expected[:, 1:4, :size] = numbers.to(dtype).transpose(0, 1)
    torch.testing.assert_close(out, expected, atol=0, rtol=0, equal_nan=True)


def test_no_number_stays_none() -> None:
    x = torch.ones(2, 64)
    x[0, 3] = torch.nan
    assert rms_norm(x, torch.ones(64), EPSILON)[0].isnan().all()
    assert silu_gate(x).isnan().sum() == 1
    assert not rms_norm(x, torch.ones(64), EPSILON)[1].isnan().any()


@pytest.mark.parametrize("size", [16, 50, 1000])
@pytest.mark.parametrize("several", [1, 3])
def test_a_row_does_not_depend_on_other_rows_and_threads(size: int, several: int) -> None:
    x, weight, angles = torch.randn(70, 2 * size), torch.randn(2, size), torch.randn(70, 2, size)

    def all_three(rows: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        heads = rows.view(-1, 2, size).clone()
        rotate(heads, turns)
        return torch.cat(
            [heads.flatten(1), rms_norm(heads, weight, EPSILON).flatten(1), silu_gate(rows)], 1
        )

    torch.set_num_threads(1)
    pairs = zip(x.split(1), angles.split(1), strict=True)
    alone = torch.cat([all_three(row, turns) for row, turns in pairs])
    torch.set_num_threads(several)
    for count in (1, 2, 8, 33, 70):
        assert torch.equal(all_three(x[:count], angles[:count]), alone[:count])


def test_other_rows_are_torchs() -> None:
    assert has_kernel(torch.zeros(2, 32), 32)
    assert not has_kernel(torch.zeros(2, 32, dtype=torch.bfloat16), 32)
    assert not has_kernel(torch.zeros(2, 32), 8)
    assert not has_kernel(torch.zeros(32, 2).t(), 32)
    assert not has_kernel(torch.zeros(2, 32, device="meta"), 32)
