"""The drafter's loop: applies commits, expands the best leaves, sends the new nodes.

It runs on the model's thread and uses no event loop, like the target's engine.
"""

import logging
import queue
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime.core import limits
from runtime.core.clock import Clock
from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import SESSION_FAULTS
from runtime.core.features import FeatureBuffer
from runtime.core.messages import Close, Commit, Draft, Event, Features, Open, Resync, Share
from runtime.core.node_keys import Ints, Keys, text_key
from runtime.core.tree import TokenTree
from runtime.draft.commands import Command, EventReceived, GrowthDropped, Send, Stop, StreamClosed
from runtime.draft.draft_state import MIN_PATH_LOGPROB, DraftState, expand_request, new_tree
from runtime.draft.frontier import allocate_rows
from runtime.drafters.base import Drafter, ExpandRequest
from runtime.scoring.calibration import Calibrations, TemperatureBucket
from runtime.telemetry.reports import DrafterReport
from runtime.telemetry.tracing import LEAD, NO_TRACE, REROOT, STEP, Trace

log = logging.getLogger(__name__)

MAX_PASS_ROWS = 16  # leaves in one pass; such a pass costs little more than a single row


class DraftEngine:
    """Grows the trees of all sessions with one drafting method.

    `run` belongs to one thread; any thread may put commands into `inbox`. `states` maps session
    keys, as the method knows them, to sessions in order of opening. `counters` counts events
    without effect, by reason. `width` limits the leaves of one session per pass unless its style
    does; `rows` limits those of all sessions together.
    """

    def __init__(
        self,
        drafter: Drafter,
        name: str,
        width: int = 4,
        rows: int = MAX_PASS_ROWS,
        calibrations: Calibrations | None = None,
        trace: Trace = NO_TRACE,
        clock: Clock = time.monotonic,
    ) -> None:
        self.drafter, self.name, self.width, self.rows, self.trace, self.clock = (
            drafter,
            name,
            width,
            rows,
            trace,
            clock,
        )
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.states: dict[str, DraftState] = {}
        self.calibrations = calibrations or Calibrations()
        self.counters: Counter[str] = Counter()
        self.passes = self.nodes = 0  # made and guessed so far
        self.computed = 0.0  # seconds that the method took

    def report(self) -> DrafterReport:
        """Return what the drafter has done since its start. Thread-safe."""
        return DrafterReport(
            len(self.states), self.passes, self.nodes, self.computed, dict(self.counters)
        )

    def run(self) -> None:
        """Serve until Stop, then drop all sessions."""
        idle = True
        while self.receive(block=idle):
            idle = not self.step()
        for name in tuple(self.states):
            self.forget(name)

    def receive(self, block: bool) -> bool:
        """Apply all commands that have arrived, waiting for the first if `block`; False
        after Stop.
        """
        try:
            while True:
                match self.inbox.get(block):
                    case Stop():
                        return False
                    case StreamClosed(stream=stream):
                        for name in [
                            name for name, state in self.states.items() if state.stream == stream
                        ]:
                            self.forget(name)
                    case GrowthDropped(stream=stream, session=session):
                        self.regrow(session_key(stream, session))
                    case EventReceived(stream=stream, event=event, send=send):
                        self.handle(stream, event, send)
                block = False
        except queue.Empty:
            return True

    def step(self) -> bool:
        """Run one pass of the method over all sessions; False if there is nothing to expand."""
        requests = self.plan()
        self.send_unsent(requests)
        if requests:
            began = self.clock()
            answers = self.expand(requests)
            self.passes += 1
            self.computed += self.clock() - began
            self.insert_answers(requests, answers)
            self.record(requests, began)
        return bool(requests)

    def plan(self) -> list[ExpandRequest]:
        """Choose the leaves to expand, at most one request per session. Changes nothing."""
        awake = [(name, state) for name, state in self.states.items() if not state.is_resting()]
        widths = [state.width(self.width) for _, state in awake]
        counts = allocate_rows(
            [state.expandable() for _, state in awake], widths, max([self.rows, *widths])
        )
        return [
            expand_request(name, state, count)
            for (name, state), count in zip(awake, counts, strict=True)
            if count
        ]

    def expand(self, requests: Sequence[ExpandRequest]) -> Sequence[DraftNodes | None]:
        """Return the method's answers.

        If the call fails, each session is expanded alone; those that fail again are dropped.
        """
        try:
            answers = self.drafter.expand(requests)
            if len(answers) != len(requests):
                raise ValueError(f"{len(answers)} answers to {len(requests)} wishes")
        except SESSION_FAULTS as error:
            if len(requests) > 1:
                return [self.expand([request])[0] for request in requests]
            self.fail(requests[0].text.session, error)
            return [None]
        return answers

    def fail(self, session: str, error: Exception) -> None:
        log.warning("drafter %s gives a session up: %s", self.name, type(error).__name__)
        log.debug("the fault, whose words may quote the session", exc_info=error)
        self.counters["failed"] += 1
        self.forget(session)

    def insert_answers(
        self, requests: Sequence[ExpandRequest], answers: Sequence[DraftNodes | None]
    ) -> None:
        """Insert the answers to `plan` into the trees and send them; no event may come in between.

        A session with an invalid answer is dropped.
        """
        for request, children in zip(requests, answers, strict=True):
            state = self.states.get(request.text.session)
            if state is not None and children is None:
                state.waits = state.lacks_features
            if state is not None and children is not None:
                self.mark_expanded(state, request.leaves)
                try:
                    state.unsent += self.insert_levels(state, children)
                except SESSION_FAULTS as error:
                    self.fail(request.text.session, error)
                    continue
                if state.should_send:
                    self.send(state)
                state.expandable().extend()

    def send_unsent(self, requests: Sequence[ExpandRequest]) -> None:
        """Send the nodes held back for sessions that have no request now."""
        requested = {request.text.session for request in requests}
        for name, state in self.states.items():
            if state.unsent and name not in requested:
                self.send(state)

    def mark_expanded(self, state: DraftState, leaves: Sequence[int]) -> None:
        state.passes += 1
        for leaf in leaves:
            state.tree.expanded[leaf] = True
        state.expandable().drop_expanded()

    def insert_levels(self, state: DraftState, nodes: DraftNodes) -> list[Draft]:
        """Insert new nodes level by level and return the drafts to send.

        Nodes below a rejected guess are rejected too.
        """
        levels = nodes.levels()
        placed = np.full(len(nodes.tokens), -1)  # where each is in the tree
        drafts = []
        for number, level in enumerate(levels):
            hung = nodes.parents[level]
            parents = (
                placed[hung - nodes.roots]
                if number and nodes.roots is not None
                else hung.astype(np.int64)
            )
            drafts.append(self.insert(state, parents, nodes.tokens[level], nodes.scores[level]))
            if number + 1 < len(levels):
                placed[level] = find_children(state.tree, parents, nodes.tokens[level])
        return drafts

    def insert(
        self,
        state: DraftState,
        parents: Ints,
        tokens: npt.NDArray[np.integer],
        scores: npt.NDArray[np.floating],
    ) -> Draft:
        """Insert guesses below these nodes; -1 marks a parent that was rejected.

        Unlikely siblings are rejected, but never a first child: a node is expanded only once and
        may become the root.
        """
        tree, calibration = state.tree, self.calibration(state).table(self.name)
        said = scores.astype(np.float64)
        ranks = np.frombuffer(tree.fanout, np.int64)[parents] + run_positions(parents)
        likely = (ranks == 0) | (
            np.frombuffer(tree.path)[parents] + calibration.scores(ranks, said) >= MIN_PATH_LOGPROB
        )
        possible = likely & (parents >= 0)
        keys, tokens, said = (
            np.frombuffer(tree.key, np.uint64)[parents[possible]],
            tokens[possible],
            said[possible],
        )
        new = tree.merge(keys, tokens.astype(np.int64), said, self.name, calibration.scores).rows
        return self.make_draft(
            state, keys[new], tokens[new].astype(np.int32), said[new].astype(np.float32)
        )

    def make_draft(
        self,
        state: DraftState,
        parents: Keys,
        tokens: npt.NDArray[np.int32],
        scores: npt.NDArray[np.float32],
    ) -> Draft:
        return Draft(state.opened.session, state.opened.epoch, self.name, parents, tokens, scores)

    def send(self, state: DraftState) -> None:
        """Send all unsent nodes, in messages of permitted size."""
        parents, tokens, scores = (
            np.concatenate(arrays)
            for arrays in zip(
                *((one.parents, one.tokens, one.scores) for one in state.unsent), strict=True
            )
        )
        state.unsent.clear()
        state.sent_passes = state.passes
        self.nodes += len(tokens)
        for start in range(0, len(tokens), limits.DRAFT_NODES):
            piece = slice(start, start + limits.DRAFT_NODES)
            draft = self.make_draft(state, parents[piece], tokens[piece], scores[piece])
            self.trace.sent(draft, self.clock(), self.name)
            state.send(draft)

    def record(self, requests: Sequence[ExpandRequest], began: float) -> None:
        if self.trace is not NO_TRACE:
            now = self.clock()
            self.trace.span(
                self.name,
                STEP,
                began,
                now,
                leaves=sum(len(request.leaves) for request in requests),
                sessions=len(requests),
            )
            self.trace.count(LEAD, now, max(max(request.text.tree.depth) for request in requests))

    def handle(self, stream: int, event: Event, send: Send) -> None:
        name = session_key(stream, event.session)
        known = self.states.get(name)
        if known is not None:
            known.waits = False
        match event:
            case Open():
                self.open(name, stream, event, send)
            case Close():
                self.forget(name)
            case Share() if known is not None:
                known.share, known.frontier = event, None
            case Commit() if known is not None:
                self.commit(known, event)
            case Features() if known is not None:
                if (why := known.add_features(event)) == "lost features":
                    self.ask_again(known)
                elif why is not None:
                    self.counters[why] += 1
            case _:
                self.counters["unknown session"] += 1

    def open(self, name: str, stream: int, event: Open, send: Send) -> None:
        if (known := self.states.get(name)) is not None:
            if event.epoch < known.opened.epoch:
                self.counters["old epoch"] += 1
                return
            self.forget(name)
        if len(self.states) >= limits.SESSIONS or not event.tokens:
            self.counters["refused"] += 1
            return
        tree = new_tree(text_key(event.tokens), event.tokens[-1])
        spec, tokens = self.drafter.feature_spec, list(event.tokens)
        features = None if spec is None else FeatureBuffer(spec.layers)
        self.states[name] = DraftState(stream, event, send, event.share, tokens, tree, features)

    def regrow(self, name: str) -> None:
        """Start again from the root, so that everything is sent again."""
        state = self.states.get(name)
        if state is not None:
            state.restart(new_tree(state.tree.key[0], state.tree.token[0]))

    def forget(self, name: str) -> None:
        if self.states.pop(name, None) is not None:
            self.drafter.close(name)

    def commit(self, state: DraftState, event: Commit) -> None:
        """Follow the target.

        A repeated or late commit changes nothing. After a lost one the drafter asks for the text
        again.
        """
        have = len(state.tokens)
        if (
            state.lost
            or event.epoch != state.opened.epoch
            or event.base + len(event.tokens) <= have
        ):
            self.counters["stale commit"] += 1
            return
        if event.base <= have:
            decided = event.tokens[have - event.base :]
            if state.unsent:
                self.send(state)
            self.calibration(state).observe_path(state.tree, decided)
            state.tree.reroot(decided)
            state.tokens.extend(decided)
            state.restart(self.tree_after(state.tree))
            now = self.clock()
            self.trace.taken(event, now, self.name)
            self.trace.instant(self.name, REROOT, now)
        if state.tree.key[0] != event.key:
            self.ask_again(state)

    def tree_after(self, tree: TokenTree) -> TokenTree:
        """Return the tree to grow after a commit: what is left of the old one.

        A method that reads features has new ones, so it guesses everything again from the root. The
        target keeps the old guesses beside the new ones.
        """
        return tree if self.drafter.feature_spec is None else new_tree(tree.key[0], tree.token[0])

    def ask_again(self, state: DraftState) -> None:
        """Ask for the whole text: something got lost on the way."""
        state.lost = True
        self.counters["resync"] += 1
        state.send(Resync(state.opened.session, self.name))

    def calibration(self, state: DraftState) -> TemperatureBucket:
        return self.calibrations.bucket(state.opened.sampling.temperature)


def find_children(tree: TokenTree, parents: Ints, tokens: npt.NDArray[np.integer]) -> Ints:
    """Return the children of these nodes with these tokens; -1 for no parent or no child."""
    found = (
        tree.child(parent, token) if parent >= 0 else None
        for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True)
    )
    return np.array([-1 if node is None else node for node in found], dtype=np.int64)


def run_positions(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return, for each value, how many equal ones directly precede it."""
    places = np.arange(len(values))
    begins = (
        np.concatenate(([True], values[1:] != values[:-1]))
        if len(values)
        else np.zeros(0, dtype=np.bool_)
    )
    return places - np.maximum.accumulate(np.where(begins, places, 0))


def session_key(stream: int, session: str) -> str:
    """Return a session's name at the drafting method, unique among all streams."""
    return f"{stream}/{session}"
