"""Forecasts the tokens per second of a schedule by running the runtime on a virtual clock."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.config import ScheduleConfig
from runtime.core import limits
from runtime.core.messages import Chunk, Request, Round, Style
from runtime.core.sampling_params import SamplingParams
from runtime.draft.draft_engine import DraftEngine
from runtime.scheduler_factory import make_scheduler
from runtime.schedulers.base import Plan, Scheduler, SessionView
from runtime.scoring.calibration import Calibrations
from runtime.scoring.speculation_gate import SpeculationGate
from runtime.sim import draft_samples
from runtime.sim.pair_profile import PairProfile
from runtime.sim.replayed_head import HeadProfile, ReplayedHead
from runtime.sim.simulator import SimulatedDrafter, SimulatedTarget, Simulator, interpolate
from runtime.sim.synthetic_models import (
    BRANCHES,
    CONTEXT,
    VOCABULARY,
    SyntheticDrafter,
    SyntheticTarget,
    choose,
)
from runtime.target.commands import AddRequest
from runtime.target.engine import Engine
from runtime.target.head_runner import MountedHead
from runtime.target.stop_checker import StopChecker
from runtime.target.verifier import Verifier

ENDLESS_TOKENS = 1 << 30  # tokens of an endless session
DRAFTER = "draft"
DRAFT_WIDTH = 4  # leaves per drafter pass, as in config.DrafterConfig
PROMPT_TOKENS = 4  # tokens
MIN_TOKENS = 400  # counted, over all sessions
MIN_SESSION_TOKENS = 40  # counted per session, if that is more
# Tokens generated before counting starts, as a share of those counted: a schedule needs about
# twenty steps to learn rates and delays.
WARM_UP_SHARE = 0.5
# Limit on served sessions, counted again in each pass of a drafter or a target.
DEFAULT_EFFORT = 6_000
EFFORT_PER_SESSION = 100  # the same limit per session, if that is more


@dataclass(frozen=True, slots=True)
class Setting:
    """The simulated deployment and load.

    Sessions are divided evenly over the targets, and every drafter serves all targets. A target
    holds at most 256 sessions; the others wait and do not change the rate.

    length  tokens per session, after which another session takes its place (0: sessions do not end)
    once    no session is replaced and all tokens count, from the first to the last, as in a
            measured batch
    tokens  tokens to count
    effort  limit on the work of the simulation, see DEFAULT_EFFORT
    head    a head that sits on every target
    """

    drafters: int = 1
    sessions: int = 1
    targets: int = 1
    width: int = DRAFT_WIDTH
    length: int = 0
    once: bool = False
    tokens: int = MIN_TOKENS
    effort: int = DEFAULT_EFFORT
    head: HeadProfile | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The steady state of all sessions together.

    rows     rows per session and step, root included
    hits     share of the rounds whose new root was drafted
    waiting  share of the targets' time spent waiting
    """

    tokens_per_second: float
    tokens_per_round: float
    rows: float
    hits: float
    waiting: float


@dataclass(slots=True)
class Progress:
    """Tokens delivered by all targets, and their rounds."""

    tokens: int = 0
    rounds: list[Round] = field(default_factory=list)

    def forecast(self, seconds: float) -> Forecast:
        rounds = max(1, len(self.rounds))
        computed, waited = (
            sum(done.computed for done in self.rounds),
            sum(done.waited for done in self.rounds),
        )
        return Forecast(
            tokens_per_second=self.tokens / seconds if seconds else 0.0,
            tokens_per_round=sum(done.accepted + 1 for done in self.rounds) / rounds,
            rows=sum(done.width + 1 for done in self.rounds) / rounds,
            hits=sum(done.hit for done in self.rounds) / rounds,
            waiting=waited / (computed + waited) if computed else 0.0,
        )


@dataclass(frozen=True, slots=True)
class RecordingScheduler:
    """A scheduler that records the finished rounds it observes."""

    inner: Scheduler
    progress: Progress

    @property
    def style(self) -> Style:
        return self.inner.style

    @property
    def gate(self) -> SpeculationGate | None:
        return self.inner.gate

    def plan(self, views: Sequence[SessionView]) -> Plan:
        return self.inner.plan(views)

    def observe(self, step: Sequence[Round]) -> None:
        self.progress.rounds += step
        self.inner.observe(step)

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        self.inner.on_growth(delay, first, leaves)


def forecast(
    profile: PairProfile, schedule: ScheduleConfig, setting: Setting = Setting()
) -> Forecast:
    return simulate(profile, lambda: make_scheduler(schedule, profile.target), setting)


