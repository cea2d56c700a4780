"""Checks that every id of a draft is the same token in the target."""

import hashlib
import json
from typing import Protocol

from runtime.core.errors import PairMismatch


class Vocabulary(Protocol):
    """The part of a tokenizer's interface that is used here."""

    def get_vocab(self) -> dict[str, int]: ...


def vocabulary_hash(tokenizer: Vocabulary, below: int | None = None) -> str:
    """Return the hex sha256 of all (id, token) pairs, added tokens included.

    With `below`, only ids below it count.
    """
    pairs = sorted(
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if below is None or number < below
    )
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def vocabulary_size(tokenizer: Vocabulary) -> int:
    """Return the lowest number above all ids, added tokens included."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_pair(
    target: Vocabulary, draft: Vocabulary, names: tuple[str, str], contexts: tuple[int, int]
) -> list[str]:
    """Raise PairMismatch, naming both models, if an id means different tokens.

    Embeddings padded to different sizes do not matter, and the draft may lack the target's last
    tokens. `names` and `contexts` are of target and draft. Returns warnings, for example that a
    draft with a shorter context is silent beyond it.
    """
    ours, theirs, size = target.get_vocab(), draft.get_vocab(), vocabulary_size(draft)
    lacking = [token for token, number in ours.items() if number >= size]
    if {token: number for token, number in ours.items() if number < size} != theirs:
        raise PairMismatch(
            f"{names[0]} and {names[1]} differ in vocabulary "
            f"({len(ours)} and {len(theirs)} tokens; "
            f"{first_difference(ours, theirs)}): "
            "choose a draft that was trained with the target's tokenizer"
        )
    warnings = []
    if lacking:
        warnings.append(
            f"{names[1]} lacks {len(lacking)} of the {len(ours)} tokens of {names[0]}, "
            f"{min(lacking, key=ours.__getitem__)[:32]!r} among them: "
            "it never guesses them, and reads them as unknown"
        )
    if contexts[1] < contexts[0]:
        warnings.append(
            f"{names[1]} reads at most {contexts[1]} tokens, {names[0]} {contexts[0]}: "
            "texts beyond that get no guesses from it"
        )
    return warnings


def first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """Describe the lowest id whose token differs."""
    left, right = ({number: token for token, number in vocab.items()} for vocab in (ours, theirs))
    number = min(
        (n for n in left.keys() | right.keys() if left.get(n) != right.get(n)), default=None
    )
    if number is None:
        return "one of them has two tokens with the same id"
    shown = [
        repr(token[:32]) if token is not None else "nothing"
        for token in (left.get(number), right.get(number))
    ]
    return f"id {number} is {shown[0]} in one and {shown[1]} in the other"
