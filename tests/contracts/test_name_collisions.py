"""Two texts with the same key, which a hostile drafter finds in seconds, change no token."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.rpc.client import GrpcLink
from runtime.core import node_keys
from runtime.core.accepted_path import AcceptedPath, accept_path
from runtime.core.messages import Commit, Draft, Event, Open, Reply, Request
from runtime.core.node_keys import child_keys, text_key
from runtime.core.sampling_params import SamplingParams
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import Drafter
from runtime.drafters.model import ModelDrafter
from runtime.drafters.noisy import NoisyDrafter
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.scoring.calibration import TemperatureBucket
from runtime.target.commands import AddRequest, Join, ReplyReceived
from runtime.target.session import Session
from tests.actors.rpc.test_network import Adversary
from tests.contracts.link_contract import TRANSPORTS, over_grpc, soon
from tests.support.fakes import ScriptedDrafter
from tests.support.harness import (
    HANG_S,
    Lockstep,
    Patient,
    answer,
    asking,
    attached,
    engine_of,
    hosted,
    lettering,
    plain,
    running,
)

# An attack on the real keys, found in three seconds: OTHER has the key of the first five tokens.
PROMPT = (3, 1, 4, 1, 5)
ROOT = text_key(PROMPT)
WIDE = ToyModel(vocabulary=151_936, context=512, memory=3)
TRUE = (62971, 73766, 103092, 65801, 8267, 1211, 31582, 73797)  # what WIDE writes after PROMPT
OTHER = (0, 585, 26894, 61868, 121695)

TOY = ToyModel(vocabulary=24, memory=3)


def growth(*chains: Sequence[int], below: int, session: str = "s", drafter: str = "d") -> Draft:
    """Chains of guesses below the text of this name, all of them certain."""
    parents = [text_key(guesses[:n], below) for guesses in chains for n in range(len(guesses))]
    tokens = np.array([*chain(*chains)], np.int32)
    return Draft(
        session, 0, drafter, np.array(parents, np.uint64), tokens, np.zeros(len(tokens), np.float32)
    )


@contextmanager
def short_names(bits: int = 16) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_keys, "KEY_MASK", (1 << bits) - 1)
        yield


def texts_named(
    name: int, below: int, length: int, vocabulary: int = TOY.vocabulary
) -> list[tuple[int, ...]]:
    """All chains of this length below the text named `below` that have this name."""
    names = np.array([below], np.uint64)
    for _ in range(length):
        names = child_keys(np.repeat(names, vocabulary), np.tile(np.arange(vocabulary), len(names)))
    places = np.unravel_index(np.flatnonzero(names == name), (vocabulary,) * length)
    return list(zip(*(place.tolist() for place in places), strict=True))


def session(model: ToyModel = WIDE) -> Session:
    return Session(
        Request("s", PROMPT, SamplingParams(max_tokens=20)),
        model.vocabulary,
        model.context,
        TemperatureBucket(),
    )


# One session


def test_the_attack_is_one() -> None:
    assert text_key(OTHER, ROOT) == text_key(TRUE[:5], ROOT)
    assert plain(WIDE, asking(PROMPT, max_tokens=8)).tokens == TRUE


def test_the_descent_follows_tokens_and_not_names() -> None:
    of = session()
    assert of.merge_drafts(growth(OTHER, TRUE[:4], below=ROOT)) == 9
    nodes = of.select(9)
    written = {TRUE[:n]: TRUE[n] for n in range(5)}
    accepted = accept_path(
        of.tree, nodes, [written.get(tuple(path), 0) for path in of.paths(nodes)]
    )
    assert ([of.tree.token[node] for node in accepted.path], accepted.token) == (
        [*TRUE[:4]],
        TRUE[4],
    )
    commit, hit = of.apply(accepted)
    assert (commit.tokens, commit.key, hit) == (TRUE[:5], text_key(TRUE[:5], ROOT), False)
    assert len(of.tree) == 1, "nothing of the other text hangs on the new root"


def test_a_second_text_under_a_taken_name_is_refused() -> None:
    of = session()
    assert of.merge_drafts(growth(OTHER, TRUE[:5], below=ROOT)) == 9
    assert +of.ignored == {"collision": 1}
    assert of.tree.descend(TRUE[:4]) is not None
    assert of.tree.descend(TRUE[:5]) is None


def test_the_name_of_the_root_is_taken_too() -> None:
    with short_names(8):
        of, root = session(TOY), text_key(PROMPT)
        alike = texts_named(root, root, 2)[0]
        assert of.merge_drafts(growth(alike, below=root)) == 1
        assert +of.ignored == {"collision": 1}


def test_what_one_drafter_calls_so_is_nothing_to_another() -> None:
    """The other text is neither refused nor attached to the wrong node; its echo matches it."""
    of = session()
    of.merge_drafts(growth(OTHER, below=ROOT, drafter="hostile"))
    assert of.merge_drafts(growth(TRUE, below=ROOT, drafter="honest")) == len(TRUE)
    assert of.merge_drafts(growth(TRUE[:4], below=ROOT, drafter="hostile")) == 0
    assert +of.ignored == {"repeated": 4}
    for text, names in (
        (OTHER, ["hostile"]),
        (TRUE, ["honest"]),
        (TRUE[:4], ["honest", "hostile"]),
    ):
        node = of.tree.descend(text)
        assert node is not None
        assert of.tree.drafters_of(node) == names
    of.apply(AcceptedPath(tuple(of.tree.descend(TRUE[:n]) or 0 for n in range(1, 6)), TRUE[5]))
    assert [of.tree.tokens_to(node) for node in range(1, len(of.tree))] == [[TRUE[6]], [*TRUE[6:8]]]
    assert of.merge_drafts(growth(TRUE[6:], [7], below=of.tree.key[0], drafter="honest")) == 1


def test_growth_that_arrives_under_a_passed_name_is_not_late() -> None:
    """Otherwise fewer would be stale than none, and the session's figures could not be sent."""
    with short_names(8):
        of = session(TOY)
        of.apply(AcceptedPath((), 5))
        root = of.tree.key[0]
        alike = texts_named(of.passed_keys[0], root, 2)[0]
        assert of.merge_drafts(growth(alike, below=root)) == 2
        assert (
            of.merge_drafts(
                replace(
                    growth([1], [2], [3], below=of.passed_keys[0]),
                    parents=np.array([of.passed_keys[0]] * 2 + [1 << 40], np.uint64),
                )
            )
            == 2
        )
        assert +of.ignored == {"stale": 1}


# Who is blamed


def test_who_sends_two_texts_of_one_name_is_struck_and_nobody_else() -> None:
    engine, struck = engine_of(WIDE), Counter[str]()

    def striking(name: str) -> Callable[[str], object]:
        return lambda why: struck.update([name])

    for name in ("hostile", "honest"):
        engine.handle(Join(name, lambda event: None, striking(name)))
    engine.handle(AddRequest(asking(PROMPT), lettering()(asking(PROMPT)), lambda chunk: None))
    engine.requests.start(engine.scheduler.style)
    expected: list[tuple[str, Sequence[Sequence[int]], int]] = [
        ("hostile", [OTHER], 0),
        ("honest", [TRUE], 0),
        ("hostile", [TRUE[:4]], 0),
        ("hostile", [TRUE], 1),
        ("honest", [TRUE], 1),
        ("honest", [OTHER], 1),
        ("nobody", [OTHER, TRUE], 1),  # a drafter that has left meanwhile
    ]
    for name, chains, strikes in expected:
        engine.handle(ReplyReceived(growth(*chains, below=ROOT, drafter=name), 0.0))
        assert struck["hostile"] == strikes
    assert struck.keys() <= {"hostile", "honest"}


# Through all that is real


class Liar(ScriptedDrafter):
    """Answers each text with what `lie` makes of it: session, number of its tokens, its name."""

    def __init__(self, lie: Callable[[str, int, int], Draft]) -> None:
        super().__init__()
        self.lie = lie

    def answer(self, sessions: set[str], event: Event) -> Reply | None:
        match event:
            case Open(session=name, tokens=tokens):
                sessions.add(name)
                return self.lie(name, len(tokens), text_key(tokens))
            case Commit(session=name, base=base, tokens=tokens, key=key) if name in sessions:
                return self.lie(name, base + len(tokens), key)
            case _:
                return None


def test_the_attack_over_grpc_changes_no_token() -> None:
    """As it was found: the other text, then the true one up to where they have one name."""

    def lie(name: str, length: int, key: int) -> Draft:
        later = [[n] for n in range(9)]  # so that nobody waits for more
        return growth(
            *((OTHER, TRUE[:4]) if length == len(PROMPT) else later), below=key, session=name
        )

    async def main() -> None:
        async with over_grpc(Liar(lie)) as link, running(WIDE, Patient(9)) as target:
            await attached(target, "scripted", link)
            found = await answer(target, asking(PROMPT, max_tokens=8))
        assert found.tokens == TRUE
        assert found.stats.by_drafter == {"scripted": 4}

    asyncio.run(main())


def test_a_drafter_that_sends_two_texts_of_one_name_is_shut_out() -> None:
    def lie(name: str, length: int, key: int) -> Draft:
        return growth(OTHER, TRUE[:5], below=key, session=name)

    async def main() -> None:
        async with over_grpc(Liar(lie)) as link, running(WIDE, Fixed(9, HANG_S)) as target:
            assert isinstance(link, GrpcLink)
            target.attach("scripted", link, link.strike)
            await soon(lambda: "scripted" in target.engine.drafters)
            for name in "abc":
                assert not link.quarantined
                found = await answer(target, asking(PROMPT, session=name, max_tokens=5))
                assert found.tokens == TRUE[:5]
            await soon(lambda: target.drafters == ())
            assert link.quarantined
            assert link.counters["malformed"] == 3
            assert target.lost == {"scripted": 1}
            assert (await answer(target, asking(PROMPT, max_tokens=8))).tokens == TRUE

    asyncio.run(main())


# Any collision


class Collider:
    """Knows the output and adds another text with the same key to every draft."""

    def __init__(self, prompt: Sequence[int], written: Sequence[int], random: Random) -> None:
        self.text, self.random, self.length, self.made = [*prompt, *written], random, len(prompt), 0

    def __call__(self, message: Event | Reply) -> list[Event | Reply]:
        if isinstance(message, Commit):
            self.length = message.base + len(message.tokens)
        if not isinstance(message, Draft):
            return [message]
        return self.random.choice([[message, self.collision()], [self.collision(), message]])

    def collision(self, session: str = "s") -> Draft:
        """Returns the true text below the newest root, up to a collision, and the other text."""
        key, true = text_key(self.text[: self.length]), self.text[self.length : self.length + 4]
        alike = [
            text
            for text in texts_named(text_key(true, key), key, len(true))
            if text[-1:] != (*true[-1:],)
        ]
        self.made += bool(alike)
        chains = [*alike[:1], true[: self.random.choice([3, 4])]]
        return growth(*self.random.sample(chains, len(chains)), below=key, session=session)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@given(seed=st.integers(0, 10**9))
@settings(max_examples=15)
def test_no_collision_of_names_changes_a_token(temperature: float, seed: int) -> None:
    """Messages are lost, repeated, delayed and forged, with keys of 16 bits and of 8."""
    request = asking(PROMPT, temperature=temperature, seed=seed, max_tokens=20)
    expected = plain(TOY, request)
    for bits in (16, 8):
        with short_names(bits):
            random = Random(seed)
            collider, adversary = Collider(PROMPT, expected.tokens, random), Adversary(seed)
            drafters: list[Drafter] = [
                ModelDrafter(TOY, branches=2),
                NoisyDrafter(ModelDrafter(TOY), TOY.vocabulary, 0.3),
            ]
            growers = [DraftEngine(drafter, f"d-{n}", 3) for n, drafter in enumerate(drafters)]

            def tamper(
                message: Event | Reply,
                adversary: Adversary = adversary,
                collider: Collider = collider,
            ) -> list[Event | Reply]:
                return [arriving for sent in collider(message) for arriving in adversary(sent)]

            (found,) = Lockstep(engine_of(TOY), *growers, tamper=tamper).run(request)
        assert found.said() == expected.said()
        assert min(found.stats.ignored.values(), default=0) >= 0


def test_collisions_do_happen_there_and_guesses_get_through() -> None:
    made, accepted, ignored = 0, 0, Counter[str]()
    expected = plain(TOY, asking(PROMPT))
    for seed in range(8):
        with short_names():
            collider = Collider(PROMPT, expected.tokens, Random(seed))
            (found,) = Lockstep(
                engine_of(TOY), DraftEngine(ModelDrafter(TOY), "d", 3), tamper=collider
            ).run(asking(PROMPT))
        assert found.said() == expected.said()
        made, accepted = made + collider.made, accepted + found.stats.accepted
        ignored.update(found.stats.ignored)
    assert made > 20
    assert accepted > 50
    assert ignored["collision"] > 5


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_collision_changes_a_token_through_links_and_threads(transport: str) -> None:
    expected = plain(TOY, asking(PROMPT, max_tokens=40))
    collider = Collider(PROMPT, expected.tokens, Random(1))

    def lie(name: str, length: int, key: int) -> Draft:
        collider.length = length
        return collider.collision(name)

    async def main() -> None:
        async with (
            running(TOY, Fixed(8, HANG_S)) as target,
            hosted(ModelDrafter(TOY, branches=2)) as host,
            TRANSPORTS[transport](host) as honest,
            TRANSPORTS[transport](Liar(lie)) as liar,
        ):
            await attached(target, "honest", honest)
            await attached(target, "liar", liar)
            found = await answer(target, asking(PROMPT, max_tokens=40))
            assert host.alive
        assert found.said() == expected.said()
        assert found.stats.accepted > 0

    with short_names():
        asyncio.run(main())
    assert collider.made > 5
