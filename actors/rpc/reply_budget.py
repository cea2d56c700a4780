"""Limits how much a drafter may send on one connection. Every event of its target renews the
budget.

A drafter has nothing useful to send until it receives something new: its tree holds a bounded
number of nodes, each is sent once, and a commit makes room for others. A correct drafter therefore
never sends more than the events it received have granted. Anything beyond that is a flood,
recognised by its size before it is decoded.
"""

from typing import NamedTuple

from protos.drafting_codec import KEY_DTYPE, SCORE_DTYPE, TOKEN_DTYPE
from runtime.core import limits
from runtime.core.messages import DEFAULT_STYLE, Close, Commit, Event, Features, Open, Share, Style

NODE_BYTES = KEY_DTYPE.itemsize + TOKEN_DTYPE.itemsize + SCORE_DTYPE.itemsize
FRAME_BYTES = 64  # size of a frame without its nodes and its session's name
# A drafter sends less and less often after an event (runtime.draft.draft_engine): its tree is full
# after about 20 frames.
FRAMES_PER_EVENT = 32
# Grants of so many events may accumulate: the replies to them may all be in flight at once.
MAX_SAVED_EVENTS = 32


class Grant(NamedTuple):
    """A number of frames, and of bytes in all of them."""

    frames: int
    size: int

    def times(self, factor: int) -> "Grant":
        return Grant(self.frames * factor, self.size * factor)


# Granted at the start of a connection.
INITIAL_GRANT = Grant(
    FRAMES_PER_EVENT, FRAMES_PER_EVENT * FRAME_BYTES + limits.TREE_NODES * NODE_BYTES
)


class ReplyBudget:
    """Call `grant` for every event before it is sent, and `spend` for every message received.

    frames, size   what may still arrive
    styles         styles of the running sessions
    resting        those of them in which the drafter owns no part of the tree
    """

    def __init__(self) -> None:
        self.frames, self.size = INITIAL_GRANT
        self.styles: dict[str, Style] = {}
        self.resting: set[str] = set()

    def grant(self, event: Event) -> None:
        match event:
            case Open(session=session, style=style, share=share):
                self.styles[session] = style
                self.rest(share)
            case Share():
                self.rest(event)
            case Commit(session=session) if session in self.resting:
                return
            case Features():  # make nothing new worth guessing
                return
            case Close(session=session):
                self.styles.pop(session, None)
                self.resting.discard(session)
                return
        style = self.styles.get(event.session, DEFAULT_STYLE)
        granted = grant_for(event.session, style, event.session in self.resting)
        most = granted.times(MAX_SAVED_EVENTS * max(1, len(self.styles)))
        self.frames = replenish(self.frames, granted.frames, most.frames)
        self.size = replenish(self.size, granted.size, most.size)

    def rest(self, share: Share) -> None:
        if share.of == 0:
            self.resting.add(share.session)
        else:
            self.resting.discard(share.session)

    def spend(self, frames: int, size: int) -> bool:
        """Subtracts a message of so many frames and bytes; returns False if it exceeds the
        budget.
        """
        if frames > self.frames or size > self.size:
            return False
        self.frames -= frames
        self.size -= size
        return True


def grant_for(session: str, style: Style, resting: bool) -> Grant:
    """Returns what an event of this session grants.

    A resting drafter can only send a Resync until the text is sent to it again. A schedule may
    request passes so wide that they fill the whole tree. Without one, a drafter fills a quarter of
    it (draft_engine.MAX_UNVERIFIED_NODES), and one pass may exceed that.
    """
    frame = FRAME_BYTES + len(session.encode(errors="replace"))
    if resting:
        return Grant(1, frame)
    nodes = limits.TREE_NODES if style.width else limits.TREE_NODES // 2
    return Grant(FRAMES_PER_EVENT, FRAMES_PER_EVENT * frame + nodes * NODE_BYTES)


def replenish(left: int, granted: int, most: int) -> int:
    """Returns `left` plus what is granted, at most `most`.

    What was saved while more sessions ran decreases to `most` step by step, since replies to ended
    sessions may still be in flight.
    """
    return min(left + granted, max(most, left - granted))
