"""Manages the sessions of a target: each begins when KV memory is free, and ends once."""

import logging
import math
from collections.abc import Sequence

from runtime.core.clock import Clock
from runtime.core.errors import SESSION_FAULTS
from runtime.core.messages import Chunk, Close, FinishReason, Style
from runtime.kv.prefix_cache import PrefixCache
from runtime.models.base import HiddenStateModel, Model
from runtime.scoring.calibration import Calibrations
from runtime.target.admission import Admission
from runtime.target.commands import AddRequest
from runtime.target.drafter_manager import DrafterManager
from runtime.target.head_runner import HeadRunner
from runtime.target.request_state import RequestState
from runtime.target.session import Session
from runtime.target.standby import StandbyTexts
from runtime.telemetry.metrics import SessionMetrics, TargetMetrics

log = logging.getLogger(__name__)


class RequestManager:
    """Owns the sessions of a target, from the queue to the last chunk, and the KV memory they hold.

    `running` maps names to active sessions, in order of their start. `admission` holds the waiting
    ones. A quarter of `kv_slots` keeps the KV of finished texts, and that of texts of other
    targets, of at most half as many tokens.
    """

    def __init__(
        self,
        model: Model,
        drafters: DrafterManager,
        heads: HeadRunner,
        metrics: TargetMetrics,
        clock: Clock,
        kv_slots: int,
        calibrations: Calibrations,
    ) -> None:
        self.model, self.drafters, self.heads, self.clock = model, drafters, heads, clock
        self.metrics, self.calibrations = metrics, calibrations
        self.running: dict[str, RequestState] = {}
        self.admission = Admission(kv_slots - kv_slots // 4)
        self.prefixes = PrefixCache(kv_slots // 4)
        self.standby = StandbyTexts(model, clock, kv_slots // 8)
        self.kv_slots, self.kv_kept = kv_slots, 0  # the latter hold finished texts
        self.soonest = math.inf  # clock when the first deadline ends
        self.report = self.metrics.report(0, 0, 0, kv_slots, ())  # read from any thread

    def add(self, request: AddRequest, style: Style) -> None:
        """Queue a request, or begin it at once."""
        self.admission.waiting.append(request)
        self.soonest = min(self.soonest, request.expires)
        self.start(style)

    def start(self, style: Style) -> None:
        """Begin the sessions that fit now, and end those whose deadline has passed.

        Drafters are asked to grow their trees of these sessions in this style.
        """
        self.expire()
        while (admitted := self.admission.next(len(self.running), self.model.context)) is not None:
            command, slots = admitted
            try:
                self._begin(command, slots, style)
            except SESSION_FAULTS as error:
                if (state := self.running.get(command.request.session)) is not None:
                    self.fail(state, error)
                else:
                    self.admission.release(slots)
                    self._refuse(command, "error", describe(error))

    def _begin(self, command: AddRequest, slots: int, style: Style) -> None:
        """Begin a session. Raises what the model's cache raises."""
        request, now = command.request, self.clock()
        bucket = self.calibrations.bucket(request.sampling.temperature)
        session = Session(request, self.model.vocabulary, self.model.context, bucket, style)
        state = self.running[session.id] = RequestState(
            session, self.model.new_cache(), command, slots, committed_at=now, growth_at=now
        )
        self.metrics.prompt += session.prompt
        self.drafters.open(state)

    def count_features(self, row_bytes: int) -> None:
        """Count features of so many bytes a token as KV memory from now on."""
        if isinstance(self.model, HiddenStateModel):
            slots = row_bytes / self.model.slot_bytes
            self.admission.feature_slots = self.prefixes.feature_slots = slots

    def read_standby(self) -> bool:
        """Read texts of other targets if there is time; return True if there may be more."""
        standby = self.standby
        if not standby.unread:
            return False
        others = ((state.session.tokens[:-1], state.cache) for state in self.ready())
        if self.idle:
            ran = standby.read_idle(self.prefixes)
        else:
            steps = self.metrics.steps
            step_s = self.metrics.computed / steps if steps else 0.0
            ran = standby.read_busy(self.prefixes, others, step_s)
        if ran:
            self.note_standby()
        return ran

    def note_standby(self) -> None:
        """Count the memory of the texts of other targets."""
        self.metrics.standby_tokens, self.metrics.standby_slots = (
            self.standby.read,
            self.standby.slots,
        )
        self.prefixes.reserve(self.standby.slots)
        self.kv_kept = self.prefixes.slots

    def states(self) -> list[RequestState]:
        return list(self.running.values())

    def ready(self) -> list[RequestState]:
        """Return the sessions whose prompt has been read."""
        return [state for state in self.running.values() if state.ready]

    def is_running(self, state: RequestState) -> bool:
        """Return False once the session is over, even if another one has its name."""
        return self.running.get(state.session.id) is state

    @property
    def idle(self) -> bool:
        return not self.running and not self.admission.waiting

    def finish(self, state: RequestState, last: Chunk) -> None:
        """Remove the session everywhere, then deliver its last chunk, whatever happens.

        Its KV stays cached for texts with the same beginning.
        """
        session = state.session
        del self.running[session.id]
        self.admission.release(state.slots)
        try:
            self._keep(state)
            self.metrics.dropped += len(session.tree) - 1
            self.drafters.notify(session, Close(session.id))
            self.heads.close(session.id)
        finally:
            self._answer(state.admitted, last)

    def _keep(self, state: RequestState) -> None:
        """Cache the KV of a session that is over."""
        length = min(state.cache.length, len(state.session.tokens) - 1)
        try:
            self.prefixes.keep(state.session.tokens[:length], state.cache, state.features)
        except SESSION_FAULTS as error:
            log.warning("the cache of a text is not kept: %s", describe(error))
        self.kv_kept = self.prefixes.slots

    def fail(self, state: RequestState, error: Exception) -> None:
        """End the session with an error. The log names its kind: its words may quote the text."""
        log.warning("a session ends by %s", kinds(error))
        log.debug("the fault, whose words may quote the session", exc_info=error)
        stats = state.stats(self.clock())
        self.finish(state, Chunk((), (), (), "error", stats, error=describe(error)))

    def abort(self, name: str, reason: FinishReason) -> None:
        """End a session, running or waiting; no error if the name is unknown.

        At its deadline a chunk brings the text that was held back: its tokens count, and nobody
        goes on with it.
        """
        state, waiting = self.running.get(name), self.admission.withdraw(name)
        if state is not None:
            if reason == "deadline" and (text := state.admitted.stop_checker.close()):
                state.admitted.deliver(Chunk((text,), (), ()))
            self.finish(state, Chunk((), (), (), reason, state.stats(self.clock())))
        elif waiting is not None:
            self._refuse(waiting, reason)

    def _refuse(self, command: AddRequest, reason: FinishReason, error: str = "") -> None:
        """End a request that has not begun."""
        prompt, elapsed = len(command.request.prompt), self.clock() - command.received_at
        stats = SessionMetrics().stats(prompt, 0, 0, {}, {}, 0.0, elapsed)
        self._answer(command, Chunk((), (), (), reason, stats, error=error))

    def abort_all(self, arrived: Sequence[AddRequest]) -> None:
        """End all sessions, and the requests in `arrived`, which are not queued yet, as
        cancelled. An error in one of them leaves no other without its last chunk.
        """
        self.admission.waiting.extend(arrived)
        waiting = [command.request.session for command in self.admission.waiting]
        for name in [*self.running, *waiting]:
            try:
                self.abort(name, "cancelled")
            except SESSION_FAULTS as error:
                log.error("session %s could not be ended in order: %s", name, describe(error))

    def expire(self) -> None:
        """End the sessions whose deadline has passed."""
        if self.soonest == math.inf or (now := self.clock()) < self.soonest:
            return
        commands = [*(state.admitted for state in self.states()), *self.admission.waiting]
        for command in commands:
            if command.expires <= now:
                self.abort(command.request.session, "deadline")
        left = (command.expires for command in commands if command.expires > now)
        self.soonest = min(left, default=math.inf)

    def until_deadline(self, wait: float) -> float:
        """Shorten `wait`, in seconds, so that it ends at the next deadline."""
        if self.soonest == math.inf:
            return wait
        return min(wait, max(0.0, self.soonest - self.clock()))

    def publish(self) -> None:
        """Update the report."""
        used = self.admission.reserved + self.kv_kept + self.metrics.standby_slots
        live, waiting = len(self.running), len(self.admission.waiting)
        resting = self.drafters.utility.resting
        self.report = self.metrics.report(live, waiting, used, self.kv_slots, resting)

    @property
    def has_changed(self) -> bool:
        """Return True if sessions have begun or ended since the last report."""
        waiting = len(self.admission.waiting)
        return (self.report.live, self.report.waiting) != (len(self.running), waiting)

    def _answer(self, command: AddRequest, last: Chunk) -> None:
        """Deliver the last chunk, after updating the report: a caller that gets it finds it
        counted.
        """
        if last.finish_reason is not None:
            self.metrics.finished[last.finish_reason] += 1
        self.publish()
        command.deliver(last)


def kinds(error: BaseException) -> str:
    """Return the class of an error, and those of its causes."""
    cause = error.__cause__
    return type(error).__name__ + ("" if cause is None else f" from {kinds(cause)}")


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
