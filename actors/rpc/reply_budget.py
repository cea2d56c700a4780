"""How much a drafter may say on one connection. Every event of its target renews the budget.

A drafter has something useful to say only after it has heard something new. Its tree holds a bounded
number of nodes, each is sent once, and a commit makes room for others. So an honest drafter has never
said more than the events that it was sent have granted. What goes beyond that is a flood. Its size
alone tells, before anything is decoded.
"""

from typing import NamedTuple

from protos.drafting_codec import KEY_DTYPE, SCORE_DTYPE, TOKEN_DTYPE
from runtime.core import limits
from runtime.core.messages import DEFAULT_STYLE, Close, Commit, Event, Open, Share, Style

NODE_BYTES = KEY_DTYPE.itemsize + TOKEN_DTYPE.itemsize + SCORE_DTYPE.itemsize
FRAME_BYTES = 64  # of a frame without its nodes and the session's name
# Frames after one event. A drafter sends ever more rarely (runtime.draft.draft_engine): its tree is full
# after about 20.
FRAMES_PER_EVENT = 32
# Events whose grants may be left over: the answers to them may all be on their way at once.
MAX_SAVED_EVENTS = 32


class Grant(NamedTuple):
    """So many frames, and bytes in all of them."""

    frames: int
    size: int

    def times(self, factor: int) -> "Grant":
        return Grant(self.frames * factor, self.size * factor)


# At the start of a connection.
INITIAL_GRANT = Grant(
    FRAMES_PER_EVENT, FRAMES_PER_EVENT * FRAME_BYTES + limits.TREE_NODES * NODE_BYTES
)


class ReplyBudget:
    """Tell `grant` of every event before it is sent, and `spend` of every message that has come.

    frames, size   what may still come
    styles         of the sessions under way
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
        """Take a message of so many frames and bytes off; False where it is beyond the budget."""
        if frames > self.frames or size > self.size:
            return False
        self.frames -= frames
        self.size -= size
        return True


def grant_for(session: str, style: Style, resting: bool) -> Grant:
    """What an event of this session grants.

    A resting drafter has only a Resync to send, until the text is sent to it again. A schedule may
    ask for passes so wide that they fill the whole tree. A drafter that grows as it likes fills a
    quarter of it (draft_engine.MAX_UNVERIFIED_NODES), and one pass may go beyond that.
    """
    frame = FRAME_BYTES + len(session.encode(errors="replace"))
    if resting:
        return Grant(1, frame)
    nodes = limits.TREE_NODES if style.width else limits.TREE_NODES // 2
    return Grant(FRAMES_PER_EVENT, FRAMES_PER_EVENT * frame + nodes * NODE_BYTES)


def replenish(left: int, granted: int, most: int) -> int:
    """`left` and what is granted, at most `most`.

    What was saved while more sessions were under way goes down to that step by step: answers to
    those that have ended may still be on their way.
    """
    return min(left + granted, max(most, left - granted))
