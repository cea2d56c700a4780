"""Rejects grammars that cannot be bounded, before anything compiles them."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any
from urllib.parse import unquote

from runtime.core import limits
from runtime.core.errors import InvalidRequest

MAX_REGEX_PARTS = 10_000  # parts of an expression once all its counted repetitions are written out
MAX_REGEX_PRODUCT = 10_000  # of the sizes of the expressions that one string has to match
FORMAT_PARTS = 100  # size of the expression of a `format`
MAX_COMBINE_STEPS = 20_000  # steps of combining the parts of a schema
MAX_REASON_CHARS = 64  # characters of a complaint, which may quote the grammar


def refusal(kind: str, why: str) -> InvalidRequest:
    shown = "".join(char if char.isprintable() else " " for char in why)[:MAX_REASON_CHARS]
    return InvalidRequest(f"{kind} cannot be used ({shown}): give another one", "response_format")


def check_schema(text: str) -> None:
    """Raises InvalidRequest for a schema whose cost cannot be bounded.

    The schema is invalid JSON, is recursive, has references that lead out of it, has expressions
    that are too long or that multiply, or has objects with too many properties.
    """
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise refusal("json_schema", "it is not an object")
        references = References(schema)
        references.check(schema, ("#",))
        SchemaShapes(references).of(schema)
    except ValueError as error:
        raise refusal("json_schema", f"invalid JSON: {error}") from error
    except RecursionError as error:
        raise refusal("json_schema", "it is nested too deeply") from error


class References:
    """Resolves the references of a schema."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self.checked: set[str] = set()  # references that lead to parts that are in order

    def check(self, part: Any, above: tuple[str, ...]) -> None:
        """Raises InvalidRequest if a reference in `part` leads nowhere or to one of `above`."""
        reference = part.get("$ref") if isinstance(part, dict) else None
        if isinstance(reference, str) and reference not in self.checked:
            if reference in above:
                raise refusal("json_schema", "it refers to itself")
            self.check(self.find(reference), (*above, reference))
            self.checked.add(reference)
        for child in children(part):
            self.check(child, above)

    def find(self, reference: str) -> Any:
        """Returns the part that a JSON pointer leads to."""
        part = self.whole
        try:
            if not reference.startswith("#/"):
                raise KeyError(reference)
            for step in unquote(reference[2:]).split("/"):
                key = step.replace("~1", "/").replace("~0", "~")
                part = part[int(step)] if isinstance(part, list) else part[key]
        except (LookupError, ValueError, TypeError) as error:
            raise refusal("json_schema", f"$ref {reference} leads out of it") from error
        return part


def children(part: Any) -> Iterable[Any]:
    return part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


@dataclass(frozen=True, slots=True, eq=False)
class SchemaShape:
    """The constraints that a schema puts on one place of a JSON text, as far as they multiply.

    sizes       sizes of the expressions that a string must match at once
    properties  number of names that an object may have, summed over alternatives
    named       shapes of the values of properties
    others      shape of every other value inside this one
    """

    sizes: tuple[int, ...] = ()
    properties: int = 0
    named: dict[str, "SchemaShape"] = field(default_factory=dict)
    others: "SchemaShape | None" = None

    def at(self, name: str) -> "SchemaShape":
        return self.named.get(name) or self.others or ANYTHING


ANYTHING = SchemaShape()


