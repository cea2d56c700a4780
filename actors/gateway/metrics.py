"""Prometheus metrics of the gateway's requests and of the fleet. deploy/METRICS.md lists them."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from actors.fleet.fleet_state import Fleet
from actors.gateway.concurrency_limiter import ConcurrencyLimiter
from actors.gateway.fleet_metrics import FleetCollector
from runtime.core.messages import Chunk, Request
from runtime.telemetry.metrics import speculative_decoding

PREFIX = "outrider:"
FIRST_TOKEN_BUCKETS = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
)
TOKEN_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.5,
)
REQUEST_BUCKETS = (
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)
CLIENT_CLOSED = "499"  # the client disconnected before the response


class GatewayMetrics:
    """Counters and histograms. They contain neither contents nor senders of requests."""

    def __init__(
        self, model: str, limiter: ConcurrencyLimiter, fleet: Callable[[], Fleet | None]
    ) -> None:
        self.registry = CollectorRegistry()

        def model_metric(
            kind: Callable[..., Any], name: str, meaning: str, *labels: str, **more: Any
        ) -> Any:
            made = kind(
                PREFIX + name, meaning, ("model_name", *labels), registry=self.registry, **more
            )
            return made if labels else made.labels(model)

        self.model = model
        running = model_metric(
            Gauge, "num_requests_running", "Generations under way that have given a token"
        )
        waiting = model_metric(
            Gauge, "num_requests_waiting", "Generations under way that have not given a token yet"
        )
        running.set_function(
            lambda: sum(entry.sessions for entry in tuple(limiter.active) if entry.has_token)
        )
        waiting.set_function(
            lambda: sum(entry.sessions for entry in tuple(limiter.active) if not entry.has_token)
        )
        self.first = model_metric(
            Histogram,
            "time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=FIRST_TOKEN_BUCKETS,
        )
        self.between = model_metric(
            Histogram,
            "inter_token_latency_seconds",
            "Between two deliveries of a generation",
            buckets=TOKEN_BUCKETS,
        )
        self.per_token = model_metric(
            Histogram,
            "time_per_output_token_seconds",
            "Of a generation, its mean time of a token after the first",
            buckets=TOKEN_BUCKETS,
        )
        self.whole = model_metric(
            Histogram,
            "e2e_request_latency_seconds",
            "From a request's arrival to its last token",
            buckets=REQUEST_BUCKETS,
        )
        self.prompts = model_metric(
            Counter, "prompt_tokens_total", "Prompt tokens of requests that have given a token"
        )
        self.generated = model_metric(Counter, "generation_tokens_total", "Tokens generated")
        self.success = model_metric(
            Counter, "request_success_total", "Generations that ended, by reason", "finished_reason"
        )
        self.drafts = model_metric(
            Counter, "spec_decode_num_drafts_total", "Rounds in which draft tokens were verified"
        )
        self.draft_tokens = model_metric(
            Counter,
            "spec_decode_num_draft_tokens_total",
            "Draft tokens that the target has verified",
        )
        self.accepted = model_metric(
            Counter, "spec_decode_num_accepted_tokens_total", "Draft tokens that were accepted"
        )
        self.accepted_at = model_metric(
            Counter,
            "spec_decode_num_accepted_tokens_per_pos_total",
            "Draft tokens accepted, by their place in the draft, from 0",
            "position",
        )
        self.by_drafter = model_metric(
            Counter,
            "accepted_tokens_total",
            "Draft tokens accepted, by the drafter that guessed them first",
            "drafter",
        )
        self.responses = model_metric(
            Counter,
            "http_responses_total",
            "HTTP answers; code 499: the client left before",
            "route",
            "code",
        )
        self.ignored = model_metric(
            Counter, "ignored_fields_total", "Unknown fields of bodies that were ignored"
        )
        self.replayed = model_metric(
            Counter,
            "idempotent_replays_total",
            "Requests that got the answer of an earlier one with their Idempotency-Key",
        )
        self.registry.register(FleetCollector(fleet))

    def text(self) -> bytes:
        """Returns the metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def answered(self, route: str, code: int | str) -> None:
        self.responses.labels(self.model, route, str(code)).inc()

    def ended(self, reason: str) -> None:
        self.success.labels(self.model, reason).inc()


class RequestTimer:
    """Times the generations of one request. `arrived` is its arrival; `now` returns seconds."""

    def __init__(
        self,
        metrics: GatewayMetrics,
        requests: Iterable[Request],
        n: int,
        arrived: float,
        now: Callable[[], float],
    ) -> None:
        self.metrics, self.requests, self.n, self.arrived, self.now = (
            metrics,
            tuple(requests),
            n,
            arrived,
            now,
        )
        self.begun: list[float | None] = [None] * len(self.requests)
        self.last = [0.0] * len(self.requests)
        self.counts = [0] * len(self.requests)
        self.open = len(self.requests)

    def on_chunk(self, index: int, chunk: Chunk) -> None:
        """Records a chunk of a generation."""
        now, metrics = self.now(), self.metrics
        if chunk.tokens:
            if self.begun[index] is None:
                if not any(self.counts):
                    metrics.first.observe(now - self.arrived)
                self.begun[index] = now
                self._count_prompt(index)
            else:
                metrics.between.observe(now - self.last[index])
            self.last[index] = now
            self.counts[index] += len(chunk.tokens)
            metrics.generated.inc(len(chunk.tokens))
        if chunk.finish_reason is not None:
            self._ended(index, chunk, now)

    def _count_prompt(self, index: int) -> None:
        if index % self.n == 0:
            self.metrics.prompts.inc(len(self.requests[index].prompt))

    def _ended(self, index: int, chunk: Chunk, now: float) -> None:
        metrics, begun, count = self.metrics, self.begun[index], self.counts[index]
        if chunk.finish_reason == "length" and begun is None:  # only its prompt was read
            self._count_prompt(index)
        self.open -= 1
        metrics.ended(str(chunk.finish_reason))
        if begun is not None and count > 1:
            metrics.per_token.observe((now - begun) / (count - 1))
        if self.open == 0:
            metrics.whole.observe(now - self.arrived)
        if (stats := chunk.stats) is not None and stats.verified:
            said = speculative_decoding(stats)
            metrics.drafts.inc(said["num_drafts"])
            metrics.draft_tokens.inc(stats.verified)
            metrics.accepted.inc(stats.accepted)
            for position in range(len(stats.histogram) - 1):
                metrics.accepted_at.labels(metrics.model, str(position)).inc(
                    sum(stats.histogram[position + 1 :])
                )
            for drafter, accepted in stats.by_drafter.items():
                metrics.by_drafter.labels(metrics.model, drafter).inc(accepted)

    def abort_unfinished(self) -> None:
        """Records the generations that have not ended as aborted."""
        for _ in range(self.open):
            self.metrics.ended("abort")
        self.open = 0
