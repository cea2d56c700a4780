"""Generates Gumbel noise as a pure function of (seed, position, token id).

The noise has the same bits on every device.

argmax(logits + gumbel) is a draw from softmax(logits) (Gumbel 1954; Maddison et al., "A* Sampling",
2014). A counter instead of a stream makes a draw independent of earlier draws and of how rows are
batched.

The code uses only operations that IEEE 754 and two's complement define to the last bit: integer
add, multiply, shift, and, or, xor with wrap-around, and float64 + - * /. numpy and torch have them
under the same names, so the array namespace is an argument (`xp`). A library's own log() would
differ in the last place between devices. Each operation is one kernel in either library, so no
compiler can fuse a multiplication with an addition.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.core.node_keys import mix64

Array = Any  # numpy array or torch tensor: whatever `xp` computes on

SIGN_BIT = 1 << 63
# Constants of SplitMix64 (Steele et al. 2014), as int64
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)
ONE_BITS = 0x3FF0000000000000  # bits of 1.0
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # bits of the square root of 1/2
MANTISSA_MASK = (1 << 52) - 1
LN_2 = 0.6931471805599453
ARTANH_TERMS = tuple(2.0 / (2 * k + 1) for k in range(11))  # of 2 artanh(s) / s in s squared


def row_key(seed: int, position: int) -> int:
    """Return 64 well mixed bits, as int64, for one position of one seed."""
    key = mix64(mix64(seed, 0), position)
    return (key ^ SIGN_BIT) - SIGN_BIT


def random_bits(seed: int, positions: Sequence[int], tokens: Array, xp: Any = np) -> Array:
    """Return 64 random bits, int64 (rows, n), for each position and each of its token ids.

    `tokens` is int64 (n,), shared by all rows, or (rows, n). The result has its namespace and
    device.
    """
    keys = xp.asarray(
        [row_key(seed, position) for position in positions], dtype=xp.int64, device=tokens.device
    )
    x = tokens * GOLDEN + keys[:, None]
    x ^= _shift_right(x, 30)
    x *= MIX_1
    x ^= _shift_right(x, 27)
    x *= MIX_2
    x ^= _shift_right(x, 31)
    return x


def gumbel_from_bits(x: Array, xp: Any = np) -> Array:
    """Convert 64 random bits, of which the upper 51 count, to standard Gumbel noise in float64.

    The noise is -log(-log(u)), between -3.6 and 36.1; u is an odd multiple of 2**-52, never 0 or 1.
    The absolute error is below 1e-14; in the upper tail the relative error is.
    """
    return -_log(-_log(_one_plus_uniform(x, xp) - 1.0, xp), xp)


def gumbel(seed: int, positions: Sequence[int], tokens: Array, xp: Any = np) -> Array:
    """Return standard Gumbel noise, float64 (rows, n): a row per position, a column per token id.

    See `random_bits` for the arguments.
    """
    return gumbel_from_bits(random_bits(seed, positions, tokens, xp), xp)


def approx_gumbel(
    seed: int, positions: Sequence[int], tokens: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.float64]:
    """Return the noise of `gumbel` up to rounding, on numpy, in a third of the time.

    It suits guesses, which need not be the same bits everywhere.
    """
    noise: npt.NDArray[np.float64] = -np.log(
        -np.log(_one_plus_uniform(random_bits(seed, positions, tokens), np) - 1.0)
    )
    return noise


def gumbel_upper_bound(x: Array, xp: Any = np) -> Array:
    """Return an upper bound of gumbel_from_bits(x), in three operations.

    Where the noise is 5 or more, the bound is less than 0.07 above it: -log(-log(1 - w)) <=
    -log(w), and the bits of a float, read as a number, bound its base-2 logarithm from below.
    """
    bound = xp.asarray((2.0 - _one_plus_uniform(x, xp)).view(xp.int64), dtype=xp.float64)
    bound *= -LN_2 / (MANTISSA_MASK + 1)
    bound += 1023 * LN_2 + 1e-9  # the rounding of the conversion is below 1e-12
    return bound


def gumbel_argmax(
    scores: npt.NDArray[np.floating[Any]], seed: int, positions: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Return argmax(scores + gumbel) of each row of `scores` (rows, vocabulary).

    Equal values go to the lowest token id; -inf marks a token that is not allowed. Logarithms cost
    six times as much as the bits, and few tokens can win: the exact noise of the token with the
    highest upper bound is the value that the bounds of the others must reach.
    """
    x = random_bits(seed, positions, np.arange(scores.shape[1]))
    bound = gumbel_upper_bound(x)
    bound += scores
    rows = np.arange(len(scores))
    guess: npt.NDArray[np.int64] = bound.argmax(axis=1)
    reached = scores[rows, guess] + gumbel_from_bits(x[rows, guess])
    row, token = np.nonzero(bound >= reached[:, None])
    if len(row) == len(rows):  # no other token can win, which is the usual case
        return guess
    bound.fill(-np.inf)
    bound[row, token] = scores[row, token] + gumbel_from_bits(x[row, token])
    bound[rows, guess] = reached
    winners: npt.NDArray[np.int64] = bound.argmax(axis=1)
    return winners


def _shift_right(x: Array, places: int) -> Array:
    """Shift int64 to the right, filling with zeros."""
    shifted = x >> places
    shifted &= (1 << (64 - places)) - 1
    return shifted


def _one_plus_uniform(x: Array, xp: Any) -> Array:
    """Return 1 + u, exactly: the upper 51 bits of x below the leading 1 of a float64, last
    bit set.
    """
    f = _shift_right(x, 12)
    f |= ONE_BITS | 1
    return f.view(xp.float64)


def _log(x: Array, xp: Any) -> Array:
    """Return the natural logarithm of positive normal float64, relative error below 1e-15, also
    near 1.

    x = 2**e * m with m between sqrt(1/2) and sqrt(2), and log m = 2 artanh((m - 1) / (m + 1)),
    whose series is cut where its terms fall below 2**-53.
    """
    x = x.view(xp.int64)
    e = x - SQRT_HALF_BITS
    e >>= 52
    m = (x - (e << 52)).view(xp.float64)
    s = m - 1.0
    m += 1.0
    s /= m
    z = s * s
    series = z * ARTANH_TERMS[-1]
    for term in ARTANH_TERMS[-2:0:-1]:
        series += term
        series *= z
    series += ARTANH_TERMS[0]
    series *= s
    e = xp.asarray(e, dtype=xp.float64)
    e *= LN_2
    e += series
    return e
