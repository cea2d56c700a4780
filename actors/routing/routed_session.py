"""A session on its way over targets: its output so far, and the targets that worked on it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from runtime.core.errors import TargetDied, Unavailable
from runtime.core.messages import NO_STATS, Chunk, Request, Stats, Tokens

MIN_DEADLINE_S = 0.001  # shortest deadline passed to a target

TargetLife = tuple[str, int, str]  # a target's name, incarnation and address


@dataclass(slots=True, eq=False)
class RoutedSession:
    """A session. Times are the event loop's.

    The output is one append-only history, whichever targets write it. Tokens are appended before
    the client sees them: what is not in the history was never sent, and the next target generates
    it again. Only the target of the current epoch appends, each token at its own position.

    ends            its deadline
    output          output tokens that the client may have seen
    epoch           epoch of the current target
    calls           targets asked so far
    position        position in the output after the last token of the current target
    scored          prompt tokens whose logprobs the client may have seen
    scored_here     prompt tokens whose logprobs the current target has delivered
    guessed         for each chunk of the current target, the drafters of its tokens
    stats           statistics of the targets that it has left
    failed_targets  incarnations of targets that were lost since the last token
    brought_tokens  the current target has delivered tokens
    died_with_it    incarnations of targets that died while they held it and delivered no token,
                    since the last token of another target
    excluded_until  incarnations that it does not ask before a time
    delays          seconds before it asks each incarnation that has refused it, or was lost, since
                    the last token
    waited          seconds in which it was with no target, since the last token
    standby         target that is told its text, to take it over
    """

    request: Request
    began: float
    ends: float
    output: list[int] = field(init=False)
    epoch: int = field(init=False)
    calls: int = 0
    position: int = 0
    scored: int = 0
    scored_here: int = 0
    guessed: list[tuple[str, ...]] = field(default_factory=list)
    stats: list[Stats] = field(default_factory=list)
    failed_targets: set[TargetLife] = field(default_factory=set)
    brought_tokens: bool = False
    died_with_it: set[TargetLife] = field(default_factory=set)
    excluded_until: dict[TargetLife, float] = field(default_factory=dict)
    delays: dict[TargetLife, float] = field(default_factory=dict)
    waited: float = 0.0
    standby: TargetLife | None = None
    over: bool = False

    def __post_init__(self) -> None:
        self.output, self.epoch = list(self.request.committed), self.request.epoch

    @property
    def begun(self) -> bool:
        """Tells whether a target has accepted it, or may have."""
        return bool(self.guessed or self.stats or self.failed_targets)

    @property
    def was_heard(self) -> bool:
        """Tells whether the client has received a token."""
        return len(self.output) > len(self.request.committed)

    @property
    def text_length(self) -> int:
        return len(self.request.prompt) + len(self.output)

    def text_from(self, start: int, most: int) -> Tokens:
        """Returns at most `most` tokens of prompt and output, from position `start` on."""
        prompt = self.request.prompt
        end, after = start + most, max(0, start - len(prompt))
        return (*prompt[start:end], *self.output[after : max(0, end - len(prompt))])

    def fence(self) -> int:
        """Begins the next epoch: whatever an older one still sends is ignored."""
        self.epoch += 1
        return self.epoch

    def append(self, epoch: int, position: int, tokens: Tokens) -> bool:
        """Appends tokens of the current epoch that follow the last one.

        Returns False, and changes nothing, for all others.
        """
        if epoch != self.epoch or position != len(self.output):
            return False
        self.output.extend(tokens)
        return True

    def next_request(self, now: float) -> Request:
        """Returns the request for the next target, in an epoch of its own."""
        epoch = self.fence() if self.calls else self.epoch
        self.calls += 1
        self.brought_tokens = False
        self.position = len(self.output)
        self.scored_here = 0
        left = None if self.request.deadline is None else max(MIN_DEADLINE_S, self.ends - now)
        sampling = self.request.sampling
        if self.scored == len(self.request.prompt) - 1 and sampling.max_tokens:
            sampling = replace(sampling, prompt_logprobs=None)  # the client has them all
        return replace(
            self.request,
            sampling=sampling,
            committed=tuple(self.output),
            epoch=epoch,
            deadline=left,
        )

    def take(self, chunk: Chunk, epoch: int, now: float) -> Chunk:
        """Appends a chunk; returns what the client may see.

        Raises Unavailable if the chunk does not fit, TargetDied if the target cancels the session.
        Tokens of a chunk that cancels are not appended: the client does not see them, so the next
        target generates them again.
        """
        if chunk.finish_reason == "cancelled":  # by the target: after its own cancellation the
            self.leave(chunk.stats)  # router does not read on
            raise TargetDied("it has ended the session")
        if not self.append(epoch, self.position, chunk.tokens):
            raise Unavailable("its output does not continue the previous output")
        self.position += len(chunk.tokens)
        chunk = self.without_seen_logprobs(chunk)
        self.guessed.append(chunk.drafters)
        if chunk.tokens or chunk.prompt_logprobs:
            self.failed_targets.clear()
            self.died_with_it.clear()
            self.delays.clear()
            self.waited = 0.0
            self.brought_tokens = True
        self.over = chunk.finish_reason is not None
        if self.over and self.stats:
            return replace(chunk, stats=self.total(chunk.stats, now))
        return chunk

    def without_seen_logprobs(self, chunk: Chunk) -> Chunk:
        """Returns the chunk without logprobs of the prompt that an earlier target has delivered.

        Each target scores the whole prompt.
        """
        if not chunk.prompt_logprobs:
            return chunk
        seen = self.scored - self.scored_here
        self.scored_here += len(chunk.prompt_logprobs)
        self.scored = max(self.scored, self.scored_here)
        return replace(chunk, prompt_logprobs=chunk.prompt_logprobs[seen:])

    def leave(self, stats: Stats | None = None) -> None:
        """Ends the current target's part, with its own statistics or reconstructed ones."""
        if stats is not None or self.guessed:
            self.stats.append(stats or self.reconstructed())
        self.guessed = []

    def deadline_chunk(self, now: float) -> Chunk:
        """Ends the session after its deadline; returns its last chunk."""
        self.over = True
        return Chunk((), (), (), "deadline", self.total(None, now))

    def reconstructed(self) -> Stats:
        """Returns the current target's statistics, as far as its chunks reveal them."""
        return reconstruct_stats(len(self.request.prompt), self.guessed)

    def total(self, last: Stats | None, now: float) -> Stats:
        """Returns the session's statistics; `last` are the current target's."""
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
    """Returns the statistics of a target that died before it reported them.

    Nodes that were not delivered are unknown. `guessed` names, for each chunk, the drafter of each
    of its tokens, "" if none.
    """
    accepted = [[name for name in names if name] for names in guessed]
    lengths = Counter(len(names) for names in accepted if names)
    total = sum(map(len, accepted))
    return Stats(
        prompt_tokens=prompt_tokens,
        completion_tokens=sum(map(len, guessed)),
        rounds=sum(map(bool, guessed)),
        drafted=total,
        verified=total,
        accepted=total,
        hits=0,
        histogram=tuple(lengths[length] for length in range(max(lengths, default=-1) + 1)),
        by_drafter=dict(Counter(name for names in accepted for name in names)),
    )
