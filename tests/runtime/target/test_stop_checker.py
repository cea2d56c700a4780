"""The end of a text: an oracle that looks at whole texts, and the cases by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.core.sampling_params import Constraint, SamplingParams
from runtime.target.stop_checker import StopChecker

EOS = 0
ANYTHING = Constraint("regex", ".*")
PIECES = [
    "<eos>",
    "a",
    "b",
    "ab",
    "ba",
    "aab",
    "é",
    "ö",
    "aé",
    "\n",
    "",
    "abab",
    "𝄞b",
]  # text of each token id


@dataclass
class Decoder:
    """Decodes ids to pieces; with `slow`, one token late, as an incomplete character would be."""

    slow: bool = False
    waiting: list[str] = field(default_factory=list)

    def decode(self, token: int) -> str:
        self.waiting.append(PIECES[token])
        return "".join(self.waiting.pop(0) for _ in range(len(self.waiting) - self.slow))

    def flush(self) -> str:
        text, self.waiting = "".join(self.waiting), []
        return text


def finish(sampling: SamplingParams, slow: bool = False) -> StopChecker:
    decoder = Decoder(slow)
    return StopChecker(sampling, frozenset({EOS}), decoder.decode, decoder.flush)


def run(
    sampling: SamplingParams, tokens: list[int], slow: bool = False
) -> tuple[list[str], int, str | None]:
    """What is given out token by token, the number of tokens, the reason."""
    end = finish(sampling, slow)
    shown = [end.feed(token).text for token in tokens if end.reason is None]
    return shown, end.count, end.reason


def oracle(sampling: SamplingParams, tokens: list[int]) -> tuple[str, int, str | None]:
    """The whole text, tokens counted, reason: every possible cut of every prefix is looked at."""
    text = ""
    for n, token in enumerate(tokens, 1):
        eos = token == EOS and not sampling.ignore_eos and n > sampling.min_tokens
        before, text = text, text if eos else text + PIECES[token]
        if n > sampling.min_tokens:
            for end in range(len(before) + 1, len(text) + 1):
                cuts = [end - len(stop) for stop in sampling.stop if text[:end].endswith(stop)]
                if cuts:
                    return text[: min(cuts)], n, "stop"
        if eos or n == sampling.max_tokens:
            return text, n, "stop" if eos else "length"
    return text, len(tokens), None


def unsure(text: str, stops: tuple[str, ...]) -> str:
    """`text` without the longest end that may become a stop string."""
    starts = [
        len(text) - n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])
    ]
    return text[: min(starts, default=len(text))]


tokens_of = st.lists(st.integers(0, len(PIECES) - 1), max_size=14)
stops_of = st.lists(st.text("abéö\n𝄞", min_size=1, max_size=5), max_size=4).map(tuple)


@given(tokens_of, stops_of, st.integers(1, 12), st.integers(0, 5), st.booleans())
@example([1, 2, 1, 2], ("ab", "b"), 9, 2, False)
@example([5, 2], ("b", "abb"), 9, 1, False)
@settings(max_examples=400, deadline=None)
def test_oracle(
    tokens: list[int], stops: tuple[str, ...], most: int, least: int, ignore_eos: bool
) -> None:
    sampling = SamplingParams(
        stop=stops, max_tokens=most, min_tokens=min(least, most), ignore_eos=ignore_eos
    )
    shown, count, reason = run(sampling, tokens)
    text, expected_count, expected_reason = oracle(sampling, tokens)
    assert (count, reason) == (expected_count, expected_reason)
    assert "".join(shown) == (unsure(text, stops) if reason is None else text)


@given(tokens_of, stops_of)
@settings(max_examples=150, deadline=None)
def test_nothing_is_shown_that_is_taken_back_and_nothing_is_held_without_need(
    tokens: list[int], stops: tuple[str, ...]
) -> None:
    sampling = SamplingParams(stop=stops, max_tokens=100)
    shown, _, reason = run(sampling, tokens)
    whole = oracle(sampling, tokens)[0]
    for n in range(len(shown) - (reason is not None)):
        assert "".join(shown[: n + 1]) == unsure(oracle(sampling, tokens[: n + 1])[0], stops)
        assert whole.startswith("".join(shown[: n + 1]))


@given(st.text("abéö\n𝄞", max_size=24), stops_of, st.data())
@settings(max_examples=150, deadline=None)
def test_how_a_text_is_cut_into_tokens_does_not_matter(
    text: str, stops: tuple[str, ...], data: st.DataObject
) -> None:
    """The same characters as other tokens end at the same character."""
    borders = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
    results = []
    for pieces in (list(text), [text[a:b] for a, b in pairwise(borders)]):
        end = StopChecker(
            SamplingParams(stop=stops, max_tokens=100), frozenset(), pieces.__getitem__, str
        )
        shown = ""
        for token in range(len(pieces)):
            if end.reason is None:
                shown += end.feed(token).text
        results.append((shown, end.reason))
    assert results[0] == results[1]


@given(tokens_of, stops_of, st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_a_decoder_that_lags_loses_no_text(
    tokens: list[int], stops: tuple[str, ...], most: int
) -> None:
    """Text held back at the end comes with the last token and is searched for stop strings."""
    sampling = SamplingParams(stop=stops, max_tokens=most)
    shown, count, reason = run(sampling, tokens, slow=True)
    text, expected_count, expected_reason = oracle(sampling, tokens)
    if reason is not None:
        assert "".join(shown) == text
        assert count <= expected_count + 1
        assert (expected_reason == "stop") == (reason == "stop")


@pytest.mark.parametrize(
    ("arguments", "tokens", "expected"),
    [
        ({}, [1, 2, EOS, 1], ("ab", 3, "stop")),
        ({"max_tokens": 3}, [1, 2, EOS], ("ab", 3, "stop")),
        ({"max_tokens": 2}, [1, 2, EOS], ("ab", 2, "length")),
        ({"ignore_eos": True, "max_tokens": 4}, [1, EOS, 2, 1], ("a<eos>ba", 4, "length")),
        ({"min_tokens": 2}, [1, EOS, 2, EOS], ("a<eos>b", 4, "stop")),
        ({"min_tokens": 2}, [1, 2, EOS], ("ab", 3, "stop")),
        ({"stop": ("b",), "max_tokens": 2}, [1, 2], ("a", 2, "stop")),
        ({"stop": ("aba",)}, [6, 3, 3], ("é", 3, "stop")),
        ({"stop": ("b",), "min_tokens": 2}, [2, 2, 1, 3], ("bbaa", 4, "stop")),
        ({"stop": ("ba",), "min_tokens": 1}, [2, 1], ("", 2, "stop")),
        ({"stop": ("ab", "b")}, [6, 3], ("é", 2, "stop")),
        # Of several in one token, the one that is complete first, though another began before it.
        ({"stop": ("abab", "b")}, [11], ("a", 1, "stop")),
        ({"stop": ("b", "abab")}, [11], ("a", 1, "stop")),
        ({"stop": ("aabé", "b")}, [1, 3, 6], ("aa", 2, "stop")),
        ({"stop": ("aaé",)}, [1, 1, EOS], ("aa", 3, "stop")),
        ({"stop": ("aaé",), "max_tokens": 2}, [1, 1], ("aa", 2, "length")),
        ({"stop": ("éa",)}, [8, 1], ("a", 2, "stop")),
        # Under a constraint an end is chosen only if nothing else may follow, so it ends the text.
        ({"constraint": ANYTHING, "ignore_eos": True}, [1, EOS], ("a", 2, "stop")),
        ({"constraint": ANYTHING, "min_tokens": 5}, [1, EOS], ("a", 2, "stop")),
    ],
)
def test_cases(
    arguments: dict[str, object], tokens: list[int], expected: tuple[str, int, str]
) -> None:
    build: Callable[..., SamplingParams] = SamplingParams
    shown, count, reason = run(build(**arguments), tokens)
    assert ("".join(shown), count, reason) == expected


@pytest.mark.parametrize("slow", [False, True])
def test_what_is_held_back_comes_when_no_token_follows(slow: bool) -> None:
    end = finish(SamplingParams(stop=("ababé",)), slow)
    shown = "".join(end.feed(token).text for token in (6, 1, 2, 1))
    assert shown == "é"
    assert end.close() == "aba"
    assert end.close() == ""


def test_nothing_follows_the_end() -> None:
    end = finish(SamplingParams(max_tokens=1))
    assert end.feed(1).reason == "length"
    with pytest.raises(RuntimeError, match="token 2 follows"):
        end.feed(2)
    assert end.count == 1


def test_a_closed_text_is_at_its_length_and_nothing_follows() -> None:
    end = finish(SamplingParams(stop=("ab",)))
    assert end.feed(1).text == ""
    assert end.close() == "a"
    assert end.reason == "length"
    with pytest.raises(RuntimeError, match="token 2 follows"):
        end.feed(2)


def test_closing_a_text_that_has_ended_changes_nothing() -> None:
    end = finish(SamplingParams(stop=("a",)), slow=True)
    assert [end.feed(token).text for token in (6, 1, 2)] == ["", "é", ""]  # "b" is not decoded yet
    assert end.reason == "stop"
    assert end.close() == ""
    assert end.reason == "stop"
