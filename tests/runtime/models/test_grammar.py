"""Grammars on the bundled tokenizer: what they allow, what they cost, which are refused."""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import Constraint, ConstraintKind
from runtime.model_paths import bundled_model
from runtime.models.grammar import GrammarCompiler, GrammarMatcher
from runtime.models.loader import load_tokenizer

VOCABULARY = 4096 + 5  # logits may have columns that are no token
EOS = frozenset({0})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(bundled_model("target"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tokenizer, VOCABULARY, EOS)
    yield made
    made.close()


def tokens(matcher: GrammarMatcher) -> list[int]:
    mask = matcher.allowed()
    assert mask.shape == (VOCABULARY,)
    assert mask.dtype == np.bool_
    found: list[int] = np.flatnonzero(mask).tolist()
    return found


def written(tokenizer: Any, matcher: GrammarMatcher, text: str) -> bool:
    """Whether the text is let through, token by token and then as a whole."""
    for token in tokenizer.encode(text):
        if token not in tokens(matcher):
            return False
        matcher.accept_token(token)
    return bool(EOS & set(tokens(matcher)))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"$ref": "#/$defs/name"},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 4}},
}


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("regex", "[0-9]{3}-(ab)*", ["123-", "123-abab"], ["12-", "123-a", "123-abc", " 123-"]),
        ("regex", "é|🙂", ["é", "🙂"], ["e", ""]),
        (
            "json_object",
            "",
            ["{}", '{"a": [1,\n    null]}'],
            ["[]", "1", '{"a": }', "{" + " " * 17 + "}"],
        ),
        (
            "json_schema",
            json.dumps(SCHEMA),
            ['{"name": "abc"}', '{"name":"","ages":[1,2]}'],
            ["{}", '{"name": "abcde"}', '{"name":"","x":1}'],
        ),
    ],
)
def test_what_fits_is_let_through_and_nothing_else(
    tokenizer: Any,
    grammars: GrammarCompiler,
    kind: ConstraintKind,
    text: str,
    good: list[str],
    bad: list[str],
) -> None:
    assert [written(tokenizer, grammars(Constraint(kind, text)), one) for one in good] == [
        True
    ] * len(good)
    assert [written(tokenizer, grammars(Constraint(kind, text)), one) for one in bad] == [
        False
    ] * len(bad)


def test_a_complete_text_may_only_end_and_its_end_may_be_taken(
    tokenizer: Any, grammars: GrammarCompiler
) -> None:
    matcher = grammars(Constraint("regex", "abc"))
    assert written(tokenizer, matcher, "abc")
    for _ in range(3):
        assert tokens(matcher) == [0]
        matcher.accept_token(0)


def test_all_tokens_that_end_a_text_do(tokenizer: Any) -> None:
    grammars = GrammarCompiler(tokenizer, VOCABULARY, frozenset({0, 5}))
    matcher = grammars(Constraint("regex", "a?"))
    assert {0, 5} <= set(tokens(matcher))
    matcher.accept_token(tokenizer.encode("a")[0])
    assert tokens(matcher) == [0, 5]
    grammars.close()


def test_what_is_not_allowed_cannot_be_taken(tokenizer: Any, grammars: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest, match="does not follow"):
        grammars(Constraint("regex", "abc")).accept_token(tokenizer.encode("x")[0])


def test_texts_of_one_grammar_go_their_own_ways(tokenizer: Any, grammars: GrammarCompiler) -> None:
    first, second = grammars(Constraint("regex", "a+b")), grammars(Constraint("regex", "a+b"))
    first.accept_token(tokenizer.encode("a")[0])
    assert tokens(first) != tokens(second)
    assert tokens(second) == tokens(grammars(Constraint("regex", "a+b")))


REFUSED: list[tuple[ConstraintKind, str, str]] = [
    ("regex", "(", "unclosed group"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", r"(a)\1", "backreferences are not supported"),
    ("regex", "\ud800", "surrogates|utf-8"),
    ("regex", "(a{1000}){1000}", "too long once its counts are written out"),
    ("regex", "(?:(?:a{,}|b{30}){30}){30}", "too long once"),
    ("regex", "a{99999999999999999999}", "too long once"),
    ("regex", "[a-z]{1,9000}[0-9]{1,9000}", "too long once"),
    ("json_schema", "{", "invalid JSON"),
    ("json_schema", "[" * 9000, "nested too deeply"),
    ("json_schema", "[]", "it is not an object"),
    ("json_schema", "true", "it is not an object"),
    ("json_schema", '{"type": "text"}', "Invalid type: text"),
    ("json_schema", '{"not": {}}', "Unimplemented keys"),
    ("json_schema", '{"enum": []}', "Unsatisfiable"),
    ("json_schema", '{"$ref": "#"}', "refers to itself"),
    ("json_schema", '{"properties": {"next": {"$ref": "#"}}}', "refers to itself"),
    (
        "json_schema",
        '{"$defs": {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"items": {"$ref": "#/$defs/a"}}}}',
        "refers to itself",
    ),
    (
        "json_schema",
        '{"properties": {"x": {"items": {"$ref": "#/properties/x"}}}}',
        "refers to itself",
    ),
    ("json_schema", '{"$ref": "http://169.254.169.254/x"}', "leads out of it"),
    ("json_schema", '{"$ref": "#name"}', "leads out of it"),
    ("json_schema", '{"$ref": "#/$defs/a"}', "leads out of it"),
    ("json_schema", '{"items": {"pattern": "(a{999}){999}"}}', "too long once"),
    ("json_schema", '{"patternProperties": {"(a{999}){999}": {}}}', "too long once"),
]


@pytest.mark.parametrize(
    ("kind", "text", "says"), REFUSED, ids=[f"{kind}-{text[:20]!a}" for kind, text, _ in REFUSED]
)
def test_what_is_no_grammar_or_costs_too_much_is_refused_in_one_line(
    grammars: GrammarCompiler, kind: ConstraintKind, text: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        grammars(Constraint(kind, text))
    message = str(caught.value)
    assert caught.value.param == "response_format"
    assert re.fullmatch(rf"{kind} cannot be used \(.{{,64}}\): give another one", message), message


STEPS = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
DOUBLED = {"$ref": "#/$defs/a0", "$defs": STEPS | {"a40": {}}}  # 2 ** 40 ways to the last part


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "regex",
            r"[^]]{1,100}[[:digit:]]\p{L}{5}\{9999999}[({9}]{3}",
        ),  # what looks like a count and is none
        ("regex", r"\w{1,50}@\w{1,50}(\.\w{1,50}){1,9}"),
        ("json_schema", '{"properties": {"$ref": {"type": "string"}}}'),
        (
            "json_schema",
            '{"$ref": "#/$defs/a~1b/items", "$defs": {"a/b": {"items": {"type": "null"}}}}',
        ),
        (
            "json_schema",
            '{"anyOf": [{"$ref": "#/x/0"}, {"$ref": "#/x/0"}], "x": [{"type": "null"}]}',
        ),
        ("json_schema", json.dumps(DOUBLED)),
    ],
)
def test_what_only_looks_dangerous_is_taken(
    grammars: GrammarCompiler, kind: ConstraintKind, text: str
) -> None:
    assert tokens(grammars(Constraint(kind, text)))


def test_a_model_that_cannot_end_takes_no_constraint(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequest, match="no end-of-text token"):
        GrammarCompiler(tokenizer, VOCABULARY, frozenset())(Constraint("json_object"))


def test_the_longest_text_is_read(grammars: GrammarCompiler) -> None:
    long = json.dumps({"enum": [f"{n:08}" for n in range(1300)]})
    assert limits.CONSTRAINT_BYTES * 0.9 < len(long) <= limits.CONSTRAINT_BYTES
    assert tokens(grammars(Constraint("json_schema", long)))
