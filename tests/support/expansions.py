"""Asks drafters that read features for children, and adds them to the tree as a host does."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from runtime.core.draft_nodes import DraftNodes
from runtime.drafters.base import Drafter, ExpandRequest, Text
from tests.support.drafters import text_of
from tests.support.eagles import features_of, tiny


def text_with(tokens: Sequence[int], start: int = 0, session: str = "s", **sampling: Any) -> Text:
    text = text_of(tokens, session, **sampling)
    return replace(text, features=features_of(tiny(), tokens, start))


def expand(found: Drafter, text: Text, leaves: Sequence[int]) -> DraftNodes:
    (nodes,) = found.expand([ExpandRequest(text, leaves)])
    assert nodes is not None
    return nodes


def insert(text: Text, nodes: DraftNodes) -> list[int]:
    """Adds guesses to the tree; returns their places."""
    places = [
        text.tree.add(parent, token, score)
        for parent, token, score in zip(
            nodes.parents.tolist(), nodes.tokens.tolist(), nodes.scores.tolist(), strict=True
        )
    ]
    for parent in set(nodes.parents.tolist()):
        text.tree.expanded[parent] = True
    return [place for place in places if place is not None]
