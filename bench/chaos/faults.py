"""The faults injected into a fleet: signals to its processes, and changes of its size."""

import os
import random
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from actors.fleet.fleet_state import DrafterState, Fleet, TargetState
from actors.rpc.endpoints import ActorLocation

SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
Victim = tuple[str, int]  # name and incarnation
MemberState = TypeVar("MemberState", TargetState, DrafterState)


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    incarnation: int
    role: str  # "target" or "drafter"
    signal: signal.Signals
    address: str


def next_fault(
    fleet: Fleet,
    already_hit: Collection[Victim],
    draw: random.Random,
    spared: Collection[str] = (),
) -> Fault | None:
    """Choose a ready member that was not hit in this incarnation, and a signal.

    The last such target is spared, since sessions need one to continue at, and so are members with
    the names `spared`. Return None if nobody is left.
    """
    targets, drafters = healthy(fleet.targets, already_hit), healthy(fleet.drafters, already_hit)
    members: list[TargetState | DrafterState] = [*(targets if len(targets) > 1 else []), *drafters]
    chosen = [state for state in members if state.name not in spared]
    if not chosen:
        return None
    state = draw.choice(chosen)
    role = "target" if isinstance(state, TargetState) else "drafter"
    return Fault(state.name, state.incarnation, role, draw.choice(SIGNALS), state.address)


def healthy(members: Sequence[MemberState], already_hit: Collection[Victim]) -> list[MemberState]:
    return [
        state
        for state in members
        if state.state == "ready" and (state.name, state.incarnation) not in already_hit
    ]


def inject(fault: Fault, places: Mapping[str, ActorLocation]) -> bool:
    """Send the signal; return False if the process no longer exists."""
    place = places.get(fault.name)
    if place is None or place.address != fault.address:
        return False
    try:
        os.kill(place.pid, fault.signal)
    except ProcessLookupError:
        return False
    return True


def next_count(before: int, most: int, draw: random.Random) -> int:
    """Draw another number of drafters from 0 to `most`."""
    return draw.choice([count for count in range(most + 1) if count != before])
