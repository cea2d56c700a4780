"""One session on its way over targets: what it has said, who has worked on it, whom it does not ask again."""

from dataclasses import dataclass, field, replace

from actors.journal import Journal
from actors.parts import joined, seen
from runtime.errors import Unavailable
from runtime.messages import Chunk, Request, Stats

LEAST_S = 0.001  # of a deadline that is passed on

Life = tuple[str, int, str]  # a target's name, incarnation and address


@dataclass(slots=True, eq=False)
class Course:
    """Times are the event loop's.

    ends       its deadline
    calls      targets that were asked so far
    said       output tokens up to the last that the present target has sent
    guessed    for each chunk of the present target, who guessed its tokens
    parts      figures of the targets that it has left
    fruitless  lives of targets that were lost since the last token
    shunned    lives that it does not ask before a time
    """

    request: Request
    began: float
    ends: float
    journal: Journal
    calls: int = 0
    said: int = 0
    guessed: list[tuple[str, ...]] = field(default_factory=list)
    parts: list[Stats] = field(default_factory=list)
    fruitless: set[Life] = field(default_factory=set)
    shunned: dict[Life, float] = field(default_factory=dict)
    over: bool = False

    @property
    def begun(self) -> bool:
        """A target has taken it, or may have."""
        return bool(self.guessed or self.parts or self.fruitless)

    def ask(self, now: float) -> Request:
        """What the next target is asked, in an epoch of its own."""
        epoch = self.journal.fence() if self.calls else self.journal.epoch
        self.calls += 1
        self.said = len(self.journal)
        left = None if self.request.deadline is None else max(LEAST_S, self.ends - now)
        return replace(self.request, committed=self.journal.tokens, epoch=epoch, deadline=left)

    def take(self, chunk: Chunk, epoch: int, now: float) -> Chunk:
        """Into the journal; returns what the client may see. Raises Unavailable where the target gives the session up."""
        if not self.journal.append(epoch, self.said, chunk.tokens):
            raise Unavailable("its output does not follow what was said before")
        self.said += len(chunk.tokens)
        if chunk.finish_reason == "cancelled":  # not by us: we would not be listening
            self.leave(chunk.stats)
            raise Unavailable("it has ended the session")
        self.guessed.append(chunk.drafters)
        if chunk.tokens:
            self.fruitless.clear()
        self.over = chunk.finish_reason is not None
        return replace(chunk, stats=self.total(chunk.stats, now)) if self.over and self.parts else chunk

    def leave(self, stats: Stats | None = None) -> None:
        """The present target's part is over, with its own figures or without."""
        if stats is not None or self.guessed:
            self.parts.append(stats or seen(len(self.request.prompt), self.guessed))
        self.guessed = []

    def total(self, last: Stats | None, now: float) -> Stats:
        last = last or seen(len(self.request.prompt), self.guessed)
        return joined([*self.parts, last], len(self.journal), now - self.began)

    def late(self, now: float) -> Chunk:
        """The last chunk of a session whose deadline has passed on its way."""
        self.over = True
        return Chunk((), (), (), "deadline", self.total(None, now))
