"""JSON schemas and regular expressions as masks over a vocabulary: what runtime.choice.Guide promises, by llguidance.

A grammar comes from a stranger. What it may cost is bounded before it is compiled, as it is compiled, and at each token: by its
size, by the work that llguidance allows itself, and by how much of it may be repeated inside what is repeated.
"""

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from runtime.choice import Allowed
from runtime.errors import InvalidRequest
from runtime.sampling import Constraint

COMPILE_S = 0.2  # of one thread, until the first mask is there
KEPT = 64  # compiled grammars, of at most limits.CONSTRAINT_BYTES each
WRITTEN_OUT = 10_000  # parts of an expression once all its counted repetitions are written out
LEXER_STATES = 20_000  # of one text; 1 to 2 kB each
SPACE = r"[ \t\n\r]{0,16}"  # between the parts of JSON: some models, once they indent, would go on until max_tokens
SHOWN = 64  # characters of a complaint, which may quote the grammar


def refusal(kind: str, why: str) -> InvalidRequest:
    shown = "".join(char if char.isprintable() else " " for char in why)[:SHOWN]
    return InvalidRequest(f"{kind} cannot be used ({shown}): give another one", "response_format")


class Matcher:
    """A Guide."""

    def __init__(self, matcher: LLMatcher, kind: str, vocabulary: int, eos: frozenset[int]) -> None:
        self._matcher, self._kind, self._vocabulary, self._eos = matcher, kind, vocabulary, eos

    def allowed(self) -> Allowed:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise refusal(self._kind, complaint(self._matcher))
        return np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_)

    def take(self, token: int) -> None:
        # A text that has ended is not gone on with; where it is complete, llguidance would call its end an error.
        if token not in self._eos and not self._matcher.consume_token(token):
            raise refusal(self._kind, f"token {token} does not follow")


class Grammars:
    """Compiles constraints for one tokenizer; called, it gives the beginning of a text. Any thread may, one at a time is served.

    `vocabulary`: columns of the model's logits; `eos`: the tokens that end a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, eos: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, eos
        self._known: LLTokenizer | None = None  # made when it is first needed: a second for a large vocabulary
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def __call__(self, constraint: Constraint) -> Matcher:
        """Raises InvalidRequest for what is no grammar, what could not be bounded, and what takes too long to compile."""
        with self._lock:
            matcher = self._compiled.get(constraint) or compiled(constraint, self._words(constraint.kind))
            self._compiled[constraint] = matcher
            self._compiled.move_to_end(constraint)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return Matcher(matcher.deep_copy(), constraint.kind, self._vocabulary, self._eos)

    def _words(self, kind: str) -> LLTokenizer:
        if not self._eos:
            raise refusal(kind, "the model has no token that ends a text")
        if self._known is None:
            most = max(self._vocabulary, len(self._tokenizer))
            try:
                self._known = from_tokenizer(self._tokenizer, n_vocab=most, eos_token=sorted(self._eos))
            except (ValueError, RuntimeError) as error:
                raise refusal(kind, "the model's tokenizer is of no kind that llguidance knows") from error
        return self._known


def compiled(constraint: Constraint, words: LLTokenizer) -> LLMatcher:
    """A matcher before the first token. Raises InvalidRequest."""
    began, kind = time.thread_time(), constraint.kind
    bounds = LLParserLimits(max_lexer_states=LEXER_STATES, verbose_errors=False)
    try:
        matcher = LLMatcher(words, grammar_of(constraint), log_level=0, limits=bounds)
        matcher.compute_bitmask()
    except ValueError as error:  # text that is no Unicode among them
        raise refusal(kind, str(error)) from error
    if matcher.is_error():
        raise refusal(kind, complaint(matcher))
    if time.thread_time() - began > COMPILE_S:
        raise refusal(kind, "it is too complex")
    return matcher


def grammar_of(constraint: Constraint) -> str:
    """In llguidance's own language, from a text that is no riddle. Raises InvalidRequest."""
    match constraint.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides={"whitespace_pattern": SPACE})
        case "json_schema":
            check_schema(constraint.text)
            return LLMatcher.grammar_from_json_schema(constraint.text, overrides={"whitespace_pattern": SPACE})
        case "regex":
            check_regex(constraint.text)
            return LLMatcher.grammar_from_regex(constraint.text)


def complaint(matcher: LLMatcher) -> str:
    """The line of llguidance's message that says what is wrong."""
    lines = matcher.get_error().splitlines() or ["nothing may follow"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


def check_schema(text: str) -> None:
    """Raises InvalidRequest for what is no JSON, refers to itself or to what is not in it, or has patterns that check_regex refuses."""
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise refusal("json_schema", "it is no object")
        Schema(schema).check(schema, ("#",))
    except ValueError as error:
        raise refusal("json_schema", f"it is no JSON: {error}") from error
    except RecursionError as error:
        raise refusal("json_schema", "it is nested too deeply") from error


class Schema:
    """`checked`: references that lead to parts that are in order."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self.checked: set[str] = set()

    def check(self, part: Any, above: tuple[str, ...]) -> None:
        """`above`: the references that have led here."""
        if isinstance(part, dict):
            for pattern in patterns_in(part):
                check_regex(pattern, "json_schema")
            reference = part.get("$ref")
            if isinstance(reference, str) and reference not in self.checked:
                if reference in above:
                    raise refusal("json_schema", "it refers to itself")
                self.check(self.find(reference), (*above, reference))
                self.checked.add(reference)
        for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            self.check(child, above)

    def find(self, reference: str) -> Any:
        """The part that a JSON pointer leads to."""
        part = self.whole
        try:
            if not reference.startswith("#/"):
                raise KeyError(reference)
            for step in unquote(reference[2:]).split("/"):
                part = part[int(step)] if isinstance(part, list) else part[step.replace("~1", "/").replace("~0", "~")]
        except (LookupError, ValueError, TypeError) as error:
            raise refusal("json_schema", f"$ref {reference} leads out of it") from error
        return part


def patterns_in(part: dict[str, Any]) -> Iterator[str]:
    """The expressions of one level of a schema."""
    named = part.get("patternProperties")
    for pattern in (part.get("pattern"), *(named if isinstance(named, dict) else ())):
        if isinstance(pattern, str):
            yield pattern


PIECE = re.compile(
    r"""\\[pPxu]\{[^}]*\}|\\.      # an escape
      | \[\^?\]?(?:\\.|[^]\\])*\]  # a class of characters
      | \{(\d+),?(\d*)\}          # a count
      | .""",
    re.DOTALL | re.VERBOSE,
)


def check_regex(pattern: str, kind: str = "regex") -> None:
    """Raises InvalidRequest where counted repetitions multiply: `(a{1000}){1000}` costs what a million letters do."""
    sizes, last = [0], 1  # of the groups that are open, and of what a count would be of
    for piece in PIECE.finditer(pattern):
        match piece[0]:
            case "(":
                sizes.append(0)
            case ")" if len(sizes) > 1:
                last = sizes.pop() or 1
                sizes[-1] += last
            case "*" | "+" | "?" | "|":
                pass
            case _ if piece[1]:
                times = max(1, int((piece[2] or piece[1])[:6]))
                sizes[-1] += last * (times - 1)
                last *= times
            case _:
                last = 1
                sizes[-1] += 1
    if max(sizes) > WRITTEN_OUT:
        raise refusal(kind, "it is too long once its counts are written out")
