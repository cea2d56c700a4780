"""Decides whether speculation pays, against plain decoding with the drafters at rest.

A drafter next door takes memory bandwidth, cache and power from the target, so a plain step while
it computes says nothing about plain decoding. The gate therefore compares ways to decode that are
measured in turns: PLAIN (drafters and heads rest), HEADS (drafters rest) and ALL.

It is a conservative bandit (Wu, Shariff, Lattimore and Szepesvari, arXiv 1602.04282): the loss
against plain decoding is bounded by an account, kept in tokens of plain decoding.

    gain of a step   tokens per session - seconds / seconds of a plain step
    budget           what speculation may still lose before it stops; plain decoding adds 1 %
    reserve          what speculation has earned beyond that; it pays for new trials

A step counts for the tokens that were to be expected of it, as long as these come true (see
runtime.scoring.expected_tokens). The gate starts with a budget for a trial of a few steps, and
without knowledge it first measures plain steps. When the budget is spent, drafters rest; each
failed trial in a row doubles the rest. While speculation is on, probes of a few plain steps keep
the comparison up to date. They are as rare as their cost demands, at most 1 % of the tokens.

Each order of load (1, 2, 3-4, 5-8, ... sessions) has an account of its own, for what pays with one
session may not pay with eight.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.scoring.gate_account import (
    FIRST_PERIOD,
    FIRST_REST,
    MAX_BUDGET,
    MAX_PERIOD,
    MAX_REST,
    MIN_STEPS,
    PLAIN,
    TRIAL_BUDGET,
    Account,
    Record,
    Way,
)

ALLOWANCE = 0.01  # tokens that may be lost per token
MAX_RESERVE = 8.0
# Steps of a trial that verified guesses: until then a drafter has only cost its start, unless that
# exceeds the budget by OVERDRAFT of a trial's.
MIN_VERIFIED = 3
OVERDRAFT = 0.5
PROBE_STEPS = 3  # plain steps of a probe, after it has settled
FIRST_PROBE_STEPS = 4  # of the first one: nothing is known yet
VISIT_STEPS = 12  # steps of a probe of another way than plain decoding
UNKNOWN_SETTLE_STEPS = 4  # until a drafter that has never answered is expected to be at rest
MEMORY = {PLAIN: 12.0, "heads": 48.0, "all": 48.0}  # steps that a record remembers
MIN_LEAD = 1.03  # speed by which another way must lead to take over


class SpeculationGate:
    """Chooses the way of the next steps from the steps so far. It has no clock of its own.

    `times` maps rows to the seconds of a pass, 1 among them: how plain steps grow with the number
    of sessions. Their level is measured. `probes` counts probes of plain decoding.
    """

    def __init__(self, times: Mapping[int, float]) -> None:
        self.rows = np.asarray(sorted(times), dtype=np.float64)
        self.seconds = np.asarray([times[int(rows)] for rows in self.rows])
        self.known: dict[str, dict[int, Account]] = {}  # by helpers, and by order of load
        self.helpers = ""
        self.sessions = 1  # in the last step
        self.probes = 0

    @property
    def accounts(self) -> dict[int, Account]:
        """Return the accounts of the present helpers, by order of load."""
        return self.known.setdefault(self.helpers, {})

    def use(self, kinds: Iterable[str]) -> None:
        """Decide about helpers of these kinds from now on. Each set of them has its accounts."""
        self.helpers = ",".join(sorted(set(kinds)))

    @property
    def account(self) -> Account:
        """Return the account of the present load; a new one begins as the nearest one goes on."""
        load = load_of(self.sessions)
        if load not in self.accounts:
            self.accounts[load] = self._new_account(load)
        return self.accounts[load]

    def _new_account(self, load: int) -> Account:
        if not self.accounts:
            return Account(budget=TRIAL_BUDGET)
        near = self.accounts[min(self.accounts, key=lambda known: abs(known - load))]
        budget = 0.0 if near.home == PLAIN else TRIAL_BUDGET
        return Account(way=near.home, home=near.home, rest=near.rest, budget=budget)

    @property
    def way(self) -> Way:
        return self.account.way

    @property
    def speedup(self) -> float:
        """Return the measured speed of speculation relative to plain decoding; 1 if unknown."""
        account = self.account
        ways = [way for way in account.records if way != PLAIN]
        return max((account.speedup(way) for way in ways), default=1.0)

    def begin(self, ways: Sequence[Way]) -> bool:
        """Start a probe if nothing is known of plain decoding; return True if it has started.

        To be asked before a step. The first steps of all then measure plain decoding.
        """
        account = self.account
        if not ways or account.way == PLAIN or account.record(PLAIN).speed:
            return False
        self._probe(account)
        return True

    def observe(
        self,
        ways: Sequence[Way],
        sessions: int,
        rows: int,
        tokens: int,
        seconds: float,
        settle: float | None = 0.0,
        expected: float | None = None,
    ) -> None:
        """Learn from a step of all sessions, and choose the way of the next.

        ways      ways to speculate that exist now, the most helpers last; none: the step was plain
        sessions  sessions in the step
        rows      rows of all of them, roots included
        tokens    tokens of all of them
        seconds   the step took, waiting and bookkeeping included
        expected  tokens that were to be expected of all of them; None: not known
        settle    seconds until drafters that were told to rest do; None: they have never answered
        """
        before, self.sessions = self.account, sessions
        account = self.account
        if account is not before:  # the step was taken in the other account's way
            account.turn(account.way)
            return
        plain, usual = np.interp([sessions, rows], self.rows, self.seconds)
        settled = not ways or is_settled(account, settle)
        way = account.way if ways else PLAIN
        clipped = account.record(way).clip(
            seconds / plain, usual / plain, account.record(PLAIN).ratios
        )
        account.age += len(ways) > 0
        account.verified += rows > sessions
        account.seconds += seconds
        judged = tokens / sessions
        if way != PLAIN and expected is not None:
            guesses, too_much = account.expected.judge(expected / sessions - 1.0, judged - 1.0)
            judged, account.budget = 1.0 + guesses, account.budget - too_much
        self._learn(account, way, judged, clipped, settled, allowed=bool(ways))
        if not ways:
            return
        if account.home not in (PLAIN, *ways):
            account.home = ways[-1]
        if account.way not in (PLAIN, *ways):
            account.turn(account.home)
        if account.way == PLAIN:
            self._while_plain(account, ways)
        else:
            self._while_speculating(account, ways)

    def _learn(
        self,
        account: Account,
        way: Way,
        tokens: float,
        seconds: float,
        settled: bool,
        allowed: bool,
    ) -> None:
        record, plain = account.record(way), account.record(PLAIN)
        if way != PLAIN or settled:
            record.add(tokens, seconds, MEMORY[way])
        if way == PLAIN:
            account.measured += settled
            account.budget += ALLOWANCE * tokens * allowed
        else:
            account.since_probe += 1
        if plain.speed and (way != PLAIN or not settled):
            # Drafters that still compute after they were told to rest cost time too.
            account.budget += tokens - seconds * plain.speed
        over = max(0.0, account.budget - MAX_BUDGET)
        account.budget -= over
        if way != PLAIN:
            account.reserve = min(MAX_RESERVE, account.reserve + over)

    def _while_plain(self, account: Account, ways: Sequence[Way]) -> None:
        if account.home != PLAIN:
            if account.measured >= (PROBE_STEPS if account.probed else FIRST_PROBE_STEPS):
                self._after_probe(account)
            return
        if account.age < account.rest:
            return
        trial = self._next_trial(account, ways)
        paid = min(max(0.0, TRIAL_BUDGET - account.budget), account.reserve)
        account.budget, account.reserve = account.budget + paid, account.reserve - paid
        if account.budget >= TRIAL_BUDGET:
            account.records[trial] = Record(ratios=account.record(trial).ratios)
            account.home, account.since_probe = trial, 0
            account.turn(trial)

    def _after_probe(self, account: Account) -> None:
        """Go on as before the probe, unless the new measurement says that it does not pay."""
        known = account.record(account.home)
        account.since_probe, account.probed = 0, True
        if known.steps >= FIRST_PERIOD / 2 and account.speedup(account.home) < 1.0:
            self._fail(account)
        else:
            account.turn(account.home)

    def _while_speculating(self, account: Account, ways: Sequence[Way]) -> None:
        if not account.record(PLAIN).speed:
            self._probe(account)
        elif account.budget < 0.0 and account.age >= MIN_STEPS and self._is_known(account):
            self._fail(account)
        elif account.way != account.home:
            if account.age >= VISIT_STEPS:
                self._after_visit(account)
        elif account.since_probe >= self._probe_period(account):
            account.rest = FIRST_REST // 2  # it has paid for that long
            account.period = min(MAX_PERIOD, 2 * account.period)
            others = [way for way in ways if way != account.home]
            account.visits += 1
            if others and account.visits % 2 == 0:
                account.since_probe = 0
                account.turn(others[account.visits // 2 % len(others)])
            else:
                self._probe(account)

    def _is_known(self, account: Account) -> bool:
        """Return whether the trial has shown what the guesses are worth, or has cost too much."""
        overdrawn = account.budget < -OVERDRAFT * TRIAL_BUDGET
        return account.verified >= MIN_VERIFIED or overdrawn

    def _probe_period(self, account: Account) -> float:
        """Return the steps between two probes: the tokens forgone are at most 1 %."""
        record = account.record(account.home)
        tokens = record.tokens / record.steps
        forgone = (PROBE_STEPS + 1) * tokens * max(0.0, 1.0 - 1.0 / account.speedup(account.home))
        return max(account.period, forgone / (ALLOWANCE * tokens))

    def _probe(self, account: Account) -> None:
        self.probes += 1
        account.turn(PLAIN)

    def _after_visit(self, account: Account) -> None:
        here, home = account.record(account.way).speed, account.record(account.home).speed
        if here > MIN_LEAD * home:
            account.home = account.way
        account.turn(account.home)

    def _fail(self, account: Account) -> None:
        """Let the drafters rest: longer than last time, unless speculation has paid meanwhile."""
        account.rest = min(MAX_REST, 2 * account.rest)
        account.period = FIRST_PERIOD
        account.home = PLAIN
        account.turn(PLAIN)

    def _next_trial(self, account: Account, ways: Sequence[Way]) -> Way:
        """Return the way that was fastest; one that was never tried comes first."""
        return max(
            ways, key=lambda way: account.record(way).speed if way in account.records else np.inf
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as plain JSON values. May run on another thread."""
        return {
            helpers: {str(load): account.to_dict() for load, account in tuple(accounts.items())}
            for helpers, accounts in tuple(self.known.items())
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Begin with what `to_dict` has returned in an earlier process.

        Raises ValueError, KeyError, TypeError or AttributeError for anything else.
        """
        self.known = {
            str(helpers): {int(load): Account.from_dict(one) for load, one in accounts.items()}
            for helpers, accounts in saved.items()
        }


def load_of(sessions: int) -> int:
    """Return the order of load: 0 for one session, 1 for two, 2 for three and four, and so on."""
    return (sessions - 1).bit_length()


def is_settled(account: Account, settle: float | None) -> bool:
    """Return True if drafters told to rest when the way changed do rest by now."""
    if settle is None:
        return account.age >= UNKNOWN_SETTLE_STEPS
    return account.age > 0 and account.seconds >= settle
