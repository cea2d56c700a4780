"""One session at a drafter: its text, its tree, and when its growth is sent."""

import math
from dataclasses import dataclass, field

from runtime.core import limits
from runtime.core.messages import Draft, Open, Share
from runtime.core.tree import TokenTree
from runtime.draft.commands import Send
from runtime.draft.frontier import Frontier
from runtime.drafters.base import ExpandRequest, Text

MAX_UNVERIFIED_NODES = 512  # nodes that wait for a commit
MIN_PATH_LOGPROB = -7.0  # log of the least path probability worth a node
# Of the passes since the last commit this part may be held back: their messages cost both sides more
# than the newest guesses are worth.
MAX_HELD_BACK = 0.25


@dataclass(slots=True)
class DraftState:
    """One session at the drafter: the text as far as it is known, and the tree that grows from it."""

    stream: int
    opened: Open
    send: Send
    share: Share
    tokens: list[int]
    tree: TokenTree
    frontier: Frontier | None = None  # None where it is to be made anew
    passes: int = 0  # answered since the last commit
    sent_passes: int = 0  # of them, those that the target has been told of
    unsent: list[Draft] = field(default_factory=list)
    lost: bool = False  # has missed a commit and asked for the text again

    def restart(self, tree: TokenTree) -> None:
        """Go on with this tree."""
        self.tree, self.frontier, self.passes, self.sent_passes = tree, None, 0, 0
        self.unsent.clear()

    @property
    def should_send(self) -> bool:
        """Whether the target should hear now: at once after a commit, when it may have little else, then ever more rarely."""
        return self.passes - self.sent_passes >= MAX_HELD_BACK * self.passes

    @property
    def node_limit(self) -> int:
        """Nodes. The mirror has room for the trees of all: one that is refused there takes all below it along."""
        return min(MAX_UNVERIFIED_NODES, limits.TREE_NODES // (self.share.of + 1))

    def is_resting(self) -> bool:
        """Whether nothing is to be grown until the next event, whatever may be expanded."""
        passes = self.opened.style.passes
        return (
            self.lost
            or len(self.tree) > self.node_limit
            or self.share.of == 0
            or 0 < passes <= self.passes
        )

    def width(self, own: int) -> int:
        """The most leaves for the next pass: as asked for, or at most `own`.

        A drafter's own choice: the fuller the tree, the nearer a leaf must come to the best. Where the target takes long, the
        nodes that are left then go into depth.
        """
        asked, expandable = self.opened.style.width, self.expandable().expandable
        if asked or not expandable:
            return asked
        least = expandable[0][0] - MIN_PATH_LOGPROB * (1 - len(self.tree) / self.node_limit)
        return sum(path <= least for path, _ in expandable[:own]) or 1

    def expandable(self) -> Frontier:
        """What may be expanded now."""
        if self.frontier is None:
            room = self.opened.prompt + self.opened.sampling.max_tokens - len(self.tokens)
            floor = (
                -math.inf if self.opened.style.width else MIN_PATH_LOGPROB
            )  # who asks for a chain wants it however unlikely it is
            self.frontier = Frontier(self.tree, min(limits.TREE_DEPTH, room - 1), floor, self.share)
        return self.frontier


def expand_request(name: str, state: DraftState, count: int) -> ExpandRequest:
    opened = state.opened
    text = Text(name, state.tokens, opened.prompt, opened.sampling, state.tree)
    return ExpandRequest(text, state.expandable().best(count), opened.style.branches)


def new_tree(key: int, token: int) -> TokenTree:
    return TokenTree(key, token, limits.TREE_NODES, limits.TREE_DEPTH)
