"""One generation as a state machine without I/O: growth is offered, rows are selected, a verdict is applied."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime import limits
from runtime.calibration import Band
from runtime.messages import AS_IT_LIKES, Commit, Draft, Open, Request, Share, Style
from runtime.tree import TokenTree, text_key
from runtime.verify import Verdict

Probabilities = npt.NDArray[np.float64]


class Session:
    """The committed tokens of one request and the target's mirror of its token tree.

    `drafted` counts the nodes that were merged, `ignored` those that changed nothing, by reason.
    """

    def __init__(self, request: Request, vocabulary: int, context: int, band: Band, epoch: int = 0, style: Style = AS_IT_LIKES) -> None:
        self.request = request
        self.id = request.session
        self.epoch = epoch
        self.style = style
        self.vocabulary = vocabulary
        self.band = band
        self.tokens = [*request.prompt, *request.committed]
        self.prompt = len(request.prompt)
        self.end = min(context, self.prompt + request.sampling.max_tokens)  # length of the longest text allowed
        self.tree = TokenTree(text_key(self.tokens), self.tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH)
        self.drafted = 0
        self.ignored: Counter[str] = Counter()

    def open(self, share: Share) -> Open:
        """What a drafter must know to join now."""
        return Open(self.id, self.epoch, tuple(self.tokens), self.prompt, self.request.sampling, share, self.style)

    def offer(self, draft: Draft) -> int:
        """Merge growth into the mirror; returns how many nodes were new.

        Idempotent and, between messages, free of order: a node whose parent is not alive is dropped. Nothing in a draft
        can do more than add nodes.
        """
        if draft.epoch != self.epoch or len(draft.tokens) > limits.DRAFT_NODES:
            self.ignored["stale" if draft.epoch != self.epoch else "oversize"] += len(draft.tokens)
            return 0
        tree, added, table = self.tree, 0, self.band.of(draft.drafter)
        for parent_key, token, said in zip(draft.parents.tolist(), draft.tokens.tolist(), draft.scores.tolist(), strict=True):
            parent = tree.index.get(parent_key)
            if parent is None:
                self.ignored["stale"] += 1
            elif not 0 <= token < self.vocabulary or not said <= 0.0:
                self.ignored["invalid"] += 1
            else:
                score = table.score(len(tree.children[parent]), said)
                new = tree.add(parent, token, score, said, draft.drafter) is not None
                added += new
                if not new:
                    self.ignored["repeated" if token in tree.children[parent] else "full"] += 1
        self.drafted += added
        return added

    @property
    def room(self) -> int:
        """Depth of the deepest node whose token could be delivered: one token more comes from the target in any case."""
        return self.end - len(self.tokens) - 1

    def worth(self) -> tuple[Probabilities, Probabilities, int]:
        """Path probabilities of all nodes that could be verified, and of those among them that could still get children,
        falling; the depth of the deepest. With an empty tree the leaf is the root, of probability 1."""
        tree, room = self.tree, self.room
        paths, depths = np.asarray(tree.path), np.asarray(tree.depth)
        inside = depths <= room
        inside[0] = False
        ends = (depths < room) & np.asarray([not children for children in tree.children])
        gains = np.exp(-np.sort(-paths[inside]))
        leaves = np.exp(-np.sort(-paths[ends]))
        return gains, leaves, int(depths[inside].max(initial=0))

    def select(self, count: int) -> list[int]:
        """At most `count` nodes to verify, most probable first to be chosen, parents before children.

        Nodes so deep that their token could not be delivered are left out.
        """
        if count == 0:
            return []
        room = self.room
        return [node for node in self.tree.best(count) if self.tree.depth[node] <= room]

    def paths(self, nodes: Sequence[int]) -> list[list[int]]:
        """Token ids below the root for each row of a step: the root's own (empty), then those of `nodes`."""
        return [[], *(self.tree.tokens_to(node) for node in nodes)]

    def apply(self, verdict: Verdict) -> tuple[Commit, bool]:
        """Append what the target decided and move the root; the second value is whether the new root was a node (hit)."""
        tree, base = self.tree, len(self.tokens)
        decided = [tree.token[node] for node in verdict.path] + [verdict.token]
        self.band.observe_path(tree, decided)
        hit = tree.reroot(decided)
        self.tokens.extend(decided)
        return Commit(self.id, self.epoch, base, tuple(decided), tree.key[0]), hit
