"""Steps a draft engine by hand, without a thread."""

from collections.abc import Sequence

from runtime.core.messages import (
    DEFAULT_STYLE,
    Commit,
    Draft,
    Event,
    Open,
    Reply,
    Share,
    Style,
)
from runtime.core.node_keys import text_key
from runtime.core.sampling_params import SamplingParams
from runtime.draft.commands import EventReceived
from runtime.draft.draft_engine import DraftEngine
from tests.support.harness import Known

V = 64
TEXT = tuple(n * n % V for n in range(200))
PROMPT = TEXT[:5]


def opened(
    session: str = "s",
    tokens: Sequence[int] = PROMPT,
    epoch: int = 0,
    share: tuple[int, int] = (0, 1),
    most: int = 100,
    style: Style = DEFAULT_STYLE,
) -> Open:
    return Open(
        session,
        epoch,
        tuple(tokens),
        len(PROMPT),
        SamplingParams(max_tokens=most),
        Share(session, *share),
        style,
    )


def commit(base: int, count: int, session: str = "s", epoch: int = 0) -> Commit:
    return Commit(session, epoch, base, TEXT[base : base + count], text_key(TEXT[: base + count]))


class Hand:
    """Drives a draft engine without a thread and keeps what it sends."""

    def __init__(self, width: int = 1, branches: int = 1) -> None:
        self.sent: list[Reply] = []
        self.draft_engine = DraftEngine(Known(TEXT, V, branches), "d", width)

    def hear(self, *events: Event, stream: int = 0) -> None:
        for event in events:
            self.draft_engine.inbox.put(EventReceived(stream, event, self.sent.append))
        assert self.draft_engine.receive(block=False)

    def grow(self, times: int, session: str = "s") -> list[int]:
        """Runs `times` passes and returns the tokens sent for the session."""
        before = len(self.sent)
        for _ in range(times):
            self.draft_engine.step()
        return [token for draft in self.drafts(session, before) for token in draft.tokens.tolist()]

    def drafts(self, session: str = "s", start: int = 0) -> list[Draft]:
        return [
            reply
            for reply in self.sent[start:]
            if isinstance(reply, Draft) and reply.session == session
        ]

    def text(self, name: str = "0/s") -> tuple[int, ...]:
        return tuple(self.draft_engine.states[name].tokens)
