"""What pseudo rows take of a pass is measured, and charged to the head that wants them."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from runtime.heads.hidden_transfer import HiddenTransfer, HiddenTransferHead
from runtime.models.base import OutputSpec, PassInput, PassOutput, causal
from runtime.models.hf import HFModel
from runtime.models.sampler import choose
from runtime.models.step_timing import TYPICAL_ROWS, branch_row_time
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.scoring.drafter_utility import DrafterUtility
from runtime.target.batch import pack
from runtime.target.engine import Engine
from runtime.target.head_runner import PRICED_BRANCH_ROWS as PRICED
from runtime.target.head_runner import HeadRunner, MountedHead
from runtime.target.verifier import Verifier
from runtime.telemetry.metrics import TargetMetrics
from tests.support.families import hf_model
from tests.support.harness import NOBODY, Lockstep, asking


class Slow(ToyModel):
    """Takes one second per row and two per branch row; every third pass is disturbed."""

    def __init__(self) -> None:
        super().__init__(context=32)
        self.now, self.passes, self.output_specs = 0.0, 0, set[OutputSpec]()

    def forward_outputs(
        self, parts: Sequence[PassInput], output_spec: OutputSpec
    ) -> list[PassOutput]:
        self.output_specs.add(output_spec)
        self.now += sum(len(part.rows.tokens) + 2 * len(part.branch_rows) for part in parts) + (
            100.0 if self.passes % 6 == 1 else 0.0
        )
        self.passes += 1
        return [PassOutput(logits) for logits in self.forward_all(parts)]


def head(model: HFModel) -> HiddenTransferHead:
    return HiddenTransferHead(HiddenTransfer(int(model.module.config.hidden_size), (1,)))


def test_the_price_is_what_riders_add() -> None:
    model, output_spec = Slow(), head(hf_model("llama")).output_spec
    assert branch_row_time(model, output_spec, 3, lambda: model.now) == 6.0  # type: ignore[arg-type]
    assert model.passes == 2 * 6
    assert model.output_specs == {output_spec}
    assert TYPICAL_ROWS >= 3


@pytest.mark.parametrize(
    ("branch_rows", "expected"),
    [(((0,), (1, 2)), {"h-0": 1.5}), (((0,), ()), {"h-0": 0.5}), (((), ()), {})],
)
def test_it_is_paid_for_each_row_that_is_ridden(
    branch_rows: Sequence[Sequence[int]], expected: dict[str, float]
) -> None:
    model = hf_model("llama")
    runner = HeadRunner(
        model,
        {"h-0": MountedHead(head(model), 0.5 * PRICED)},
        DrafterUtility(),
        TargetMetrics(),
        lambda: 0.0,
    )
    parts = [
        PassInput(model.new_cache(), causal(np.arange(3), 0), branch_rows=of) for of in branch_rows
    ]
    assert runner.branch_row_time(parts) == {}  # it is not active
    runner.activate()
    assert runner.branch_row_time(parts) == expected


@pytest.mark.parametrize("price", [0.0, 1e9])
def test_the_head_is_charged_for_them_in_each_step(price: float) -> None:
    model = hf_model("llama")
    engine = Engine(
        model,
        Verifier(choose, NOBODY),
        Fixed(4),
        lambda: 0.0,
        heads={"h-0": MountedHead(head(model), price)},
    )
    lockstep = Lockstep(engine)
    lockstep.admit(asking([1, 2, 3], max_tokens=40))
    lockstep.round()
    lockstep.round()
    assert engine.drafter_manager.utility.spent["h-0"] == pytest.approx(
        (1 + 5) * price / PRICED
    )  # beside the root alone, then beside it and four guesses
    (live,) = engine.requests.running.values()
    assert [round_.ridden for round_ in live.metrics.rounds] == pytest.approx(
        [price / PRICED, 5 * price / PRICED]
    )


@pytest.mark.parametrize(
    ("seconds", "branch_rows"), [(0.0, (0, 1, 2, 3)), (0.15, (1, 2, 3)), (0.3, (2,)), (0.5, ())]
)
def test_only_rows_that_are_worth_it_are_ridden(seconds: float, branch_rows: Sequence[int]) -> None:
    """It stops at the root's row with probability 0.1, then 0.18, 0.45 and 0.27."""
    model = hf_model("llama")
    engine = Engine(
        model,
        Verifier(choose, NOBODY),
        Fixed(4),
        lambda: 0.0,
        heads={"h-0": MountedHead(head(model), seconds * PRICED)},
    )
    lockstep = Lockstep(engine)
    lockstep.admit(asking([1, 2, 3], max_tokens=40))
    lockstep.round()
    (live,) = engine.requests.running.values()
    tree = live.session.tree
    tree.reroot([9])  # to a text with nothing below it
    for parent, chance in ((0, 0.9), (1, 0.5), (1, 0.3)):
        tree.add(parent, 5 + len(tree), math.log(chance))
    engine.heads.activate()
    engine.metrics.computed, engine.metrics.completion = 10.0, 10
    assert engine.heads.with_branch_rows(
        live.session, [1, 2, 3], pack(live.session, live.cache, [1, 2, 3])
    ).branch_rows == list(branch_rows)


@pytest.mark.parametrize(("nodes", "ridden"), [(8, 9), (30, 16)])
def test_where_they_cost_nothing_all_rows_are_ridden_that_the_target_may_stop_at(
    nodes: int, ridden: int
) -> None:
    model = hf_model("llama")
    engine = Engine(
        model,
        Verifier(choose, NOBODY),
        Fixed(4),
        lambda: 0.0,
        heads={"h-0": MountedHead(head(model))},
    )
    lockstep = Lockstep(engine)
    lockstep.admit(asking([1, 2, 3], max_tokens=40))
    lockstep.round()
    (live,) = engine.requests.running.values()
    tree = live.session.tree
    tree.reroot([9])
    for node in range(nodes):
        tree.add(node, 5 + node, math.log(0.9))
    engine.heads.activate()
    chain = list(range(1, nodes + 1))
    branch_rows = engine.heads.with_branch_rows(
        live.session, chain, pack(live.session, live.cache, chain)
    ).branch_rows
    assert len(branch_rows) == ridden
    assert nodes in branch_rows, "the end of a likely chain"
