"""Every constrained output fits and is the same with drafters, which know no constraint."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import InvalidRequest
from runtime.core.messages import Request
from runtime.core.sampler_reference import Allowed, reference_sample
from runtime.core.sampling_params import Constraint, SamplingParams
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import Drafter
from runtime.drafters.model import ModelDrafter
from runtime.drafters.noisy import NoisyDrafter
from runtime.model_paths import bundled_model
from runtime.models import sampler as fast
from runtime.models.grammar import GrammarCompiler
from runtime.models.loader import load_model, load_tokenizer
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from tests.support.harness import (
    Known,
    Lockstep,
    Mute,
    Output,
    answer,
    asking,
    attached,
    engine_of,
    hosted,
    output,
    plain,
    running,
)

EOS = frozenset({0})
PROMPT = (30, 10, 40, 10, 50)
TOY = ToyModel(vocabulary=4096, memory=3, sharpness=3.0)
SCHEMA = Constraint(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "path": {"type": "string", "maxLength": 30},
                "lines": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["path", "lines"],
            "additionalProperties": False,
        }
    ),
)
REGEX = Constraint("regex", r"[a-z_]{3,12}\([a-z]+(, [a-z]+){2,8}\)(\.[a-z]{2,9}){1,4}")
CONSTRAINTS = pytest.mark.parametrize("constraint", [SCHEMA, REGEX], ids=["json_schema", "regex"])
TEMPERATURES = pytest.mark.parametrize("temperature", [0.0, 0.8])

# A drafter for a text that is known to the test.
DRAFTERS: dict[str, Callable[[list[int]], Drafter]] = {
    "perfect": lambda text: Known(text, 4096, 2),
    "noisy": lambda text: NoisyDrafter(Known(text, 4096, 2), 4096, 0.3),
    "ignorant": lambda text: ModelDrafter(TOY, branches=2),
    "mute": lambda text: Mute(),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(bundled_model("target"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tokenizer, 4096, EOS)
    yield made
    made.close()


def check(grammars: GrammarCompiler, tokenizer: Any, constraint: Constraint, found: Output) -> None:
    """Every token was allowed, and a text that has ended is what was asked for."""
    guide = grammars(constraint)
    for token in found.tokens:
        assert guide.allowed()[token]
        guide.accept_token(token)
    if found.reason == "stop" and constraint.kind == "regex":
        assert re.fullmatch(constraint.text, text_of(tokenizer, found))
    elif found.reason == "stop":
        value = json.loads(text_of(tokenizer, found))
        assert value.keys() == {"path", "lines"}
        assert isinstance(value["path"], str)
        assert all(isinstance(line, int) for line in value["lines"])


def text_of(tokenizer: Any, found: Output) -> str:
    decoded: str = tokenizer.decode([token for token in found.tokens if token not in EOS])
    return decoded


@TEMPERATURES
@CONSTRAINTS
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_speculation_on_is_speculation_off(
    drafter: str,
    constraint: Constraint,
    temperature: float,
    tokenizer: Any,
    grammars: GrammarCompiler,
) -> None:
    request = asking(
        PROMPT, max_tokens=40, temperature=temperature, seed=5, constraint=constraint, logprobs=2
    )
    alone = plain(TOY, request, EOS, grammar=grammars)
    draft_engine = DraftEngine(DRAFTERS[drafter]([*PROMPT, *alone.tokens]), "d", 2)
    (found,) = Lockstep(engine_of(TOY, 8, EOS), draft_engine, passes=4, grammar=grammars).run(
        request
    )
    assert found.said() == alone.said()
    assert found.logprobs == alone.logprobs
    check(grammars, tokenizer, constraint, found)
    if drafter == "perfect":
        assert found.stats.rounds <= -(-len(found.tokens) // 4)
    if drafter == "noisy":
        assert 0 < found.stats.accepted < len(found.tokens)


@TEMPERATURES
@CONSTRAINTS
def test_the_shipped_pair(
    constraint: Constraint, temperature: float, tokenizer: Any, grammars: GrammarCompiler, pair: Any
) -> None:
    target, draft = pair
    prompt = tokenizer.encode("def copy_file(src, dst):\n    ")
    request = asking(prompt, max_tokens=32, temperature=temperature, seed=2, constraint=constraint)
    alone = plain(target, request, EOS, fast.choose, grammars)
    draft_engine = DraftEngine(ModelDrafter(draft, branches=2), "d", 2)
    (found,) = Lockstep(
        engine_of(target, 8, EOS, fast.choose), draft_engine, passes=4, grammar=grammars
    ).run(request)
    assert found.said() == alone.said()
    check(grammars, tokenizer, constraint, found)
    assert found.stats.accepted > 0


@pytest.fixture(scope="module")
def pair() -> Any:
    return load_model(bundled_model("target"), "float32", "cpu"), load_model(
        bundled_model("draft"), "float32", "cpu"
    )


class Counting:
    """A regular expression's guide that counts its masks."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.masks = inner, 0

    def allowed(self) -> Allowed:
        self.masks += 1
        mask: Allowed = self.inner.allowed()
        return mask

    def accept_token(self, token: int) -> None:
        self.inner.accept_token(token)


