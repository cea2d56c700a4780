"""Incremental detokenisation, against the decoding of the whole."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from runtime.models.detokenize import MAX_WINDOW_TOKENS, REPLACEMENT, Detokenizer, TextOffsets
from tests.support.paths import ROOT

SHIPPED = ROOT / "models" / "target" / "tokenizer.json"
STORIES = (
    ROOT.parent / "shared" / "models" / "stories260K" / "tokenizer.json"
)  # sentencepiece, with byte tokens


@pytest.fixture(scope="module", params=[SHIPPED, STORIES], ids=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    path: Path = request.param
    if not path.exists():
        pytest.skip(f"{path.name} of {path.parent.name} is not there")
    return Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED))


@pytest.fixture(scope="module")
def stories() -> Tokenizer:
    if not STORIES.exists():
        pytest.skip("stories260K is not there")
    return Tokenizer.from_file(str(STORIES))


def pieces(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    """What each token gives, and last what is flushed."""
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*map(detokenizer.decode, output), detokenizer.flush()]


def decoded(tokenizer: Tokenizer, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def byte(tokenizer: Tokenizer, value: int) -> int:
    """The token of one byte."""
    token = tokenizer.token_to_id(f"<0x{value:02X}>")
    if token is None:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [b for b in range(256) if b not in printable]
        token = tokenizer.token_to_id(
            chr(value) if value in printable else chr(256 + rest.index(value))
        )
    assert isinstance(token, int)
    return token


@given(st.text(max_size=30), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_real_text(tokenizer: Tokenizer, text: str, where: float) -> None:
    """Wherever the prompt ends, both texts join, and no piece holds half a character."""
    tokens = tokenizer.encode("x" + text).ids
    cut = 1 + round(where * (len(tokens) - 1))
    given_out, whole, before = (
        pieces(tokenizer, tokens[:cut], tokens[cut:]),
        decoded(tokenizer, tokens),
        decoded(tokenizer, tokens[:cut]),
    )
    assert whole.endswith("".join(given_out))
    if whole.startswith(before):
        assert before + "".join(given_out) == whole
    if REPLACEMENT not in whole:
        assert REPLACEMENT not in "".join(given_out)


@given(st.text(min_size=1, max_size=12), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_a_prompt_that_ends_inside_a_character(
    tokenizer: Tokenizer, text: str, where: float
) -> None:
    """The output then begins with that character."""
    data, prefix = text.replace(REPLACEMENT, "").encode(), tokenizer.encode("x").ids
    cut = round(where * len(data))
    tokens = [byte(tokenizer, value) for value in data]
    complete = data[:cut].decode(errors="ignore")
    assert (
        "".join(pieces(tokenizer, [*prefix, *tokens[:cut]], tokens[cut:]))
        == data.decode()[len(complete) :]
    )


@given(st.text(min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_as_the_library_streams(tokenizer: Tokenizer, text: str) -> None:
    prompt, output = tokenizer.encode("once").ids, tokenizer.encode(text + "z").ids
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    assert pieces(tokenizer, prompt, output) == [
        *(stream.step(tokenizer, token) or "" for token in output),
        "",
    ]


@given(
    st.lists(st.integers(0, 4095) | st.integers(90, 350), max_size=20),
    st.lists(st.integers(0, 4095) | st.integers(90, 350), max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_any_tokens_of_a_byte_level_vocabulary(
    shipped: Tokenizer, prompt: list[int], output: list[int]
) -> None:
    whole, before = decoded(shipped, prompt + output), decoded(shipped, prompt)
    given_out = "".join(pieces(shipped, prompt, output))
    assert whole.endswith(given_out)
    if whole.startswith(before):
        assert before + given_out == whole


@given(
    st.lists(st.integers(0, 511) | st.integers(3, 258), max_size=20),
    st.lists(st.integers(0, 511) | st.integers(3, 258), max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_any_tokens_of_a_byte_fallback_vocabulary(
    stories: Tokenizer, prompt: list[int], output: list[int]
) -> None:
    """The decoder withdraws characters before an invalid byte; what was emitted stays."""
    given_out = "".join(pieces(stories, prompt, output))
    whole, before = decoded(stories, prompt + output), decoded(stories, prompt)
    kept = [char for char in whole if char != REPLACEMENT]
    assert len(given_out.encode()) <= 3 * len(whole.encode())
    if whole.startswith(before) and REPLACEMENT not in whole:
        assert before + given_out == whole
    if not before:
        remaining = iter(given_out)
        assert all(char in remaining for char in kept)


def test_the_space_after_the_prompt(stories: Tokenizer) -> None:
    prompt, output = stories.encode("Once upon a").ids, stories.encode("time").ids[1:]
    assert stories.encode("time").tokens[1].startswith("\N{LOWER ONE EIGHTH BLOCK}")
    assert "".join(pieces(stories, prompt, output)) == " time"
    assert (
        "".join(pieces(stories, prompt[:1], output)) == "time"
    )  # at the beginning of a text there is none


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    prompt, (a, b) = (
        tokenizer.encode("x").ids,
        (tokenizer.encode(" one").ids[-1], tokenizer.encode(" two").ids[-1]),
    )
    assert pieces(tokenizer, prompt, [a, 0, b]) == [
        *pieces(tokenizer, prompt, [a, b])[:1],
        "",
        *pieces(tokenizer, prompt, [a, b])[1:],
    ]


def test_a_character_of_four_tokens(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("x").ids
    output = [byte(tokenizer, value) for value in "𝄞é".encode()]
    assert pieces(tokenizer, prompt, output) == ["", "", "", "𝄞", "", "é", ""]


def test_a_character_that_the_prompt_begins(tokenizer: Tokenizer) -> None:
    first, second = (byte(tokenizer, value) for value in "é".encode())
    prompt = [*tokenizer.encode("x").ids, first, second, first]
    assert pieces(tokenizer, prompt, [second, second]) == ["é", "", REPLACEMENT]


def test_an_unknown_character_of_the_prompt_is_not_repeated(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("x" + REPLACEMENT).ids
    assert "".join(pieces(tokenizer, prompt, [byte(tokenizer, ord("a"))])) == "a"


def test_invalid_bytes(tokenizer: Tokenizer) -> None:
    c3, a9, ff = (byte(tokenizer, value) for value in (0xC3, 0xA9, 0xFF))
    prompt = tokenizer.encode("x").ids
    letter = tokenizer.token_to_id("o")
    assert letter is not None
    assert "".join(pieces(tokenizer, prompt, [c3, a9, ff, letter])) == f"é{REPLACEMENT}o"
    assert "".join(pieces(tokenizer, prompt, [letter, c3])) == f"o{REPLACEMENT}"
    assert pieces(tokenizer, prompt, [ff, ff, letter, letter]) == [
        "",
        "",
        f"{REPLACEMENT}{REPLACEMENT}o",
        "o",
        "",
    ]


def test_the_work_does_not_grow_with_the_text(shipped: Tokenizer) -> None:
    detokenizer = Detokenizer(shipped, shipped.encode("x = 1\n" * 50).ids)
    for token in shipped.encode("def f(x):\n    return x\n" * 200).ids:
        detokenizer.decode(token)
    assert len(detokenizer._window) < 8


class Counting:
    """Counts the tokens that a tokenizer decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.tokens = tokenizer, 0

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        self.tokens += len(tokens)
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text


