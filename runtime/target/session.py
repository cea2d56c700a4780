"""One generation as a state machine without I/O: growth is offered, rows are selected, a verdict is applied."""

import math
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime.core import limits
from runtime.core.messages import AS_IT_LIKES, Commit, Draft, Key, Open, Request, Share, Style
from runtime.core.node_names import text_key
from runtime.core.tree import TokenTree
from runtime.core.verify import Verdict
from runtime.scoring import agreement
from runtime.scoring.calibration import Band

Probabilities = npt.NDArray[np.float64]

MEMORY = 0.05  # weight of a new position in what is known of this text
USUAL = 0.8  # share of first guesses that are right, before anything was seen of the text
LEAST, MOST = 0.3, 2.0  # of the tilt
LEAST_TURN = -3.0


class Session:
    """The committed tokens of one request and the target's mirror of its token tree.

    `drafted` counts the nodes that were merged, `ignored` those that changed nothing, by reason: `late` where their parent is a text
    that was decided to go on meanwhile, `stale` where it is none that was decided, `collision` where the drafter has given their name
    to another node.
    """

    def __init__(
        self,
        request: Request,
        vocabulary: int,
        context: int,
        band: Band,
        style: Style = AS_IT_LIKES,
    ) -> None:
        self.request = request
        self.id = request.session
        self.epoch = request.epoch
        self.style = style
        self.vocabulary = vocabulary
        self.band = band
        self.tokens = [*request.prompt, *request.committed]
        self.prompt = len(request.prompt)
        self.end = min(
            context, self.prompt + request.sampling.max_tokens
        )  # length of the longest text allowed
        self.most = (
            limits.STEP_ROWS
            if request.max_rows is None
            else min(limits.STEP_ROWS, request.max_rows)
        )  # nodes of a step
        self.tree = TokenTree(
            text_key(self.tokens), self.tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH
        )
        self.right = self.expected = (
            USUAL  # moving averages: first guesses that were right, and what they were scored
        )
        self.passed: deque[Key] = deque(
            maxlen=limits.TREE_DEPTH
        )  # names of the texts that the root has left behind
        self.drafted = 0
        self.ignored: Counter[str] = Counter()

    def open(self, share: Share) -> Open:
        """What a drafter must know to join now."""
        return Open(
            self.id,
            self.epoch,
            tuple(self.tokens),
            self.prompt,
            self.request.sampling,
            share,
            self.style,
        )

    def offer(self, *drafts: Draft) -> int:
        """Merge growth of one drafter into the mirror; returns how many nodes were new.

        Idempotent and, between messages, free of order: a node whose parent is not alive is dropped. Nothing in a draft
        can do more than add nodes.
        """
        fitting = [draft for draft in drafts if self.fits(draft)]
        if not fitting:
            return 0
        parents, drafter = np.concatenate([draft.parents for draft in fitting]), fitting[0].drafter
        tokens = np.concatenate([draft.tokens for draft in fitting], dtype=np.int64)
        said = np.concatenate([draft.scores for draft in fitting], dtype=np.float64)
        valid = (tokens >= 0) & (tokens < self.vocabulary) & (said <= 0.0)
        merged = self.tree.merge(
            parents[valid], tokens[valid], said[valid], drafter, self.band.of(drafter).scores
        )
        if merged.shared and (scores := agreement.scores(self.band, self.tree, merged.shared)):
            self.tree.rescore(scores)
        late = (
            sum(map(set(self.passed).__contains__, parents[valid][merged.stale].tolist()))
            if merged.stale
            else 0
        )
        dropped = {
            "invalid": int((~valid).sum()),
            "late": late,
            "stale": len(merged.stale) - late,
            "repeated": merged.repeated,
            "full": merged.full,
            "collision": merged.collisions,
        }
        for reason, count in dropped.items():
            if count:
                self.ignored[reason] += count
        self.drafted += len(merged.rows)
        return len(merged.rows)

    def fits(self, draft: Draft) -> bool:
        """Whether it may be merged; counted where it may not."""
        if draft.epoch == self.epoch and len(draft.tokens) <= limits.DRAFT_NODES:
            return True
        self.ignored["stale" if draft.epoch != self.epoch else "oversize"] += len(draft.tokens)
        return False

    @property
    def room(self) -> int:
        """Depth of the deepest node whose token could be delivered: one token more comes from the target in any case."""
        return self.end - len(self.tokens) - 1

    @property
    def tilt(self) -> float:
        """How much likelier this text's first guesses are right than scores say: their probability is exp(tilt * score), so 1 is neutral.

        Easy passages are easy for a while: scores are right on average over texts, and too low in one, too high in another.
        """
        return min(MOST, max(LEAST, math.log(self.right) / math.log(self.expected)))

    @property
    def turn(self) -> float:
        """What a path loses where it leaves the first guess, beside the score of the guess that it takes: the likelier the first are
        right, the less is left for others. Never above 0: no node is worth more than its parent."""
        return max(LEAST_TURN, min(0.0, math.log((1.0 - self.right) / (1.0 - self.expected))))

    def values(self) -> Probabilities:
        """Logs of the path probabilities of all nodes, (n,), as far as this text is like its last positions."""
        aside, turns = np.frombuffer(self.tree.aside), np.frombuffer(self.tree.turns, np.int64)
        found: Probabilities = (
            self.tilt * (np.frombuffer(self.tree.path) - aside) + aside + self.turn * turns
        )
        return found

    def worth(self) -> tuple[Probabilities, Probabilities, int]:
        """Path probabilities of all nodes that could be verified, and of those among them that could still get children,
        falling; the depth of the deepest. With an empty tree the leaf is the root, of probability 1. No more nodes than may be
        verified in one step."""
        tree, room, values = self.tree, self.room, self.values()
        depths, fanout = np.frombuffer(tree.depth, np.int64), np.frombuffer(tree.fanout, np.int64)
        inside = depths <= room
        inside[0] = False
        ends = (depths < room) & (fanout == 0)
        gains = np.exp(-np.sort(-values[inside])[: self.most])
        leaves = np.exp(-np.sort(-values[ends]))
        return gains, leaves, int(depths[inside].max(initial=0))

    def select(self, count: int) -> list[int]:
        """At most `count` nodes to verify, most probable first to be chosen, parents before children.

        Nodes so deep that their token could not be delivered are left out.
        """
        if (most := min(count, self.most)) == 0:
            return []
        room = self.room
        return [
            node for node in self.tree.best(most, self.values()) if self.tree.depth[node] <= room
        ]

    def paths(self, nodes: Sequence[int]) -> list[list[int]]:
        """Token ids below the root for each row of a step: the root's own (empty), then those of `nodes`."""
        return [[], *(self.tree.tokens_to(node) for node in nodes)]

    def apply(self, verdict: Verdict) -> tuple[Commit, bool]:
        """Append what the target decided and move the root; the second value is whether the new root was a node (hit)."""
        tree, base = self.tree, len(self.tokens)
        decided = [tree.token[node] for node in verdict.path] + [verdict.token]
        self.band.observe_path(tree, decided)
        agreement.observe_path(self.band, tree, decided)
        self.observe(decided)
        self.passed.extend(tree.key[node] for node in (0, *verdict.path))
        hit = tree.reroot(decided)
        self.tokens.extend(decided)
        return Commit(self.id, self.epoch, base, tuple(decided), tree.key[0]), hit

    def observe(self, decided: Sequence[int]) -> None:
        """Compare the best guesses that the decided tokens passed with their scores."""
        tree, node = self.tree, 0
        for token in decided:
            children = tree.children(node)
            if not children:
                return
            first = max(children, key=tree.score.__getitem__)
            self.right += MEMORY * ((tree.token[first] == token) - self.right)
            self.expected += MEMORY * (math.exp(tree.score[first]) - self.expected)
            self.right, self.expected = (
                min(0.99, max(0.05, mean)) for mean in (self.right, self.expected)
            )
            taken = tree.child(node, token)
            if taken is None:
                return
            node = taken
