"""Scores guesses of nodes that drafters of several kinds share or dispute.

A node guessed by two kinds is likelier than either kind knows; a node that another kind disputes
may hardly be worth a row. So besides the tables of runtime.scoring.calibration for the first
drafter of a node, each kind has two more: for guesses echoed by another kind, and for guesses
opposed by another kind's different guess for the same position. A node guessed by several kinds is
scored by the mean of their log odds. Measured on 15,481 guesses of the bundled pair, its draft
model together with n-grams and token recycling, the log loss is 0.186 with the mean, 0.199 with the
maximum, and 0.222 without looking at other drafters.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from runtime.core.tree import Proposal, TokenTree
from runtime.scoring.calibration import (
    BINS,
    MIN_PROBABILITY,
    PRIOR_WEIGHT,
    TemperatureBucket,
    choices_along,
    drafter_kind,
    table_cells,
)

ECHOED, OPPOSED = " echoed", " opposed"
BIN_CENTERS = 1.0 - ((np.arange(BINS) + 0.5) / BINS) ** 2  # of the bins

SharedPosition = dict[
    int, dict[str, Proposal]
]  # the children of a node: of each who has guessed it, by kind


def shared_positions(tree: TokenTree, parents: Iterable[int]) -> list[SharedPosition]:
    """Return the positions at which more than one kind has guessed children."""
    places = []
    for parent in parents:
        place = {
            child: {
                drafter_kind(proposal.drafter): proposal
                for proposal in reversed(tree.proposals(child))
            }
            for child in tree.children(parent)
        }
        if len({name for proposals in place.values() for name in proposals}) > 1:
            places.append(place)
    return places


def observe_path(bucket: TemperatureBucket, tree: TokenTree, decided: Sequence[int]) -> None:
    """Count the children of shared positions along the decided tokens."""
    if not tree.later_proposals and len(set(tree.drafter[1:])) < 2:
        return
    for node, taken in choices_along(tree, decided):
        for place in shared_positions(tree, [node]):
            for child, proposals in place.items():
                for name, proposal in proposals.items():
                    bucket.table(name, table_suffix(proposals)).observe(
                        proposal.rank, proposal.raw_logprob, child == taken
                    )


def table_suffix(proposals: dict[str, Proposal]) -> str:
    """Return the suffix of the table for a guess at a shared position."""
    return ECHOED if len(proposals) > 1 else OPPOSED


def combined_scores(
    bucket: TemperatureBucket, tree: TokenTree, parents: Iterable[int]
) -> dict[int, float]:
    """Return log acceptance estimates, below 0, for children of shared positions below these
    parents.

    What a table has not observed is extrapolated: the kind's rate when it comes first, scaled by
    how much more or less often guesses of the same rank were right in this table.
    """
    nodes: list[int] = []
    groups: dict[tuple[str, str], int] = {}
    heard: list[tuple[int, int, int, float]] = []  # place among `nodes`, group, rank, said
    for place in shared_positions(tree, parents):
        for child, proposals in place.items():
            beside = table_suffix(proposals)
            for name, proposal in proposals.items():
                heard.append(
                    (
                        len(nodes),
                        groups.setdefault((name, beside), len(groups)),
                        proposal.rank,
                        proposal.raw_logprob,
                    )
                )
            nodes.append(child)
    if not heard:
        return {}
    first, here = (
        [bucket.table(name) for name, _ in groups],
        [bucket.table(*group) for group in groups],
    )
    first_tries, first_hits = (
        np.array([table.tries for table in first]),
        np.array([table.hits for table in first]),
    )
    tries, hits = (
        np.array([table.tries for table in here]),
        np.array([table.hits for table in here]),
    )
    which, group, ranks, raw_logprob = map(np.array, zip(*heard, strict=True))
    cell = group, *table_cells(ranks, raw_logprob)
    expected = (
        tries * (first_hits + PRIOR_WEIGHT * BIN_CENTERS) / (first_tries + PRIOR_WEIGHT)
    ).sum(2)
    all_, right = tries.sum(2), hits.sum(2)
    less, more = (
        (right + PRIOR_WEIGHT) / (expected + PRIOR_WEIGHT),
        (all_ - right + PRIOR_WEIGHT) / (all_ - expected + PRIOR_WEIGHT),
    )
    usual = (first_hits[cell] + PRIOR_WEIGHT * np.exp(raw_logprob)) / (
        first_tries[cell] + PRIOR_WEIGHT
    )
    usual = np.where(
        less[cell[:2]] < 1.0, usual * less[cell[:2]], 1.0 - (1.0 - usual) * more[cell[:2]]
    )
    p = np.minimum(
        np.maximum(
            (hits[cell] + PRIOR_WEIGHT * usual) / (tries[cell] + PRIOR_WEIGHT), MIN_PROBABILITY
        ),
        1.0 - MIN_PROBABILITY,
    )
    odds = np.bincount(which, np.log(p / (1.0 - p))) / np.bincount(which)
    return dict(zip(nodes, (-np.log1p(np.exp(-odds))).tolist(), strict=True))
