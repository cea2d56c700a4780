"""Draws a scenario from a seed: who is there, what is asked, and what goes wrong.

Each part is drawn on its own, so a part that is left out changes no other. Parts have names, such
as `session-2`, `fault-0` and `noise-drop`; a failing seed is shrunk by leaving out as many as
possible.
"""

from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

from runtime.core.messages import Request
from runtime.core.sampling_params import SamplingParams
from tests.simulation.batch import BatchSpec
from tests.simulation.machines import DrafterSpec, TargetSpec
from tests.simulation.network import Noise
from tests.simulation.toys import VOCABULARY

FaultKind = Literal["kill", "stop", "cut", "leave", "pause", "drain", "end"]
NOISES = ("drop", "duplicate", "reorder", "cut", "flip")
HORIZON_S = 4.0  # sessions and faults begin before


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """A request, when it is made, and when its client goes away: after so many tokens, or so many
    seconds.
    """

    request: Request
    at: float
    cancel_after_tokens: int | None = None
    cancel_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to `who` at a time, for so many seconds. `other` is the far end of a cut link.

    A process that is killed, or ends in order, is started again by the controller. `leave` removes
    a drafter and brings it back; `drain` drains a target and starts it again.
    """

    kind: FaultKind
    who: str
    at: float
    seconds: float
    other: str = ""

    def __str__(self) -> str:
        far = f" from {self.other}" if self.other else ""
        return f"{self.kind} {self.who}{far} at {self.at:.3f} s for {self.seconds:.3f} s"


@dataclass(frozen=True)
class Scenario:
    """Everything that a seed decides beforehand. `left_out` names the parts that were drawn and
    left out.
    """

    seed: int
    targets: tuple[TargetSpec, ...]
    drafters: dict[str, DrafterSpec]
    sessions: dict[str, SessionPlan]
    faults: dict[str, Fault]
    noise: Noise
    key_bits: int
    batch: BatchSpec | None = None
    left_out: frozenset[str] = field(default_factory=frozenset)

    @property
    def parts(self) -> list[str]:
        """Return the names of all parts that can be left out."""
        noises = [f"noise-{kind}" for kind in NOISES if getattr(self.noise, kind)]
        batch = ["batch"] if self.batch else []
        return [*self.faults, *noises, *batch, *self.sessions, *self.drafters]

    def without(self, names: frozenset[str]) -> "Scenario":
        noises = {kind: 0.0 for kind in NOISES if f"noise-{kind}" in names}
        return replace(
            self,
            drafters={name: spec for name, spec in self.drafters.items() if name not in names},
            sessions={name: plan for name, plan in self.sessions.items() if name not in names},
            faults={name: fault for name, fault in self.faults.items() if name not in names},
            noise=replace(self.noise, **noises),
            batch=None if "batch" in names else self.batch,
            left_out=self.left_out | names,
        )


def draw(seed: int, left_out: frozenset[str] = frozenset()) -> Scenario:
    random = Random(f"{seed}/scenario")
    pass_s = random.choice((0.02, 0.05, 0.1))
    slots = random.choice((400, 800, 4000))
    policies = ("living", "fixed", "fixed", "sync", "amusd", "pearl")
    policy = random.choice(policies)
    targets = tuple(
        TargetSpec(policy, pass_s * random.choice((1.0, 1.0, 1.5)), slots)
        for _ in range(random.choice((1, 1, 2, 2, 3)))
    )
    drafters = {
        f"drafter-{number}": DrafterSpec(
            random.choice(("guesser",) * 6 + ("ngram",)),
            random.choice((0.5, 0.8, 0.95)),
            pass_s * random.choice((0.1, 0.2, 0.4)),
            random.choice((1, 2, 4)),
        )
        for number in range(random.choice((0, 1, 1, 1, 2, 2, 2, 3)))
    }
    sessions = {
        f"session-{number}": draw_session(Random(f"{seed}/session/{number}"), f"session-{number}")
        for number in range(random.choice((1, 2, 3, 4, 6)))
    }
    names = [f"target-{number}" for number in range(len(targets))]
    faults = {
        f"fault-{number}": draw_fault(Random(f"{seed}/fault/{number}"), names, list(drafters))
        for number in range(random.choice((0, 1, 2, 3, 5)))
    }
    rates = dict.fromkeys(NOISES, (0.0, 0.0, 0.0, 0.02, 0.1, 0.3))
    rates["cut"] = rates["flip"] = (0.0, 0.0, 0.0, 0.002, 0.02, 0.1)  # three end the link
    drawn = {kind: random.choice(rates[kind]) for kind in NOISES}
    noise = Noise(**drawn, delay=random.choice((0.001, 0.005, 0.02)))
    key_bits = random.choice((64, 64, 64, 64, 12, 16))
    batch = None
    if random.random() < 0.2:
        batch = BatchSpec(
            random.randint(2, 8),
            random.randint(1, 4),
            random.choice((0.0, 0.05, 0.3)),
            random.choice((0.0, 0.0, 0.1)),
        )
        for number in range(random.choice((0, 1, 2, 3))):
            kind: FaultKind = random.choice(("kill", "kill", "stop"))
            at, seconds = random.uniform(0.5, HORIZON_S), random.choice((0.2, 2.5))
            faults[f"fault-batch-{number}"] = Fault(kind, "batch", at, seconds)
    scenario = Scenario(seed, targets, drafters, sessions, faults, noise, key_bits, batch)
    return scenario.without(left_out) if left_out else scenario


def draw_session(random: Random, name: str) -> SessionPlan:
    long = random.random() < 0.2
    shared = [number * 7 % VOCABULARY for number in range(40)] if long else []
    prompt = (*shared, *(random.randrange(VOCABULARY) for _ in range(random.randint(1, 6))))
    most = random.choice((1, 8, 20, 40, 80))
    sampling = SamplingParams(
        temperature=random.choice((0.0, 0.0, 0.7, 1.0)),
        top_k=random.choice((0, 0, 5)),
        repetition_penalty=random.choice((1.0, 1.0, 1.2)),
        frequency_penalty=random.choice((0.0, 0.0, 0.5)),
        seed=random.randrange(1 << 30),
        stop=random.choice(((), (), (), (), ("c",), ("ab", "dcb"))),
        max_tokens=most,
        min_tokens=random.choice((0, min(most, 4))),
        ignore_eos=random.random() < 0.7,
        logprobs=random.choice((None, None, 1)),
    )
    request = Request(
        name,
        prompt,
        sampling,
        speculation=random.random() < 0.95,
        deadline=random.choice((None, None, None, None, 0.3, 2.0, 30.0)),
        max_rows=random.choice((None,) * 8 + (0, 3)),
    )
    leaves = random.random()
    return SessionPlan(
        request,
        random.uniform(0.2, HORIZON_S),
        random.randint(0, 10) if leaves < 0.08 else None,
        random.uniform(0.0, 0.6) if 0.08 <= leaves < 0.16 else None,
    )


def draw_fault(random: Random, targets: list[str], drafters: list[str]) -> Fault:
    at, seconds = random.uniform(0.2, HORIZON_S + 0.5), random.choice((0.05, 0.5, 2.5, 5.0))
    drafter = random.choice(drafters) if drafters else None
    target = random.choice(targets)
    who = target if drafter is None or random.random() < 0.5 else drafter
    kinds: list[FaultKind] = [
        "kill",
        "kill",
        "stop",
        "cut",
        "cut",
        "leave",
        "pause",
        "drain",
        "end",
    ]
    kind = random.choice(kinds)
    other = ""
    if kind == "cut":
        other = random.choice(["gateway", *([drafter] if drafter else [])])
        who, seconds = target, random.choice((0.2, 1.8, 2.6, 5.0))
    if kind == "pause":
        seconds = random.uniform(0.01, 0.4)
    if kind in ("pause", "stop") and random.random() < 0.2:
        who = "gateway"
    if kind == "drain":
        who = target
    if kind == "leave" and drafter is not None:
        who = drafter
    elif kind == "leave":
        kind = "kill"
    return Fault(kind, who, at, seconds, other)
