"""A pair fits where every id is the same token on both sides."""

import pytest

from runtime.core.errors import PairMismatch
from runtime.models.vocab_check import check_pair, vocabulary_hash, vocabulary_size


class Words:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}


class Backwards(Words):
    """The same tokens and ids, told in another order."""

    def get_vocab(self) -> dict[str, int]:
        return dict(reversed(super().get_vocab().items()))


def check(ours: Words, theirs: Words, contexts: tuple[int, int] = (64, 64)) -> list[str]:
    return check_pair(ours, theirs, ("big", "small"), contexts)


def test_equal_vocabularies_fit() -> None:
    assert check(Words("a", "b"), Backwards("a", "b")) == []
    assert check(Words("a", "b"), Words("a", "b"), (64, 128)) == []


@pytest.mark.parametrize(
    ("theirs", "difference"),
    [
        (Words("a", "c", "b"), r"3 and 3 tokens; id 1 is 'b' in one and 'c' in the other"),
        (Words("a", "c"), r"3 and 2 tokens; id 1 is 'b' in one and 'c' in the other"),
        (Words("a", "b", "c", "d"), r"3 and 4 tokens; id 3 is nothing in one and 'd' in the other"),
    ],
)
def test_a_mismatch_names_both_sides(theirs: Words, difference: str) -> None:
    with pytest.raises(
        PairMismatch, match=rf"^big and small differ in vocabulary \({difference}\): choose a draft"
    ):
        check(Words("a", "b", "c"), theirs)


def test_a_draft_may_lack_the_last_tokens_and_that_is_told() -> None:
    assert check(Words("a", "b", "c", "d"), Words("a", "b")) == [
        "small lacks 2 of the 4 tokens of big, 'c' among them: it never guesses them, "
        "and reads them as unknown"
    ]


def test_the_hash_of_a_part_is_that_of_a_shorter_vocabulary() -> None:
    whole = Words("a", "b", "c")
    assert vocabulary_hash(whole, 2) == vocabulary_hash(Words("a", "b")) != vocabulary_hash(whole)
    assert vocabulary_hash(whole, vocabulary_size(whole)) == vocabulary_hash(whole)
    assert (vocabulary_size(whole), vocabulary_size(Words())) == (3, 0)


def test_a_shorter_draft_is_allowed_and_told() -> None:
    assert check(Words("a"), Words("a"), (64, 32)) == [
        "small reads at most 32 tokens, big 64: texts beyond that get no guesses from it"
    ]


def test_the_hash_follows_the_vocabulary_and_nothing_else() -> None:
    assert vocabulary_hash(Words("a", "b")) == vocabulary_hash(Backwards("a", "b"))
    assert len(vocabulary_hash(Words("a", "b"))) == 64
    others = [Words("b", "a"), Words("a"), Words("a", "b", "c"), Words("a", "é"), Words('a", "b')]
    assert len({vocabulary_hash(words) for words in (Words("a", "b"), *others)}) == 6
