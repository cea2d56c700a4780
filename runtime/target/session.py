"""One generation as a state machine without I/O: merges drafts, selects rows, applies decisions."""

import math
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime.core import limits
from runtime.core.accepted_path import AcceptedPath
from runtime.core.messages import DEFAULT_STYLE, Commit, Draft, Key, Open, Request, Share, Style
from runtime.core.node_keys import text_key
from runtime.core.tree import TokenTree
from runtime.scoring import agreement
from runtime.scoring.calibration import TemperatureBucket

Floats = npt.NDArray[np.float64]

ACCURACY_EWMA_WEIGHT = 0.05  # weight of a new position
INITIAL_ACCURACY = 0.8  # of first guesses
MIN_CONFIDENCE_SCALE, MAX_CONFIDENCE_SCALE = 0.3, 2.0
MIN_BRANCH_PENALTY = -3.0


class Session:
    """The committed tokens of one request, and the target's copy of its token tree.

    `drafted` counts merged nodes; `ignored` counts nodes without effect, by reason. `late`: the
    text of their parent has been committed and passed meanwhile. `stale`: their parent is unknown.
    `collision`: the drafter has given their key to another node.
    """

    def __init__(
        self,
        request: Request,
        vocabulary: int,
        context: int,
        bucket: TemperatureBucket,
        style: Style = DEFAULT_STYLE,
    ) -> None:
        self.request = request
        self.id = request.session
        self.epoch = request.epoch
        self.style = style
        self.vocabulary = vocabulary
        self.bucket = bucket
        self.tokens = [*request.prompt, *request.committed]
        self.prompt = len(request.prompt)
        # Length of the longest text allowed
        self.end = min(context, self.prompt + request.sampling.max_tokens)
        self.max_step_nodes = (
            limits.STEP_ROWS
            if request.max_rows is None
            else min(limits.STEP_ROWS, request.max_rows)
        )
        self.tree = TokenTree(
            text_key(self.tokens), self.tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH
        )
        # Moving averages over first guesses: share that was right, and probability by score
        self.accuracy = self.expected_accuracy = INITIAL_ACCURACY
        # Keys of former roots
        self.passed_keys: deque[Key] = deque(maxlen=limits.TREE_DEPTH)
        self.drafted = 0
        self.ignored: Counter[str] = Counter()

    def open(self, share: Share) -> Open:
        """Return what a drafter needs to join now."""
        return Open(
            self.id,
            self.epoch,
            tuple(self.tokens),
            self.prompt,
            self.request.sampling,
            share,
            self.style,
        )

    def merge_drafts(self, *drafts: Draft) -> int:
        """Merge drafts of one drafter into the tree and return the number of new nodes.

        Merging is idempotent, and independent of the order of messages: a node whose parent is not
        alive is dropped. A draft can do nothing but add nodes.
        """
        fitting = [draft for draft in drafts if self.is_mergeable(draft)]
        if not fitting:
            return 0
        parents, drafter = np.concatenate([draft.parents for draft in fitting]), fitting[0].drafter
        tokens = np.concatenate([draft.tokens for draft in fitting], dtype=np.int64)
        raw_logprob = np.concatenate([draft.scores for draft in fitting], dtype=np.float64)
        valid = (tokens >= 0) & (tokens < self.vocabulary) & (raw_logprob <= 0.0)
        merged = self.tree.merge(
            parents[valid],
            tokens[valid],
            raw_logprob[valid],
            drafter,
            self.bucket.table(drafter).scores,
        )
        if merged.shared and (
            scores := agreement.combined_scores(self.bucket, self.tree, merged.shared)
        ):
            self.tree.rescore(scores)
        late = (
            sum(map(set(self.passed_keys).__contains__, parents[valid][merged.stale].tolist()))
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

    def is_mergeable(self, draft: Draft) -> bool:
        """Return True if a draft may be merged; otherwise count its nodes as ignored."""
        if draft.epoch == self.epoch and len(draft.tokens) <= limits.DRAFT_NODES:
            return True
        self.ignored["stale" if draft.epoch != self.epoch else "oversize"] += len(draft.tokens)
        return False

    @property
    def room(self) -> int:
        """Return the depth of the deepest node whose token could be delivered.

        One more token always comes from the target itself.
        """
        return self.end - len(self.tokens) - 1

    @property
    def confidence_scale(self) -> float:
        """Return how to scale scores of first guesses in this text: their probability is exp(scale
        * score).

        1 is neutral. Scores are right on average over texts but too low in one and too high in
        another: easy passages stay easy for a while.
        """
        return min(
            MAX_CONFIDENCE_SCALE,
            max(MIN_CONFIDENCE_SCALE, math.log(self.accuracy) / math.log(self.expected_accuracy)),
        )

    @property
    def branch_penalty(self) -> float:
        """Return what a path loses when it leaves the first guess, in addition to the score of the
        node.

        The more often first guesses are right, the less probability is left for others. The value
        is at most 0: no node is worth more than its parent.
        """
        return max(
            MIN_BRANCH_PENALTY,
            min(0.0, math.log((1.0 - self.accuracy) / (1.0 - self.expected_accuracy))),
        )

    def values(self) -> Floats:
        """Return the log path probabilities (n,) of all nodes, adapted to the recent part of this
        text.
        """
        off_top_logprob, off_top_count = (
            np.frombuffer(self.tree.off_top_logprob),
            np.frombuffer(self.tree.off_top_count, np.int64),
        )
        found: Floats = (
            self.confidence_scale * (np.frombuffer(self.tree.path) - off_top_logprob)
            + off_top_logprob
            + self.branch_penalty * off_top_count
        )
        return found

    def marginal_gains(self) -> tuple[Floats, Floats, int]:
        """Return path probabilities of verifiable nodes and of expandable leaves, and the maximum
        depth.

        Both arrays are falling. In an empty tree the only leaf is the root, of probability 1. No
        more nodes are returned than one step may verify.
        """
        tree, room, values = self.tree, self.room, self.values()
        depths, fanout = np.frombuffer(tree.depth, np.int64), np.frombuffer(tree.fanout, np.int64)
        inside = depths <= room
        inside[0] = False
        ends = (depths < room) & (fanout == 0)
        gains = np.exp(-np.sort(-values[inside])[: self.max_step_nodes])
        leaves = np.exp(-np.sort(-values[ends]))
        return gains, leaves, int(depths[inside].max(initial=0))

    def expected_accepted(self, nodes: Sequence[int]) -> float:
        """Return how many of these nodes will be accepted, by their path probabilities."""
        return float(np.exp(self.values()[nodes]).sum()) if nodes else 0.0

    def select(self, count: int) -> list[int]:
        """Return up to `count` nodes to verify, the most probable ones, parents before children.

        Nodes too deep to be delivered are left out.
        """
        if (max_step_nodes := min(count, self.max_step_nodes)) == 0:
            return []
        room = self.room
        return [
            node
            for node in self.tree.best_nodes(max_step_nodes, self.values())
            if self.tree.depth[node] <= room
        ]

    def paths(self, nodes: Sequence[int]) -> list[list[int]]:
        """Return the token ids below the root for each row of a step: [] for the root, then the
        nodes'.
        """
        return [[], *(self.tree.tokens_to(node) for node in nodes)]

    def apply(self, accepted: AcceptedPath) -> tuple[Commit, bool]:
        """Append the decided tokens and move the root.

        Returns the commit, and True if the new root was a node (hit).
        """
        tree, base = self.tree, len(self.tokens)
        decided = [tree.token[node] for node in accepted.path] + [accepted.token]
        self.bucket.observe_path(tree, decided)
        agreement.observe_path(self.bucket, tree, decided)
        self.observe(decided)
        self.passed_keys.extend(tree.key[node] for node in (0, *accepted.path))
        hit = tree.reroot(decided)
        self.tokens.extend(decided)
        return Commit(self.id, self.epoch, base, tuple(decided), tree.key[0]), hit

    def observe(self, decided: Sequence[int]) -> None:
        """Compare the best guess at each decided position with its score."""
        tree, node = self.tree, 0
        for token in decided:
            children = tree.children(node)
            if not children:
                return
            first = max(children, key=tree.score.__getitem__)
            self.accuracy += ACCURACY_EWMA_WEIGHT * ((tree.token[first] == token) - self.accuracy)
            self.expected_accuracy += ACCURACY_EWMA_WEIGHT * (
                math.exp(tree.score[first]) - self.expected_accuracy
            )
            self.accuracy, self.expected_accuracy = (
                min(0.99, max(0.05, mean)) for mean in (self.accuracy, self.expected_accuracy)
            )
            taken = tree.child(node, token)
            if taken is None:
                return
            node = taken
