"""The state of one session at a drafter, and when its new nodes are sent."""

import math
from dataclasses import dataclass, field

from runtime.core import limits
from runtime.core.features import FeatureBuffer
from runtime.core.messages import Draft, Features, Open, Share
from runtime.core.tree import TokenTree
from runtime.draft.commands import Send
from runtime.draft.frontier import Frontier
from runtime.drafters.base import ExpandRequest, Text

MAX_UNVERIFIED_NODES = 512  # per tree
MIN_PATH_LOGPROB = -7.0  # log of the least path probability worth a node
# The same for expanding a node with a method that reads features. It starts again after each
# commit, so its deep guesses do not outlive the step, and its passes take memory bandwidth from the
# target: for SmolLM2 beside two heads, on two cores, temperature 0, 2.76 tokens a step instead of
# 2.82 with -7, and passes of the target of 16.9 ms instead of 18.2 (at 0.8: 2.25 for 2.29, 18.5 for
# 20.3).
MIN_EXPANDED_LOGPROB = -3.0
# Share of the passes since the last commit whose nodes may be held back: sending them costs both
# sides more than the newest guesses are worth.
MAX_HELD_BACK = 0.25


@dataclass(slots=True)
class DraftState:
    """One session at the drafter: its text as far as it is known, and the tree that
    continues it.
    """

    stream: int
    opened: Open
    send: Send
    share: Share
    tokens: list[int]
    tree: TokenTree
    features: FeatureBuffer | None = None  # of the target; None: the method asks for none
    frontier: Frontier | None = None  # None: to be made
    passes: int = 0  # answered since the last commit
    sent_passes: int = 0  # of them, those whose nodes were sent
    unsent: list[Draft] = field(default_factory=list)
    lost: bool = False  # has missed a commit and asked for the text again
    waits: bool = False  # the method has no answer before more features arrive

    @property
    def lacks_features(self) -> bool:
        """Return True if the method asks for features and some of the text have not arrived.

        A text of one token has none before it goes on.
        """
        kept, read = self.features, len(self.tokens) - 1
        return kept is not None and (kept.end < read or read == 0)

    def add_features(self, event: Features) -> str | None:
        """Append hidden states of the target; repeated rows change nothing.

        Returns what is wrong with them, as the drafter counts it, or None.
        """
        kept, rows = self.features, event.rows
        width = rows.rows.shape[1]
        if self.lost or event.epoch != self.opened.epoch:
            return "stale features"
        if kept is None or width % len(kept.layers) or kept.width not in (0, width):
            return "refused features"
        if rows.end > len(self.tokens) + limits.TREE_DEPTH:  # of no commit that can follow
            return "refused features"
        return None if kept.append(rows) else "lost features"

    def restart(self, tree: TokenTree) -> None:
        """Continue with this tree."""
        self.tree, self.frontier, self.passes, self.sent_passes = tree, None, 0, 0
        self.unsent.clear()

    @property
    def should_send(self) -> bool:
        """Return True at once after a commit, when the target may have few nodes, then ever less
        often.
        """
        return self.passes - self.sent_passes >= MAX_HELD_BACK * self.passes

    @property
    def node_limit(self) -> int:
        """Return the most nodes of the tree.

        The target's tree has room for the trees of all drafters: a node refused there takes all
        nodes below it along.
        """
        return min(MAX_UNVERIFIED_NODES, limits.TREE_NODES // (self.share.of + 1))

    def is_resting(self) -> bool:
        """Return True if nothing is to be grown until the next event."""
        passes = self.opened.style.passes
        return (
            self.lost
            or self.waits
            or len(self.tree) > self.node_limit
            or self.share.of == 0
            or 0 < passes <= self.passes
        )

    def width(self, own: int) -> int:
        """Return the most leaves for the next pass: the number requested, or at most `own`.

        Without a request, a leaf must be the closer to the best the fuller the tree is. If the
        target takes long, the remaining nodes then add depth.
        """
        asked, expandable = self.opened.style.width, self.expandable().expandable
        if asked or not expandable:
            return asked
        least = expandable[0][0] - MIN_PATH_LOGPROB * (1 - len(self.tree) / self.node_limit)
        return sum(path <= least for path, _ in expandable[:own]) or 1

    def expandable(self) -> Frontier:
        """Return the frontier, made anew after a re-root."""
        if self.frontier is None:
            room = self.opened.prompt + self.opened.sampling.max_tokens - len(self.tokens)
            # A scheduler that requests a chain wants it however unlikely it is.
            least = MIN_PATH_LOGPROB if self.features is None else MIN_EXPANDED_LOGPROB
            floor = -math.inf if self.opened.style.width else least
            self.frontier = Frontier(self.tree, min(limits.TREE_DEPTH, room - 1), floor, self.share)
        return self.frontier


def expand_request(name: str, state: DraftState, count: int) -> ExpandRequest:
    opened = state.opened
    # Those of the next commit may be here before it.
    kept, read = state.features, len(state.tokens) - 1
    features = None if kept is None or kept.start >= min(kept.end, read) else kept.between(0, read)
    text = Text(name, state.tokens, opened.prompt, opened.sampling, state.tree, features)
    return ExpandRequest(text, state.expandable().best(count), opened.style.branches)


def new_tree(key: int, token: int) -> TokenTree:
    return TokenTree(key, token, limits.TREE_NODES, limits.TREE_DEPTH)
