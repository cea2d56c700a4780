"""The state of a fleet as the controller tells it to routers, gateways and people."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from actors.fleet.scaling_policy import Decision
from runtime.telemetry.reports import DrafterReport, TargetReport

State = Literal["starting", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class TargetState:
    """A target, as others see it.

    Only a `ready` target gets new sessions; a `failed` one is not restarted. While a deployment
    changes, there may be targets of two models.

    address   of its gRPC server, "" until it has one
    sessions  running and waiting
    node      Ray's node ID
    restarts  lives lost under this name
    trouble   why it does not start, "" if nothing is known to be wrong
    model     the model that it serves
    """

    name: str
    address: str
    incarnation: int
    state: State
    sessions: int
    report: TargetReport | None
    node: str
    restarts: int = 0
    trouble: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class DrafterState:
    """A drafter, with fields as in TargetState. It is `failed` after too many failures."""

    name: str
    pool: str
    address: str
    incarnation: int
    state: State
    restarts: int
    report: DrafterReport | None
    node: str
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool of drafters.

    draft     the model, or the method of a pool without one
    count     wanted number of drafters
    decision  the last one of the autoscaler that changed the count
    """

    name: str
    draft: str
    count: int
    ready: int
    min: int
    max: int
    auto: bool
    decision: Decision | None = None


@dataclass(frozen=True, slots=True)
class Fleet:
    """A snapshot of a fleet.

    gateways  addresses of those that serve
    replaced  members that were lost and restarted
    heads     names of the heads on each target
    """

    model: str
    served_model: str
    version: str
    targets: tuple[TargetState, ...]
    drafters: tuple[DrafterState, ...]
    pools: tuple[PoolState, ...]
    gateways: tuple[str, ...]
    replaced: int
    heads: tuple[str, ...] = ()


def targets_of_model(targets: Sequence[TargetState], model: str) -> list[TargetState]:
    """Returns the targets of this model, and those of older versions, which omit theirs."""
    return [target for target in targets if target.model in ("", model)]