def simulate(profile: PairProfile, policy: Callable[[], Scheduler], setting: Setting) -> Forecast:
    """Run the simulation; `policy` creates the scheduler of one target."""
    simulator, progress, examples = Simulator(), Progress(), draft_samples.samples_of(profile)
    guesser, calibrations = SyntheticDrafter(examples), examples.calibrations(DRAFTER, BRANCHES)
    if setting.head is not None:
        setting.head.calibrate(calibrations)
    known = calibrations.to_dict()
    wanted_targets = range(min(setting.targets, setting.sessions))
    targets = [
        simulated_target(
            simulator, profile, RecordingScheduler(policy(), progress), known, setting.head
        )
        for _ in wanted_targets
    ]
    drafters = [
        simulated_drafter(simulator, profile, f"{DRAFTER}-{n}", guesser, known, setting.width)
        for n in range(setting.drafters)
    ]
    for stream, one in enumerate(targets):
        for draft in drafters:
            draft.join(one, stream, profile.rtt / 2)
    for number in range(min(setting.sessions, limits.SESSIONS * len(targets))):
        admit_session(targets[number % len(targets)].engine, number, setting, progress)
    for one in targets:
        one.resume()
    if setting.once:
        run_until(simulator, drafters, progress, setting.length * setting.sessions, sys.maxsize)
        return progress.forecast(simulator.now)
    wanted = max(setting.tokens, MIN_SESSION_TOKENS * setting.sessions)
    effort = max(setting.effort, EFFORT_PER_SESSION * setting.sessions)
    run_until(simulator, drafters, progress, int(WARM_UP_SHARE * wanted), effort // 3)
    began, progress.tokens, progress.rounds = simulator.now, 0, []
    run_until(simulator, drafters, progress, wanted, effort)
    return progress.forecast(simulator.now - began)


def simulated_target(
    simulator: Simulator,
    profile: PairProfile,
    policy: Scheduler,
    known: Mapping[str, Any],
    head: HeadProfile | None,
) -> SimulatedTarget:
    """Create a target that starts with saved calibrations, `known`, as after a long time of
    operation.
    """
    heads = {f"{head.name}-0": MountedHead(ReplayedHead(head))} if head is not None else {}
    engine = Engine(
        SyntheticTarget(),
        Verifier(choose, frozenset()),
        policy,
        simulator.clock,
        kv_slots=CONTEXT,
        calibrations=Calibrations.from_dict(known),
        heads=heads,
    )
    of_rows = interpolate(profile.target)

    def seconds(rows: int, sessions: int, taken: int, busy: bool) -> float:
        model = (of_rows(rows) + profile.text * (sessions - 1)) * (profile.beside if busy else 1.0)
        head_time = head.seconds if head is not None and engine.heads.active else 0.0
        return model + (profile.step + head_time) * sessions + profile.message * taken

    return SimulatedTarget(simulator, engine, seconds)


def simulated_drafter(
    simulator: Simulator,
    profile: PairProfile,
    name: str,
    guesser: SyntheticDrafter,
    known: Mapping[str, Any],
    width: int,
) -> SimulatedDrafter:
    draft_engine = DraftEngine(
        guesser, name, width, calibrations=Calibrations.from_dict(known), clock=simulator.clock
    )
    return SimulatedDrafter(simulator, draft_engine, interpolate(profile.draft, profile.pass_))


def admit_session(engine: Engine, number: int, setting: Setting, progress: Progress) -> None:
    """Start a session, and the next one in its place when it ends."""

    def deliver(chunk: Chunk) -> None:
        progress.tokens += len(chunk.tokens)
        if chunk.finish_reason is not None and not setting.once:
            admit_session(engine, number + limits.SESSIONS * setting.targets, setting, progress)

    prompt = tuple(number // VOCABULARY**digit % VOCABULARY for digit in range(PROMPT_TOKENS))
    sampling = SamplingParams(max_tokens=setting.length or ENDLESS_TOKENS)
    request = Request(str(number), prompt, sampling)
    engine.inbox.put(
        AddRequest(
            request, StopChecker(sampling, frozenset(), lambda token: "", lambda: ""), deliver
        )
    )


def run_until(
    simulator: Simulator,
    drafters: Sequence[SimulatedDrafter],
    progress: Progress,
    tokens: int,
    effort: int,
) -> None:
    """Run until `tokens` tokens have been delivered or `effort` sessions have been served."""
    while (
        progress.tokens < tokens
        and sum(draft.served_requests for draft in drafters) + len(progress.rounds) < effort
    ):
        if not simulator.step():
            return
