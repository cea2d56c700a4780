"""Who is there: what the controller says of targets, drafters and gateways, for routers, status and metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.reports import DrafterReport, TargetReport
from runtime.scaling import Decision

State = Literal["starting", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class TargetState:
    """Only a `ready` one gets new sessions; a `failed` one, a drafter that failed again and again, is not started any more.

    `address` is that of its gRPC server, "" until it has one; `node` is Ray's name of its node.

    `trouble`: why it does not start, "" where nothing is known to be wrong. `model`: what it serves; while a deployment changes there
    may be targets of two.
    """

    name: str
    address: str
    incarnation: int
    state: State
    sessions: int  # under way and waiting
    report: TargetReport | None
    node: str
    restarts: int = 0  # lives lost under this name
    trouble: str = ""
    model: str = ""


def serving(targets: Sequence[TargetState], model: str) -> list[TargetState]:
    """Those of this model. One of an older version does not say what it serves."""
    return [target for target in targets if target.model in ("", model)]


@dataclass(frozen=True, slots=True)
class DrafterState:
    """As TargetState."""

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
    """`count` drafters are wanted now; `draft` is the model, or the method of those without one."""

    name: str
    draft: str
    count: int
    ready: int
    min: int
    max: int
    auto: bool
    decision: Decision | None = None  # the last that changed the count by itself


@dataclass(frozen=True, slots=True)
class Fleet:
    """`gateways`: addresses of those that serve. `replaced`: lives of targets, drafters and gateways that were lost and followed.
    `heads`: names of those that sit on each target."""

    model: str
    served_model: str
    version: str
    targets: tuple[TargetState, ...]
    drafters: tuple[DrafterState, ...]
    pools: tuple[PoolState, ...]
    gateways: tuple[str, ...]
    replaced: int
    heads: tuple[str, ...] = ()
