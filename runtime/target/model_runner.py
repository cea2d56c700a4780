"""Runs one pass of the target's model over a batch and decides for each session."""

from collections.abc import Sequence

from runtime.core.errors import SESSION_FAULTS
from runtime.models.base import PassOutput
from runtime.target.batch import Batch, BatchItem
from runtime.target.feature_sender import FeatureSender
from runtime.target.head_runner import HeadRunner
from runtime.target.verifier import Decision, Verifier
from runtime.telemetry.metrics import TargetMetrics


class ModelRunner:
    """Isolates failures: a session that fails in a pass does not affect the others."""

    def __init__(
        self,
        heads: HeadRunner,
        verifier: Verifier,
        metrics: TargetMetrics,
        features: FeatureSender,
    ) -> None:
        self.heads, self.verifier, self.metrics, self.features = heads, verifier, metrics, features

    def run(self, batch: Batch) -> list[Decision | Exception]:
        """Return the decision for each item of the batch, or the error that ends its session.

        If the pass over all items fails, each item gets a pass to itself.
        """
        self.heads.charge(batch.parts)
        try:
            output = self._forward(batch.items)
        except SESSION_FAULTS:
            self.metrics.fallbacks["alone"] += 1
            return [self._run_alone(item) for item in batch.items]
        return [self._decide(*one) for one in zip(batch.items, output, strict=True)]

    def _run_alone(self, item: BatchItem) -> Decision | Exception:
        try:
            (output,) = self._forward([item])
        except SESSION_FAULTS as error:
            return error
        return self._decide(item, output)

    def _forward(self, items: Sequence[BatchItem]) -> list[PassOutput]:
        layers = self.features.layers_for(item.state for item in items)
        output = self.heads.forward([item.part for item in items], layers)
        if layers and any(one.features is None for one in output):
            self.features.disable()
        return output

    def _decide(self, item: BatchItem, output: PassOutput) -> Decision | Exception:
        state = item.state
        try:
            return self.verifier.decide(state.session, state.admitted.grammar, item.nodes, output)
        except SESSION_FAULTS as error:
            return error
