"""Runs the heads of a target: they observe each pass and guess from its output."""

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt

from runtime.core.clock import Clock
from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import SESSION_FAULTS, InvalidRequest
from runtime.core.messages import Draft
from runtime.core.node_keys import child_key
from runtime.core.tree import TokenTree
from runtime.drafters.base import Text
from runtime.heads.base import Head, VerifiedStep
from runtime.models.base import HiddenStateModel, Model, OutputSpec, PassInput, PassOutput
from runtime.scoring.drafter_utility import DrafterUtility
from runtime.target.batch import BatchItem, accepted_rows
from runtime.target.request_state import RequestState
from runtime.target.session import Session
from runtime.target.verifier import Decision
from runtime.telemetry.metrics import TargetMetrics
from runtime.telemetry.tracing import STEP, Trace

PRICED_BRANCH_ROWS = 4  # rows beside which pseudo rows ride where their price is measured
MAX_BRANCH_ROWS = 16  # of a session's step, at most: those at which the target most likely stops

NO_OUTPUTS = OutputSpec()

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountedHead:
    """A head, and the seconds that PRICED_BRANCH_ROWS branch rows add to a pass; 0 without
    branches.
    """

    head: Head
    seconds: float = 0.0


class HeadRunner:
    """Owns the heads of a target by name: `built`, the `selected` ones, and the `active` of these.

    Active heads take part in the current step. Without any, a pass is the model's own. A head that
    fails is disabled, logged and counted in `metrics`, and the target continues without it. The
    cost of heads is charged to them in `utility`, which makes them rest.
    """

    def __init__(
        self,
        model: Model,
        heads: Mapping[str, MountedHead],
        utility: DrafterUtility,
        metrics: TargetMetrics,
        clock: Clock,
    ) -> None:
        """Raise InvalidRequest if two heads need branch rows."""
        self.model, self.utility, self.metrics, self.clock = model, utility, metrics, clock
        self.built = dict(heads)
        self.selected: dict[str, Head] = {}
        self.active: list[str] = []
        self.output_spec = NO_OUTPUTS  # of those active
        self.select(None)

    def select(self, names: Container[str] | None) -> None:
        """Use only these heads from now on; None: all. Raises InvalidRequest as the constructor
        does.
        """
        chosen = {
            name: mounted.head
            for name, mounted in self.built.items()
            if names is None or name in names
        }
        merge_output_specs([head.output_spec for head in chosen.values()])
        self.selected.clear()
        self.selected.update(chosen)
        self._look_with([name for name in self.active if name in chosen])

    def activate(self) -> None:
        """Let heads that do not rest observe the next pass and guess after it."""
        self._look_with(self.utility.active(self.selected))

    def with_branch_rows(
        self, session: Session, nodes: Sequence[int], part: PassInput
    ) -> PassInput:
        """Add branch rows to a session's part of a step if a head needs them and they are worth
        their time.

        A branch row brings about one token if the target stops at the row it belongs to.
        """
        branches = len(self.output_spec.branches)
        if not branches or not can_use_drafts(session):
            return part
        least = self.metrics.rate * sum(self.price(name) for name in self.active)
        worth = (part.rows.positions + branches < self.model.context) & (
            end_probabilities(session.tree, nodes) >= least
        )
        rows = [row for row in rows_by_end_probability(session.tree, nodes) if worth[row]]
        return replace(part, branch_rows=sorted(rows[:MAX_BRANCH_ROWS]))

    def feature_layers(self) -> set[int]:
        """Return the layers whose states the selected heads read for whole texts."""
        return {layer for head in self.selected.values() for layer in head.output_spec.features}

    def price(self, name: str) -> float:
        """Return the seconds per branch row."""
        return self.built[name].seconds / PRICED_BRANCH_ROWS

    def forward(self, parts: Sequence[PassInput], layers: tuple[int, ...] = ()) -> list[PassOutput]:
        """Run one pass with the outputs that heads need, and with features of `layers`.

        Raises the model's errors if nothing but logits is needed. If a pass fails that one without
        these outputs survives, the heads that need them are disabled, and features are None.
        """
        output_spec = merge_output_specs([self.output_spec, OutputSpec(features=layers)])
        if output_spec != NO_OUTPUTS:
            try:
                return cast(HiddenStateModel, self.model).forward_outputs(parts, output_spec)
            except SESSION_FAULTS as error:
                failure = error
            found = [PassOutput(logits) for logits in self.model.forward_all(parts)]
            for name in [
                name for name in self.active if self.selected[name].output_spec != NO_OUTPUTS
            ]:
                self.disable(name, failure)
            return found
        return [PassOutput(logits) for logits in self.model.forward_all(parts)]

    def branch_row_time(self, parts: Sequence[PassInput]) -> dict[str, float]:
        """Return, by head, the seconds that branch rows add to a pass over these parts."""
        ridden = sum(len(part.branch_rows) for part in parts)
        return {
            name: ridden * price for name in self.active if ridden and (price := self.price(name))
        }

    def charge(self, parts: Sequence[PassInput]) -> None:
        """Charge the heads for the branch rows of a pass."""
        for name, seconds in self.branch_row_time(parts).items():
            self.utility.charge({name}, seconds)

    def guess(self, going: Sequence[tuple[BatchItem, Decision]], trace: Trace) -> None:
        """Let the active heads guess from the new roots of these sessions.

        Each session keeps the guesses until a step that does not wait for a better drafter.
        """
        if not self.active:
            return
        items = [(item, decision) for item, decision in going if can_use_drafts(item.state.session)]
        seen = [make_seen(item, decision) for item, decision in items]
        for name in tuple(self.active) if seen else ():
            began = self.clock()
            for state, draft in self._propose(name, [item.state for item, _ in items], seen):
                state.head_drafts.append(draft)
            ended = self.clock()
            self.utility.charge({name}, ended - began)
            trace.span(name, STEP, began, ended, sessions=len(seen))

    def disable(self, name: str, error: Exception) -> None:
        """Continue without this head."""
        log.warning("head %s is disabled: %s: %s", name, type(error).__name__, error)
        del self.built[name]
        self.select(self.selected.keys() - {name})
        self.metrics.fallbacks["head lost"] += 1

    def close(self, session: str) -> None:
        """Forget a session."""
        for name, mounted in tuple(self.built.items()):
            try:
                mounted.head.close(session)
            except SESSION_FAULTS as error:
                self.disable(name, error)

    def _look_with(self, names: list[str]) -> None:
        self.active, self.output_spec = (
            names,
            merge_output_specs([self.selected[name].output_spec for name in names]),
        )

    def _propose(
        self, name: str, states: Sequence[RequestState], seen: Sequence[VerifiedStep]
    ) -> list[tuple[RequestState, Draft]]:
        """Return the guesses of one head as drafts."""
        try:
            growths = self.selected[name].propose(seen)
            found = [
                (state, growth)
                for state, growth in zip(states, growths, strict=True)
                if len(growth.tokens)
            ]
            return [(state, make_draft(state.session, growth, name)) for state, growth in found]
        except SESSION_FAULTS as error:
            self.disable(name, error)
            return []