def test_a_step_costs_a_mask_for_each_token_that_it_decides(grammars: GrammarCompiler) -> None:
    guides: list[Counting] = []

    def counted(constraint: Constraint) -> Counting:
        guides.append(Counting(grammars(constraint)))
        return guides[-1]

    request = asking(PROMPT, max_tokens=30, constraint=REGEX)
    alone = plain(TOY, request, EOS, grammar=grammars)
    wide = DraftEngine(Known([*PROMPT, *alone.tokens], 4096, 6), "d", 4)
    (found,) = Lockstep(engine_of(TOY, 32, EOS), wide, passes=4, grammar=counted).run(request)
    assert found.tokens == alone.tokens
    assert found.stats.verified > 4 * len(found.tokens)
    assert len(found.tokens) <= guides[0].masks <= len(found.tokens) + limit_of_a_step(found)


def limit_of_a_step(found: Output) -> int:
    """Tokens that a last step may have decided beyond the end."""
    return len(found.stats.histogram)


@pytest.mark.parametrize(
    "early",
    [
        {"min_tokens": 20},
        {"ignore_eos": True},
        {"min_tokens": 20, "ignore_eos": True, "temperature": 0.8},
    ],
)
def test_a_complete_text_ends_however_much_longer_it_was_to_be(
    early: dict[str, Any], tokenizer: Any, grammars: GrammarCompiler
) -> None:
    request = asking(PROMPT, max_tokens=30, constraint=Constraint("regex", "(yes|no)!"), **early)
    alone = plain(TOY, request, EOS, grammar=grammars)
    assert (text_of(tokenizer, alone) in ("yes!", "no!"), alone.reason, alone.tokens[-1]) == (
        True,
        "stop",
        0,
    )
    assert len(alone.tokens) < 8
    knowing = DraftEngine(
        Known([*PROMPT, *alone.tokens, 9, 9, 9], 4096), "d"
    )  # goes on behind the end
    (found,) = Lockstep(engine_of(TOY, 8, EOS), knowing, passes=9, grammar=grammars).run(request)
    assert found.said() == alone.said()


def test_an_end_that_is_not_wanted_waits_until_nothing_else_is_allowed(
    tokenizer: Any, grammars: GrammarCompiler
) -> None:
    """After "a" the text may end or go on: with ignore_eos it goes on."""
    request = asking(
        PROMPT,
        max_tokens=30,
        constraint=Constraint("regex", "a{1,40}"),
        ignore_eos=True,
        logit_bias=((0, 100.0),),
    )
    assert len(text_of(tokenizer, plain(TOY, request, EOS, grammar=grammars))) == 40


