"""Shows a generation at a terminal, or formats it as a JSON object."""

import sys
from itertools import zip_longest
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.status import Status
from rich.style import Style
from rich.table import Table

from actors.openai.usage import metrics, tokens_per_second, usage
from runtime.config import Deployment
from runtime.core.messages import Chunk, Request, Stats

DRAFTED, OWN = Style.parse("green"), Style.parse("bold white")
# A model must not move the cursor of a terminal, or send it commands.
UNSHOWN = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)]) | {9: "\t", 10: "\n"}


class Progress:
    """A progress line with a spinner on standard error, if that is a terminal and not `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.status: Status | None = None

    def __enter__(self) -> "Progress":
        return self

    def note(self, what: str) -> None:
        if self.status is None:
            self.status = self.console.status(what)
            self.status.start()
        self.status.update(what)

    def done(self) -> None:
        if self.status is not None:
            self.status.stop()
            self.status = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.done()


class Stream:
    """Prints the pieces of an output as they come, and collects them.

    A terminal gets colours, and no control characters but tabs and newlines. A file or a pipe gets
    exactly the text.
    """

    def __init__(self, progress: Progress, quiet: bool) -> None:
        self.progress, self.quiet = progress, quiet
        self.console = Console(highlight=False, soft_wrap=True)
        self.text = ""
        self.tokens: list[int] = []
        self.drafters: list[str] = []

    def show(self, chunk: Chunk) -> None:
        self.progress.done()
        self.text += "".join(chunk.pieces)
        self.tokens.extend(chunk.tokens)
        self.drafters.extend(chunk.drafters)
        if not self.quiet:
            for piece, drafter in zip_longest(chunk.pieces, chunk.drafters, fillvalue=""):
                shown = piece.translate(UNSHOWN) if self.console.is_terminal else piece
                # Text of rich would lose control characters and make spaces of tabs.
                segment = Segment(shown, DRAFTED if drafter else OWN)
                self.console.print(Segments([segment]), end="")
            sys.stdout.flush()

    def summary(self, warnings: tuple[str, ...], last: Chunk) -> None:
        if self.quiet or last.stats is None:
            return
        self.console.print()
        errors = Console(stderr=True, highlight=False)
        for warning in warnings:
            errors.print(f"note: {warning}", style="yellow")
        errors.print(stats_table(last.stats, last.finish_reason or ""))

    def one_line_summary(self, last: Chunk | None) -> None:
        """Ends an answer with a line of its stats. `last` is None if the user ended it."""
        self.console.print()
        sys.stdout.flush()
        stats = None if last is None else last.stats
        text = "stopped" if last is None or stats is None else stats_line(stats, last.finish_reason)
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="dim")


def stats_line(stats: Stats, reason: str | None) -> str:
    """Returns speed, tokens per step and accepted guesses in a few words."""
    parts = [
        f"{tokens_per_second(stats):.1f} tokens/s",
        f"{stats.completion_tokens / max(stats.rounds, 1):.2f} tokens per step",
        f"{stats.accepted} of {stats.verified} guesses accepted"
        + (f" ({stats.accepted / stats.verified:.0%})" if stats.verified else ""),
    ]
    if reason == "length":
        parts.append(f"cut after {stats.completion_tokens} tokens")
    return ", ".join(parts)


def stats_table(stats: Stats, reason: str) -> Table:
    """Returns the summary under the text."""
    found = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    found.add_column(style="dim")
    found.add_column()
    for name, value in stats_rows(stats, reason):
        found.add_row(name, value)
    return found


def stats_rows(stats: Stats, reason: str) -> list[tuple[str, str]]:
    rounds = max(stats.rounds, 1)
    spent = {
        "prefill": stats.prefill,
        "computing": stats.computed,
        "waiting": stats.waited,
        "bookkeeping": stats.bookkeeping,
    }
    guessed = (
        ", ".join(f"{name} {count}" for name, count in sorted(stats.by_drafter.items())) or "none"
    )
    return [
        (
            "speed",
            f"{tokens_per_second(stats):.1f} tokens/s ({stats.completion_tokens} tokens in "
            f"{stats.elapsed:.2f} s, ended by {reason})",
        ),
        (
            "per step",
            f"{stats.completion_tokens / rounds:.2f} tokens in each of {stats.rounds} target steps",
        ),
        (
            "acceptance",
            f"{stats.accepted} of {stats.verified} verified nodes; accepted by drafter: {guessed}",
        ),
        ("hit rate", f"{stats.hits / rounds:.0%} of the new roots were in the tree already"),
        (
            "target's time",
            ", ".join(
                f"{name} {seconds / max(stats.elapsed, 1e-9):.0%}"
                for name, seconds in spent.items()
            ),
        ),
    ]


def generation_json(
    plan: Deployment, request: Request, stream: Stream, last: Chunk
) -> dict[str, Any]:
    """Returns the object of --json."""
    stats = last.stats
    if stats is None:
        raise ValueError("the last chunk of an output has its stats")
    return {
        "text": stream.text,
        "token_ids": stream.tokens,
        "finish_reason": last.finish_reason,
        "usage": usage(stats.prompt_tokens, stats.completion_tokens),
        "seed": request.sampling.seed,
        "model": plan.target.model,
        "metrics": metrics(stats),
    }
