"""The heads of a target, as its loop sees them: they look at each pass, and what they guess goes into the mirrors at once."""

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt

from runtime.drafters.base import Text
from runtime.errors import InvalidRequest
from runtime.heads.base import Growth, Head, Seen
from runtime.messages import Draft
from runtime.metrics import Ledger
from runtime.models.base import Look, Model, Open, Part, Shown
from runtime.node_names import child_key
from runtime.session import Session
from runtime.target.chunked_prefill import FAILURES
from runtime.target.request_state import RequestState
from runtime.target.verifier import Decision
from runtime.tree import TokenTree

RIDDEN = 4  # rows beside which pseudo rows ride where their price is measured
MOST = 16  # of a session's step, at most: those at which the target most likely stops

NOTHING = Look()

log = logging.getLogger(__name__)


class HeadRunner:
    """Heads by name: those that were `built`, of them those in use, and of these those `active` in the present step. Without any a pass is
    the model's own, and nothing else happens.

    One that fails is taken off, logged and counted in `ledger`: the target goes on without it. `prices`: seconds by which the pseudo rows
    of a head prolong a pass where RIDDEN rows are ridden; none where that was not measured.
    """

    def __init__(self, model: Model, heads: Mapping[str, Head], ledger: Ledger, prices: Mapping[str, float] | None = None) -> None:
        """Raises InvalidRequest for two heads whose branches would meet."""
        self.model, self.built, self.ledger = model, dict(heads), ledger
        self.prices = dict(prices or {})
        self.heads: dict[str, Head] = {}
        self.active: list[str] = []
        self.look = NOTHING  # of those active
        self.use(heads)

    def use(self, names: Container[str]) -> None:
        """Only these are asked from now on. Raises InvalidRequest as at first."""
        chosen = {name: head for name, head in self.built.items() if name in names}
        joint([head.look for head in chosen.values()])
        self.heads.clear()
        self.heads.update(chosen)
        self.activate([name for name in self.active if name in chosen])

    def activate(self, names: list[str]) -> None:
        """Of those in use, these alone look at the next pass and are asked after it."""
        self.active, self.look = names, joint([self.heads[name].look for name in names])

    def riding(self, live: RequestState, nodes: Sequence[int], part: Part) -> Part:
        """The part of a step, with riders where a head wants them and they are worth their time: beside a row at which the target stops
        they bring about a token."""
        session, branches = live.session, len(self.look.branches)
        if not branches or not wanted(session):
            return part
        least = self.ledger.rate * sum(self.price(name) for name in self.active)
        worth = (part.rows.positions + branches < self.model.context) & (ends(session.tree, nodes) >= least)
        rows = [row for row in likely_ends(session.tree, nodes) if worth[row]]
        return replace(part, riders=sorted(rows[:MOST]))

    def price(self, name: str) -> float:
        """Seconds for each row that is ridden."""
        return self.prices.get(name, 0.0) / RIDDEN

    def forward(self, parts: Sequence[Part]) -> list[Shown]:
        """One pass with all that the heads look at. Raises what the model raises where nobody looks."""
        if self.look != NOTHING:
            try:
                return cast(Open, self.model).show_all(parts, self.look)
            except FAILURES as error:
                failure = error
            found = [Shown(logits) for logits in self.model.forward_all(parts)]
            for name in [name for name in self.active if self.heads[name].look != NOTHING]:
                self.disable(name, failure)
            return found
        return [Shown(logits) for logits in self.model.forward_all(parts)]

    def riding_time(self, parts: Sequence[Part]) -> dict[str, float]:
        """Seconds that a pass over these takes longer for the pseudo rows of heads, by head."""
        ridden = sum(len(part.riders) for part in parts)
        return {name: ridden * self.price(name) for name in self.active if ridden and name in self.prices}

    def propose(self, name: str, seen: Sequence[tuple[RequestState, Seen]]) -> list[tuple[RequestState, Draft]]:
        """What one head guesses, as a drafter would send it."""
        try:
            growths = self.heads[name].propose([one for _, one in seen])
            found = [(live, growth) for (live, _), growth in zip(seen, growths, strict=True) if len(growth.tokens)]
            return [(live, draft_of(live.session, growth, name)) for live, growth in found]
        except FAILURES as error:
            self.disable(name, error)
            return []

    def disable(self, name: str, error: Exception) -> None:
        log.warning("head %s is taken off: %s: %s", name, type(error).__name__, error)
        del self.built[name]
        self.use(self.heads.keys() - {name})
        self.ledger.fallbacks["head lost"] += 1

    def close(self, session: str) -> None:
        for name, head in tuple(self.built.items()):
            try:
                head.close(session)
            except FAILURES as error:
                self.disable(name, error)


def joint(looks: Sequence[Look]) -> Look:
    """All that they want. Raises InvalidRequest where two have branches: a pass has those of one."""
    branched = [look.branches for look in looks if look.branches]
    if len(branched) > 1:
        raise InvalidRequest("two heads want pseudo rows in one pass: give one of them", "draft")
    return Look(any(look.hidden for look in looks), branched[0] if branched else ())


def wanted(session: Session) -> bool:
    """Whether anybody can help: not with the last token."""
    return session.request.speculation and min(session.room, session.most) > 0


def seen_by(
    step: Iterable[tuple[RequestState, Sequence[int], Part, Decision | None]], going: Container[str]
) -> list[tuple[RequestState, Seen]]:
    """What a step has shown of the sessions `going` on that anybody can help, after their roots have moved. It is given by sessions,
    their nodes that got rows in this order, their parts, and what was decided."""
    found = []
    for live, nodes, part, decision in step:
        session, row_of = live.session, {node: row for row, node in enumerate(nodes, start=1)}
        if decision is not None and session.id in going and wanted(session):
            text = Text(session.id, session.tokens, session.prompt, session.request.sampling, session.tree)
            path = [0, *(row_of[node] for node in decision.verdict.path)]
            found.append((live, Seen(text, part.rows.tokens, path, decision.shown, part.riders)))
    return found


def draft_of(session: Session, growth: Growth, name: str) -> Draft:
    """Nodes by the names of their parents. Raises ValueError for a parent that does not come before its child, and for arrays of unequal
    length."""
    if len(growth.scores) != len(growth.tokens):
        raise ValueError(f"{len(growth.scores)} scores of {len(growth.tokens)} nodes: give one of each")
    keys = [session.tree.key[0]]
    for parent, token in zip(growth.parents.tolist(), growth.tokens.tolist(), strict=True):
        if not 0 <= parent < len(keys):
            raise ValueError(f"parent {parent} of node {len(keys)}: give 0 or a node before it")
        keys.append(child_key(keys[parent], token))
    parents = np.array(keys, dtype=np.uint64)[growth.parents]
    return Draft(session.id, session.epoch, name, parents, growth.tokens.astype(np.int32), growth.scores.astype(np.float32))


def ends(tree: TokenTree, nodes: Sequence[int]) -> npt.NDArray[np.float64]:
    """(rows,) of a step, root and `nodes`: how likely the target's way ends at each."""
    taken: npt.NDArray[np.float64] = np.exp(np.frombuffer(tree.path)[[0, *nodes]])
    found, row_of = taken.copy(), {node: row for row, node in enumerate([0, *nodes])}
    for row, node in enumerate(nodes, start=1):
        found[row_of[tree.parent[node]]] -= taken[row]
    return found


def likely_ends(tree: TokenTree, nodes: Sequence[int]) -> list[int]:
    """All rows of a step, in the order of how likely the target's way ends there."""
    order: list[int] = np.argsort(-ends(tree, nodes), kind="stable").tolist()
    return order
