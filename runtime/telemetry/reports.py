"""Reports of targets and drafters since their start, for status, metrics and scaling.

Times are in seconds. Each field defines how it is exposed as a metric.
"""

from dataclasses import dataclass, field
from typing import Literal

MetricKind = Literal["counter", "gauge"]


@dataclass(frozen=True, slots=True)
class Metric:
    """Defines how a field is exposed. `label` names its keys or positions; "" for a single
    value.
    """

    name: str
    kind: MetricKind
    meaning: str
    label: str = ""


def counter(name: str, meaning: str, label: str = "") -> dict[str, Metric]:
    """Return the metadata of a field that only grows."""
    return {"metric": Metric(name, "counter", meaning, label)}


def gauge(name: str, meaning: str) -> dict[str, Metric]:
    return {"metric": Metric(name, "gauge", meaning)}


@dataclass(frozen=True, slots=True)
class GuessReport:
    """Reports what one drafter contributed to one target, in tokens (nodes of trees).

    `stale` includes what it sent while it rested. `lead` is the distance from a root to its deepest
    node.
    """

    proposed: int = field(
        default=0,
        metadata=counter(
            "proposed_tokens_total", "Draft tokens that arrived and were put into a tree"
        ),
    )
    accepted: int = field(
        default=0,
        metadata=counter("accepted_tokens_total", "Draft tokens that were accepted and delivered"),
    )
    late: int = field(
        default=0,
        metadata=counter(
            "late_tokens_total", "Draft tokens that arrived after the text had passed them"
        ),
    )
    stale: int = field(
        default=0,
        metadata=counter(
            "stale_tokens_total", "Draft tokens for a session, an epoch or a parent that was gone"
        ),
    )
    lead: float = field(
        default=0.0,
        metadata=gauge("lead_tokens", "Mean tokens that its tree is ahead when a step begins"),
    )
    round_trip: float = field(
        default=0.0,
        metadata=gauge(
            "round_trip_seconds", "From a commit to the first growth on it, moving average"
        ),
    )
    resting: bool = field(
        default=False,
        metadata=gauge(
            "resting", "1 where it has brought nothing for long and has no share at present"
        ),
    )
    feature_bytes: int = field(
        default=0,
        metadata=counter("feature_bytes_total", "Bytes of hidden states that were sent to it"),
    )


