"""The interface of a head: it guesses from the target's own pass, without a pass of its own.

A new head is one new file in this folder with a `build()`. Its `output_spec` states which outputs
of a pass it needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.core.draft_nodes import DraftNodes
from runtime.core.features import FeatureBuffer
from runtime.core.sampler_reference import SamplingInput
from runtime.drafters.base import Text
from runtime.models.base import HiddenStateModel, ModelIdentity, OutputSpec, PassOutput


@dataclass(frozen=True, slots=True)
class VerifiedStep:
    """One session's result of a step, after its root has moved.

    text         the session as a drafter sees it; the head must not change its tree, which is the
                 target's
    tokens       int64 (rows,): the token of each verified row, first the old root, then nodes
    path         rows of the accepted path, from 0; the token that the target chose after the last
                 is the new root
    output       logits of each row, and the outputs requested by `output_spec`
    branch_rows  rows that pseudo rows branched from
    features     of all committed tokens but the last, if a head's `output_spec` has features; of
                 these layers and perhaps others
    """

    text: Text
    tokens: npt.NDArray[np.int64]
    path: Sequence[int]
    output: PassOutput
    branch_rows: Sequence[int] = ()
    features: FeatureBuffer | None = None


class Head(Protocol):
    """Guesses continuations. It may be wrong or silent; the target trusts nothing it returns.

    It runs on the target's thread, within the step.
    """

    @property
    def output_spec(self) -> OutputSpec:
        """Return the outputs that the head needs of every pass; they never change."""
        ...

    def propose(self, seen: Sequence[VerifiedStep]) -> Sequence[DraftNodes]:
        """Guess how the texts of several sessions continue; the answers are parallel.

        All guesses hang on the root of a text, so `roots` is 1.
        """
        ...

    def close(self, session: str) -> None:
        """Forget a session that has ended; an unknown session is no error."""
        ...


@dataclass(frozen=True, slots=True)
class HeadContext:
    """The target that a head's `build()` may use, and the folder of its trained weights, if any."""

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
