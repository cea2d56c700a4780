"""Do a target and a draft speak the same language? Compared are the vocabularies, token by token, not their sizes."""

import hashlib
import json
from typing import Protocol

from runtime.core.errors import PairMismatch


class Vocabulary(Protocol):
    """The part of a tokenizer that is looked at here."""

    def get_vocab(self) -> dict[str, int]: ...


def vocabulary_hash(tokenizer: Vocabulary) -> str:
    """sha256, in hex, of all (id, token) pairs, added tokens included: equal exactly where the vocabularies are."""
    pairs = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def check_pair(
    target: Vocabulary, draft: Vocabulary, names: tuple[str, str], contexts: tuple[int, int]
) -> list[str]:
    """Raises PairMismatch, naming both, where an id means another token. Embeddings padded to other sizes are no difference.

    `names` and `contexts` are of target and draft. Returns warnings: a draft of shorter context falls silent beyond it.
    """
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours != theirs:
        raise PairMismatch(
            f"{names[0]} and {names[1]} differ in vocabulary ({len(ours)} and {len(theirs)} tokens; {first_difference(ours, theirs)}): "
            "choose a draft that was trained with the target's tokenizer"
        )
    if contexts[1] < contexts[0]:
        return [
            f"{names[1]} reads at most {contexts[1]} tokens, {names[0]} {contexts[0]}: texts beyond that get no guesses from it"
        ]
    return []


def first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """The lowest id whose token differs, in words."""
    left, right = ({number: token for token, number in vocab.items()} for vocab in (ours, theirs))
    number = min(
        (n for n in left.keys() | right.keys() if left.get(n) != right.get(n)), default=None
    )
    if number is None:
        return "one of them has two tokens of one id"
    shown = [
        repr(token[:32]) if token is not None else "nothing"
        for token in (left.get(number), right.get(number))
    ]
    return f"id {number} is {shown[0]} in one and {shown[1]} in the other"
