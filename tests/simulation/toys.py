"""The exact toy model of a simulation, drafters that guess it, and the output of plain decoding."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from runtime.core.draft_nodes import DraftNodes
from runtime.core.messages import Request
from runtime.core.node_keys import mix64
from runtime.core.sampler_reference import SamplingInput, reference_sample
from runtime.drafters.base import ExpandRequest
from runtime.models.base import PassInput
from runtime.models.toy import ToyModel
from runtime.target.stop_checker import StopChecker

VOCABULARY, CONTEXT = 20, 192
EOS = frozenset({0})
Sleep = Callable[[float], None]
PassTime = Callable[[int], float]  # seconds of a pass by its rows

_toy = ToyModel(VOCABULARY, CONTEXT, sharpness=2.0)


@lru_cache(maxsize=1 << 15)
def next_logits(text: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return the toy's logits (vocabulary,) after a text: a pure function, so it is kept."""
    return _toy.logits(text)


class SlowToy(ToyModel):
    """The toy; its passes take virtual time."""

    def __init__(self, sleep: Sleep, seconds: PassTime) -> None:
        super().__init__(VOCABULARY, CONTEXT)
        self.sleep, self.seconds = sleep, seconds

    def forward_all(self, parts: Sequence[PassInput]) -> list[npt.NDArray[np.float32]]:
        self.sleep(self.seconds(sum(len(part.rows.tokens) for part in parts)))
        return super().forward_all(parts)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        return next_logits(tuple(tokens))


class Guesser:
    """A drafter that knows the output, and whose first guess is right with probability `skill`.

    Its guesses are a function of the text and of `salt`.
    """

    feature_spec = None

    def __init__(
        self,
        sleep: Sleep,
        seconds: PassTime,
        outputs: Mapping[str, "PlainOutput"],
        skill: float,
        salt: int,
    ) -> None:
        self.sleep, self.seconds, self.outputs = sleep, seconds, outputs
        self.skill, self.salt = skill, salt

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes]:
        self.sleep(self.seconds(sum(len(request.leaves) for request in requests)))
        return [self.guess(request) for request in requests]

    def guess(self, request: ExpandRequest) -> DraftNodes:
        parents: list[int] = []
        tokens: list[int] = []
        scores: list[float] = []
        plain = self.outputs.get(request.text.session.partition("/")[2])
        for leaf in request.leaves:
            text = [*request.text.tokens, *request.text.tree.tokens_to(leaf)]
            if len(text) >= CONTEXT:
                continue
            drawn = mix64(mix64(self.salt, len(text)), text[-1])
            first = None if plain is None else plain.after(text)
            if first is None or drawn % 1000 >= 1000 * self.skill:
                first = drawn % VOCABULARY
            parents += [leaf, leaf]
            tokens += [first, (first + VOCABULARY - 1) % VOCABULARY]
            scores += [-0.2, -1.7]
        return DraftNodes(
            np.asarray(parents, np.int32),
            np.asarray(tokens, np.int32),
            np.asarray(scores, np.float32),
        )

    def close(self, session: str) -> None:
        pass


class PlainOutput:
    """What plain decoding says to a request, token by token, and its end.

    `tokens` goes on beyond the end, as a target does that decides several tokens at once.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.reason: str | None = None
        checker = stop_checker(request)
        while self.reason is None:
            delta = checker.feed(self.token(len(self.pieces)))
            self.pieces.append(delta.text)
            self.reason = delta.reason
        self.count = len(self.pieces)

    def token(self, position: int) -> int:
        """Return the output token at a position, from 0."""
        prompt = self.request.prompt
        while len(self.tokens) <= position:
            text = (*prompt, *self.tokens)
            asked = SamplingInput(self.request.sampling, len(prompt), text, [[]], EOS)
            self.tokens.append(int(reference_sample(next_logits(text)[None], asked)[0]))
        return self.tokens[position]

    def after(self, text: Sequence[int]) -> int | None:
        """Return the token that follows a text; None if the text is not of this output."""
        place = len(text) - len(self.request.prompt)
        if place < 0 or place >= self.request.sampling.max_tokens:
            return None
        self.token(place)
        return self.tokens[place] if [*self.request.prompt, *self.tokens[:place]] == text else None


def letter(token: int) -> str:
    return chr(ord("a") + token)


def stop_checker(request: Request) -> StopChecker:
    return StopChecker(request.sampling, EOS, letter, lambda: "")
