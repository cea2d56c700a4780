"""Sends drafters the hidden states of the target that they have asked for."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import numpy as np

from runtime.core import limits
from runtime.core.errors import SESSION_FAULTS, ModelRefused
from runtime.core.features import (
    EXPONENT_BITS,
    FeatureBits,
    FeatureBuffer,
    FeatureRows,
    FeatureSpec,
    LayerFeatures,
)
from runtime.core.messages import Features
from runtime.models.base import HiddenStateModel, Model, OutputSpec, PassInput, PassOutput
from runtime.target.commands import Send
from runtime.target.request_state import RequestState
from runtime.telemetry.metrics import TargetMetrics

# Messages per drafter and step with rows of earlier steps, for a drafter that joins in mid-text: a
# link holds only so many events that are not sent yet.
BACKLOG_MESSAGES = 32
VALUE_BYTES = 2  # of a bfloat16

log = logging.getLogger(__name__)


def row_bytes(model: Model, layers: Sequence[int]) -> int:
    """Return the bytes of the features of one token; 0 for a model without hidden states."""
    size = model.hidden_size if isinstance(model, HiddenStateModel) else 0
    return len(layers) * size * VALUE_BYTES


def check_features(model: Model, spec: FeatureSpec) -> None:
    """Raise ModelRefused if the model cannot show these hidden states."""
    if not isinstance(model, HiddenStateModel):
        raise ModelRefused(
            f"model {model.name} shows no hidden states, layers {list(spec.layers)} were asked for:"
            " choose a drafting method without features"
        )
    model.check(OutputSpec(features=spec.layers))
    if (row := row_bytes(model, spec.layers)) > limits.FEATURE_BYTES:
        raise ModelRefused(
            f"features of layers {list(spec.layers)} of model {model.name} are {row} bytes a token:"
            f" at most {limits.FEATURE_BYTES} are allowed, ask for fewer layers"
        )


class FeatureSender:
    """Knows which drafters ask for features, keeps those of each session, and sends them.

    specs     what each present drafter asks for
    layers    the layers that a pass returns for sessions that keep features
    of_heads  returns the layers that the target's own heads read

    A session keeps features if a drafter asked before it ended, and then to its end, so that a
    drafter that reconnects gets all of them. Without a request nothing is computed or kept.
    """

    def __init__(self, metrics: TargetMetrics) -> None:
        self.metrics = metrics
        self.specs: dict[str, FeatureSpec] = {}
        self.layers: tuple[int, ...] = ()
        self.of_heads: Callable[[], set[int]] = set
        self.lost = False  # the model has failed to show them
        self._backlog: Counter[str] = Counter()  # messages in this step, by drafter

    def ask(
        self,
        name: str,
        spec: FeatureSpec,
        states: Iterable[RequestState],
        sends: Mapping[str, Send],
    ) -> None:
        """Serve a drafter from now on. It gets what is known of the running sessions."""
        if name not in sends or self.lost:
            return
        if not self.specs:
            self.layers = ()
        self.specs[name] = spec
        self._widen()
        for state in states:
            state.features_sent.pop(name, None)
            self.begin(state)
            self.send(state, sends)

    def forget(self, name: str, states: Iterable[RequestState]) -> None:
        """Stop serving a drafter."""
        if self.specs.pop(name, None) is not None:
            for state in states:
                state.features_sent.pop(name, None)

    def begin(self, state: RequestState) -> None:
        """Keep features of this session if a drafter has asked for them, or a head reads them."""
        if not self._widen() or self.lost or not state.session.request.speculation:
            return
        if state.features is None or state.features.layers != self.layers:
            state.features = FeatureBuffer(self.layers)

    def _widen(self) -> bool:
        """Let `layers` contain all that is wanted; return False if nothing is."""
        wanted = {layer for spec in self.specs.values() for layer in spec.layers} | self.of_heads()
        if not wanted <= set(self.layers):
            self.layers = tuple(sorted(wanted))
        return bool(wanted)

    def next_step(self) -> None:
        self._backlog.clear()

    def layers_for(self, states: Iterable[RequestState]) -> tuple[int, ...]:
        """Return the layers that a pass over these sessions must show."""
        return self.layers if any(state.features is not None for state in states) else ()

    def reuse(self, state: RequestState, cached: FeatureBuffer | None, length: int) -> None:
        """Take over the features of the first `length` tokens, which another text has left."""
        known = state.features
        if known is not None and cached is not None and cached.layers == known.layers:
            state.features = cached.fork(length)

    def record(
        self,
        state: RequestState,
        start: int,
        shown: LayerFeatures | None,
        rows: Sequence[int] | slice = slice(None),
    ) -> None:
        """Keep `rows` of a pass: those of the committed tokens from position `start` on.

        If some are missing or not finite, the session's features begin anew after them.
        """
        if state.features is None:
            return
        bits = None if shown is None else shown.of(state.features.layers)
        if bits is None:
            return
        chosen = bits[rows]
        begin = last_not_finite(chosen) + 1
        found = FeatureRows(start + begin, chosen[begin:])
        if not len(found.rows):
            return
        if not state.features.append(found):
            state.features = FeatureBuffer(state.features.layers)
            state.features.append(found)

    def send(
        self, state: RequestState, sends: Mapping[str, Send], fresh: int | None = None
    ) -> None:
        """Send each drafter what it has not got yet.

        `fresh` is the position of the first row of this step. Older rows are sent as far as
        BACKLOG_MESSAGES allows, and newer ones after them.
        """
        kept = state.features
        if kept is None:
            return
        for name, spec in self.specs.items():
            if name not in sends:
                continue
            start = max(state.features_sent.get(name, 0), kept.start)
            if start >= kept.end:
                continue
            rows = kept.between(start, kept.end)
            bits = LayerFeatures(kept.layers, rows.rows).of(spec.layers)
            if bits is None:
                continue
            late = fresh is None or start < fresh
            sent = self._send_rows(state, name, sends[name], FeatureRows(start, bits), late)
            state.features_sent[name] = start + sent

    def _send_rows(
        self, state: RequestState, name: str, send: Send, found: FeatureRows, late: bool
    ) -> int:
        """Send rows in messages of permitted size; return how many were sent."""
        size = limits.FEATURE_BYTES // (found.rows.shape[1] * VALUE_BYTES)
        for begin in range(0, len(found.rows), size):
            if late:
                if self._backlog[name] >= BACKLOG_MESSAGES:
                    return begin
                self._backlog[name] += 1
            piece = found.rows[begin : begin + size]
            send(
                Features(
                    state.session.id, state.session.epoch, FeatureRows(found.start + begin, piece)
                )
            )
            self.metrics.guesses[name].feature_bytes += piece.nbytes
        return len(found.rows)

    def read(
        self, model: Model, parts: Sequence[PassInput], states: Iterable[RequestState]
    ) -> Sequence[PassOutput]:
        """Run a pass that also shows what these sessions keep.

        Raises the model's errors.
        """
        layers = self.layers_for(states)
        if layers:
            try:
                return cast(HiddenStateModel, model).forward_outputs(
                    parts, OutputSpec(features=layers)
                )
            except SESSION_FAULTS:
                log.debug("a pass with hidden states failed", exc_info=True)
        output = [PassOutput(logits) for logits in model.forward_all(parts)]
        if layers:
            self.disable()
        return output

    def disable(self) -> None:
        """Continue without features: a pass that was to show them failed, and one without did
        not.
        """
        if not self.lost:
            log.warning("the model failed to show hidden states: drafters get no features any more")
            self.metrics.fallbacks["features lost"] += 1
        self.lost = True
        self.specs.clear()
        self.layers = ()


def last_not_finite(rows: FeatureBits) -> int:
    """Return the last row with an infinite number or NaN; -1 without any."""
    bad = np.flatnonzero((rows & EXPONENT_BITS == EXPONENT_BITS).any(axis=1))
    return int(bad[-1]) if len(bad) else -1