@pytest.mark.parametrize("end", ["text", "special", "bytes"])
@pytest.mark.parametrize("said", ["special", "incomplete", "invalid", "half"])
def test_tokens_without_text_cost_the_same_after_any_prompt(
    tokenizer: Tokenizer, end: str, said: str
) -> None:
    """A prompt of 32k tokens and an output of as many are decoded in short windows."""
    e, half, ff = (byte(tokenizer, value) for value in (0xE4, 0xBD, 0xFF))
    text = tokenizer.encode("x = größe(y)\n" * 40).ids * 200
    prompt = text + {"text": [], "special": [0] * 2000, "bytes": [ff] * 2000}[end]
    counting = Counting(tokenizer)
    detokenizer = Detokenizer(counting, prompt[-32_768:])  # type: ignore[arg-type]
    assert counting.tokens < (10_000 if end == "special" else 500)
    output = {"special": [0], "incomplete": [e], "invalid": [ff], "half": [e, half]}[said]
    for count in range(1000):
        counting.tokens = 0
        detokenizer.decode(output[count % len(output)])
        assert counting.tokens < 5 * MAX_WINDOW_TOKENS


def test_special_tokens_inside_a_character(tokenizer: Tokenizer) -> None:
    first, *rest = (byte(tokenizer, value) for value in "𝄞".encode())
    prompt = tokenizer.encode("x").ids
    output = [first, *[0] * 100, rest[0], *[0] * 100, *rest[1:]]
    assert "".join(pieces(tokenizer, prompt, output)) == "𝄞"


