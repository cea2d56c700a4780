"""From chunks to what clients read: OpenAI's objects, whole or in pieces. Pure: names and time are handed in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llguidance import LLTokenizer

from actors.openai.errors import ApiError
from actors.openai.protocol import AnyBody, ChatBody
from actors.openai.served_model import ServedModel
from actors.openai.usage import merge_stats, metrics, usage
from runtime.core.messages import Chunk, FinishReason, Logprob, Request, Stats


@dataclass(slots=True)
class ChoiceOutput:
    """What has come of one choice. `offsets`: characters of the text before each token."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    stats: Stats | None = None

    def add(self, chunk: Chunk) -> None:
        for piece in chunk.pieces:
            self.offsets.append(len(self.text))
            self.text += piece
        self.tokens += chunk.tokens
        self.logprobs += chunk.logprobs
        if chunk.finish_reason is not None:
            self.reason, self.stats = chunk.finish_reason, chunk.stats


class ResponseBuilder:
    """The answer to one request, while its chunks come: `add` them, in any order of choices, then `whole`; or send what `delta` gives.

    `name` is the answer's id without its prefix, `created` in seconds since 1970. Usage is what was delivered.
    """

    def __init__(
        self, body: AnyBody, served: ServedModel, asked: Sequence[Request], name: str, created: int
    ) -> None:
        self.body, self.served, self.asked = body, served, asked
        self.said = [ChoiceOutput() for _ in asked]
        self.chat = isinstance(body, ChatBody)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{name}",
            "created": created,
            "model": served.name,
        }

    @property
    def over(self) -> bool:
        """Every choice has come to its end."""
        return all(said.reason is not None for said in self.said)

    def add(self, index: int, chunk: Chunk) -> None:
        """Raises ApiError where the choice has ended without an end: at its deadline, or by a fault of the target."""
        self.said[index].add(chunk)
        match chunk.finish_reason:
            case "deadline":
                raise self.late()
            case "cancelled":
                raise ApiError(
                    503,
                    "unavailable",
                    "the target has given the request up: try again",
                    retry_after=1,
                    usage=self.usage(),
                )
            case "error":
                raise ApiError(
                    500,
                    "target_failed",
                    "the target has failed on this request: see its log",
                    usage=self.usage(),
                )
            case None | "stop" | "length":
                pass

    def late(self) -> ApiError:
        return ApiError(
            504,
            "deadline_exceeded",
            "the deadline has passed: allow more time, or ask for less",
            usage=self.usage(),
        )

    def usage(self) -> dict[str, Any]:
        firsts = range(0, len(self.asked), self.body.n)
        reused = (
            min(stats.reused, len(self.asked[first].prompt))
            for first in firsts
            if (stats := self.said[first].stats) is not None
        )
        prompt = sum(len(self.asked[first].prompt) for first in firsts)
        return usage(prompt, sum(len(said.tokens) for said in self.said), sum(reused))

    def figures(self) -> dict[str, Any]:
        """How it was made: of all choices together; and the first one's seed, which makes it again."""
        parts = [said.stats for said in self.said if said.stats is not None]
        return {"seed": self.asked[0].sampling.seed, "metrics": metrics(merge_stats(parts))}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, when all is said."""
        choices: list[dict[str, Any]] = []
        for index, said in enumerate(self.said):
            choice = {
                "index": index,
                "finish_reason": said.reason,
                "logprobs": self.logprobs(said.tokens, said.logprobs, said.offsets),
            }
            choices.append(
                choice
                | (
                    {"message": {"role": "assistant", "content": said.text}}
                    if self.chat
                    else {"text": said.text}
                )
            )
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            **self.head,
            "object": kind,
            "choices": choices,
            "usage": self.usage(),
            **self.figures(),
        }

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with: who speaks, in a chat."""
        if not self.chat:
            return []
        return [
            self.event([self.choice(index, {"delta": {"role": "assistant", "content": ""}})])
            for index in range(len(self.asked))
        ]

    def delta(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Adds the chunk; what a stream says of it, perhaps nothing yet. Raises as `add`."""
        first = len(self.said[index].tokens)
        self.add(index, chunk)
        text = "".join(chunk.pieces)
        if not text and not chunk.logprobs and chunk.finish_reason is None:
            return []
        logprobs = self.logprobs(chunk.tokens, chunk.logprobs, self.said[index].offsets[first:])
        said: dict[str, Any] = (
            {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        )
        found = [self.event([self.choice(index, said, logprobs, chunk.finish_reason)])]
        if self.over:
            if self.wants_usage:
                found.append(self.event([]) | {"usage": self.usage()})
            found[-1] |= self.figures()
        return found

    @property
    def wants_usage(self) -> bool:
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices} | (
            {"usage": None} if self.wants_usage else {}
        )

    def choice(
        self,
        index: int,
        said: dict[str, Any],
        logprobs: Any = None,
        reason: FinishReason | None = None,
    ) -> dict[str, Any]:
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[Logprob], offsets: Sequence[int]
    ) -> dict[str, Any] | None:
        if not logprobs:
            return None
        of = chat_logprobs if self.chat else completion_logprobs
        return of(self.served.byte_tokenizer, tokens, logprobs, offsets)


def chat_logprobs(
    pieces: LLTokenizer, tokens: Sequence[int], logprobs: Sequence[Logprob], offsets: Sequence[int]
) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = pieces.decode_bytes([token])
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            entry(token, found.chosen) | {"top_logprobs": [entry(*top) for top in found.top]}
            for token, found in zip(tokens, logprobs, strict=True)
        ],
        "refusal": None,
    }


def completion_logprobs(
    pieces: LLTokenizer, tokens: Sequence[int], logprobs: Sequence[Logprob], offsets: Sequence[int]
) -> dict[str, Any]:
    """The chosen token is one of the top ones here, whatever its rank. Of tokens that read the same, the more likely one counts."""

    def text(token: int) -> str:
        return pieces.decode_bytes([token]).decode(errors="replace")

    tops: list[dict[str, float]] = []
    for token, found in zip(tokens, logprobs, strict=True):
        top: dict[str, float] = {}
        for other, logprob in (*found.top, (token, found.chosen)):
            top.setdefault(text(other), logprob)
        tops.append(top)
    return {
        "tokens": [text(token) for token in tokens],
        "token_logprobs": [found.chosen for found in logprobs],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }
