"""Builds drafting methods and asks them for one expansion."""

import gc
import importlib
import types
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from runtime.core import limits
from runtime.core.draft_nodes import DraftNodes
from runtime.core.features import FeatureRows
from runtime.core.node_keys import text_key
from runtime.core.sampling_params import SamplingParams
from runtime.core.tree import TokenTree
from runtime.drafters.base import Drafter, ExpandRequest, Text
from runtime.method_registry import drafting_methods, module_name
from runtime.models.toy import ToyModel
from tests.support import blocks, eagles, masks

PROMPT = [3, 1, 4, 1, 5, 9, 3, 1, 4, 1]
# Its greedy output repeats itself, so every method finds something.
LOOPING = ToyModel(vocabulary=16, memory=2)
METHODS = pytest.mark.parametrize("method", drafting_methods())


def built(method: str) -> Drafter:
    module = importlib.import_module(f"runtime.drafters.{module_name(method)}")
    # Some methods read the target's folder and weights that were trained for it.
    place: masks.Tiny | eagles.Tiny | blocks.Tiny = masks.tiny(LOOPING.vocabulary)
    if method == "eagle":
        place = eagles.tiny(LOOPING.vocabulary)
    if method == "block":
        place = blocks.tiny(LOOPING.vocabulary)
    given = masks.ingredients(place.target, place.folder)
    drafter: Drafter = module.build(
        replace(given, load=lambda name: LOOPING, load_layers=lambda name: LOOPING)
    )
    return drafter if drafter.feature_spec is None else Fed(drafter)


class Fed:
    """Gives a drafter features, for targets that have none: the same for the same texts."""

    feature_spec = None

    def __init__(self, inner: Drafter, width: int = 96) -> None:
        self.inner, self.table = (
            inner,
            np.random.default_rng(0).normal(size=(LOOPING.vocabulary, width)).astype(np.float32),
        )

    def expand(self, requests: Sequence[ExpandRequest]) -> Sequence[DraftNodes | None]:
        return self.inner.expand(
            [replace(request, text=self.with_features(request.text)) for request in requests]
        )

    def with_features(self, text: Text) -> Text:
        bits = self.table[list(text.tokens[:-1])].view(np.uint32) >> 16
        return replace(text, features=FeatureRows(0, bits.astype(np.uint16)))

    def close(self, session: str) -> None:
        self.inner.close(session)


def text_of(tokens: Sequence[int], session: str = "s", **sampling: object) -> Text:
    tree = TokenTree(text_key(tokens), tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH)
    return Text(session, list(tokens), len(tokens), SamplingParams(**sampling), tree)  # type: ignore[arg-type]


def expanded(drafter: Drafter, text: Text, leaves: Sequence[int], branches: int = 0) -> DraftNodes:
    """Expands one text and returns the nodes attached to the tree."""
    (found,) = drafter.expand([ExpandRequest(text, leaves, branches)])
    assert found is not None
    return near(found)


def near(found: DraftNodes) -> DraftNodes:
    """Returns the nodes attached directly to the tree."""
    level = found.levels()[0]
    return DraftNodes(found.parents[level], found.tokens[level], found.scores[level])


def holds(thing: object, name: str) -> bool:
    """Returns True if the string can be reached from the object through references."""
    seen: set[int] = set()
    stack = [thing]
    while stack:
        found = stack.pop()
        if id(found) in seen or isinstance(
            found, type | types.ModuleType | types.FunctionType | types.MethodType
        ):
            continue
        seen.add(id(found))
        if isinstance(found, str) and found == name:
            return True
        stack.extend(gc.get_referents(found))
        if isinstance(found, dict):
            stack.extend(found)  # CPython does not follow keys that are strings
    return False
