"""One session on its way over targets: what its client may have heard, and who has worked on it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from runtime.core.errors import TargetDied, Unavailable
from runtime.core.messages import NO_STATS, Chunk, Request, Stats, Tokens

MIN_DEADLINE_S = 0.001  # that is passed on

TargetLife = tuple[str, int, str]  # a target's name, incarnation and address


@dataclass(slots=True, eq=False)
class RoutedSession:
    """Times are the event loop's.

    The output is one append-only history, whatever becomes of the targets that write it. Tokens are
    appended before the client sees them: what is not in it was never said, and the next target says
    it again. Only the target of the current epoch appends, each token at its own place.

    ends            its deadline
    output          output tokens that the client may have seen
    epoch           of the present target
    calls           targets that were asked so far
    position        place in the output behind the last token of the present target
    guessed         for each chunk of the present target, who guessed its tokens
    stats           figures of the targets that it has left
    failed_targets  lives of targets that were lost since the last token
    brought_tokens  the present target has
    died_with_it    lives of targets that died while they held it and had brought no token, since
                    the last token of another one
    excluded_until  lives that it does not ask before a time
    """

    request: Request
    began: float
    ends: float
    output: list[int] = field(init=False)
    epoch: int = field(init=False)
    calls: int = 0
    position: int = 0
    guessed: list[tuple[str, ...]] = field(default_factory=list)
    stats: list[Stats] = field(default_factory=list)
    failed_targets: set[TargetLife] = field(default_factory=set)
    brought_tokens: bool = False
    died_with_it: set[TargetLife] = field(default_factory=set)
    excluded_until: dict[TargetLife, float] = field(default_factory=dict)
    over: bool = False

    def __post_init__(self) -> None:
        self.output, self.epoch = list(self.request.committed), self.request.epoch

    @property
    def begun(self) -> bool:
        """Tells whether a target has taken it, or may have."""
        return bool(self.guessed or self.stats or self.failed_targets)

    @property
    def was_heard(self) -> bool:
        """Tells whether the client has got a token."""
        return len(self.output) > len(self.request.committed)

    def fence(self) -> int:
        """Begins the next epoch: nothing that an older one still sends has any effect."""
        self.epoch += 1
        return self.epoch

    def append(self, epoch: int, position: int, tokens: Tokens) -> bool:
        """Takes tokens of the current epoch that follow the last one.

        Returns False, and changes nothing, for all others.
        """
        if epoch != self.epoch or position != len(self.output):
            return False
        self.output.extend(tokens)
        return True

    def next_request(self, now: float) -> Request:
        """Returns what the next target is asked, in an epoch of its own."""
        epoch = self.fence() if self.calls else self.epoch
        self.calls += 1
        self.brought_tokens = False
        self.position = len(self.output)
        left = None if self.request.deadline is None else max(MIN_DEADLINE_S, self.ends - now)
        return replace(self.request, committed=tuple(self.output), epoch=epoch, deadline=left)

    def take(self, chunk: Chunk, epoch: int, now: float) -> Chunk:
        """Appends a chunk; returns what the client may see.

        Raises Unavailable if the target gives the session up.
        """
        if not self.append(epoch, self.position, chunk.tokens):
            raise Unavailable("its output does not follow what was said before")
        self.position += len(chunk.tokens)
        if chunk.finish_reason == "cancelled":  # not by us: we would not be listening
            self.leave(chunk.stats)
            raise TargetDied("it has ended the session")
        self.guessed.append(chunk.drafters)
        if chunk.tokens:
            self.failed_targets.clear()
            self.died_with_it.clear()
            self.brought_tokens = True
        self.over = chunk.finish_reason is not None
        if self.over and self.stats:
            return replace(chunk, stats=self.total(chunk.stats, now))
        return chunk

    def leave(self, stats: Stats | None = None) -> None:
        """Ends the present target's part, with its own figures or without."""
        if stats is not None or self.guessed:
            self.stats.append(stats or self.reconstructed())
        self.guessed = []

    def deadline_chunk(self, now: float) -> Chunk:
        """Ends the session, since its deadline has passed; returns its last chunk."""
        self.over = True
        return Chunk((), (), (), "deadline", self.total(None, now))

    def reconstructed(self) -> Stats:
        """Returns the present target's figures, as far as its chunks tell them."""
        return reconstruct_stats(len(self.request.prompt), self.guessed)

    def total(self, last: Stats | None, now: float) -> Stats:
        """Returns the session's figures, `last` being the present target's."""
        parts = [*self.stats, last or self.reconstructed()]
        prompt = parts[0].prompt_tokens
        return replace(
            sum(parts, NO_STATS),
            prompt_tokens=prompt,
            completion_tokens=len(self.output),
            reused=min(parts[-1].reused, prompt),  # it may count committed tokens too
            elapsed=now - self.began,
        )


def reconstruct_stats(prompt_tokens: int, guessed: Sequence[Sequence[str]]) -> Stats:
    """Returns the figures of a target that died before it reported them.

    Nodes that were not delivered are unknown. `guessed` names, for each chunk, who guessed each token
    of it, "" if nobody.
    """
    accepted = [[name for name in names if name] for names in guessed]
    lengths = Counter(len(names) for names in accepted if names)
    total = sum(map(len, accepted))
    return Stats(
        prompt_tokens=prompt_tokens,
        completion_tokens=sum(map(len, guessed)),
        rounds=len(guessed),
        drafted=total,
        verified=total,
        accepted=total,
        hits=0,
        histogram=tuple(lengths[length] for length in range(max(lengths, default=-1) + 1)),
        by_drafter=dict(Counter(name for names in accepted for name in names)),
    )
