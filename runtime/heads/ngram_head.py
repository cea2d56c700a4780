"""Prompt lookup on the target itself: proposes what followed the latest n-grams of this text.

It guesses what runtime.drafters.ngram guesses (Saxena 2023; LLMA, arXiv 2304.04487), but its
guesses are there when a step ends: a lookup takes microseconds, and a message to a drafter takes
more. An index of n-grams makes the cost of a step independent of the length of the text.
"""

from collections.abc import Sequence

import numpy as np

from runtime.core.draft_nodes import NO_NODES, DraftNodes
from runtime.drafters.ngram import MAX_NGRAM, MIN_NGRAM
from runtime.heads.base import HeadContext, VerifiedStep
from runtime.models.base import OutputSpec

MAX_CHAIN = 16  # tokens guessed after an n-gram
MAX_FOLLOWERS = 2  # of an n-gram: distinct tokens that came next, the latest first


class NgramIndex:
    """The places of a growing text at which each of its n-grams was followed by a token.

    Keys are hashes: a collision costs a wrong guess at most. `shortest` is the least n.
    """

    def __init__(self, shortest: int = MIN_NGRAM) -> None:
        self.shortest = shortest
        self.places: dict[int, tuple[int, ...]] = {}
        self.length = 0  # tokens indexed

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in the new tokens of a text; the old ones must be the same as before."""
        for place in range(max(self.length, self.shortest), len(tokens)):
            for key in self.keys(tokens, place):
                others = (at for at in self.places.get(key, ()) if tokens[at] != tokens[place])
                self.places[key] = (place, *others)[:MAX_FOLLOWERS]
        self.length = len(tokens)

    def followers(self, tokens: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the length of the longest n-gram at the end of the text that was there before,
        and the places that followed it; (0, ()) if there is none.
        """
        keys = self.keys(tokens, len(tokens))
        for length, key in reversed([*enumerate(keys, start=self.shortest)]):
            if found := self.places.get(key):
                return length, found
        return 0, ()

    def keys(self, tokens: Sequence[int], end: int) -> list[int]:
        """Return the keys of the n-grams that end before `end`, the shortest first."""
        lengths = range(self.shortest, min(MAX_NGRAM, end) + 1)
        return [hash(tuple(tokens[end - length : end])) for length in lengths]


class NgramHead:
    """A Head for any target."""

    output_spec = OutputSpec()

    def __init__(self, shortest: int = MIN_NGRAM) -> None:
        self.shortest = shortest
        self.indexes: dict[str, NgramIndex] = {}

    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        return [self.guess(one.text.session, one.text.tokens) for one in seen]

    def guess(self, session: str, tokens: Sequence[int]) -> DraftNodes:
        index = self.indexes.setdefault(session, NgramIndex(self.shortest))
        index.extend(tokens)
        length, places = index.followers(tokens)
        chains = [tokens[place : place + MAX_CHAIN] for place in places]
        return chain_nodes(length, chains) if chains else NO_NODES

    def close(self, session: str) -> None:
        self.indexes.pop(session, None)


def chain_nodes(length: int, chains: Sequence[Sequence[int]]) -> DraftNodes:
    """Return the chains below the root. The score of a token is log(n / (n + 1)) after n tokens
    that agree, and a later chain has what the ones before it leave.
    """
    parents, tokens, scores = list[int](), list[int](), list[float]()
    left = 1.0
    for chain in chains:
        for step, token in enumerate(chain):
            agreed = length + step
            share = agreed / (agreed + 1.0)
            parents.append(len(tokens) if step else 0)
            tokens.append(token)
            scores.append(np.log(share if step else left * share))
        left /= length + 1.0
    return DraftNodes(
        np.asarray(parents, dtype=np.int32),
        np.asarray(tokens, dtype=np.int32),
        np.asarray(scores, dtype=np.float32),
        roots=1,
    )


def build(context: HeadContext) -> NgramHead:
    return NgramHead()
