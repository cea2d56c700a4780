"""The handshake between a target and a drafter, before any token is exchanged."""

from collections.abc import Callable
from dataclasses import dataclass

# Raised when an old reader would misunderstand a new writer. New kinds of frames and new fields
# do not need that.
PROTOCOL = 2


@dataclass(frozen=True, slots=True)
class Hello:
    """Introduces one end of a stream.

    vocabulary   hash of the tokenizer's vocabulary
    model        name of the sender's own model, for people to read
    drafter      name of the drafter: its own, or the one that the target expects at the address
    incarnation  incarnation of that drafter, own or expected; a replacement gets a higher one
    tokens       size of the vocabulary: all its ids are below; 0 if unknown
    """

    vocabulary: str
    model: str
    drafter: str
    incarnation: int = 0
    protocol: int = PROTOCOL
    tokens: int = 0


def mismatch(
    target: Hello, drafter: Hello, hash_below: Callable[[int], str] | None = None
) -> str | None:
    """Returns why the two must not talk, in a line that names both values; None if they match.

    A drafter may lack the target's last tokens. `hash_below` is the target's: it hashes the part of
    its vocabulary below an id. Without it, such a drafter is left for the target to check.
    """
    if target.protocol != drafter.protocol:
        return (
            f"protocol {target.protocol} of the target is not protocol {drafter.protocol} of the"
            " drafter: install the same version"
        )
    if (target.drafter, target.incarnation) != (drafter.drafter, drafter.incarnation):
        asked, here = (
            f"{target.drafter} in life {target.incarnation}",
            f"{drafter.drafter} in life {drafter.incarnation}",
        )
        return f"drafter {asked} was asked for, drafter {here} is here: resolve its address again"
    vocabulary = target.vocabulary
    if 0 < drafter.tokens < target.tokens:
        if hash_below is None:
            return None
        vocabulary = hash_below(drafter.tokens)
    if vocabulary != drafter.vocabulary:
        return (
            f"vocabulary {vocabulary} of target {target.model} is not"
            f" vocabulary {drafter.vocabulary} of draft {drafter.model}:"
            " choose a draft with the target's tokenizer"
        )
    return None
