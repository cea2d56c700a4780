"""Takes what has arrived out of the engine's queue, and puts a drafter's growth of one session together."""

import queue
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.core.messages import Draft
from runtime.target.commands import Command, ReplyReceived, Stop


@dataclass(frozen=True, slots=True)
class GrowthReceived:
    """Growth of one session from one drafter, and the clock when each draft of it arrived."""

    session: str
    drafter: str
    drafts: list[tuple[Draft, float]]


def drain(
    inbox: "queue.SimpleQueue[Command]", wait: float | None
) -> Iterator[Command | GrowthReceived]:
    """Yield what has arrived, waiting at most `wait` seconds (None: for ever) for the first of it.

    Growth comes last, one piece for each session and drafter: merging it at once costs a third.
    What arrives meanwhile is left for the next call, so a drafter that floods the target does not
    keep it from its steps. Nothing follows a Stop, and what arrived after it stays in the queue.
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