@dataclass(frozen=True, slots=True)
class TargetReport:
    """Counters since the start, and the current state.

    `rounds` counts a step once for each session in it. While no session is running, drafted =
    accepted + rejected + expired; otherwise living trees hold the rest. `kv_used` and `kv_slots`
    count slots, one per token. `fallbacks` counts what went without something:

    no drafter   rounds of sessions that want guesses while there is no drafter
    all resting  rounds while all drafters rest, having contributed nothing for long
    plain faster rounds while all drafters pause: for a probe, or since plain decoding is faster
    empty tree   rounds for which no guess arrived in time
    alone        packed passes that failed and were repeated session by session
    head lost    heads that failed and were disabled
    features lost
                 the model could not show hidden states: drafters get none any more
    """

    live: int = field(
        default=0, metadata=gauge("live_sessions", "Sessions that are being generated")
    )
    waiting: int = field(
        default=0, metadata=gauge("waiting_sessions", "Sessions that wait for KV memory")
    )
    kv_used: int = field(default=0, metadata=gauge("kv_used_slots", "KV memory in use, in tokens"))
    kv_slots: int = field(default=0, metadata=gauge("kv_slots", "KV memory, in tokens"))
    steps: int = field(default=0, metadata=counter("steps_total", "Forward passes"))
    rounds: int = field(
        default=0,
        metadata=counter("rounds_total", "Forward passes, counted once for each session in them"),
    )
    rows: int = field(default=0, metadata=counter("rows_total", "Rows of forward passes"))
    prompt_tokens: int = field(
        default=0, metadata=counter("prompt_tokens_total", "Prompt tokens taken in")
    )
    reused_tokens: int = field(
        default=0,
        metadata=counter(
            "reused_tokens_total", "Prompt tokens whose keys and values were there already"
        ),
    )
    completion_tokens: int = field(
        default=0, metadata=counter("completion_tokens_total", "Tokens generated")
    )
    drafted: int = field(
        default=0,
        metadata=counter(
            "drafted_tokens_total", "Draft tokens that arrived and were put into a tree"
        ),
    )
    verified: int = field(
        default=0, metadata=counter("verified_tokens_total", "Draft tokens that were given a row")
    )
    accepted: int = field(
        default=0,
        metadata=counter("accepted_tokens_total", "Draft tokens that were accepted and delivered"),
    )
    rejected: int = field(
        default=0,
        metadata=counter(
            "rejected_tokens_total", "Draft tokens that were verified and not delivered"
        ),
    )
    expired: int = field(
        default=0,
        metadata=counter("expired_tokens_total", "Draft tokens that were dropped without a row"),
    )
    accepted_at: tuple[int, ...] = field(
        default=(),
        metadata=counter(
            "accepted_tokens_per_pos_total",
            "Draft tokens accepted, by their place on the path, from 0",
            "position",
        ),
    )
    waited: float = field(
        default=0.0,
        metadata=counter("wait_seconds_total", "Time in which the target waited for drafts"),
    )
    computed: float = field(
        default=0.0,
        metadata=counter("compute_seconds_total", "Time in which the target's model computed"),
    )
    bookkeeping: float = field(
        default=0.0,
        metadata=counter(
            "bookkeeping_seconds_total", "Time of the target's steps beside the model's"
        ),
    )
    prefilled: float = field(
        default=0.0,
        metadata=counter("prefill_seconds_total", "Time in which the target read prompts"),
    )
    finished: dict[str, int] = field(
        default_factory=dict,
        metadata=counter(
            "sessions_finished_total", "Sessions that ended, by reason", "finished_reason"
        ),
    )
    fallbacks: dict[str, int] = field(
        default_factory=dict,
        metadata=counter("fallbacks_total", "Steps that did without something, by cause", "cause"),
    )
    probes: int = field(
        default=0,
        metadata=counter(
            "spec_decode_probes_total",
            "Times that drafters paused for a few steps, to measure plain decoding",
        ),
    )
    speedup: float = field(
        default=1.0,
        metadata=gauge(
            "spec_decode_speedup",
            "Speed with drafts over plain decoding with drafters at rest, as last measured",
        ),
    )
    active: bool = field(
        default=True,
        metadata=gauge(
            "spec_decode_active", "0 while drafters pause: for a probe, or since plain is faster"
        ),
    )
    standby_slots: int = field(
        default=0,
        metadata=gauge(
            "standby_slots", "KV memory that holds texts of other targets' sessions, in tokens"
        ),
    )
    standby_tokens: int = field(
        default=0,
        metadata=counter(
            "standby_tokens_total", "Tokens of other targets' sessions that were read in advance"
        ),
    )
    lost_links: dict[str, int] = field(
        default_factory=dict,
        metadata=counter(
            "lost_links_total",
            "Connections to a drafter that ended: lost, or let go by scaling",
            "drafter",
        ),
    )
    guesses: dict[str, GuessReport] = field(default_factory=dict)  # by drafter


@dataclass(frozen=True, slots=True)
class DrafterReport:
    """Counters since the drafter started, and its current sessions."""

    sessions: int = field(default=0, metadata=gauge("sessions", "Sessions that it guesses for"))
    passes: int = field(default=0, metadata=counter("passes_total", "Forward passes"))
    nodes: int = field(default=0, metadata=counter("nodes_total", "Draft tokens guessed"))
    computed: float = field(
        default=0.0, metadata=counter("compute_seconds_total", "Time in which the drafter computed")
    )
    counters: dict[str, int] = field(
        default_factory=dict,
        metadata=counter(
            "ignored_messages_total",
            "Messages that a drafter got and that had no effect, by reason",
            "reason",
        ),
    )