class SchemaShapes:
    """Combines the parts of a schema as a grammar library does, and refuses what multiplies.

    A product of expressions is an automaton with as many states as the product of theirs, and
    already its first step can take for ever.
    """

    def __init__(self, references: References) -> None:
        self._references = references
        self._known: dict[int, SchemaShape] = {}  # by the identity of a part
        self._both: dict[tuple[SchemaShape, SchemaShape], SchemaShape] = {}
        self._either: dict[tuple[SchemaShape, SchemaShape], SchemaShape] = {}
        self._steps = 0

    def of(self, part: Any) -> SchemaShape:
        """Returns the shape of a part whose references are in order. Raises InvalidRequest."""
        if not isinstance(part, dict):
            return ANYTHING
        if id(part) not in self._known:
            self._known[id(part)] = reduce(self.both, self._parts(part))
        return self._known[id(part)]

    def _parts(self, part: dict[str, Any]) -> Iterator[SchemaShape]:
        """Yields what must hold at the same time."""
        yield self._own(part)
        if isinstance(reference := part.get("$ref"), str):
            yield self.of(self._references.find(reference))
        for one in list_at(part, "allOf"):
            yield self.of(one)
        for key in ("anyOf", "oneOf"):
            if options := list_at(part, key):
                yield reduce(self.either, map(self.of, options))

    def _own(self, part: dict[str, Any]) -> SchemaShape:
        sizes = [FORMAT_PARTS] if isinstance(part.get("format"), str) else []
        if isinstance(pattern := part.get("pattern"), str):
            sizes.append(check_regex(pattern, "json_schema"))
        patterned = dict_at(part, "patternProperties")
        names = sorted(check_regex(pattern, "json_schema") for pattern in patterned)
        check_product(names[-2:])  # no two may fit one name
        properties = dict_at(part, "properties")
        inside = [
            *patterned.values(),
            part.get("additionalProperties"),
            part.get("items"),
            *list_at(part, "items"),
            *list_at(part, "prefixItems"),
        ]
        return self._checked(
            tuple(sizes),
            len(properties),
            {name: self.of(value) for name, value in properties.items()},
            reduce(self.either, map(self.of, inside)),
        )

    def both(self, one: SchemaShape, other: SchemaShape) -> SchemaShape:
        """Returns the shape of what fits both."""
        if ANYTHING in (one, other):
            return one if other is ANYTHING else other
        if (one, other) not in self._both:
            names = one.named | other.named
            self._count(names)
            named = {name: self.both(one.at(name), other.at(name)) for name in names}
            others = self.both(one.others or ANYTHING, other.others or ANYTHING)
            most = max(len(names), one.properties, other.properties)
            found = self._checked(one.sizes + other.sizes, most, named, others)
            self._both[one, other] = found
        return self._both[one, other]

    def either(self, one: SchemaShape, other: SchemaShape) -> SchemaShape:
        """Returns a shape that covers both."""
        if one is other or other is ANYTHING:
            return one
        if one is ANYTHING:
            return other
        if (one, other) not in self._either:
            names = one.named | other.named
            self._count(names)
            named = {name: self.either(one.at(name), other.at(name)) for name in names}
            others = self.either(one.others or ANYTHING, other.others or ANYTHING)
            sizes = max(one.sizes, other.sizes, key=product)
            found = self._checked(sizes, one.properties + other.properties, named, others)
            self._either[one, other] = found
        return self._either[one, other]

    def _checked(
        self,
        sizes: tuple[int, ...],
        properties: int,
        named: dict[str, SchemaShape],
        others: SchemaShape,
    ) -> SchemaShape:
        check_product(sizes)
        if properties > (most := limits.SCHEMA_PROPERTIES):
            raise refusal(
                "json_schema", f"{properties} properties at one place, the most is {most}"
            )
        if not sizes and not named and others is ANYTHING:
            return ANYTHING
        return SchemaShape(sizes, properties, named, others)

    def _count(self, names: Iterable[str]) -> None:
        self._steps += 1 + len(list(names))
        if self._steps > MAX_COMBINE_STEPS:
            raise refusal("json_schema", "its parts combine in too many ways")


def list_at(part: dict[str, Any], key: str) -> list[Any]:
    found = part.get(key)
    return found if isinstance(found, list) else []


def dict_at(part: dict[str, Any], key: str) -> dict[str, Any]:
    found = part.get(key)
    return found if isinstance(found, dict) else {}


def product(sizes: Iterable[int]) -> int:
    return math.prod(max(size, 1) for size in sizes)


def check_product(sizes: Sequence[int]) -> None:
    """Raises InvalidRequest if expressions that go together have too many parts together."""
    if len(sizes) > 1 and product(sizes) > MAX_REGEX_PRODUCT:
        raise refusal(
            "json_schema", f"its patterns multiply to more than {MAX_REGEX_PRODUCT} parts"
        )


PIECE = re.compile(
    r"""\\[pPxu]\{[^}]*\}|\\.      # an escape
      | \[\^?\]?(?:\\.|[^]\\])*\]  # a class of characters
      | \{(\d+),?(\d*)\}          # a count
      | .""",
    re.DOTALL | re.VERBOSE,
)


def check_regex(pattern: str, kind: str = "regex") -> int:
    """Returns the number of parts of an expression with its counted repetitions written out.

    Raises InvalidRequest for too many: `(a{1000}){1000}` costs what a million letters do.
    """
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
    if max(sizes) > MAX_REGEX_PARTS:
        raise refusal(kind, "it is too long once its counts are written out")
    return max(sizes)