def test_many_invalid_bytes_are_replaced_in_time(tokenizer: Tokenizer) -> None:
    """What they are followed by is whole."""
    ff, *char = (byte(tokenizer, value) for value in b"\xff" + "𝄞".encode())
    prompt = tokenizer.encode("x").ids
    found = pieces(tokenizer, prompt, [*[ff] * 500, *char, *tokenizer.encode("y").ids[-1:]])
    said = "".join(found)
    assert said.startswith(REPLACEMENT * 500)
    assert "".join(found[:500]).count(REPLACEMENT) > 400
    assert said.strip(REPLACEMENT + " ") in ("𝄞y", "y")  # some take a run of bytes as one


def test_a_prompt_that_ends_in_many_special_tokens(tokenizer: Tokenizer) -> None:
    """The output begins with its space, as in the whole."""
    prompt, output = tokenizer.encode("x").ids, tokenizer.encode("a time").ids[1:]
    assert pieces(tokenizer, prompt + [0] * 500, output) == pieces(tokenizer, prompt, output)


@given(st.text(min_size=1, max_size=20), st.integers(0, 200), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_a_long_prompt_gives_the_output_of_the_whole(
    tokenizer: Tokenizer, text: str, repeats: int, cut: int
) -> None:
    """Also where it ends inside a character."""
    tokens = tokenizer.encode(("größe 𝄞" + text) * repeats + "x").ids
    char = [byte(tokenizer, value) for value in "𝄞".encode()]
    prompt, output = tokens + char[:cut], char[cut:] + tokenizer.encode("x" + text).ids[1:]
    before = decoded(tokenizer, tokens)
    whole = decoded(tokenizer, prompt + output)
    assert before + "".join(pieces(tokenizer, prompt, output)) == whole


class PanicException(BaseException):
    """Named as what a library of Rust raises, which is no Exception."""


def test_a_panic_of_the_library_is_an_error_of_the_text(shipped: Tokenizer) -> None:
    class Panicking(Counting):
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            if 7 in tokens:
                raise PanicException("index out of bounds")
            return super().decode(tokens, skip_special_tokens)

    detokenizer = Detokenizer(Panicking(shipped), [5])  # type: ignore[arg-type]
    detokenizer.decode(6)
    with pytest.raises(RuntimeError, match="the tokenizer has failed: index out of bounds"):
        detokenizer.decode(7)


def test_no_prompt(tokenizer: Tokenizer) -> None:
    output = tokenizer.encode("Hello you").ids
    assert "".join(pieces(tokenizer, [], output)) == decoded(tokenizer, output)
    assert pieces(tokenizer, [], []) == [""]


def offsets(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[int]:
    return list(map(TextOffsets(tokenizer, prompt).next, output))


def test_offsets_of_whole_words(shipped: Tokenizer) -> None:
    output = shipped.encode("def copy_file(src, dst):").ids
    assert offsets(shipped, shipped.encode("x = 1\n").ids, output) == [
        0,
        3,
        8,
        9,
        13,
        14,
        17,
        18,
        22,
    ]


@given(st.text(min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_the_offset_of_a_byte_is_that_of_its_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace(REPLACEMENT, "")
    output = [byte(tokenizer, value) for value in text.encode()]
    assert offsets(tokenizer, tokenizer.encode("x").ids, output) == [
        place for place, char in enumerate(text) for _ in char.encode()
    ]


def test_offsets_beside_invalid_bytes(shipped: Tokenizer, tokenizer: Tokenizer) -> None:
    """Each byte that becomes no character has an offset of its own."""
    prompt, letter = tokenizer.encode("x").ids, tokenizer.token_to_id("o")
    assert letter is not None
    c3, a9, ff = (byte(tokenizer, value) for value in (0xC3, 0xA9, 0xFF))
    assert offsets(tokenizer, prompt, [ff, ff, letter, letter]) == [0, 1, 2, 3]
    assert offsets(tokenizer, prompt, [letter, c3, letter]) == [0, 1, 2]
    assert offsets(tokenizer, prompt, [letter, c3, a9, letter, c3, 0, a9]) == [0, 1, 1, 2, 3, 3, 3]
    assert offsets(tokenizer, [*prompt, c3], [a9, letter]) == [0, 1]
    ids = [byte(shipped, value) for value in (0xE2, 0x82, 0xFF, 0xC3, 0xC3, 0xA9)]
    assert offsets(shipped, prompt, ids) == [0, 0, 1, 2, 3, 3]
    many = [c3] * (2 * MAX_WINDOW_TOKENS)
    assert offsets(tokenizer, prompt, [*many, letter]) == list(range(len(many) + 1))
