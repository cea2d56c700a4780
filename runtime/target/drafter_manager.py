"""Tracks drafters, assigns tree partitions, and suspends unproductive drafters and heads."""

from collections.abc import Collection, Iterable, Sequence

from runtime.core import limits
from runtime.core.features import FeatureSpec
from runtime.core.messages import Commit, Draft, Event, Round, Share
from runtime.core.tree import TokenTree
from runtime.scoring.calibration import drafter_kind
from runtime.scoring.drafter_utility import DrafterUtility
from runtime.scoring.gate_account import PLAIN, Way
from runtime.scoring.speculation_gate import SpeculationGate
from runtime.target.commands import Send, Strike, ignore_strike
from runtime.target.feature_sender import FeatureSender
from runtime.target.request_state import RequestState
from runtime.target.session import Session
from runtime.telemetry.metrics import TargetMetrics


class DrafterManager:
    """Manages the drafters of a target.

    `sends` holds the channel of each present drafter, in order of joining. `metrics` records what
    drafters contribute. `heads` are the names of the target's own heads: they receive no messages
    and own no share, but rest by the same rule. `features` are sent to drafters that ask for them.
    """

    def __init__(
        self, metrics: TargetMetrics, utility: DrafterUtility, heads: Collection[str] = ()
    ) -> None:
        self.sends: dict[str, Send] = {}
        self.strikes: dict[str, Strike] = {}
        self.metrics, self.utility, self.heads = metrics, utility, heads
        self.features = FeatureSender(metrics)
        self.gate: SpeculationGate | None = None

    def join(
        self,
        name: str,
        send: Send,
        sessions: Collection[RequestState],
        strike: Strike = ignore_strike,
    ) -> None:
        self.features.forget(name, sessions)  # of a drafter that had the name before
        self.sends[name], self.strikes[name] = send, strike
        self._pause()
        self.assign_shares(sessions, joined=name)

    def leave(self, name: str, send: Send, sessions: Collection[RequestState]) -> None:
        """Remove a drafter. One that has joined under the same name since then stays."""
        if self.sends.get(name) is send:
            del self.sends[name], self.strikes[name]
            self.features.forget(name, sessions)
            self.utility.forget(name)
            self._pause()
            self.assign_shares(sessions)

    def reset_utility(self, sessions: Iterable[RequestState]) -> None:
        """Restart the trial of every drafter and head."""
        self.utility.reset()
        self.assign_shares(sessions)

    def set_gate(self, gate: SpeculationGate | None, sessions: Iterable[RequestState]) -> None:
        """Obey this gate from now on; None: drafters never pause. Restarts every trial."""
        self.gate = gate
        self._pause()
        self.reset_utility(sessions)

    @property
    def plain(self) -> bool:
        """Return True while speculation does not pay: no guess gets a row."""
        return self.gate is not None and self.gate.way == PLAIN

    def begin(self, sessions: Sequence[RequestState]) -> None:
        """Let drafters pause before the first step of all, whose time is that of plain decoding."""
        if self.gate is not None and self.gate.begin(self._ways(sessions)):
            self._pause()
            self.assign_shares(sessions)

    def judge(self, rounds: Sequence[Round], sessions: Sequence[RequestState]) -> None:
        """Tell the gate of a step, and let drafters pause or go on as it decides."""
        if self.gate is None or not rounds:
            return
        one, before = rounds[0], self.gate.way  # their times are the same
        self.gate.observe(
            self._ways(sessions),
            len(rounds),
            sum(done.width + 1 for done in rounds),
            sum(done.accepted + 1 for done in rounds),
            one.waited + one.computed + one.bookkeeping,
            self._settling_time(),
            sum(done.expected + 1.0 for done in rounds),
        )
        self.metrics.gate(self.gate.probes, self.gate.speedup, self.plain)
        if self.gate.way != before:
            self._pause()
            self.assign_shares(sessions)

    def _pause(self) -> None:
        """Let those pause that the gate does not want now."""
        if self.gate is not None:
            self.gate.use(map(drafter_kind, (*self.sends, *self.heads)))
        way = "all" if self.gate is None else self.gate.way
        drafters = self.sends if way != "all" else ()
        self.utility.paused = {*drafters, *(self.heads if way == PLAIN else ())}

    def _ways(self, sessions: Iterable[RequestState]) -> tuple[Way, ...]:
        """Return the ways to speculate that exist: without drafters that rest for good."""
        if not any(state.session.request.speculation for state in sessions):
            return ()
        heads, drafters = (
            [name for name in names if name not in self.utility.resting]
            for names in (self.heads, self.sends)
        )
        if heads and drafters:
            return ("heads", "all")
        return ("all",) if heads or drafters else ()

    def _settling_time(self) -> float | None:
        """Return the seconds until all drafters rest once they are told to; None if unknown."""
        trips = [self.metrics.guesses[name].round_trip for name in self.sends]
        known = [trip for trip in trips if trip is not None]
        return max(known, default=0.0) if len(known) == len(trips) else None

    def sends_for(self, session: Session) -> dict[str, Send]:
        return self.sends if session.request.speculation else {}

    def active(self, session: Session) -> list[str]:
        return self.utility.active(self.sends_for(session))

    def notify(self, session: Session, event: Event) -> None:
        for send in self.sends_for(session).values():
            send(event)

    def notify_commit(self, state: RequestState, commit: Commit) -> None:
        """Send a commit to the active drafters. Others get one for all when their rest is over.

        Each message takes time from the target.
        """
        active = self.active(state.session)
        for name, send in self.sends_for(state.session).items():
            if name in active:
                send(commit)
            else:
                state.untold.setdefault(name, commit.base)

    def _catch_up(self, state: RequestState, name: str) -> None:
        """Send what a drafter has missed while it rested."""
        session, base = state.session, state.untold.get(name)
        if base is None:
            return
        if name in self.features.specs and len(session.tokens) - base > limits.TREE_DEPTH:
            self._open(state, name)  # it refuses features that are so far ahead of its text
            return
        del state.untold[name]
        send = self.sends[name]
        self.features.send(state, {name: send})
        send(
            Commit(
                session.id, session.epoch, base, tuple(session.tokens[base:]), session.tree.key[0]
            )
        )

    def ask_features(self, name: str, spec: FeatureSpec, sessions: Iterable[RequestState]) -> None:
        """Send this drafter these hidden states from now on."""
        self.features.ask(name, spec, sessions, self.sends)

    def open(self, state: RequestState) -> None:
        """Announce a new session."""
        self.features.begin(state)
        for name in self.sends_for(state.session):
            self._open(state, name)

    def _open(self, state: RequestState, name: str) -> None:
        """Send the whole text, and the features that are known of it."""
        send = self.sends[name]
        send(state.session.open(self.share(state.session.id, name)))
        state.features_sent.pop(name, None)
        state.untold.pop(name, None)
        self.features.send(state, {name: send})

    def send_features(self, state: RequestState, fresh: int) -> None:
        """Send active drafters what a pass has shown of a session from position `fresh` on."""
        active = self.active(state.session)
        self.features.send(state, {name: self.sends[name] for name in active}, fresh)

    def reopen(self, state: RequestState, name: str) -> None:
        """Send the text again to a drafter that lost it, at most once per commit.

        Otherwise a drafter that keeps asking would have the whole text sent each time. A resting
        drafter gets the text when its rest is over.
        """
        session = state.session
        if name not in self.sends_for(session):
            return
        if not self.utility.active([name]):
            state.lost.add(name)
        elif name not in state.reopened:
            state.reopened.add(name)
            self._open(state, name)

    def assign_shares(self, sessions: Iterable[RequestState], joined: str = "") -> None:
        """Send every drafter its share of every session.

        A drafter that has joined, or that lost a text while it rested, gets the whole text.
        """
        for state in sessions:
            for name, send in self.sends_for(state.session).items():
                share = self.share(state.session.id, name)
                anew = name == joined or (share.of > 0 and name in state.lost)
                state.lost -= {name} if anew else set()
                if anew:
                    self._open(state, name)
                else:
                    if share.of > 0:
                        self._catch_up(state, name)
                    send(share)

    def share(self, session: str, name: str) -> Share:
        active = self.utility.active(self.sends)
        return (
            Share(session, active.index(name), len(active))
            if name in active
            else Share(session, 0, 0)
        )

    def merge(self, state: RequestState | None, name: str, drafts: Sequence[Draft]) -> int:
        """Merge drafts into their session's tree and return the number of new nodes.

        `state` is None for an unknown session. A drafter that gives one key to two texts gets a
        strike: a drafter never meets such texts unless it searches for them.
        """
        guesses = self.metrics.guesses[name]
        if state is None or not state.session.request.speculation or name in self.utility.resting:
            guesses.stale += sum(len(draft.tokens) for draft in drafts)
            return 0
        ignored = state.session.ignored
        late, stale, collisions = ignored["late"], ignored["stale"], ignored["collision"]
        new = state.session.merge_drafts(*drafts)
        guesses.proposed += new
        guesses.late += ignored["late"] - late
        guesses.stale += ignored["stale"] - stale
        if ignored["collision"] > collisions and name in self.strikes:
            self.strikes[name]("two texts of one name")
        if new:
            state.record_reach(name, new)
        return new

    def record_leads(self, ready: Iterable[RequestState]) -> None:
        """Record, as a step begins, how far drafters are ahead and what the step lacks."""
        everyone = [*self.sends, *self.heads]
        awake = self.utility.active(everyone)
        for state in ready:
            active = self.active(state.session)
            if (cause := state.fallback_cause(everyone, awake, self.plain)) is not None:
                self.metrics.fallbacks[cause] += 1
            for name in active:
                self.metrics.guesses[name].lead(state.lead(name))

    def credited_to(self, tree: TokenTree, nodes: Sequence[int]) -> list[str]:
        """Return who is credited for each node.

        If a drafter and a head guessed the same node, the drafter is credited: the node would exist
        without the head.
        """
        return [
            next(
                (name for name in tree.drafters_of(node) if name not in self.heads),
                tree.drafter[node],
            )
            for node in nodes
        ]

    def update_resting(self, thanks: Iterable[str], sessions: Iterable[RequestState]) -> None:
        """Credit the tokens of a step, then suspend drafters that contributed nothing for long, or
        wake them.
        """
        if (
            self.utility.observe([*self.sends, *self.heads], thanks, self.metrics.rate)
            & self.sends.keys()
        ):
            self.assign_shares(sessions)
