"""The noise: the same bits everywhere, uniform, independent, and exact in the tails."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core import noise
from runtime.core.node_keys import mix64

MASK = (1 << 64) - 1
EXTREMES = np.array(
    [0, 1, -1, 2**63 - 1, -(2**63), 1 << 12, 1 << 62, ~(1 << 12), 12345678901234567], dtype=np.int64
)
FROZEN = [
    ["-0x1.1b6ebab070dd7p-2", "0x1.0d43ffea908e4p+0", "-0x1.8ada2808dbf83p-1"],
    ["0x1.fdf7ff152aa26p-1", "0x1.7d0cc561232f8p+1", "0x1.ffcdbed4d066ap-3"],
]


def plain(seed: int, position: int, token: int) -> float:
    """The definition in whole numbers of any size and the library's logarithm."""
    x = (mix64(mix64(seed, 0), position) + token * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    x ^= x >> 31
    return -math.log(-math.log((x >> 12 | 1) / 2**52))


def chi_square(observed: npt.NDArray[Any], expected: npt.NDArray[np.float64]) -> float:
    """Probability of a deviation at least this large."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(
        torch.special.gammaincc(
            torch.tensor((observed.size - 1) / 2.0).double(), torch.tensor(statistic / 2).double()
        )
    )


def uniforms(seeds: range, positions: range, tokens: range) -> npt.NDArray[np.float64]:
    """(seeds, positions, tokens), from the Gumbel values back to the uniform ones."""
    return np.stack(
        [
            np.exp(-np.exp(-noise.gumbel(seed, positions, np.arange(tokens.start, tokens.stop))))
            for seed in seeds
        ]
    )


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_the_value_is_the_definition(seed: int, position: int, token: int) -> None:
    value = float(noise.gumbel(seed, [position], np.array([token]))[0, 0])
    assert value == pytest.approx(plain(seed, position, token), rel=1e-13, abs=1e-13)


def test_the_values_never_change() -> None:
    found = noise.gumbel(-7, [0, 4095], np.array([0, 1, 128_000]))
    assert [[value.hex() for value in row] for row in found.tolist()] == FROZEN


def test_torch_gives_the_same_bits() -> None:
    tokens = np.arange(5000)
    for seed in (0, 1, -(2**63), 2**63 - 1):
        expected = noise.gumbel(seed, range(20), tokens)
        assert np.array_equal(
            noise.gumbel(seed, range(20), torch.from_numpy(tokens), torch).numpy(), expected
        )
    assert np.array_equal(
        noise.gumbel_from_bits(torch.from_numpy(EXTREMES), torch).numpy(),
        noise.gumbel_from_bits(EXTREMES),
    )
    assert np.array_equal(
        noise.gumbel_upper_bound(torch.from_numpy(EXTREMES), torch).numpy(),
        noise.gumbel_upper_bound(EXTREMES),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_bits() -> None:
    tokens = torch.arange(128_000)
    expected = noise.gumbel(3, range(8), tokens.numpy())
    assert np.array_equal(noise.gumbel(3, range(8), tokens.cuda(), torch).cpu().numpy(), expected)


def test_tokens_may_differ_from_row_to_row() -> None:
    whole = noise.gumbel(9, [4, 5, 6], np.arange(100))
    tokens = np.array([[3, 99], [0, 50], [7, 7]])
    assert np.array_equal(
        noise.gumbel(9, [4, 5, 6], tokens), np.take_along_axis(whole, tokens, axis=1)
    )


def test_tails() -> None:
    upper = (np.array([2**52 - 1, 2**52 - 3, 2**52 - 2**20 - 1, 2**51 + 1]) << 12).astype(np.int64)
    w = np.array([1, 3, 2**20 + 1, 2**51 - 1]) / 2**52
    assert noise.gumbel_from_bits(upper) == pytest.approx(-np.log(-np.log1p(-w)), rel=1e-14)
    assert noise.gumbel_from_bits(EXTREMES).min() >= -3.6
    assert noise.gumbel_from_bits(EXTREMES).max() <= 36.1


def test_ceiling_is_close_above() -> None:
    x = np.concatenate([noise.random_bits(1, range(50), np.arange(2000)).ravel(), EXTREMES])
    value, bound = noise.gumbel_from_bits(x), noise.gumbel_upper_bound(x)
    assert (bound >= value).all()
    assert (bound - value)[value > 5].max() < 0.07


@pytest.mark.parametrize(
    ("seeds", "positions", "tokens"),
    [
        (range(1), range(1), range(200_000)),
        (range(1), range(200_000), range(1)),
        (range(3000), range(1), range(1)),
        (range(50), range(50), range(50)),
    ],
    ids=["tokens", "positions", "seeds", "all"],
)
def test_uniform(seeds: range, positions: range, tokens: range) -> None:
    u = uniforms(seeds, positions, tokens).ravel()
    observed = np.histogram(u, bins=256, range=(0, 1))[0]
    assert chi_square(observed, np.full(256, u.size / 256)) > 1e-6


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seed", "position", "token"])
@pytest.mark.parametrize("lag", [1, 2, 16])
def test_neighbours_are_independent(axis: int, lag: int) -> None:
    u = uniforms(range(60), range(60), range(60))
    first, second = (
        np.delete(u, np.s_[-lag:], axis).ravel(),
        np.delete(u, np.s_[:lag], axis).ravel(),
    )
    observed = np.histogram2d(first, second, bins=16, range=((0, 1), (0, 1)))[0]
    assert chi_square(observed, np.full((16, 16), first.size / 256)) > 1e-6


def test_a_pair_that_depends_is_found() -> None:
    """The test above can fail: the noise of position + token does not depend on both."""
    u = np.stack(
        [uniforms(range(1), range(1), range(shift, shift + 200))[0, 0] for shift in range(200)]
    )
    observed = np.histogram2d(
        u[:-1, 1:].ravel(), u[1:, :-1].ravel(), bins=16, range=((0, 1), (0, 1))
    )[0]
    assert chi_square(observed, np.full((16, 16), observed.sum() / 256)) < 1e-6


@pytest.mark.parametrize("bit", [0, 1, 31, 62])
def test_one_bit_of_the_seed_turns_half_of_the_bits(bit: int) -> None:
    changed = noise.random_bits(99, range(50), np.arange(50)) ^ noise.random_bits(
        99 ^ (1 << bit), range(50), np.arange(50)
    )
    share = np.unpackbits(changed.view(np.uint8)).mean()
    assert abs(share - 0.5) < 6 * 0.5 / math.sqrt(64 * 2500)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 10.0])
def test_argmax_is_the_plain_argmax(spread: float) -> None:
    scores = (np.random.default_rng(0).standard_normal((40, 3000)) * spread).astype(np.float32)
    scores[:, ::7] = -np.inf
    positions = [5 * row for row in range(40)]
    assert np.array_equal(
        noise.gumbel_argmax(scores, 11, positions),
        (scores + noise.gumbel(11, positions, np.arange(3000))).argmax(axis=1),
    )
