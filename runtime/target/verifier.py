"""The target's decision for one session of a step, from its logits to a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.core.messages import Logprob
from runtime.core.sampler_reference import Ask, Chooser, Guide, Scorer, logprobs
from runtime.core.verify import Verdict, match, walk
from runtime.models.base import PassOutput
from runtime.target.session import Session


@dataclass(frozen=True, slots=True)
class Decision:
    """`logprobs`: of the verdict's tokens, the target's own included; empty where nobody asked for them. `output`: what it was made of."""

    verdict: Verdict
    logprobs: tuple[Logprob, ...]
    output: PassOutput


@dataclass(frozen=True, slots=True)
class Verifier:
    """How the logits of one family of models are read; `eos` are the tokens that end a text."""

    choose: Chooser
    eos: frozenset[int]
    score: Scorer = logprobs

    def decide(
        self, session: Session, guide: Guide | None, nodes: Sequence[int], output: PassOutput
    ) -> Decision:
        """`output` is of the rows of the root and of `nodes`. `guide` goes along with what is decided.

        Nothing else changes, and each decision is committed: so the state of a constraint needs no rollback.
        """
        logits = output.logits
        verdict = (
            self.verdict(session, nodes, logits)
            if guide is None
            else self.guided(session, guide, nodes, logits)
        )
        k = session.request.sampling.logprobs
        if k is None:
            return Decision(verdict, (), output)
        rows = [0, *(nodes.index(node) + 1 for node in verdict.path)]
        tokens = [*(session.tree.token[node] for node in verdict.path), verdict.token]
        return Decision(verdict, self.score(logits[rows], tokens, k), output)

    def verdict(self, session: Session, nodes: Sequence[int], logits: Any) -> Verdict:
        ask = Ask(
            session.request.sampling, session.prompt, session.tokens, session.paths(nodes), self.eos
        )
        return match(session.tree, nodes, self.choose(logits, ask).tolist())

    def guided(self, session: Session, guide: Guide, nodes: Sequence[int], logits: Any) -> Verdict:
        """Row by row down the path that the target takes: one mask for each token that is decided, however many nodes there are.

        A guess that breaks the constraint is never chosen, so nothing below it is looked at. Drafters know of no constraint: where
        it bites, their guesses are wrong.
        """
        sampling, path = session.request.sampling, list[int]()

        def choose(row: int) -> int:
            ask = Ask(
                sampling, session.prompt, session.tokens, [path], self.eos, guide.allowed()[None]
            )
            token = int(self.choose(logits[row : row + 1], ask)[0])
            guide.take(token)
            path.append(token)
            return token

        return walk(session.tree, nodes, choose)
