"""What a head promises. It sits on the target and guesses from what the target's own pass has computed, without a pass of its own.

A new head is one new file in this folder with a `build()`; what it needs of a pass it says by its `output_spec`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.core.draft_nodes import DraftNodes
from runtime.core.sampler_reference import SamplingInput
from runtime.drafters.base import Text
from runtime.models.base import HiddenStateModel, ModelIdentity, OutputSpec, PassOutput


@dataclass(frozen=True, slots=True)
class VerifiedStep:
    """What a step has shown of one session, whose root has moved since.

    text    the session as a drafter sees it; its tree is the target's own and is not to be changed
    tokens  int64 (rows,)  the token of each row that was verified: the old root's, then those of nodes
    path    rows on the way that the target took, from 0 on: what it chose after the last of them is the new root
    shown   of each row the logits, and what was looked at
    riders  the rows that pseudo rows rode beside
    """

    text: Text
    tokens: npt.NDArray[np.int64]
    path: Sequence[int]
    output: PassOutput
    branch_rows: Sequence[int] = ()


class Head(Protocol):
    """Like a drafter it may be wrong or silent, and nothing it says is trusted. It runs on the target's thread, within the step."""

    @property
    def output_spec(self) -> OutputSpec:
        """What it needs of every pass; the same at all times."""
        ...

    def propose(self, seen: Sequence[VerifiedStep]) -> Sequence[DraftNodes]:
        """Guess how the texts of several sessions go on; the answers are parallel. All hangs on the root of a text: `roots` is 1."""
        ...

    def close(self, session: str) -> None:
        """The session is over, and its name means nothing any more; no error where nothing is kept."""
        ...


@dataclass(frozen=True, slots=True)
class HeadContext:
    """What a head's `build()` may use: the target, and the folder of what was trained for it, if any."""

    model: HiddenStateModel
    identity: ModelIdentity
    folder: Path | None


def ask_ahead(seen: VerifiedStep, places: int) -> SamplingInput:
    """Ask for the tokens of the next `places` places after the new root.

    Nothing is known of the paths that lead there but their lengths.
    """
    text, root = seen.text, seen.text.tokens[-1]
    paths = [[root] * place for place in range(places)]
    return SamplingInput(text.sampling, text.prompt, text.tokens, paths, frozenset())
