"""PEARL: parallel speculative decoding with adaptive draft length (Liu et al., arXiv 2408.11850).

Target and drafter work at the same time in rounds of max(gamma * t, T):

    pre-verify   after a rejection: the target decides one token while the drafter drafts gamma,
                 the first of which is that token
    post-verify  after acceptance: the target verifies the other gamma - 1 while the drafter
                 drafts gamma more, the first of which is decided with them

A round in which everything is accepted yields gamma tokens; one after a rejection yields one. Here
the token decided ahead is the target's own at the end of the rows. The first drafted token was
right if it names a node (hit), and the other gamma - 1 are the nodes that the re-root keeps. The
drafter rests after gamma passes without a commit, as in the paper.

Two differences favour PEARL or matter little. A rejection reaches the drafter at once, not only at
the end of the round (the paper sets gamma so that gamma * t is T, where both coincide). A first
token that arrives after the target's decision counts as rejected, so with a drafter as slow as the
target this is plain decoding.
"""

from runtime.core import limits
from runtime.core.messages import Style
from runtime.schedulers.base import SessionView
from runtime.schedulers.blocking import Blocking


def gamma(step: float, t: float) -> int:
    """Return the paper's optimal tokens per round, T/t (`step` is T), as an integer of at least
    one.

    It is at most half the depth of a tree, which must hold the tokens being verified and those
    drafted meanwhile.
    """
    return max(1, min(round(step / t), limits.TREE_DEPTH // 2))


class Pearl(Blocking):
    def __init__(self, gamma: int, t: float) -> None:
        """`t`: see Blocking."""
        super().__init__(t)
        self.style = Style(width=1, branches=1, passes=gamma)

    @property
    def expected_growths(self) -> int:
        return self.style.passes

    def needs_growth(self, view: SessionView) -> bool:
        return view.depth < self.rows_wanted(view)

    def rows_wanted(self, view: SessionView) -> int:
        return self.style.passes - 1 if view.hit else 0