def merge_output_specs(output_specs: Sequence[OutputSpec]) -> OutputSpec:
    """Combine what the heads need of a pass. Raises InvalidRequest if two of them need branches."""
    branched = [output_spec.branches for output_spec in output_specs if output_spec.branches]
    if len(branched) > 1:
        raise InvalidRequest("two heads need branch rows in one pass: give one of them", "draft")
    features = {layer for output_spec in output_specs for layer in output_spec.features}
    return OutputSpec(
        any(output_spec.hidden for output_spec in output_specs),
        branched[0] if branched else (),
        tuple(sorted(features)),
    )


def can_use_drafts(session: Session) -> bool:
    """Return True if guesses can help: the last token needs none."""
    return session.request.speculation and min(session.room, session.max_step_nodes) > 0


def make_seen(item: BatchItem, decision: Decision) -> VerifiedStep:
    """Return what a step has computed for a session, whose root has moved since."""
    session = item.state.session
    text = Text(session.id, session.tokens, session.prompt, session.request.sampling, session.tree)
    path = accepted_rows(item.nodes, decision.accepted.path)
    return VerifiedStep(
        text,
        item.part.rows.tokens,
        path,
        decision.output,
        item.part.branch_rows,
        item.state.features,
    )


def make_draft(session: Session, growth: DraftNodes, name: str) -> Draft:
    """Convert nodes to a draft, which refers to parents by key.

    Raises ValueError for a parent that does not come before its child, and for arrays of unequal
    length.
    """
    if len(growth.scores) != len(growth.tokens):
        raise ValueError(
            f"{len(growth.scores)} scores of {len(growth.tokens)} nodes: give one of each"
        )
    keys = session.tree.key[: growth.roots].tolist()
    for parent, token in zip(growth.parents.tolist(), growth.tokens.tolist(), strict=True):
        if not 0 <= parent < len(keys):
            raise ValueError(f"parent {parent} of node {len(keys)}: give 0 or a node before it")
        keys.append(child_key(keys[parent], token))
    parents = np.array(keys, dtype=np.uint64)[growth.parents]
    return Draft(
        session.id,
        session.epoch,
        name,
        parents,
        growth.tokens.astype(np.int32),
        growth.scores.astype(np.float32),
    )


def end_probabilities(tree: TokenTree, nodes: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return, for the root and each of `nodes`, the probability (rows,) that the target stops
    there.
    """
    taken: npt.NDArray[np.float64] = np.exp(np.frombuffer(tree.path)[[0, *nodes]])
    found, row_of = taken.copy(), {node: row for row, node in enumerate([0, *nodes])}
    for row, node in enumerate(nodes, start=1):
        found[row_of[tree.parent[node]]] -= taken[row]
    return found


def rows_by_end_probability(tree: TokenTree, nodes: Sequence[int]) -> list[int]:
    """Return all rows of a step, those where the target most likely stops first."""
    order: list[int] = np.argsort(-end_probabilities(tree, nodes), kind="stable").tolist()
    return order
