"""The drafter's loop: apply the commits that have arrived, expand the best leaves, send the growth at once.

It runs on the model's thread and knows no event loop, like the target's engine.
"""

import logging
import queue
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime import limits
from runtime.calibration import Calibration
from runtime.drafters.base import Children, Drafter, Text
from runtime.errors import OutriderError
from runtime.frontier import frontier
from runtime.messages import Close, Commit, Draft, Event, Open, Reply, Resync, Share
from runtime.tree import TokenTree, text_key

log = logging.getLogger(__name__)

Send = Callable[[Reply], None]
RUN_AHEAD = 192  # nodes that wait for a commit
FLOOR = -7.0  # log of the least path probability worth a row


@dataclass(frozen=True, slots=True)
class Heard:
    """An event that came in on one stream; the names of its sessions are the stream's own."""

    stream: int
    event: Event
    send: Send


@dataclass(frozen=True, slots=True)
class Unheard:
    """Growth of a session was dropped on the way: what hangs on it means nothing to the target."""

    stream: int
    session: str


@dataclass(frozen=True, slots=True)
class Gone:
    """A stream is over, and with it all its sessions."""

    stream: int


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Input = Heard | Unheard | Gone | Stop
Name = tuple[int, str]  # stream, session


@dataclass(slots=True)
class Growing:
    """One session at the drafter: the text as far as it is known, and the tree that grows from it."""

    session: str
    epoch: int
    tokens: list[int]
    prompt: int
    opened: Open
    share: Share
    tree: TokenTree
    send: Send
    lost: bool = False  # has missed a commit and asked for the text again


class Grower:
    """`run` belongs to one thread; `inbox` may be filled from any. `counters`: events without effect, by reason."""

    def __init__(self, drafter: Drafter, name: str, width: int = 4) -> None:
        self.drafter, self.name, self.width = drafter, name, width
        self.inbox: queue.SimpleQueue[Input] = queue.SimpleQueue()
        self.growing: dict[Name, Growing] = {}
        self.calibrations: dict[float, Calibration] = {}
        self.counters: Counter[str] = Counter()

    def run(self) -> None:
        """Until Stop. Nothing is kept of any session then."""
        idle = True
        while self.take_in(block=idle):
            grown = [self.grow(name) for name in tuple(self.growing)]
            idle = not any(grown)
        for name in tuple(self.growing):
            self.forget(name)

    def take_in(self, block: bool) -> bool:
        try:
            while True:
                match self.inbox.get(block):
                    case Stop():
                        return False
                    case Gone(stream=stream):
                        for name in [name for name in self.growing if name[0] == stream]:
                            self.forget(name)
                    case Unheard(stream=stream, session=session):
                        self.grow_anew((stream, session))
                    case Heard(stream=stream, event=event, send=send):
                        self.hear((stream, event.session), event, send)
                block = False
        except queue.Empty:
            return True

    def hear(self, name: Name, event: Event, send: Send) -> None:
        known = self.growing.get(name)
        match event:
            case Open():
                self.open(name, event, send)
            case Close():
                self.forget(name)
            case Share() if known is not None:
                known.share = event
            case Commit() if known is not None:
                self.commit(known, event)
            case _:
                self.counters["unknown session"] += 1

    def open(self, name: Name, event: Open, send: Send) -> None:
        if name in self.growing:
            self.forget(name)
        if len(self.growing) >= limits.SESSIONS or not event.tokens:
            self.counters["refused"] += 1
            return
        tree = sapling(text_key(event.tokens), event.tokens[-1])
        self.growing[name] = Growing(event.session, event.epoch, list(event.tokens), event.prompt, event, event.share, tree, send)

    def grow_anew(self, name: Name) -> None:
        """From the root, so that all is sent again."""
        growing = self.growing.get(name)
        if growing is not None:
            growing.tree = sapling(growing.tree.key[0], growing.tree.token[0])

    def forget(self, name: Name) -> None:
        if self.growing.pop(name, None) is not None:
            self.drafter.close(private(name))

    def commit(self, growing: Growing, event: Commit) -> None:
        """Follow the target. A repeated or late commit changes nothing; after a lost one the text is asked for again."""
        have = len(growing.tokens)
        if growing.lost or event.epoch != growing.epoch or event.base + len(event.tokens) <= have:
            self.counters["stale commit"] += 1
            return
        if event.base <= have:
            decided = event.tokens[have - event.base :]
            self.calibration(growing).observe_path(growing.tree, decided)
            growing.tree.reroot(decided)
            growing.tokens.extend(decided)
        if growing.tree.key[0] != event.key:
            growing.lost = True
            self.counters["resync"] += 1
            growing.send(Resync(growing.session, self.name))

    def calibration(self, growing: Growing) -> Calibration:
        return self.calibrations.setdefault(round(growing.opened.sampling.temperature, 1), Calibration())

    def grow(self, name: Name) -> bool:
        """One forward pass for one session; False where there is nothing to expand until the next event."""
        growing = self.growing[name]
        tree, sampling = growing.tree, growing.opened.sampling
        room = growing.prompt + sampling.max_tokens - len(growing.tokens)
        # The mirror has room for the trees of all: a node that is refused there takes all below it along.
        if growing.lost or len(tree) > min(RUN_AHEAD, limits.TREE_NODES // (growing.share.of + 1)):
            return False
        leaves = frontier(tree, self.width, growing.share.index, growing.share.of, min(limits.TREE_DEPTH, room - 1), FLOOR)
        if not leaves:
            return False
        text = Text(private(name), growing.tokens, growing.prompt, sampling, tree)
        try:
            children = self.drafter.expand(text, leaves)
        except (OutriderError, RuntimeError, ValueError, MemoryError) as error:
            log.warning("drafter %s gives a session up: %s: %s", self.name, type(error).__name__, error)
            self.counters["failed"] += 1
            self.forget(name)
            return False
        for leaf in leaves:
            tree.expanded[leaf] = True
        self.add(growing, children)
        return True

    def add(self, growing: Growing, children: Children) -> None:
        """Put new children into the tree and send them, named by their parents."""
        tree, calibration = growing.tree, self.calibration(growing)
        parents: list[int] = []
        tokens: list[int] = []
        scores: list[float] = []
        for parent, token, said in zip(children.parents.tolist(), children.tokens.tolist(), children.scores.tolist(), strict=True):
            score = calibration.score(len(tree.children[parent]), said)
            if tree.add(parent, token, score, said, self.name) is not None:
                parents.append(tree.key[parent])
                tokens.append(token)
                scores.append(said)
        if tokens:
            keys = np.asarray(parents, dtype=np.uint64)
            draft = (keys, np.asarray(tokens, dtype=np.int32), np.asarray(scores, dtype=np.float32))
            growing.send(Draft(growing.session, growing.epoch, self.name, *draft))


def sapling(key: int, token: int) -> TokenTree:
    return TokenTree(key, token, limits.TREE_NODES, limits.TREE_DEPTH)


def private(name: Name) -> str:
    """A session's name at the drafting method: unlike those of other streams."""
    return f"{name[0]}/{name[1]}"
