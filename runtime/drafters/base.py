"""What a drafting method promises. A new method is one new file in this folder with a `build()`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.models.base import Model
from runtime.sampling import Sampling
from runtime.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Text:
    """One session as a drafter sees it: what is committed, and the tree of guesses that continues it.

    The root of `tree` is the last of `tokens`; `prompt` of them came from the user.
    """

    session: str
    tokens: Sequence[int]
    prompt: int
    sampling: Sampling
    tree: TokenTree


@dataclass(frozen=True, slots=True)
class Children:
    """Guesses, as parallel arrays: index of the parent in the tree, token id, log of the estimated acceptance (<= 0)."""

    parents: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]


class Drafter(Protocol):
    """Anything that proposes continuations. It may be wrong or silent; nothing it says is trusted."""

    def expand(self, text: Text, leaves: Sequence[int]) -> Children:
        """Guess the children of these nodes of `text.tree` (indices; a node is asked about at most once per life).

        One forward pass where the method has a model. Nothing need be returned for a leaf that the method has no
        opinion on; the host does not ask again.
        """
        ...

    def close(self, session: str) -> None:
        """Forget all that is kept for the session; no error where nothing is."""
        ...


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What a method's `build()` may use: names of models, and the way to load one on this drafter's device."""

    target: str
    draft: str
    load: Callable[[str], Model]
