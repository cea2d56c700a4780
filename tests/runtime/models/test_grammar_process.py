"""Grammars that cost too much end with their own process: nothing else notices."""

import gc
import json
import os
import random
import select
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runtime.core import limits
from runtime.core.errors import InvalidRequest, Overloaded
from runtime.core.sampling_params import Constraint
from runtime.model_paths import bundled_model
from runtime.models import grammar, grammar_check
from runtime.models.grammar import GrammarCompiler, GrammarMatcher
from runtime.models.loader import load_tokenizer
from tests.support.harness import HANG_S
from tests.support.odd_tokenizers import ODD_TOKENIZERS

EOS = frozenset({0})


def string(i: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^(a|b)*a(a|b){{{i}}}$"}


def schema(value: dict[str, Any]) -> Constraint:
    return Constraint("json_schema", json.dumps(value, separators=(",", ":")))


ALL = [string(i) for i in range(1, 32)]
ATTACK = schema({"allOf": ALL})  # its automaton has 2 ** 31 branches at its first step
GOOD = Constraint("regex", "(a|b)*c")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(bundled_model("target"))


@pytest.fixture
def grammars(tokenizer: Any) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tokenizer, 4096, EOS)
    yield made
    made.close()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is all that holds up a product of expressions."""
    monkeypatch.setattr(grammar_check, "MAX_REGEX_PRODUCT", 10**99)


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in listed for child in file.read_text("ascii").split()]


def gone(processes: list[int]) -> bool:
    """Whether all of these processes end."""
    for pid in processes:
        try:
            watched = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([watched], [], [], HANG_S)[0]:
                return False
        finally:
            os.close(watched)
    return True


def server_of(before: set[int]) -> int:
    """The only child of this process that is new."""
    (server,) = set(children(os.getpid())) - before
    return server


def write(tokenizer: Any, matcher: GrammarMatcher, text: str) -> None:
    for token in tokenizer.encode(text):
        assert matcher.allowed()[token]
        matcher.accept_token(token)
    matcher.allowed()


PRODUCTS = {
    "the attack": {"allOf": ALL},
    "properties of all": {"allOf": [{"properties": {"p": one}} for one in ALL]},
    "references": {
        "allOf": [{"$ref": f"#/$defs/{i}"} for i in range(31)],
        "$defs": {str(i): one for i, one in enumerate(ALL)},
    },
    "a chain of references": {
        "$ref": "#/$defs/0",
        "$defs": {str(i): one | {"$ref": f"#/$defs/{i + 1}"} for i, one in enumerate(ALL)}
        | {"31": string(31)},
    },
    "alternatives": {"allOf": [{"anyOf": [one, {"type": "null"}]} for one in ALL]},
    "alternatives beside others": {"allOf": ALL[:2], "anyOf": [ALL[2] | {"oneOf": ALL[3:9]}]},
    "items": {"allOf": [{"type": "array", "items": one} for one in ALL]},
    "first items": {"allOf": [{"type": "array", "prefixItems": [one]} for one in ALL]},
    "any other property": {
        "allOf": [{"properties": {"p": one}} for one in ALL[:9]]
        + [{"additionalProperties": one} for one in ALL[9:]]
    },
    "values of patterns": {"allOf": [{"patternProperties": {"^p": one}} for one in ALL]},
    "names": {"patternProperties": {"^(a|b)*a(a|b){200}$": {}, "^(a|b)*b(a|b){200}$": {}}},
    "a format": {"format": "uri", "pattern": "^(a{500}|b)*$"},
    "deep inside": {"items": {"properties": {"p": {"items": {"allOf": ALL}}}}},
}


@pytest.mark.parametrize("value", PRODUCTS.values(), ids=PRODUCTS)
def test_products_of_expressions_are_refused_by_name(
    grammars: GrammarCompiler, value: dict[str, Any]
) -> None:
    before = children(os.getpid())
    with pytest.raises(InvalidRequest, match="patterns multiply to more than 10000 parts") as found:
        grammars(schema(value))
    assert found.value.param == "response_format"
    assert children(os.getpid()) == before, "no process is started for it"


SUMS = {
    "two small ones": {"allOf": [string(1), string(2)]},
    "a long one with a length": {"type": "string", "pattern": "^[a-z]{2000}$", "maxLength": 3000},
    "alternatives": {"anyOf": ALL},
    "of different properties": {
        "allOf": [{"properties": {f"p{i}": one}} for i, one in enumerate(ALL)]
    },
    "of a base": {
        "$ref": "#/$defs/base",
        "properties": {f"p{i}": one for i, one in enumerate(ALL)},
        "$defs": {"base": {"type": "object", "properties": {"p": string(9)}}},
    },
    "names": {"patternProperties": {f"^{letter}-[a-z]{{9}}": {} for letter in "abcdefgh"}},
    "in data": {"properties": {"pattern": {"type": "string"}, "format": {"enum": ["a", "b"]}}},
}


@pytest.mark.parametrize("value", SUMS.values(), ids=SUMS)
def test_expressions_for_different_strings_do_not_multiply(
    grammars: GrammarCompiler, value: dict[str, Any]
) -> None:
    assert grammars(schema(value)).allowed().any()


def test_parts_that_combine_in_too_many_ways_are_refused(grammars: GrammarCompiler) -> None:
    wide: dict[str, Any] = {"properties": {f"p{i}": {} for i in range(90)}}
    with pytest.raises(InvalidRequest, match="its parts combine in too many ways"):
        grammars(schema({"allOf": [{"$ref": "#/$defs/a"}] * 400, "$defs": {"a": wide}}))


def objects(*counts: int) -> dict[str, Any]:
    numbered = [range(1000 * place, 1000 * place + count) for place, count in enumerate(counts)]
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {f"{number}": {"enum": ["a", "b"]} for number in numbers},
                "additionalProperties": False,
            }
            for numbers in numbered
        ]
    }


@pytest.mark.parametrize("counts", [(501,), (600,), (300, 201)])
def test_too_many_properties_are_refused_by_the_limit(
    grammars: GrammarCompiler, counts: tuple[int, ...]
) -> None:
    with pytest.raises(
        InvalidRequest, match=f"{sum(counts)} properties at one place, the most is 500"
    ):
        grammars(schema(objects(*counts)))


@pytest.mark.parametrize("counts", [(500,), (250, 250)])
def test_as_many_properties_as_are_allowed_can_be_written(
    grammars: GrammarCompiler, tokenizer: Any, counts: tuple[int, ...]
) -> None:
    matcher = grammars(schema(objects(*counts)))
    write(tokenizer, matcher, '{"7":"a","9":"b","249":"b"}')
    assert matcher.allowed()[0]


@pytest.mark.parametrize("family", ODD_TOKENIZERS)
def test_a_tokenizer_that_the_library_does_not_read_costs_only_grammars(family: str) -> None:
    """The compiler is made; each grammar is refused with the reason, and no process is left."""
    made = GrammarCompiler(ODD_TOKENIZERS[family](), 8, frozenset({1}))
    for _ in range(2):
        with pytest.raises(InvalidRequest) as refused:
            made(GOOD)
        assert refused.value.param == "response_format"
        assert str(refused.value).startswith(
            "regex cannot be used with this model (llguidance does not read its tokenizer: "
            "ValueError: can't determine decoder type: "
        )
        assert str(refused.value).endswith("): ask without response_format")
    assert made._server is None
    made.close()


@pytest.mark.usefixtures("unchecked")
def test_a_grammar_that_never_compiles_is_refused_while_others_are_served(
    grammars: GrammarCompiler, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(children(os.getpid()))
    first = grammars(GOOD)
    server = server_of(before)
    with ThreadPoolExecutor() as pool, monkeypatch.context() as patient:
        patient.setattr(grammar, "COMPILE_TIMEOUT_S", HANG_S)
        attack = pool.submit(refused, grammars, ATTACK)
        write(tokenizer, first, "ab" * 10)
        write(tokenizer, grammars(GOOD), "abc")
        why = attack.result(HANG_S)
    assert f"over {grammar.COMPILE_CPU_S:g} s or {grammar.MEMORY_BYTES >> 20} MiB" in why
    write(tokenizer, first, "c")
    assert server_of(before) == server, "the tokenizer is not loaded again"


def refused(grammars: GrammarCompiler, constraint: Constraint) -> str:
    with pytest.raises(InvalidRequest) as found:
        grammars(constraint)
    return str(found.value)


@pytest.mark.usefixtures("unchecked")
def test_a_grammar_that_compiles_waits_for_no_other(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack may take minutes here: it is under way until everything is closed."""
    monkeypatch.setattr(grammar, "COMPILE_CPU_S", 600.0)
    monkeypatch.setattr(grammar, "MEMORY_BYTES", 1 << 40)
    monkeypatch.setattr(grammar, "COMPILE_TIMEOUT_S", 600.0)
    before = set(children(os.getpid()))
    grammars = GrammarCompiler(tokenizer, 4096, EOS)
    with ThreadPoolExecutor() as pool:
        first = grammars(GOOD)
        server = server_of(before)
        attack = pool.submit(refused, grammars, ATTACK)
        while len(children(server)) < 2:
            assert not attack.done()
        write(tokenizer, grammars(GOOD), "abc")
        write(tokenizer, first, "ab" * 10 + "c")
        assert not attack.done()
        left = children(server)
        grammars.close()
        assert "too complex" in attack.result(HANG_S)
    assert gone(left)
    assert children(os.getpid()) == list(before)


