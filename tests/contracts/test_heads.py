"""Every head keeps the target's output, is bounded, and forgets closed sessions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.core import limits
from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import ModelRefused
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.model import ModelDrafter
from runtime.heads.base import Head, HeadContext, VerifiedStep
from runtime.heads.hidden_transfer import HiddenTransfer
from runtime.heads.medusa import Medusa
from runtime.heads.ngram_head import NgramHead
from runtime.method_registry import head_methods, module_name
from runtime.models.base import ModelIdentity, OutputSpec, causal
from runtime.models.eagle import Eagle, write_eagle
from runtime.models.head_checkpoint import write_checkpoint
from runtime.models.hf import HFModel
from runtime.models.llama import is_llama
from runtime.models.sampler import choose
from tests.support.drafters import holds
from tests.support.eagles import SHAPE
from tests.support.families import FAMILIES, VOCABULARY, hf_model
from tests.support.harness import Lockstep, asking, output, plain
from tests.support.heads import PROMPT, headed

HEADS = pytest.mark.parametrize("method", head_methods())
IDENTITY = ModelIdentity(32, 2, VOCABULARY, "hash")
SETTINGS: dict[str, dict[str, Any]] = {
    "medusa": {"heads": 3, "blocks": 2},
    "hidden-transfer": {"layers": [1, 1]},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Writes heads with small random weights, so that they say much the same as the target."""
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
    shape = replace(SHAPE, layers=(0, 1, 2), draft_vocabulary=VOCABULARY)
    folders["eagle-head"] = tmp_path_factory.mktemp("heads") / "eagle"
    write_eagle(folders["eagle-head"], Eagle(32, shape), IDENTITY)
    return folders


def built(method: str, trained: Mapping[str, Path], model: HFModel | None = None) -> Head:
    if method == "ngram-head":  # random models seldom repeat two tokens
        return NgramHead(shortest=1)
    mount = HeadContext(model or hf_model("llama"), IDENTITY, trained.get(method))
    head: Head = import_module(f"runtime.heads.{module_name(method)}").build(mount)
    mount.model.check(head.output_spec)
    return head


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
def test_the_output_with_drafters_and_all_other_heads_is_the_targets(
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
    """Wraps a head and records its growth."""

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
def test_an_untrained_head_is_refused(method: str) -> None:
    with pytest.raises(ModelRefused, match=f"outrider train` {method}"):
        built(method, {})


def test_no_eagle_ships_for_an_unknown_target() -> None:
    with pytest.raises(ModelRefused, match="outrider train eagle"):
        built("eagle-head", {})


def test_the_contract_covers_the_folder() -> None:
    assert {"token-recycling", "medusa", "hidden-transfer", "eagle-head"} <= set(head_methods())
    assert "base" not in head_methods()


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
