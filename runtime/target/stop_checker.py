"""Decides where a text ends and which part of it may be shown.

It works token by token, so grouping does not matter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from runtime.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Delta:
    """The effect of one token: text that is now final, and the reason if the text ends.

    The token counts in any case.
    """

    text: str
    reason: Literal["stop", "length"] | None = None


class StopChecker:
    """Takes the tokens of one output in order, decides where it ends, and returns its text.

    - An `eos` token ends it ("stop"), unless ignore_eos; the token's own text is not output.
      Under a constraint it always ends the text, even within the first min_tokens tokens: the
      target samples it there only if nothing else is allowed.
    - A stop string ends it ("stop") with the token that completes it; the text is cut before the
      string. If one character completes several, the cut is before the longest. This rule and the
      first one do not apply to the first min_tokens tokens.
    - The max_tokens-th token ends it ("length"), unless it ends for one of the reasons above.

    Text that may be the beginning of a stop string is held back until that is decided. `decode`
    returns the text that a token adds, "" while a character is incomplete. `flush` returns the text
    still held when the tokens end.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        eos: frozenset[int],
        decode: Callable[[int], str],
        flush: Callable[[], str],
    ) -> None:
        self._sampling, self._eos, self._decode, self._flush = sampling, eos, decode, flush
        self._held = ""
        self.count = 0
        self.reason: Literal["stop", "length"] | None = None

    def feed(self, token: int) -> Delta:
        """Process the next token; `count` counts them.

        Raises RuntimeError after the end of the text (`reason` is not None).
        """
        if self.reason is not None:
            raise RuntimeError(f"token {token} follows the end of the text")
        self.count += 1
        may_stop = self.count > self._sampling.min_tokens
        free = self._sampling.constraint is None
        ended = token in self._eos and not (free and (self._sampling.ignore_eos or not may_stop))
        last = ended or self.count == self._sampling.max_tokens
        piece = "" if ended else self._decode(token)
        if last:
            piece += self._flush()
        text = self._held + piece
        cut = find_stop(text, len(self._held), self._sampling.stop) if may_stop else None
        if cut is not None:
            return self._end(text[:cut], "stop")
        if last:
            return self._end(text, "stop" if ended else "length")
        sure = len(text) - held_length(text, self._sampling.stop)
        self._held = text[sure:]
        return Delta(text[:sure])

    def close(self) -> str:
        """Return the text that is held back, when no token follows: the session's time is over."""
        return self._end(self._held + self._flush(), "length").text if self.reason is None else ""

    def _end(self, text: str, reason: Literal["stop", "length"]) -> Delta:
        self._held, self.reason = "", reason
        return Delta(text, reason)


def find_stop(text: str, old: int, stops: tuple[str, ...]) -> int | None:
    """Return where the first completed stop string begins, or None.

    Matches within the first `old` characters are ignored.
    """
    found = [
        (start + len(stop), start)
        for stop in stops
        if (start := text.find(stop, max(0, old + 1 - len(stop)))) >= 0
    ]
    return min(found)[1] if found else None


def held_length(text: str, stops: tuple[str, ...]) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of a stop
    string.
    """
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next(
        (
            n
            for n in range(longest, 0, -1)
            if any(len(stop) > n and stop.startswith(text[-n:]) for stop in stops)
        ),
        0,
    )
