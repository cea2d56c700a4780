"""What a guess is worth where drafters of several kinds have guessed.

What two of them guess is likelier than either knows, and what is said against another may be hardly worth a row. So beside the tables of
runtime.scoring.calibration, for who came first, there are two more for each kind: for guesses that somebody of another kind has echoed, and for
those that are opposed by another kind's other guess for the same place. A node that several kinds have guessed is scored by the mean of
their log odds: measured on 15,481 guesses of the pair that ships, its draft beside n-grams and token recycling, the log loss is 0.186 by
the mean, 0.199 by the highest, and 0.222 where others are not looked at.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from runtime.core.tree import TokenTree, Voice
from runtime.scoring.calibration import BINS, LEAST, PRIOR, Band, cells, kind, passed

ECHOED, OPPOSED = " echoed", " opposed"
MIDDLES = 1.0 - ((np.arange(BINS) + 0.5) / BINS) ** 2  # of the bins

Place = dict[int, dict[str, Voice]]  # the children of a node: of each who has guessed it, by kind


def shared_places(tree: TokenTree, parents: Iterable[int]) -> list[Place]:
    """Those of which more than one kind has guessed children."""
    places = []
    for parent in parents:
        place = {
            child: {kind(voice.drafter): voice for voice in reversed(tree.voices(child))}
            for child in tree.children(parent)
        }
        if len({name for voices in place.values() for name in voices}) > 1:
            places.append(place)
    return places


def observe_path(band: Band, tree: TokenTree, decided: Sequence[int]) -> None:
    """Count the children of shared places that the decided tokens passed."""
    if not tree.echoes and len(set(tree.drafter[1:])) < 2:
        return
    for node, taken in passed(tree, decided):
        for place in shared_places(tree, [node]):
            for child, voices in place.items():
                for name, voice in voices.items():
                    band.of(name, others(voices)).observe(voice.rank, voice.said, child == taken)


def others(voices: dict[str, Voice]) -> str:
    """What they have made of a guess at a shared place."""
    return ECHOED if len(voices) > 1 else OPPOSED


def scores(band: Band, tree: TokenTree, parents: Iterable[int]) -> dict[int, float]:
    """Of the children of these, as far as the places are shared: logs of the estimated acceptance, below 0.

    What a table has not seen is taken to be what the kind reaches where it comes first, as many times more or less as guesses of the same
    rank have been right in that table than they are there.
    """
    nodes: list[int] = []
    groups: dict[tuple[str, str], int] = {}
    heard: list[tuple[int, int, int, float]] = []  # place among `nodes`, group, rank, said
    for place in shared_places(tree, parents):
        for child, voices in place.items():
            beside = others(voices)
            for name, voice in voices.items():
                heard.append(
                    (
                        len(nodes),
                        groups.setdefault((name, beside), len(groups)),
                        voice.rank,
                        voice.said,
                    )
                )
            nodes.append(child)
    if not heard:
        return {}
    first, here = [band.of(name) for name, _ in groups], [band.of(*group) for group in groups]
    first_tries, first_hits = (
        np.array([table.tries for table in first]),
        np.array([table.hits for table in first]),
    )
    tries, hits = (
        np.array([table.tries for table in here]),
        np.array([table.hits for table in here]),
    )
    which, group, ranks, said = map(np.array, zip(*heard, strict=True))
    cell = group, *cells(ranks, said)
    expected = (tries * (first_hits + PRIOR * MIDDLES) / (first_tries + PRIOR)).sum(2)
    all_, right = tries.sum(2), hits.sum(2)
    less, more = (
        (right + PRIOR) / (expected + PRIOR),
        (all_ - right + PRIOR) / (all_ - expected + PRIOR),
    )
    usual = (first_hits[cell] + PRIOR * np.exp(said)) / (first_tries[cell] + PRIOR)
    usual = np.where(
        less[cell[:2]] < 1.0, usual * less[cell[:2]], 1.0 - (1.0 - usual) * more[cell[:2]]
    )
    p = np.minimum(
        np.maximum((hits[cell] + PRIOR * usual) / (tries[cell] + PRIOR), LEAST), 1.0 - LEAST
    )
    odds = np.bincount(which, np.log(p / (1.0 - p))) / np.bincount(which)
    return dict(zip(nodes, (-np.log1p(np.exp(-odds))).tolist(), strict=True))
