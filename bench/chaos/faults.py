"""What is done to the members of a fleet: blows to their processes, and changes of their number."""

import os
import random
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from actors.controller.fleet_view import DrafterState, Fleet, TargetState
from actors.rpc.endpoints import ActorLocation

SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
Victim = tuple[str, int]  # name and incarnation
State = TypeVar("State", TargetState, DrafterState)


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    incarnation: int
    role: str  # "target" or "drafter"
    signal: signal.Signals
    address: str


def next_fault(fleet: Fleet, struck: Collection[Victim], draw: random.Random) -> Fault | None:
    """Against any member that serves and was not struck yet in this life. The last such target is spared: there must be something to go on
    at. None where nobody is left."""
    targets, drafters = whole(fleet.targets, struck), whole(fleet.drafters, struck)
    chosen: list[TargetState | DrafterState] = [*(targets if len(targets) > 1 else []), *drafters]
    if not chosen:
        return None
    state = draw.choice(chosen)
    role = "target" if isinstance(state, TargetState) else "drafter"
    return Fault(state.name, state.incarnation, role, draw.choice(SIGNALS), state.address)


def whole(members: Sequence[State], struck: Collection[Victim]) -> list[State]:
    return [
        state
        for state in members
        if state.state == "ready" and (state.name, state.incarnation) not in struck
    ]


def inject(blow: Fault, places: Mapping[str, ActorLocation]) -> bool:
    """False where the process is not there any more."""
    place = places.get(blow.name)
    if place is None or place.address != blow.address:
        return False
    try:
        os.kill(place.pid, blow.signal)
    except ProcessLookupError:
        return False
    return True


def next_count(before: int, most: int, draw: random.Random) -> int:
    """Another number of drafters, from 0 to `most`."""
    return draw.choice([count for count in range(most + 1) if count != before])
