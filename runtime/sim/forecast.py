"""What to expect: tokens per second of a schedule, by letting the runtime run on a virtual clock."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.config import ScheduleConfig
from runtime.core import limits
from runtime.core.messages import Chunk, Request, Round, Style
from runtime.core.sampling_params import Sampling
from runtime.draft.draft_engine import DraftEngine
from runtime.scheduler_factory import scheduler
from runtime.schedulers.base import Plan, Scheduler, View
from runtime.scoring.calibration import Calibrations
from runtime.sim import draft_samples
from runtime.sim.pair_profile import Measured
from runtime.sim.replayed_head import HeadFigures, ReplayedHead
from runtime.sim.simulator import DrafterSide, TargetSide, World, linear
from runtime.sim.synthetic_models import BRANCHES, CONTEXT, VOCABULARY, Guesser, NamingModel, choose
from runtime.target.commands import AddRequest
from runtime.target.engine import Engine
from runtime.target.head_runner import MountedHead
from runtime.target.stop_checker import StopChecker
from runtime.target.verifier import Verifier

ENDLESS = 1 << 30  # tokens of a session that does not end
DRAFTER = "draft"
WIDTH = 4  # leaves in one pass of a drafter, as in config.DrafterConfig
PROMPT = 4  # tokens
TOKENS = 400  # counted, of all sessions together
STEPS = 40  # tokens of each session, where that is more
WARM_UP = 0.5  # of them, that come before and are not counted: a schedule learns rates and delays over some twenty steps
EFFORT = 6_000  # sessions served, counted anew in each pass of a drafter or a target, after which it ends in any case
EFFORT_EACH = 100  # the same for each session, where that is more


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated beside the pair. Sessions are divided evenly over the targets; every drafter serves all of these.

    `length`: tokens of each session, after which another takes its place (0: none ends); `once`: none does, and what counts is the
    whole of them, from the first token to the last, as when a batch is measured. A target holds 256 sessions at most: others wait,
    and do not change how many tokens there are in a second. `head`: one that sits on every target.
    """

    drafters: int = 1
    sessions: int = 1
    targets: int = 1
    width: int = WIDTH
    length: int = 0
    once: bool = False
    tokens: int = TOKENS
    effort: int = EFFORT
    head: HeadFigures | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of all sessions together, in steady state. `hits`: share of the rounds whose new root was drafted; `rows`: of a
    session in a step, the root included; `waiting`: share of the targets' time."""

    tokens_per_second: float
    tokens_per_round: float
    rows: float
    hits: float
    waiting: float


@dataclass(slots=True)
class Seen:
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
class Watched:
    """A scheduler, and what it is told of finished steps."""

    inner: Scheduler
    seen: Seen

    @property
    def style(self) -> Style:
        return self.inner.style

    def plan(self, views: Sequence[View]) -> Plan:
        return self.inner.plan(views)

    def observe(self, step: Sequence[Round]) -> None:
        self.seen.rounds += step
        self.inner.observe(step)

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        self.inner.on_growth(delay, first, leaves)


def forecast(
    measured: Measured, schedule: ScheduleConfig, setting: Setting = Setting()
) -> Forecast:
    return simulate(measured, lambda: scheduler(schedule, measured.target), setting)


def simulate(measured: Measured, policy: Callable[[], Scheduler], setting: Setting) -> Forecast:
    """`policy` makes the scheduler of one target."""
    world, seen, examples = World(), Seen(), draft_samples.of(measured)
    guesser, learned = Guesser(examples), examples.learned(DRAFTER, BRANCHES)
    if setting.head is not None:
        setting.head.teach(learned)
    known = learned.saved()
    wanted_targets = range(min(setting.targets, setting.sessions))
    targets = [
        target(world, measured, Watched(policy(), seen), known, setting.head)
        for _ in wanted_targets
    ]
    drafters = [
        drafter(world, measured, f"{DRAFTER}-{n}", guesser, known, setting.width)
        for n in range(setting.drafters)
    ]
    for stream, one in enumerate(targets):
        for draft in drafters:
            draft.join(one, stream, measured.rtt / 2)
    for number in range(min(setting.sessions, limits.SESSIONS * len(targets))):
        admit(targets[number % len(targets)].engine, number, setting, seen)
    for one in targets:
        one.go_on()
    if setting.once:
        advance(world, drafters, seen, setting.length * setting.sessions, sys.maxsize)
        return seen.forecast(world.now)
    wanted = max(setting.tokens, STEPS * setting.sessions)
    effort = max(setting.effort, EFFORT_EACH * setting.sessions)
    advance(world, drafters, seen, int(WARM_UP * wanted), effort // 3)
    began, seen.tokens, seen.rounds = world.now, 0, []
    advance(world, drafters, seen, wanted, effort)
    return seen.forecast(world.now - began)


def target(
    world: World,
    measured: Measured,
    policy: Scheduler,
    known: Mapping[str, Any],
    head: HeadFigures | None,
) -> TargetSide:
    """`known`: saved calibrations; target and drafters begin as after a long time together."""
    heads = {f"{head.name}-0": MountedHead(ReplayedHead(head))} if head is not None else {}
    engine = Engine(
        NamingModel(),
        Verifier(choose, frozenset()),
        policy,
        world.clock,
        kv_slots=CONTEXT,
        calibrations=Calibrations.restored(known),
        heads=heads,
    )
    of_rows = linear(measured.target)

    def seconds(rows: int, sessions: int, taken: int, busy: bool) -> float:
        model = (of_rows(rows) + measured.text * (sessions - 1)) * (
            measured.beside if busy else 1.0
        )
        looked = head.seconds if head is not None and engine.heads.active else 0.0
        return model + (measured.step + looked) * sessions + measured.message * taken

    return TargetSide(world, engine, seconds)


def drafter(
    world: World,
    measured: Measured,
    name: str,
    guesser: Guesser,
    known: Mapping[str, Any],
    width: int,
) -> DrafterSide:
    draft_engine = DraftEngine(
        guesser, name, width, calibrations=Calibrations.restored(known), clock=world.clock
    )
    return DrafterSide(world, draft_engine, linear(measured.draft, measured.pass_))


def admit(engine: Engine, number: int, setting: Setting, seen: Seen) -> None:
    """A session, and after its end the next in its place."""

    def deliver(chunk: Chunk) -> None:
        seen.tokens += len(chunk.tokens)
        if chunk.finish_reason is not None and not setting.once:
            admit(engine, number + limits.SESSIONS * setting.targets, setting, seen)

    prompt = tuple(number // VOCABULARY**digit % VOCABULARY for digit in range(PROMPT))
    sampling = Sampling(max_tokens=setting.length or ENDLESS)
    request = Request(str(number), prompt, sampling)
    engine.inbox.put(
        AddRequest(
            request, StopChecker(sampling, frozenset(), lambda token: "", lambda: ""), deliver
        )
    )


def advance(
    world: World, drafters: Sequence[DrafterSide], seen: Seen, tokens: int, effort: int
) -> None:
    """Until so many tokens have been seen, or sessions have been served so often since the beginning."""
    while (
        seen.tokens < tokens
        and sum(draft.answered for draft in drafters) + len(seen.rounds) < effort
    ):
        if not world.step():
            return
