"""What a guess is worth where drafters of several kinds have guessed.

What two of them guess is likelier than either knows, and what is said against another may be hardly worth a row. So beside the tables of
runtime.scoring.calibration, for who came first, there are two more for each kind: for guesses that somebody of another kind has echoed, and for
those that are opposed by another kind's other guess for the same place. A node that several kinds have guessed is scored by the mean of
their log odds: measured on 15,481 guesses of the pair that ships, its draft beside n-grams and token recycling, the log loss is 0.186 by
the mean, 0.199 by the highest, and 0.222 where others are not looked at.
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
    """Those of which more than one kind has guessed children."""
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
    """Count the children of shared places that the decided tokens passed."""
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
    """What they have made of a guess at a shared place."""
    return ECHOED if len(proposals) > 1 else OPPOSED


def combined_scores(
    bucket: TemperatureBucket, tree: TokenTree, parents: Iterable[int]
) -> dict[int, float]:
    """Of the children of these, as far as the places are shared: logs of the estimated acceptance, below 0.

    What a table has not seen is taken to be what the kind reaches where it comes first, as many times more or less as guesses of the same
    rank have been right in that table than they are there.
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
