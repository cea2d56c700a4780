"""Decides one session of a step: from its logits to the accepted path."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.core.accepted_path import AcceptedPath, accept_path, accept_path_by_row
from runtime.core.messages import Logprob
from runtime.core.sampler_reference import (
    GrammarState,
    LogprobScorer,
    Sampler,
    SamplingInput,
    logprobs,
)
from runtime.models.base import PassOutput
from runtime.target.session import Session


@dataclass(frozen=True, slots=True)
class Decision:
    """`logprobs` cover the accepted tokens and the target's own; empty if they were not requested.

    `output` is the model output that the decision was made from.
    """

    accepted: AcceptedPath
    logprobs: tuple[Logprob, ...]
    output: PassOutput


@dataclass(frozen=True, slots=True)
class Verifier:
    """Samples from the logits of one family of models; `eos` are the end-of-text tokens."""

    sample: Sampler
    eos: frozenset[int]
    score: LogprobScorer = logprobs

    def decide(
        self,
        session: Session,
        grammar: GrammarState | None,
        nodes: Sequence[int],
        output: PassOutput,
    ) -> Decision:
        """Decide from the output for the rows of the root and of `nodes`, advancing `grammar`.

        Nothing else changes. Every decision is committed, so the grammar needs no rollback.
        """
        logits = output.logits
        accepted = (
            self._accept(session, nodes, logits)
            if grammar is None
            else self._accept_constrained(session, grammar, nodes, logits)
        )
        k = session.request.sampling.logprobs
        if k is None:
            return Decision(accepted, (), output)
        rows = [0, *(nodes.index(node) + 1 for node in accepted.path)]
        tokens = [*(session.tree.token[node] for node in accepted.path), accepted.token]
        return Decision(accepted, self.score(logits[rows], tokens, k), output)

    def _accept(self, session: Session, nodes: Sequence[int], logits: Any) -> AcceptedPath:
        ask = SamplingInput(
            session.request.sampling, session.prompt, session.tokens, session.paths(nodes), self.eos
        )
        return accept_path(session.tree, nodes, self.sample(logits, ask).tolist())

    def _accept_constrained(
        self, session: Session, grammar: GrammarState, nodes: Sequence[int], logits: Any
    ) -> AcceptedPath:
        """Decide row by row along the accepted path: one mask per decided token, however many
        nodes.

        A guess that breaks the constraint is never chosen, so nothing below it is examined.
        Drafters do not know the constraint: their guesses are wrong wherever it excludes them.
        """
        sampling, path = session.request.sampling, list[int]()

        def choose(row: int) -> int:
            ask = SamplingInput(
                sampling, session.prompt, session.tokens, [path], self.eos, grammar.allowed()[None]
            )
            token = int(self.sample(logits[row : row + 1], ask)[0])
            grammar.accept_token(token)
            path.append(token)
            return token

        return accept_path_by_row(session.tree, nodes, choose)
