"""The drafters of a target: who is there, which part of a tree is whose, and what each has brought; and what its own heads have."""

from collections.abc import Collection, Iterable, Sequence

from runtime.core.messages import Draft, Event, Share
from runtime.core.tree import TokenTree
from runtime.scoring.drafter_utility import DrafterUtility
from runtime.target.commands import Send, Strike, ignore_strike
from runtime.target.request_state import RequestState
from runtime.target.session import Session
from runtime.telemetry.metrics import TargetMetrics


class DrafterManager:
    """`sends`: how to reach those that are there now, in the order of their coming. What they bring is written into `metrics`.

    `heads`: names of those that sit on the target. Nobody tells them anything and they have no share, but they rest by the same rule.
    """

    def __init__(
        self, metrics: TargetMetrics, utility: DrafterUtility, heads: Collection[str] = ()
    ) -> None:
        self.sends: dict[str, Send] = {}
        self.strikes: dict[str, Strike] = {}
        self.metrics, self.utility, self.heads = metrics, utility, heads

    def join(
        self,
        name: str,
        send: Send,
        sessions: Iterable[RequestState],
        strike: Strike = ignore_strike,
    ) -> None:
        self.sends[name], self.strikes[name] = send, strike
        self.assign_shares(sessions, joined=name)

    def leave(self, name: str, send: Send, sessions: Iterable[RequestState]) -> None:
        """Who has joined under the same name since then stays."""
        if self.sends.get(name) is send:
            del self.sends[name], self.strikes[name]
            self.utility.forget(name)
            self.assign_shares(sessions)

    def reset_utility(self, sessions: Iterable[RequestState]) -> None:
        """Let all show again what they are good for."""
        self.utility.reset()
        self.assign_shares(sessions)

    def sends_for(self, session: Session) -> dict[str, Send]:
        return self.sends if session.request.speculation else {}

    def active(self, session: Session) -> list[str]:
        return self.utility.active(self.sends_for(session))

    def notify(self, session: Session, event: Event) -> None:
        for send in self.sends_for(session).values():
            send(event)

    def open(self, session: Session) -> None:
        """A session begins."""
        for name, send in self.sends_for(session).items():
            send(session.open(self.share(session.id, name)))

    def reopen(self, state: RequestState, name: str) -> None:
        """Once for each commit at most: a drafter that asks again and again would have the whole text sent
        each time. One that rests has no use for the text yet: it gets it when its rest is over."""
        session = state.session
        if name not in self.sends_for(session):
            return
        if name in self.utility.resting:
            state.lost.add(name)
        elif name not in state.reopened:
            state.reopened.add(name)
            self.sends[name](session.open(self.share(session.id, name)))

    def assign_shares(self, sessions: Iterable[RequestState], joined: str = "") -> None:
        """Tell every drafter its part of every session. The one that has joined learns the whole text, and
        so does one that lost it while it rested."""
        for state in sessions:
            for name, send in self.sends_for(state.session).items():
                share = self.share(state.session.id, name)
                anew = name == joined or (share.of > 0 and name in state.lost)
                state.lost -= {name} if anew else set()
                send(state.session.open(share) if anew else share)

    def share(self, session: str, name: str) -> Share:
        active = self.utility.active(self.sends)
        return (
            Share(session, active.index(name), len(active))
            if name in active
            else Share(session, 0, 0)
        )

    def merge(self, state: RequestState | None, name: str, drafts: Sequence[Draft]) -> int:
        """Offer growth to its session's tree; returns how many nodes were new. None is where nobody asked for it. A drafter that has given
        one name to two texts gets a strike: who does not look for such texts never meets them."""
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
        """How far the drafters are ahead as a step begins, and what it goes without."""
        everyone = [*self.sends, *self.heads]
        awake = self.utility.active(everyone)
        for state in ready:
            active = self.active(state.session)
            if (cause := state.fallback_cause(everyone, awake)) is not None:
                self.metrics.fallbacks[cause] += 1
            for name in active:
                self.metrics.guesses[name].lead(state.lead(name))

    def credited_to(self, tree: TokenTree, nodes: Sequence[int]) -> list[str]:
        """To whom: to a drafter, where one has guessed the node as well as a head. Without that head it would be there all the same."""
        return [
            next(
                (name for name in tree.drafters_of(node) if name not in self.heads),
                tree.drafter[node],
            )
            for node in nodes
        ]

    def update_resting(self, thanks: Iterable[str], sessions: Iterable[RequestState]) -> None:
        """After a step: its tokens are owed to these. Who has brought nothing for long rests, or is tried again."""
        if (
            self.utility.observe([*self.sends, *self.heads], thanks, self.metrics.rate)
            & self.sends.keys()
        ):
            self.assign_shares(sessions)
