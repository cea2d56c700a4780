"""Targets and drafters die, come and go while clients compare every token.

The full size is `make test-chaos`.
"""

from dataclasses import replace

import pytest

from bench.chaos.run import ChaosOptions, run_in_cluster
from tests.support.pair import save_model

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ChaosOptions:
    """The draft is the target itself, so its guesses are right. The first fault hits a target."""
    folder = str(save_model(tmp_path_factory.mktemp("models") / "tiny", context=512))
    return ChaosOptions(
        folder,
        folder,
        streams=8,
        seconds=8.0,
        targets=2,
        drafters=1,
        tokens=200,
        seed=2,
        period_s=2.0,
        cases=8,
    )


def test_blows_change_no_token(cluster: None, options: ChaosOptions) -> None:
    outcome = run_in_cluster(options, silent)
    assert outcome.passed, outcome.wrong
    assert any(what.startswith("target") for what in outcome.blows)
    assert outcome.gaps, "no session was under way when a target was struck"


def test_drafters_that_come_and_go_change_no_token(cluster: None, options: ChaosOptions) -> None:
    outcome = run_in_cluster(replace(options, targets=1, max_drafters=2), silent)
    assert outcome.passed, outcome.wrong
    assert outcome.changes > 0
    assert not outcome.blows


def silent(_: str) -> None:
    """For nobody is there to be told how far it is."""
