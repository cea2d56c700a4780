"""Computes node keys: 64-bit hashes of a text, by which messages refer to the nodes of a tree.

    key of a text  = fold of child_key over its token ids
    key of a child = child_key(key of its parent, token id)

Every process computes the same keys, and a key stays valid when the root moves. A key proves
nothing: the mix has no secret, so a drafter finds two texts with one key in seconds. A key is
therefore looked up only among those of the same drafter (runtime.core.tree), and nothing that
decides a token looks one up.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

MASK_64 = (1 << 64) - 1
KEY_MASK = MASK_64  # significant bits of a key; tests use few, so that keys collide
EMPTY_TEXT = 0x9E3779B97F4A7C15
INCREMENT, MULTIPLIER_1, MULTIPLIER_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

Keys = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def mix64(key: int, token: int) -> int:
    """Return 64 bits that depend on all bits of both (finaliser of SplitMix64, Steele et
    al. 2014).
    """
    x = (key + (token + 1) * INCREMENT) & MASK_64
    x = ((x ^ (x >> 30)) * MULTIPLIER_1) & MASK_64
    x = ((x ^ (x >> 27)) * MULTIPLIER_2) & MASK_64
    return x ^ (x >> 31)


def child_key(key: int, token: int) -> int:
    """Return the key of the text with key `key` continued by `token`."""
    return mix64(key, token) & KEY_MASK


def child_keys(keys: Keys, tokens: Ints) -> Keys:
    """Return child_key (n,) of each pair."""
    x = keys + (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(INCREMENT)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    names: Keys = (x ^ (x >> np.uint64(31))) & np.uint64(KEY_MASK)
    return names


def text_key(tokens: Iterable[int], start: int = EMPTY_TEXT) -> int:
    """Return the key of a text, or of the text with key `start` continued by `tokens`."""
    key = start
    for token in tokens:
        key = child_key(key, token)
    return key
