"""Commits the target's decisions: moves roots, notifies drafters, delivers tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.core.clock import Clock
from runtime.core.errors import SESSION_FAULTS
from runtime.core.messages import Chunk, Commit, Round
from runtime.schedulers.base import Scheduler
from runtime.target.batch import Batch, BatchItem, accepted_rows, keep_accepted
from runtime.target.drafter_manager import DrafterManager
from runtime.target.head_runner import HeadRunner
from runtime.target.request_manager import RequestManager
from runtime.target.verifier import Decision
from runtime.telemetry.metrics import TargetMetrics
from runtime.telemetry.tracing import NODES, TARGET, Trace


@dataclass(frozen=True, slots=True)
class Committed:
    """A session whose root has moved. `guessed_by` names who guessed each token; "" for nobody."""

    item: BatchItem
    decision: Decision
    commit: Commit
    guessed_by: tuple[str, ...]
    hit: bool

    @property
    def credited(self) -> list[str]:
        """Return who is credited for each accepted node."""
        nodes = self.item.nodes
        return [self.item.credited[nodes.index(node)] for node in self.decision.accepted.path]


class Committer:
    """Finishes a step. Drafters are notified first, so that they continue during the rest."""

    def __init__(
        self,
        requests: RequestManager,
        drafters: DrafterManager,
        heads: HeadRunner,
        metrics: TargetMetrics,
        clock: Clock,
    ) -> None:
        self.requests, self.drafters, self.heads = requests, drafters, heads
        self.metrics, self.clock = metrics, clock

    def commit(
        self,
        batch: Batch,
        decisions: Sequence[Decision | None],
        decided: float,
        scheduler: Scheduler,
        trace: Trace,
    ) -> None:
        """Commit `decisions`, one per item of the batch; None marks an item that failed.

        They were made at `decided` on the clock.
        """
        committed = [
            one
            for item, decision in zip(batch.items, decisions, strict=True)
            if decision is not None and self.requests.is_running(item.state)
            if (one := self._move_root(item, decision, trace)) is not None
        ]
        outputs = [(one, chunk) for one in committed if (chunk := self._output(one)) is not None]
        self._credit(committed)
        going = [(one.item, one.decision) for one, chunk in outputs if chunk.finish_reason is None]
        ridden = sum(self.heads.branch_row_time(batch.parts).values())
        self.heads.guess(going, trace)
        done = self.clock()
        rounds = [make_round(one, batch, decided, done, ridden) for one, _ in outputs]
        if not self.drafters.plain:  # other steps are no measure of speculation
            scheduler.observe(rounds)
        self.metrics.step(rounds)
        self.drafters.judge(rounds, self.requests.states())
        for (one, chunk), round_ in zip(outputs, rounds, strict=True):
            one.item.state.record_commit(round_, decided)
            self.metrics.delivered(chunk.drafters)
        for one, chunk in outputs:
            self._deliver(one, chunk)
        trace.step(batch, rounds, decided, done)
        nodes = sum(len(item.state.session.tree) - 1 for item in batch.items)
        trace.count(NODES, decided, nodes)

    def _move_root(self, item: BatchItem, decision: Decision, trace: Trace) -> Committed | None:
        """Apply a decision to its session and notify the drafters; None if that fails, which ends
        the session.
        """
        session, accepted = item.state.session, decision.accepted
        guessed_by = (*(session.tree.drafter[node] for node in accepted.path), "")
        nodes, base = len(session.tree), len(session.tokens) - 1
        try:
            commit, hit = session.apply(accepted)
            self._send_features(item, decision, base)
        except SESSION_FAULTS as error:
            self._fail(item, base, error)
            return None
        self.metrics.dropped += nodes - len(session.tree)
        self.drafters.notify_commit(item.state, commit)
        trace.sent(commit, self.clock(), TARGET)
        return Committed(item, decision, commit, guessed_by, hit)

    def _fail(self, item: BatchItem, base: int, error: Exception) -> None:
        """End a session in a step that began with `base` slots in its cache."""
        cache = item.state.cache
        cache.truncate(min(cache.length, base))  # what is behind is in no order
        self.requests.fail(item.state, error)

    def _send_features(self, item: BatchItem, decision: Decision, start: int) -> None:
        """Keep and send what the pass has shown of the tokens from position `start` on."""
        if item.state.features is not None:
            rows = accepted_rows(item.nodes, decision.accepted.path)
            self.drafters.features.record(item.state, start, decision.output.features, rows)
            self.drafters.send_features(item.state, start)

    def _output(self, one: Committed) -> Chunk | None:
        """Roll the cache back and make the output chunk; None if that fails, which ends the
        session.
        """
        state, base = one.item.state, one.commit.base - 1
        try:
            keep_accepted(state.cache, base, one.item.nodes, one.decision.accepted.path)
            return state.make_chunk(one.commit, one.guessed_by, one.decision.logprobs)
        except SESSION_FAULTS as error:
            self._fail(one.item, base, error)
            return None

    def _credit(self, committed: Sequence[Committed]) -> None:
        if any(one.item.state.session.request.speculation for one in committed):
            credited = [name for one in committed for name in one.credited]
            self.drafters.update_resting(credited, self.requests.running.values())

    def _deliver(self, one: Committed, chunk: Chunk) -> None:
        state = one.item.state
        if chunk.finish_reason is None:
            state.admitted.deliver(chunk)
        else:
            self.requests.finish(state, replace(chunk, stats=state.stats(self.clock())))


def make_round(one: Committed, batch: Batch, decided: float, done: float, ridden: float) -> Round:
    """Make the record of one session in a step; `decided` and `done` are clock readings."""
    state, planned = one.item.state, batch.began - batch.opened - batch.waited
    return Round(
        session=state.session.id,
        number=len(state.metrics.rounds),
        width=len(one.item.nodes),
        accepted=len(one.decision.accepted.path),
        hit=one.hit,
        waited=batch.waited,
        computed=decided - batch.began,
        bookkeeping=max(0.0, planned) + done - decided,
        ridden=ridden,
        expected=one.item.expected,
    )
