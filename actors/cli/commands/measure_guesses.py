"""Measures heads, and drafters without a model, along the target's own texts."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from runtime.core import limits
from runtime.core.draft_nodes import DraftNodes
from runtime.core.features import FeatureBuffer, FeatureRows
from runtime.core.messages import Tokens
from runtime.core.node_keys import text_key
from runtime.core.sampling_params import SamplingParams
from runtime.core.tree import TokenTree
from runtime.drafters.base import Drafter, ExpandRequest, Text
from runtime.heads.base import Head, VerifiedStep
from runtime.models.base import OutputSpec, PassInput, causal
from runtime.models.hf import HFModel
from runtime.sim.draft_samples import RankedScores
from runtime.sim.pair_profile import Position
from runtime.sim.replayed_head import HeadProfile, head_step

TargetAnswer = tuple[Sequence[int], Sequence[int]]  # prompt and output of the target
NO_GUESS_LOGPROB = -14.0  # stands for no guess
LEAF_COUNTS = (4, 16)  # of a pass, in addition to one
REPEATS = 8


def measure_head(
    name: str, head: Head, model: HFModel, answers: Sequence[TargetAnswer], sampling: SamplingParams
) -> HeadProfile:
    """Measures a head in steps of plain decoding along the answers.

    Each pass runs without the head and then with it; the difference is its cost.
    """
    steps: list[tuple[RankedScores, ...]] = []
    without, passes, own = [], [], []
    for number, (prompt, output) in enumerate(answers):
        cache = model.new_cache()
        shown = answer_features(model, (prompt, output), head.output_spec.features)
        if len(prompt) > 1:
            model.forward(cache, causal(np.asarray(prompt[:-1]), 0), last=0)
        for place in range(len(output) - 1):
            text = (*prompt, *output[:place])
            rows = causal(np.asarray(text[-1:]), cache.length)
            began = time.monotonic()
            model.forward_all([PassInput(cache, rows)])
            middle = time.monotonic()
            cache.truncate(len(text) - 1)
            part = PassInput(cache, rows)
            if (
                head.output_spec.branches
                and rows.positions[0] + len(head.output_spec.branches) < model.context
            ):
                part = replace(part, branch_rows=(0,))
            looking = time.monotonic()
            (pass_output,) = model.forward_outputs([part], head.output_spec)
            seen = time.monotonic()
            growth = head.propose(
                [
                    VerifiedStep(
                        new_text(number, (*text, output[place]), prompt, sampling),
                        rows.tokens,
                        (0,),
                        pass_output,
                        part.branch_rows,
                        shown,
                    )
                ]
            )[0]
            own.append(time.monotonic() - seen)
            without.append(middle - began)
            passes.append(seen - looking)
            steps.append(head_step(growth, output[place + 1 :]))
        head.close(str(number))
    price = statistics.median(own) + max(
        0.0, statistics.median(passes) - statistics.median(without)
    )
    return HeadProfile(name, price, tuple(steps))


def measure_drafter(
    drafter: Drafter,
    answers: Sequence[TargetAnswer],
    sampling: SamplingParams,
    model: HFModel | None = None,
) -> tuple[dict[int, float], tuple[Position, ...]]:
    """Returns the median seconds of a pass by leaves, and the guesses at each place.

    The target `model` shows the features that the drafter asks for, if it does.
    """
    seconds, found = [], []
    layers = () if drafter.feature_spec is None else drafter.feature_spec.layers
    for number, (prompt, output) in enumerate(answers):
        shown = answer_features(model, (prompt, output), layers)
        for place in range(len(output)):
            text = new_text(number, (*prompt, *output[:place]), prompt, sampling, shown)
            guessed, took = timed_expand(drafter, ExpandRequest(text, [0]))
            seconds.append(took)
            near, *below = rank_positions(guessed, output[place:]) or [
                Position(rank=None, scores=(NO_GUESS_LOGPROB,))
            ]
            found.append(near.model_copy(update={"below": tuple(below)}))
        drafter.close(str(number))
    shown = answer_features(model, answers[0], layers)
    wider = {
        width: expand_seconds(drafter, answers[0], sampling, width, shown) for width in LEAF_COUNTS
    }
    return {1: statistics.median(seconds), **wider}, tuple(found)


def timed_expand(drafter: Drafter, request: ExpandRequest) -> tuple[DraftNodes, float]:
    """Returns the guesses, and the seconds of their pass without passes that read the text."""
    while True:
        began = time.monotonic()
        (guessed,) = drafter.expand([request])
        if guessed is not None:
            return guessed, time.monotonic() - began


def expand_seconds(
    drafter: Drafter,
    answer: TargetAnswer,
    sampling: SamplingParams,
    width: int,
    shown: FeatureBuffer | None,
) -> float:
    """Returns the median seconds of a pass below `width` children of a text's last token."""
    prompt, output = answer
    seconds = []
    for place in range(min(REPEATS, len(output))):
        text = new_text(width, (*prompt, *output[:place]), prompt, sampling, shown)
        timed_expand(drafter, ExpandRequest(text, [0]))
        leaves = [
            leaf
            for token in range(width)
            if (leaf := text.tree.add(0, token, NO_GUESS_LOGPROB)) is not None
        ]
        seconds.append(timed_expand(drafter, ExpandRequest(text, leaves))[1])
    drafter.close(str(width))
    return statistics.median(seconds)


def rank_positions(guessed: DraftNodes, text: Sequence[int]) -> list[Position]:
    """Returns the guesses of a pass for one leaf, by place.

    Each place is below the best guess of the one before. `text` is the target's continuation.
    """
    found: list[Position] = []
    siblings, right = np.arange(len(guessed.tokens))[guessed.levels()[0]], True
    while len(siblings):
        best = siblings[np.argsort(-guessed.scores[siblings], kind="stable")]
        actual = text[len(found) : len(found) + 1] if right else ()
        ranks = np.flatnonzero(np.isin(guessed.tokens[best], actual)).tolist()
        scores = tuple(np.minimum(guessed.scores[best].astype(float), 0.0).tolist())
        found.append(Position(rank=ranks[0] if ranks else None, scores=scores))
        right = found[-1].rank == 0
        siblings = guessed.children_of(int(best[0]))
    return found


def new_text(
    number: int,
    tokens: Tokens,
    prompt: Sequence[int],
    sampling: SamplingParams,
    shown: FeatureBuffer | None = None,
) -> Text:
    """Returns a text without guesses, with the features of all tokens but the last."""
    tree = TokenTree(text_key(tokens), tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH)
    features = None if shown is None else shown.between(0, len(tokens) - 1)
    return Text(str(number), tokens, len(prompt), sampling, tree, features)


def answer_features(
    model: HFModel | None, answer: TargetAnswer, layers: tuple[int, ...]
) -> FeatureBuffer | None:
    """Returns the hidden states of these layers along a prompt and its answer, if there are any."""
    if not layers or model is None:
        return None
    prompt, output = answer
    rows = causal(np.asarray((*prompt, *output)), 0)
    (shown,) = model.forward_outputs(
        [PassInput(model.new_cache(), rows, last=0)], OutputSpec(features=layers)
    )
    found = FeatureBuffer(layers)
    if shown.features is not None:
        found.append(FeatureRows(0, shown.features.rows))
    return found
