"""PEARL: parallel speculative decoding with adaptive draft length (Liu et al., arXiv 2408.11850).

Target and drafter work at the same time in rounds of max(gamma * t, T):

    pre-verify   after a rejection: the target decides one token while the drafter drafts gamma, of which that is the first
    post-verify  after acceptance: the target verifies the other gamma - 1 while the drafter drafts gamma more, of which the
                 first is decided with them

so a round in which all is accepted brings gamma tokens, and one after a rejection brings one. Here the token decided ahead is
the target's own at the end of the rows: the first drafted one was right where it names a node (hit), and the other gamma - 1
are what the re-root leaves. The drafter rests after gamma passes without a commit, as in the paper.

Two differences, in PEARL's favour or of little weight: a rejection reaches the drafter at once and not only at the end of the
round (the paper sets gamma so that gamma * t is T, where both are the same moment); and a first token that arrives later than the
target's decision counts as rejected, so for a drafter as slow as the target this is plain decoding.
"""

from runtime.core import limits
from runtime.core.messages import Style
from runtime.schedulers.base import SessionView
from runtime.schedulers.blocking import Blocking


def gamma(step: float, t: float) -> int:
    """The paper's optimal number of tokens in a round, T/t (`step` is T), as a whole number of at least one.

    At most half the depth of a tree, which must hold the tokens under verification and those drafted meanwhile.
    """
    return max(1, min(round(step / t), limits.TREE_DEPTH // 2))


class Pearl(Blocking):
    def __init__(self, gamma: int, t: float) -> None:
        """`t`: see Turns."""
        super().__init__(t)
        self.style = Style(width=1, branches=1, passes=gamma)

    @property
    def expected_growths(self) -> int:
        return self.style.passes

    def needs_growth(self, view: SessionView) -> bool:
        return view.depth < self.rows_wanted(view)

    def rows_wanted(self, view: SessionView) -> int:
        return self.style.passes - 1 if view.hit else 0