def test_a_grammar_that_becomes_too_complex_ends_its_session_alone(
    grammars: GrammarCompiler,
) -> None:
    class Failing(Counting):
        def allowed(self) -> Allowed:
            if self.masks == 5:
                raise InvalidRequest("too complex", "response_format")
            return super().allowed()

    lockstep = Lockstep(
        engine_of(TOY, 8, EOS), grammar=lambda constraint: Failing(grammars(constraint))
    )
    bad, good = lockstep.run(asking(PROMPT, "bad", constraint=REGEX), asking(PROMPT, "good"))
    assert (bad.reason, bad.error, len(bad.tokens)) == ("error", "InvalidRequest: too complex", 5)
    assert good.said() == plain(TOY, asking(PROMPT), EOS).said()


# At the target


def test_requests_with_constraints_beside_each_other(grammars: GrammarCompiler) -> None:
    async def main() -> None:
        requests = [
            asking(
                PROMPT,
                f"s{n}",
                max_tokens=16,
                temperature=0.4 * n,
                seed=n,
                constraint=(None, SCHEMA, REGEX)[n % 3],
            )
            for n in range(6)
        ]
        async with (
            running(TOY, Fixed(4, 0.01), EOS, grammar=grammars) as asked,
            hosted(ModelDrafter(TOY), width=2) as host,
        ):
            await attached(asked, "d", host)
            found = await asyncio.gather(*(answer(asked, request) for request in requests))
        assert [one.said() for one in found] == [
            plain(TOY, request, EOS, grammar=grammars).said() for request in requests
        ]

    asyncio.run(main())


def test_a_text_decided_in_part_is_gone_on_with_where_its_constraint_stands(
    grammars: GrammarCompiler,
) -> None:
    async def main() -> None:
        sampling = SamplingParams(max_tokens=24, constraint=SCHEMA, temperature=0.8, seed=3)
        whole = plain(TOY, Request("s", PROMPT, sampling), EOS, grammar=grammars)
        async with running(TOY, Fixed(8), EOS, grammar=grammars) as asked:
            for cut in (1, 9, 23):
                found = await answer(
                    asked, Request("s", PROMPT, sampling, committed=whole.tokens[:cut], epoch=2)
                )
                assert (found.tokens, found.reason) == (whole.tokens[cut:], whole.reason)
            with pytest.raises(
                InvalidRequest,
                match="committed token 9, at index 1, breaks the response_format",
            ) as caught:
                await answer(asked, Request("s", PROMPT, sampling, committed=(whole.tokens[0], 9)))
            assert caught.value.param == "committed"

    asyncio.run(main())


def test_a_constraint_that_cannot_be_used_is_refused_before_the_first_piece(
    grammars: GrammarCompiler,
) -> None:
    async def main() -> None:
        async with (
            running(TOY, Fixed(8), EOS, grammar=grammars) as asked,
            running(TOY, Fixed(8), EOS) as ignorant,
        ):
            for target, says in (
                (asked, "unclosed group"),
                (ignorant, "does not support response_format"),
            ):
                with pytest.raises(InvalidRequest, match=says) as caught:
                    await anext(
                        target.generate(asking(PROMPT, constraint=Constraint("regex", "(")))
                    )
                assert caught.value.param == "response_format"
                assert (
                    output([chunk async for chunk in target.generate(asking(PROMPT))]).reason
                    == "length"
                )

    asyncio.run(main())


def test_the_noise_of_a_position_is_the_same_with_a_constraint(grammars: GrammarCompiler) -> None:
    """A constraint that bars nothing likely changes nothing; drafters guess as well as before."""
    free = plain(TOY, asking(PROMPT, temperature=0.8, seed=1, max_tokens=12), EOS)
    mask = np.ones(4096, np.bool_)

    class Anything:
        def allowed(self) -> Allowed:
            return mask

        def accept_token(self, token: int) -> None:
            pass

    request = asking(PROMPT, temperature=0.8, seed=1, max_tokens=12, constraint=REGEX)
    assert (
        plain(TOY, request, EOS, reference_sample, lambda constraint: Anything()).tokens
        == free.tokens
    )
