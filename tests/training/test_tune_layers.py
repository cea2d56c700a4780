"""The search for draft layers works on known scores and on a target with an idle layer."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from runtime.core.errors import ModelRefused
from runtime.models.base import ModelIdentity
from tests.support.pair import save_model
from training.layers import (
    Subset,
    agreement_score,
    as_json,
    best_subset,
    count_trials,
    forecast_speed_up,
    keep_layers,
    layers_of,
    pass_share,
    rank_rates,
    search_layers,
)
from training.teacher import Teacher, load_teacher

WORTH = (0.4, 0.0, 0.3, 0.1)


def worth(layers: Sequence[int]) -> float:
    return 0.2 + sum(WORTH[layer] for layer in layers)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_teacher(
        str(save_model(tmp_path_factory.mktemp("tune") / "target", num_hidden_layers=3)), "cpu"
    )


def test_the_layer_that_is_missed_least_goes_first() -> None:
    told: list[int] = []
    found = search_layers(4, worth, told.append)
    assert [subset.layers for subset in found] == [(0, 2, 3), (0, 2), (0,)]
    assert [subset.acceptance for subset in found] == pytest.approx([1.0, 0.9, 0.6])
    assert sum(told) == count_trials(4) == 9


TIMES = {1: 0.03, 8: 0.032}


def test_the_promise_grows_with_acceptance_and_falls_with_cost() -> None:
    known = {1: 0.6, 2: 0.7, 4: 0.8, 8: 0.85}
    promise = forecast_speed_up(known, 0.2, TIMES)
    assert promise > 1.2
    assert (
        forecast_speed_up({k: 1.1 * rate for k, rate in known.items()}, 0.2, TIMES)
        > promise
        > forecast_speed_up(known, 0.6, TIMES)
    )
    assert forecast_speed_up(dict.fromkeys(known, 0.0), 0.2, TIMES) == pytest.approx(1.0, abs=0.1)


def test_the_best_subset_promises_most() -> None:
    one, two = Subset((0, 1), 0.9), Subset((0,), 0.4)
    assert best_subset({one: 1.2, two: 1.3}) is two
    written = as_json(ModelIdentity(8, 3, 16, "abc"), {one: 1.2, two: 1.3})
    assert (written["layers"], written["speed_up"]) == ([0], 1.3)
    assert [other["layers"] for other in written["others"]] == [[0, 1], [0]]


def test_rates_and_cost_of_layers(teacher: Teacher) -> None:
    known = rank_rates(
        teacher, [torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(1))]
    )
    assert known((0, 1, 2)) == dict.fromkeys((1, 2, 4, 8), 1.0)
    some = known((0,))
    assert sorted(some.values()) == list(some.values())
    assert (
        0
        < pass_share(teacher, (0,))
        < pass_share(teacher, (0, 2))
        < pass_share(teacher, (0, 1, 2))
        == 1.0
    )


def test_a_layer_that_does_nothing_is_not_missed(teacher: Teacher) -> None:
    layer = teacher.module.model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    score = agreement_score(
        teacher, [torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(0))]
    )
    assert score((0, 2)) == score((0, 1, 2)) == 1.0
    assert score((0,)) < 1.0
    assert search_layers(3, score)[0] == Subset((0, 2), 1.0)


def test_all_layers_are_back_afterwards(teacher: Teacher) -> None:
    whole = layers_of(teacher)
    with keep_layers(teacher, (0, 2)):
        assert len(layers_of(teacher)) == 2
    assert layers_of(teacher) is whole


def test_a_target_of_one_layer_has_nothing_to_choose(tmp_path: Path) -> None:
    single = load_teacher(str(save_model(tmp_path / "one", num_hidden_layers=1)), "cpu")
    with pytest.raises(ModelRefused, match="has no layers to choose from"):
        layers_of(single)
