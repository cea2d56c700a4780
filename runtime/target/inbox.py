"""Drains the engine's queue and groups a drafter's growth by session."""

import queue
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.core.messages import Draft
from runtime.target.commands import Command, ReplyReceived, Stop


@dataclass(frozen=True, slots=True)
class GrowthReceived:
    """Growth of one session from one drafter; each draft comes with the clock reading of its
    arrival.
    """

    session: str
    drafter: str
    drafts: list[tuple[Draft, float]]


def drain(
    inbox: "queue.SimpleQueue[Command]", wait: float | None
) -> Iterator[Command | GrowthReceived]:
    """Yield all messages, waiting at most `wait` seconds (None: forever) for the first.

    Growth comes last, grouped by session and drafter: merging a group at once costs a third.
    Messages that arrive meanwhile are left for the next call, so a drafter that floods the target
    cannot stall its steps. Nothing follows a Stop; later messages stay in the queue.
    """
    try:
        arrived = inbox.get(wait != 0.0, wait or None)
    except queue.Empty:
        return
    growth: dict[tuple[str, str], GrowthReceived] = {}
    for left in range(inbox.qsize(), -1, -1):
        match arrived:
            case Stop():
                yield arrived
                return
            case ReplyReceived(reply=Draft(session=session, drafter=drafter) as draft, at=at):
                known = growth.setdefault((session, drafter), GrowthReceived(session, drafter, []))
                known.drafts.append((draft, at))
            case _:
                yield arrived
        if left:
            arrived = inbox.get()
    yield from growth.values()