@pytest.mark.usefixtures("unchecked")
def test_a_mask_that_never_ends_ends_its_own_text(
    grammars: GrammarCompiler, tokenizer: Any
) -> None:
    """It compiles at once: the product stands behind a property that comes first."""
    late = [{"type": "string", "pattern": f"^(z|y(a|b)*a(a|b){{{i}}})$"} for i in range(1, 23)]
    value = {
        "type": "object",
        "required": ["a", "b"],
        "properties": {"a": {"type": "integer"}, "b": {"allOf": late}},
    }
    other, matcher = grammars(GOOD), grammars(schema(value))
    with pytest.raises(InvalidRequest, match=r"over 0\.2 s for its masks or 128 MiB"):
        write(tokenizer, matcher, '{"a":1,"b":"y')
    with pytest.raises(InvalidRequest, match="too complex"):
        matcher.allowed()
    write(tokenizer, other, "abc")


def wander(tokenizer: Any, matcher: GrammarMatcher) -> None:
    letters = [tokenizer.encode(letter)[0] for letter in "ab"]
    drawn = random.Random(1)
    for _ in range(20_000):
        matcher.accept_token(drawn.choice(letters))


MANY_STATES = Constraint("regex", "(a|b)*a(a|b){24}c")


def test_a_text_that_needs_too_much_memory_ends_alone(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MEMORY_BYTES", 4 << 20)
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 10**7)
    grammars = GrammarCompiler(tokenizer, 4096, EOS)
    first, second = grammars(MANY_STATES), grammars(MANY_STATES)
    with pytest.raises(InvalidRequest, match="or 4 MiB"):
        wander(tokenizer, first)
    write(tokenizer, second, "ab" * 10)
    grammars.close()


