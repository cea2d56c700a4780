"""What target and drafter must agree on before a token is exchanged."""

from dataclasses import dataclass

PROTOCOL = 2  # raised when an old reader would misunderstand a new writer; new kinds of frames and new fields do not


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks, on either side of a stream.

    vocabulary   hash of the tokenizer's vocabulary
    model        name of the speaker's own model, for people to read
    drafter      name of the drafter: its own, or the one that the target believes to be at the address
    incarnation  which life of that drafter, likewise: it is raised when the drafter is replaced
    """

    vocabulary: str
    model: str
    drafter: str
    incarnation: int = 0
    protocol: int = PROTOCOL


def mismatch(target: Hello, drafter: Hello) -> str | None:
    """Why these two must not talk, in a line that names both values; None where they may."""
    if target.protocol != drafter.protocol:
        return f"protocol {target.protocol} of the target is not protocol {drafter.protocol} of the drafter: install the same version"
    if (target.drafter, target.incarnation) != (drafter.drafter, drafter.incarnation):
        asked, here = (
            f"{target.drafter} in life {target.incarnation}",
            f"{drafter.drafter} in life {drafter.incarnation}",
        )
        return f"drafter {asked} was asked for, drafter {here} is here: resolve its address again"
    if target.vocabulary != drafter.vocabulary:
        return (
            f"vocabulary {target.vocabulary} of target {target.model} is not vocabulary {drafter.vocabulary} of draft {drafter.model}:"
            " choose a draft with the target's tokenizer"
        )
    return None
