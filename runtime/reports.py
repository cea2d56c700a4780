"""What targets and drafters say of themselves since they started: for status, metrics and scaling. Times in seconds."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GuessReport:
    """What one drafter has brought to one target, in tokens (nodes of trees).

    proposed  arrived and put into a mirror;  accepted  of them, delivered;  late  arrived after the root had passed them;
    stale     for a session, epoch or parent that is gone, or sent while it rests
    lead      mean tokens from a root to its deepest node when a step begins
    """

    proposed: int = 0
    accepted: int = 0
    late: int = 0
    stale: int = 0
    lead: float = 0.0
    round_trip: float = 0.0  # seconds from a commit to the first growth on its root, moving average
    resting: bool = False  # it brought nothing for long and has no share at present


@dataclass(frozen=True, slots=True)
class TargetReport:
    """Counters since the start, and what is under way now.

    `rounds` counts a step once for each session in it. Where nothing is under way, drafted = accepted + rejected + expired; before,
    live trees hold the rest. `fallbacks` counts what went on without something, by cause:

    no drafter   rounds of sessions that want guesses while nobody is there to guess
    all resting  rounds while all drafters rest, having brought nothing for long
    empty tree   rounds for which no guess was there in time
    alone        packed passes that failed and were made again session by session
    head lost    heads that failed and were taken off
    """

    live: int = 0
    waiting: int = 0
    kv_used: int = 0  # slots, one for a token
    kv_slots: int = 0
    steps: int = 0
    rounds: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    drafted: int = 0  # nodes that arrived from drafters and were put into a mirror
    verified: int = 0  # of them, given a row
    accepted: int = 0  # of them, delivered
    rejected: int = 0  # verified and not delivered
    expired: int = 0  # dropped without a row, with the branch or the session that they belonged to
    accepted_at: tuple[int, ...] = ()  # accepted nodes by their place on the path, from 0
    waited: float = 0.0
    computed: float = 0.0
    bookkeeping: float = 0.0
    prefilled: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)  # sessions by finish reason
    fallbacks: dict[str, int] = field(default_factory=dict)
    lost_links: dict[str, int] = field(default_factory=dict)  # by drafter
    guesses: dict[str, GuessReport] = field(default_factory=dict)  # by drafter


@dataclass(frozen=True, slots=True)
class DrafterReport:
    sessions: int = 0
    passes: int = 0
    nodes: int = 0  # guessed
    computed: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)  # messages without effect, by reason
