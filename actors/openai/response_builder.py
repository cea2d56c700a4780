"""Builds OpenAI's response objects from chunks, whole or streamed.

Pure: callers pass names and times.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from actors.openai.echo import Echo
from actors.openai.errors import ApiError
from actors.openai.protocol import AnyBody, ChatBody, StreamOptions
from actors.openai.served_model import ServedModel
from actors.openai.usage import merge_stats, metrics, usage
from runtime.core.messages import Chunk, FinishReason, Logprob, Request, Stats
from runtime.models.detokenize import TextOffsets
from runtime.models.token_bytes import TokenBytes

OBFUSCATED_BYTES = 64  # sizes of obfuscated events are multiples of it, plus a constant


@dataclass(slots=True)
class ChoiceOutput:
    """The output of one choice, behind its prompt if that is echoed.

    offset_of  returns the characters of text before the next token, which it is given
    echo       the prompt, until it is part of the output
    shown      characters of the prompt in the output
    offsets    of each token; empty if no offsets are asked for
    logprobs   of each token, None for the first one of a prompt; empty if none are asked for
    generated  tokens without those of the prompt
    """

    offset_of: Callable[[int], int] | None = None
    echo: Echo | None = None
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    shown: int = 0
    generated: int = 0
    reason: FinishReason | None = None
    stats: Stats | None = None

    def add(self, chunk: Chunk) -> None:
        if self.echo is not None:
            self._add_prompt(self.echo, chunk)
        self.text += "".join(chunk.pieces)
        self.tokens += chunk.tokens
        self.generated += len(chunk.tokens)
        if self.offset_of is not None:
            self.offsets += (self.shown + self.offset_of(token) for token in chunk.tokens)
        self.logprobs += chunk.logprobs
        if chunk.finish_reason is not None:
            self.reason, self.stats = chunk.finish_reason, chunk.stats

    def _add_prompt(self, echo: Echo, chunk: Chunk) -> None:
        """Adds the prompt, once its logprobs are complete if the response has some."""
        self.prompt_logprobs += chunk.prompt_logprobs
        if echo.offsets and len(self.prompt_logprobs) < len(echo.tokens) - 1:
            return
        self.text, self.shown, self.echo = echo.text, len(echo.text), None
        if echo.offsets:
            self.tokens, self.offsets = [*echo.tokens], [*echo.offsets]
            self.logprobs = [None, *self.prompt_logprobs]


class ResponseBuilder:
    """Builds the response to one request while its chunks arrive.

    Either `add` all chunks, in any order of choices, and then call `response`; or send what `delta`
    returns for each. `name` is the response's id without its prefix, `created` is in seconds since
    1970. `echoes` are the prompts to show before each output, if any. Usage counts the tokens
    delivered.
    """

    def __init__(
        self,
        body: AnyBody,
        served: ServedModel,
        requests: Sequence[Request],
        name: str,
        created: int,
        echoes: Sequence[Echo] = (),
    ) -> None:
        self.body, self.served, self.requests = body, served, requests
        self.chat, self.options = isinstance(body, ChatBody), body.stream_options or StreamOptions()
        self.outputs = [
            ChoiceOutput(self.offset_counter(request), echo)
            for request, echo in zip_longest(requests, echoes)
        ]
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{name}",
            "created": created,
            "model": served.name,
        }

    def offset_counter(self, request: Request) -> Callable[[int], int] | None:
        """Returns what counts text offsets; None if the response has none."""
        if self.chat or request.sampling.logprobs is None:
            return None
        return TextOffsets(self.served.tokenizer.backend_tokenizer, request.prompt).next

    @property
    def finished(self) -> bool:
        """Tells whether every choice has ended."""
        return all(output.reason is not None for output in self.outputs)

    def add(self, index: int, chunk: Chunk) -> None:
        """Adds a chunk. Raises ApiError if its choice ended at its deadline, or by a target's
        failure.
        """
        self.outputs[index].add(chunk)
        match chunk.finish_reason:
            case "deadline":
                raise self.deadline_error()
            case "cancelled":
                raise ApiError(
                    503,
                    "unavailable",
                    "the target has cancelled the request: try again",
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

    def deadline_error(self) -> ApiError:
        return ApiError(
            504,
            "deadline_exceeded",
            "the deadline has passed: allow more time, or ask for less",
            usage=self.usage(),
        )

    def usage(self) -> dict[str, Any]:
        firsts = range(0, len(self.requests), self.body.n)
        reused = (
            min(stats.reused, len(self.requests[first].prompt))
            for first in firsts
            if (stats := self.outputs[first].stats) is not None
        )
        prompt = sum(len(self.requests[first].prompt) for first in firsts)
        return usage(prompt, sum(output.generated for output in self.outputs), sum(reused))

    def generation_info(self) -> dict[str, Any]:
        """Returns the first choice's seed, which reproduces the response, and the metrics of all
        choices.
        """
        parts = [output.stats for output in self.outputs if output.stats is not None]
        return {"seed": self.requests[0].sampling.seed, "metrics": metrics(merge_stats(parts))}

    def response(self) -> dict[str, Any]:
        """Returns the complete response."""
        choices: list[dict[str, Any]] = []
        for index, output in enumerate(self.outputs):
            choice = {
                "index": index,
                "finish_reason": output.reason,
                "logprobs": self.logprobs(output.tokens, output.logprobs, output.offsets),
            }
            choices.append(
                choice
                | (
                    {"message": {"role": "assistant", "content": output.text}}
                    if self.chat
                    else {"text": output.text}
                )
            )
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            **self.head,
            "object": kind,
            "choices": choices,
            "usage": self.usage(),
            **self.generation_info(),
        }

    def opening_events(self) -> list[dict[str, Any]]:
        """Returns the events that open a stream: in a chat, the role of each choice."""
        if not self.chat:
            return []
        return [
            self.event([self.choice(index, {"delta": {"role": "assistant", "content": ""}})])
            for index in range(len(self.requests))
        ]

    def delta(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Adds a chunk and returns its events, possibly none. Raises like `add`."""
        output = self.outputs[index]
        known, first = len(output.text), len(output.logprobs)
        self.add(index, chunk)
        text, fresh = output.text[known:], output.logprobs[first:]
        if not text and not fresh and chunk.finish_reason is None:
            return []
        logprobs = self.logprobs(output.tokens[first:], fresh, output.offsets[first:])
        content: dict[str, Any] = (
            {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        )
        found = [self.event([self.choice(index, content, logprobs, chunk.finish_reason)])]
        if self.finished:
            if self.options.include_usage:
                found.append(self.event([]) | {"usage": self.usage()})
            found[-1] |= self.generation_info()
        return found

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns an event of a stream, with what its stream_options ask for."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        found = {**self.head, "object": kind, "choices": choices}
        if self.options.include_usage or self.options.continuous_usage_stats:
            found["usage"] = self.usage() if self.options.continuous_usage_stats else None
        if self.options.include_obfuscation:
            size = len(json.dumps(found, ensure_ascii=False).encode())
            found["obfuscation"] = "x" * (-size % OBFUSCATED_BYTES)
        return found

    def choice(
        self,
        index: int,
        output: dict[str, Any],
        logprobs: Any = None,
        reason: FinishReason | None = None,
    ) -> dict[str, Any]:
        return {"index": index, **output, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[Logprob | None], offsets: Sequence[int]
    ) -> dict[str, Any] | None:
        if not logprobs:
            return None
        of = chat_logprobs if self.chat else completion_logprobs
        return of(self.served.byte_tokenizer, tokens, logprobs, offsets)


def chat_logprobs(
    pieces: TokenBytes,
    tokens: Sequence[int],
    logprobs: Sequence[Logprob | None],
    offsets: Sequence[int],
) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = pieces.decode_bytes([token])
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            entry(token, found.chosen) | {"top_logprobs": [entry(*top) for top in found.top]}
            for token, found in zip(tokens, logprobs, strict=True)
            if found is not None
        ],
        "refusal": None,
    }


def completion_logprobs(
    pieces: TokenBytes,
    tokens: Sequence[int],
    logprobs: Sequence[Logprob | None],
    offsets: Sequence[int],
) -> dict[str, Any]:
    """Returns the logprobs object of a completion.

    The chosen token is always among the top ones. Of tokens with equal text, the likeliest counts.
    The first token of a prompt has no logprob: its entries are null.
    """

    def text(token: int) -> str:
        return pieces.decode_bytes([token]).decode(errors="replace")

    tops: list[dict[str, float] | None] = []
    for token, found in zip(tokens, logprobs, strict=True):
        if found is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for other, logprob in (*found.top, (token, found.chosen)):
            top.setdefault(text(other), logprob)
        tops.append(top)
    return {
        "tokens": [text(token) for token in tokens],
        "token_logprobs": [None if found is None else found.chosen for found in logprobs],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }
