"""Every head in the folder: right on a target, bounded, forgetful; alone and beside drafters. And the seam that they sit in."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from runtime.core import limits
from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import InvalidRequest, ModelRefused
from runtime.core.node_keys import text_key
from runtime.core.sampler_reference import Sampler, reference_sample
from runtime.core.tree import TokenTree
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import Text
from runtime.drafters.model import ModelDrafter
from runtime.heads.base import Head, HeadContext, VerifiedStep
from runtime.heads.hidden_transfer import HiddenTransfer
from runtime.heads.medusa import Medusa
from runtime.method_registry import head_methods, module_name
from runtime.models.base import Branch, Model, ModelIdentity, OutputSpec, causal
from runtime.models.head_checkpoint import write_checkpoint
from runtime.models.hf import HFModel
from runtime.models.llama import is_llama
from runtime.models.sampler import choose
from runtime.models.toy import ToyModel
from runtime.schedulers.base import Plan, SessionView
from runtime.schedulers.fixed import Fixed
from runtime.scoring.drafter_utility import REST_COMMITS, TRIAL_COMMITS
from runtime.target.commands import SetScheduler
from runtime.target.engine import Engine
from runtime.target.head_runner import MountedHead, make_draft, rows_by_end_probability
from runtime.target.session import Session
from runtime.target.verifier import Verifier
from tests.contracts.test_drafters import holds
from tests.support.families import FAMILIES, VOCABULARY, hf_model
from tests.support.harness import NOBODY, Known, Lockstep, Mute, asking, continued, output, plain

PROMPT = (3, 1, 4, 1, 5, 9, 3, 1, 4, 1)
TOY = ToyModel(vocabulary=24, memory=3)
TEXT = continued(TOY, PROMPT, 100)
HEADS = pytest.mark.parametrize("method", head_methods())
IDENTITY = ModelIdentity(32, 2, VOCABULARY, "hash")
SETTINGS: dict[str, dict[str, Any]] = {
    "medusa": {"heads": 3, "blocks": 2},
    "hidden-transfer": {"layers": [1, 1]},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of heads that know nothing: random weights, but small ones, so that they say much the same as the target."""
    torch.manual_seed(1)
    modules = {"medusa": Medusa(32, 3, 2), "hidden-transfer": HiddenTransfer(32, [1, 1])}
    folders = {}
    for method, module in modules.items():
        for parameter in module.parameters():
            parameter.data += torch.randn_like(parameter) * 0.02
        folders[method] = tmp_path_factory.mktemp("heads") / method
        write_checkpoint(
            folders[method], method, IDENTITY, SETTINGS[method], dict(module.state_dict())
        )
    return folders


def built(method: str, trained: Mapping[str, Path], model: HFModel | None = None) -> Head:
    mount = HeadContext(model or hf_model("llama"), IDENTITY, trained.get(method))
    head: Head = import_module(f"runtime.heads.{module_name(method)}").build(mount)
    mount.model.check(head.output_spec)
    return head


def headed(model: Model, *mounted: Head, rows: int = 8, chooser: Sampler = choose) -> Engine:
    """An engine whose clock ticks once for each look at it; its heads are h-0, h-1, ..."""
    ticks = itertools.count()
    named = {f"h-{number}": MountedHead(head) for number, head in enumerate(mounted)}
    return Engine(
        model, Verifier(chooser, NOBODY), Fixed(rows), lambda: float(next(ticks)), heads=named
    )


# The contract


@HEADS
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_the_targets(
    method: str, temperature: float, family: str, trained: dict[str, Path]
) -> None:
    model = hf_model(family)
    if method == "hidden-transfer" and not is_llama(model.module):
        with pytest.raises(ModelRefused, match="takes no pseudo rows"):
            built(method, trained, model)
        return
    head = built(method, trained, model)
    requests = [
        asking(
            (*PROMPT, n),
            f"s{n}",
            max_tokens=24,
            temperature=temperature,
            seed=n,
            top_k=9 * n,
            top_p=1 - n / 9,
        )
        for n in range(3)
    ]
    found = Lockstep(headed(model, head)).run(*requests)
    assert [one.said() for one in found] == [
        plain(model, request, chooser=choose).said() for request in requests
    ]
    assert sum(one.stats.verified for one in found) > 0


@HEADS
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_beside_drafters_and_all_other_heads(
    method: str, temperature: float, trained: dict[str, Path]
) -> None:
    model = hf_model("llama")
    request = asking(PROMPT, max_tokens=40, temperature=temperature, seed=3)
    mounted = [
        built(method, trained),
        *(built(other, trained) for other in head_methods() if other != method),
    ]
    engine = headed(model, *mounted, rows=16)
    (found,) = Lockstep(engine, DraftEngine(ModelDrafter(hf_model("llama")), "d", 2), passes=1).run(
        request
    )
    assert found.said() == plain(model, request, chooser=choose).said()
    assert found.stats.by_drafter["d"] > 0
    assert engine.metrics.guesses["h-0"].proposed > 0
    assert engine.metrics.fallbacks == {}


@dataclass(frozen=True, slots=True)
class Watching:
    """Another head, whose growths are looked at."""

    inner: Head
    growths: list[DraftNodes]

    @property
    def output_spec(self) -> OutputSpec:
        return self.inner.output_spec

    def propose(self, seen: Sequence[VerifiedStep]) -> Sequence[DraftNodes]:
        found = self.inner.propose(seen)
        self.growths.extend(found)
        return found

    def close(self, session: str) -> None:
        self.inner.close(session)


@HEADS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_growth_is_bounded_and_makes_sense(
    method: str, temperature: float, trained: dict[str, Path]
) -> None:
    growths: list[DraftNodes] = []
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "seed": 5,
        "top_k": 3,
        "frequency_penalty": 0.5,
    }
    Lockstep(headed(hf_model("llama"), Watching(built(method, trained), growths))).run(
        asking(PROMPT, max_tokens=40, **sampling)
    )
    assert sum(len(growth.tokens) for growth in growths) > 0
    for growth in growths:
        assert len(growth.parents) == len(growth.tokens) == len(growth.scores) <= limits.DRAFT_NODES
        assert all(0 <= parent <= place for place, parent in enumerate(growth.parents.tolist()))
        assert ((growth.tokens >= 0) & (growth.tokens < VOCABULARY)).all()
        assert np.isfinite(growth.scores).all()
        assert (growth.scores <= 0).all()
        pairs = list(zip(growth.parents.tolist(), growth.tokens.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)


@HEADS
def test_nothing_is_left_of_a_closed_session(method: str, trained: dict[str, Path]) -> None:
    head = built(method, trained)
    Lockstep(headed(hf_model("llama"), head)).run(
        asking(PROMPT, "session-one"), asking(PROMPT[:-1], "session-two")
    )
    head.close("session-one")
    head.close("session-never-seen")
    assert not holds(head, "session-one")


@HEADS
def test_the_cache_never_shows_a_head(method: str, trained: dict[str, Path]) -> None:
    """After any steps with it, keys and values are those of the text alone."""
    model = hf_model("llama")
    lockstep = Lockstep(headed(model, built(method, trained)))
    lockstep.admit(asking(PROMPT, max_tokens=40))
    for _ in range(6):
        lockstep.round()
    (live,) = lockstep.engine.requests.running.values()
    fresh: Any = model.new_cache()
    model.forward(fresh, causal(np.asarray(live.session.tokens[:-1]), 0))
    cache: Any = live.cache
    assert cache.length == fresh.length == len(live.session.tokens) - 1
    torch.testing.assert_close(
        cache.planes()[:, :, : cache.length],
        fresh.planes()[:, :, : fresh.length],
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("method", SETTINGS)
def test_a_head_that_must_be_trained_says_so(method: str) -> None:
    with pytest.raises(ModelRefused, match=f"outrider train` {method}"):
        built(method, {})


def test_the_contract_covers_the_folder() -> None:
    assert {"token-recycling", "medusa", "hidden-transfer"} <= set(head_methods())
    assert "base" not in head_methods()


# The seam


class Oracle:
    """A head that knows what will be written, `depth` tokens of it."""

    output_spec: ClassVar[OutputSpec] = OutputSpec()

    def __init__(self, text: Sequence[int], depth: int) -> None:
        self.text, self.depth = list(text), depth

    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        return [self.grow(one.text) for one in seen]

    def grow(self, text: Text) -> DraftNodes:
        assert list(text.tokens) == self.text[: len(text.tokens)]
        coming = np.asarray(self.text[len(text.tokens) :][: self.depth])
        return DraftNodes(np.arange(len(coming)), coming, np.full(len(coming), -0.1), roots=1)

    def close(self, session: str) -> None:
        pass


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_perfect_head_saves_d_of_d_plus_one_steps(depth: int) -> None:
    """But for the first, before which it has seen nothing."""
    engine = headed(TOY, Oracle(TEXT, depth), chooser=reference_sample)
    (found,) = Lockstep(engine).run(asking(PROMPT, max_tokens=8 * (depth + 1) + 1))
    assert found.tokens == tuple(TEXT[len(PROMPT) : len(PROMPT) + 8 * (depth + 1) + 1])
    assert (found.stats.rounds, found.stats.accepted) == (9, 8 * depth)
    assert found.stats.by_drafter == {"h-0": 8 * depth}
    assert found.drafters == ("", *(("h-0",) * depth + ("",)) * 8)
    report = engine.report()
    assert report.guesses["h-0"].accepted == 8 * depth
    assert report.fallbacks == {"empty tree": 1}
    assert report.drafted == report.accepted + report.rejected + report.expired


def test_acceptance_is_counted_for_each() -> None:
    """The drafter guesses a token in each round, which the head knows too, and the head one more."""
    engine = headed(TOY, Oracle(TEXT, 2), chooser=reference_sample)
    (found,) = Lockstep(engine, DraftEngine(Known(TEXT, 24), "d", 1), passes=1).run(
        asking(PROMPT, max_tokens=38)
    )
    assert found.tokens == tuple(TEXT[len(PROMPT) : len(PROMPT) + 38])
    assert found.stats.by_drafter == {"d": 13, "h-0": 12}
    assert (found.stats.rounds, found.stats.ignored["repeated"]) == (13, 12)


class Waits(Fixed):
    """Waits once before each step for a drafter, and looks at what is there meanwhile."""

    seen: ClassVar[list[tuple[float, int]]] = []

    def plan(self, views: Sequence[SessionView]) -> Plan:
        self.seen.append((views[0].waited, len(views[0].gains)))
        return super().plan(views) if views[0].waited else Plan((0,), 1.0)


def test_while_somebody_is_waited_for_heads_do_not_count() -> None:
    engine = headed(TOY, Oracle(TEXT, 2), chooser=reference_sample)
    engine.scheduler = Waits(8)
    (found,) = Lockstep(engine).run(asking(PROMPT, max_tokens=7))
    assert found.stats.rounds == 3
    assert {gains for waited, gains in Waits.seen if not waited} == {0}
    assert [gains for waited, gains in Waits.seen if waited] == [0, 0, 2, 0, 2]


def test_a_session_without_speculation_is_no_business_of_a_head() -> None:
    engine = headed(TOY, Oracle(TEXT, 2), chooser=reference_sample)
    (found,) = Lockstep(engine).run(asking(PROMPT, speculation=False))
    assert found.stats.drafted == 0
    assert engine.metrics.guesses == {}


class Failing(Oracle):
    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        raise RuntimeError("out of memory")


class Circular(Oracle):
    def grow(self, text: Text) -> DraftNodes:
        return DraftNodes(np.array([1]), np.array([3]), np.array([-0.1]), roots=1)


class Lopsided(Oracle):
    def grow(self, text: Text) -> DraftNodes:
        return DraftNodes(np.array([0]), np.array([3]), np.array([-0.1, -0.2]), roots=1)


class Blind(Oracle):
    """Wants to look at what the model does not show."""

    output_spec = OutputSpec(hidden=True)


class Clinging(Oracle):
    """Takes no leave."""

    def close(self, session: str) -> None:
        raise ValueError(session)


@pytest.mark.parametrize("kind", [Failing, Circular, Lopsided, Blind, Clinging])
def test_a_head_that_fails_is_disabled(
    kind: type[Oracle], caplog: pytest.LogCaptureFixture
) -> None:
    engine = headed(TOY, kind(TEXT, 2), Oracle(TEXT, 2), chooser=reference_sample)
    (found,) = Lockstep(engine).run(asking(PROMPT))
    assert found.tokens == tuple(TEXT[len(PROMPT) : len(PROMPT) + 24])
    assert list(engine.heads.selected) == list(engine.drafter_manager.heads) == ["h-1"]
    assert engine.metrics.fallbacks["head lost"] == 1
    assert "head h-0 is disabled" in caplog.text


class Wrong(Oracle):
    """Guesses what is never written, and nonsense that must be ignored."""

    def grow(self, text: Text) -> DraftNodes:
        right = self.text[len(text.tokens)]
        return DraftNodes(
            np.array([0, 0, 0, 0]),
            np.array([(right + 1) % 24, -1, 24, right]),
            np.array([-0.1, -0.1, -0.1, 0.1]),
            roots=1,
        )


def test_a_head_that_brings_nothing_rests_and_costs_nothing() -> None:
    engine, text = (
        headed(TOY, Wrong(continued(TOY, PROMPT, 700), 1), chooser=reference_sample),
        continued(TOY, PROMPT, 400),
    )
    (found,) = Lockstep(engine).run(asking(PROMPT, max_tokens=200))
    assert found.tokens == tuple(text[len(PROMPT) : len(PROMPT) + 200])
    assert found.stats.accepted == 0
    assert found.stats.ignored["invalid"] == 3 * (
        TRIAL_COMMITS - 1
    )  # it is judged after the last commit of its trial, and not asked again
    assert engine.metrics.guesses["h-0"].proposed == TRIAL_COMMITS - 1 < REST_COMMITS
    assert engine.drafter_manager.utility.active(engine.heads.selected) == []
    assert engine.report().guesses["h-0"].resting


class Branched(Oracle):
    output_spec = OutputSpec(branches=(Branch(1, lambda states: states),))


def test_a_head_that_rests_does_not_look(trained: dict[str, Path]) -> None:
    model = hf_model("llama")
    engine = headed(model, built("hidden-transfer", trained), built("medusa", trained))
    lockstep = Lockstep(engine)
    chunks = lockstep.admit(asking(PROMPT, max_tokens=40))
    output_specs = []
    for resting in (set[str](), {"h-0"}, {"h-0", "h-1"}):
        lockstep.round()
        engine.drafter_manager.utility.resting = resting
        lockstep.round()
        output_specs.append(
            (len(engine.heads.output_spec.branches), engine.heads.output_spec.hidden)
        )
    assert output_specs == [(2, True), (0, True), (0, False)]
    while engine.requests.running:
        lockstep.round()
    assert (
        output(chunks).said() == plain(model, asking(PROMPT, max_tokens=40), chooser=choose).said()
    )


@pytest.mark.parametrize("known", [0, 1])
def test_a_head_rests_where_a_drafter_guesses_the_same(known: int) -> None:
    """It knows two tokens of each step; so does the drafter, or it knows nothing."""
    text = continued(TOY, PROMPT, 4 * TRIAL_COMMITS)
    engine = headed(TOY, Oracle(text, 2), chooser=reference_sample)
    found = Lockstep(engine, DraftEngine(Known(text, 24) if known else Mute(), "d", 1), passes=2)
    found.admit(asking(PROMPT, max_tokens=4 * TRIAL_COMMITS))
    for _ in range(TRIAL_COMMITS):
        found.round()
    assert engine.requests.running
    assert ("h-0" in engine.drafter_manager.utility.resting) == bool(known)


def test_heads_come_into_use_and_go_out_of_it() -> None:
    engine = headed(TOY, Oracle(TEXT, 1), Oracle(TEXT, 3), chooser=reference_sample)
    for names, brought in (
        (frozenset({"h-0"}), {"h-0"}),
        (frozenset(), set()),
        (None, {"h-0", "h-1"}),
        (frozenset({"h-1"}), {"h-1"}),
    ):
        engine.handle(SetScheduler(Fixed(8), names))
        (found,) = Lockstep(engine).run(asking(PROMPT))
        assert found.tokens == tuple(TEXT[len(PROMPT) : len(PROMPT) + 24])
        assert set(found.stats.by_drafter) == brought


def test_two_heads_with_branches_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="two heads want pseudo rows"):
        headed(TOY, Branched(TEXT, 1), Branched(TEXT, 1))


def test_where_the_way_likely_ends() -> None:
    """Root 1 - 0.9 = 0.1; its child 0.9 - 0.45 - 0.27 = 0.18; their children 0.45, 0.27."""
    tree = TokenTree(text_key([1]), 1, 10, 10)
    tree.add(0, 5, float(np.log(0.9)))
    tree.add(1, 6, float(np.log(0.5)))
    tree.add(1, 7, float(np.log(0.3)))
    assert rows_by_end_probability(tree, [1, 2, 3]) == [2, 3, 1, 0]
    assert rows_by_end_probability(tree, []) == [0]


def test_a_draft_names_its_parents() -> None:
    session = Session(
        asking(PROMPT),
        24,
        100,
        Engine(
            TOY, Verifier(reference_sample, NOBODY), Fixed(1), lambda: 0.0
        ).requests.calibrations.bucket(0.0),
    )
    draft = make_draft(
        session,
        DraftNodes(np.array([0, 1, 0]), np.array([5, 6, 7]), np.array([-0.1, -0.2, -0.3]), roots=1),
        "h-0",
    )
    assert draft.parents.tolist() == [text_key(PROMPT), text_key([*PROMPT, 5]), text_key(PROMPT)]
    assert session.merge_drafts(draft) == 3
