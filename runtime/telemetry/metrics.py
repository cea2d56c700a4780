"""Aggregates rounds into the metrics of a session, a drafter and a target."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from runtime.core.messages import Round, Stats
from runtime.telemetry.reports import GuessReport, TargetReport

ROUND_TRIP_EWMA_WEIGHT = 0.1  # weight of a new round trip


class SessionMetrics:
    """Running sums of one session."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []

    def add(self, done: Round) -> None:
        self.rounds.append(done)

    def stats(
        self,
        prompt_tokens: int,
        completion_tokens: int,
        drafted: int,
        by_drafter: Mapping[str, int],
        ignored: Mapping[str, int],
        prefill: float,
        elapsed: float,
        reused: int = 0,
    ) -> Stats:
        """Return the stats. Times are in seconds; `elapsed` runs from the arrival of the request to
        its last token.
        """
        histogram = Counter(done.accepted for done in self.rounds if done.width)
        return Stats(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            rounds=len(self.rounds),
            drafted=drafted,
            verified=sum(done.width for done in self.rounds),
            accepted=sum(by_drafter.values()),
            hits=sum(done.hit for done in self.rounds),
            histogram=tuple(histogram[n] for n in range(max(histogram, default=0) + 1)),
            by_drafter=dict(by_drafter),
            ignored=dict(ignored),
            elapsed=elapsed,
            prefill=prefill,
            reused=reused,
            waited=sum(done.waited for done in self.rounds),
            computed=sum(done.computed for done in self.rounds),
            bookkeeping=sum(done.bookkeeping for done in self.rounds),
        )


@dataclass(slots=True)
class DrafterMetrics:
    """Running sums of one drafter; see GuessReport."""

    proposed: int = 0
    accepted: int = 0
    late: int = 0
    stale: int = 0
    ahead: int = 0  # sum over `begun`
    begun: int = 0  # rounds for which it could guess
    feature_bytes: int = 0
    round_trip: float | None = None

    def lead(self, tokens: int) -> None:
        self.ahead += tokens
        self.begun += 1

    def answered(self, seconds: float) -> None:
        self.round_trip = (
            seconds
            if self.round_trip is None
            else self.round_trip + ROUND_TRIP_EWMA_WEIGHT * (seconds - self.round_trip)
        )

    def report(self, resting: bool) -> GuessReport:
        lead = self.ahead / self.begun if self.begun else 0.0
        return GuessReport(
            self.proposed,
            self.accepted,
            self.late,
            self.stale,
            lead,
            self.round_trip or 0.0,
            resting,
            self.feature_bytes,
        )


class TargetMetrics:
    """Running sums of one target since its start, updated by one thread; `report` freezes them."""

    def __init__(self) -> None:
        self.steps = self.rounds = self.rows = self.verified = self.dropped = 0
        self.prompt = self.reused = self.completion = 0
        self.waited = self.computed = self.bookkeeping = self.prefilled = 0.0
        self.places: list[int] = []  # delivered guesses by their place on the path
        self.finished: Counter[str] = Counter()  # by FinishReason
        self.fallbacks: Counter[str] = Counter()
        self.guesses: defaultdict[str, DrafterMetrics] = defaultdict(DrafterMetrics)
        self.probes, self.speedup, self.active = 0, 1.0, True  # see TargetReport
        self.standby_tokens = self.standby_slots = 0

    @property
    def rate(self) -> float:
        """Return the tokens of all sessions per second of steps."""
        seconds = self.waited + self.computed + self.bookkeeping
        return self.completion / seconds if seconds else 0.0

    def step(self, rounds: Sequence[Round]) -> None:
        """Add the rounds of one step, which share its times."""
        self.steps += 1
        self.rounds += len(rounds)
        width = sum(done.width for done in rounds)
        self.rows += len(rounds) + width
        self.verified += width
        for done in rounds[:1]:
            self.waited += done.waited
            self.computed += done.computed
            self.bookkeeping += done.bookkeeping

    def delivered(self, drafters: Sequence[str]) -> None:
        """Add the delivered tokens of one round, by who guessed them; guessed tokens come first."""
        self.completion += len(drafters)
        guessed = [name for name in drafters if name]
        self.places += [0] * (len(guessed) - len(self.places))
        for place, name in enumerate(guessed):
            self.places[place] += 1
            self.guesses[name].accepted += 1

    def gate(self, probes: int, speedup: float, plain: bool) -> None:
        """Record what the speculation gate has decided."""
        self.probes, self.speedup, self.active = probes, speedup, not plain

    def report(
        self, live: int, waiting: int, kv_used: int, kv_slots: int, resting: Collection[str]
    ) -> TargetReport:
        accepted = sum(self.places)
        return TargetReport(
            live=live,
            waiting=waiting,
            kv_used=kv_used,
            kv_slots=kv_slots,
            steps=self.steps,
            rounds=self.rounds,
            rows=self.rows,
            prompt_tokens=self.prompt,
            reused_tokens=self.reused,
            completion_tokens=self.completion,
            drafted=sum(of_one.proposed for of_one in self.guesses.values()),
            verified=self.verified,
            accepted=accepted,
            rejected=self.verified - accepted,
            expired=self.dropped - self.verified,
            accepted_at=tuple(self.places),
            waited=self.waited,
            computed=self.computed,
            bookkeeping=self.bookkeeping,
            prefilled=self.prefilled,
            finished=dict(self.finished),
            fallbacks=dict(self.fallbacks),
            probes=self.probes,
            speedup=self.speedup,
            active=self.active,
            standby_slots=self.standby_slots,
            standby_tokens=self.standby_tokens,
            guesses={name: of_one.report(name in resting) for name, of_one in self.guesses.items()},
        )


def speculative_decoding(stats: Stats) -> dict[str, object]:
    """Return the object that vLLM reports under this name.

    mean_acceptance_length includes the target's own token, as in vLLM; num_drafts counts rounds
    that verified guesses. A tree spends several rows on one position, so draft_acceptance_rate
    (accepted over verified nodes) is lower than for an equally useful chain.
    """
    return {
        "mean_acceptance_length": stats.completion_tokens / stats.rounds if stats.rounds else 0.0,
        "draft_acceptance_rate": stats.accepted / stats.verified if stats.verified else 0.0,
        "acceptance_histogram": list(stats.histogram),
        "num_drafts": sum(stats.histogram),
        "num_draft_tokens": stats.verified,
        "num_accepted_tokens": stats.accepted,
    }