def test_masks_that_are_slow_again_and_again_end_their_text(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No single one is over the limit, but the model's thread waits for all of them."""
    monkeypatch.setattr(grammar, "MASKS_CPU_S", 0.01)
    monkeypatch.setattr(grammar, "TOKEN_CPU_S", 0.0)
    monkeypatch.setattr(grammar, "MEMORY_BYTES", 1 << 40)
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 10**7)
    grammars = GrammarCompiler(tokenizer, 4096, EOS)
    matcher = grammars(MANY_STATES)
    with pytest.raises(InvalidRequest, match=r"over 0\.01 s for its masks"):
        wander(tokenizer, matcher)
    grammars.close()


def test_texts_of_one_grammar_do_not_use_up_each_others_states(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 1000)
    grammars = GrammarCompiler(tokenizer, 4096, EOS)
    first, second = grammars(MANY_STATES), grammars(MANY_STATES)
    with pytest.raises(InvalidRequest, match="too many states"):
        wander(tokenizer, first)
    write(tokenizer, second, "ab" * 10)
    write(tokenizer, grammars(MANY_STATES), "ab" * 10)
    grammars.close()


def test_a_process_that_is_killed_is_replaced(grammars: GrammarCompiler, tokenizer: Any) -> None:
    before = set(children(os.getpid()))
    first = grammars(GOOD)
    server = server_of(before)
    watched = os.pidfd_open(server)
    os.kill(server, signal.SIGKILL)
    assert select.select([watched], [], [], HANG_S)[0]
    os.close(watched)
    write(tokenizer, grammars(GOOD), "abc")
    assert server_of(before) != server
    write(tokenizer, first, "abc")


def test_the_process_of_a_text_ends_with_it(grammars: GrammarCompiler) -> None:
    before = set(children(os.getpid()))
    matcher = grammars(GOOD)
    (process,) = children(server_of(before))
    del matcher
    gc.collect()
    assert gone([process])


def test_nothing_is_left_after_close(tokenizer: Any) -> None:
    before = set(children(os.getpid()))
    grammars = GrammarCompiler(tokenizer, 4096, EOS)
    matchers = [grammars(GOOD) for _ in range(3)]
    server = server_of(before)
    processes = children(server)
    assert len(processes) == 3
    grammars.close()
    assert set(children(os.getpid())) == before
    assert gone(processes)
    for matcher in matchers:
        with pytest.raises(InvalidRequest, match="too complex"):
            write(load_tokenizer(bundled_model("target")), matcher, "a")
    grammars.close()


def test_processes_are_bounded_in_number(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONSTRAINED_REQUESTS", 2)
    matchers = [grammars(GOOD), grammars(GOOD)]
    with pytest.raises(Overloaded, match="server at capacity: 2 requests with a response_format"):
        grammars(GOOD)
    matchers.pop()
    gc.collect()
    matchers.append(grammars(GOOD))
