"""A head without weights: it repeats on a synthetic text what a real head guessed on measured
texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.core.draft_nodes import NO_NODES, DraftNodes
from runtime.core.node_keys import child_key, text_key
from runtime.core.tree_builder import best_first
from runtime.drafters.base import Text
from runtime.heads.base import VerifiedStep
from runtime.models.base import OutputSpec
from runtime.scoring.calibration import Calibrations
from runtime.sim.draft_samples import RankedScores
from runtime.sim.synthetic_models import VOCABULARY, next_token


@dataclass(frozen=True, slots=True)
class HeadProfile:
    """Measurements of a head.

    seconds  added to a step by the head: its own time, and the time of the outputs that it reads
    steps    in order along the target's texts: for each place ahead the guesses after the target's
             own tokens, up to the first place whose guesses missed the target's choice; empty if
             the head was silent
    """

    name: str
    seconds: float
    steps: tuple[tuple[RankedScores, ...], ...]

    def hit_rate(self, ahead: int) -> float:
        """Return the share of the steps in which the best guess was right at each of the first
        `ahead` places.
        """
        return sum(
            len(step) >= ahead and all(rank == 0 for rank, _ in step[:ahead]) for step in self.steps
        ) / len(self.steps)

    def calibrate(self, known: Calibrations) -> None:
        """Teach a target's calibrations everything that these steps show."""
        table = known.bucket(0.0).table(self.name)
        for step in self.steps:
            for rank, scores in step:
                for place, score in enumerate(scores):
                    table.observe(place, score, place == rank)


class ReplayedHead:
    """A Head of SyntheticTarget."""

    output_spec = OutputSpec()

    def __init__(self, profile: HeadProfile) -> None:
        self.profile = profile

    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        return [self.draft(one.text) for one in seen]

    def draft(self, text: Text) -> DraftNodes:
        steps = self.profile.steps
        step = steps[(text_key(text.tokens[: text.prompt]) + len(text.tokens)) % len(steps)]
        if not step:
            return NO_NODES
        most = max(len(scores) for _, scores in step)
        tokens, said, key = (
            np.zeros((len(step), most), np.int64),
            np.full((len(step), most), -np.inf),
            text.tree.key[0],
        )
        for place, (rank, scores) in enumerate(step):
            right = next_token(key)
            tokens[place] = [
                right if guess == rank else (right + 1 + guess) % VOCABULARY
                for guess in range(most)
            ]
            said[place, : len(scores)] = scores
            key = child_key(key, right)
        return best_first(tokens, said)

    def close(self, session: str) -> None:
        pass


def head_step(draft: DraftNodes, text: Sequence[int]) -> tuple[RankedScores, ...]:
    """Return a step of HeadProfile: the guesses of a head, given the target's actual continuation
    `text` after the root.
    """
    node, found = 0, []
    for token in text:
        children = np.flatnonzero(draft.parents == node)
        if not len(children):
            break
        best = children[np.argsort(-draft.scores[children], kind="stable")]
        right = np.flatnonzero(draft.tokens[best] == token)
        found.append(
            (
                int(right[0]) if len(right) else -1,
                tuple(np.minimum(draft.scores[best], 0.0).tolist()),
            )
        )
        if not len(right):
            break
        node = int(best[right[0]]) + 1
    return tuple(found)
