"""Encodes and decodes the messages between a target and its callers. Contract: see fields.py."""

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

from google.protobuf.message import Message

from protos import speculation_pb2 as pb
from protos.fields import encoder, parse, sampling_from_pb, sampling_to_pb, session_name, token_ids
from runtime.core.errors import InvalidRequest
from runtime.core.messages import (
    Chunk,
    FinishReason,
    Logprob,
    Request,
    StandbyText,
    Stats,
)

TARGET_SERVICE: str = pb.DESCRIPTOR.services_by_name["Target"].full_name
HEARTBEAT: bytes = pb.Heartbeat().SerializeToString()
HEARTBEATS_REQUEST: bytes = pb.HeartbeatsRequest().SerializeToString()
STATS_FIELDS = tuple(field.name for field in fields(Stats))
FINISH_REASONS: dict[FinishReason | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "cancelled": pb.FINISH_REASON_CANCELLED,
    "error": pb.FINISH_REASON_ERROR,
    "deadline": pb.FINISH_REASON_DEADLINE,
}
FINISH_REASON_OF = {number: reason for reason, number in FINISH_REASONS.items()}


@encoder
def encode_request(request: Request) -> Message:
    return pb.GenerateRequest(
        session=request.session,
        prompt=request.prompt,
        sampling=sampling_to_pb(request.sampling),
        speculation=request.speculation,
        committed=request.committed,
        epoch=request.epoch,
        deadline=request.deadline,
        max_rows=request.max_rows,
    )


def decode_request(data: bytes) -> Request:
    request = parse(pb.GenerateRequest.FromString, data)
    return Request(
        session_name(request),
        token_ids(request.prompt, "prompt"),
        sampling_from_pb(request.sampling),
        request.speculation if request.HasField("speculation") else True,
        token_ids(request.committed, "committed"),
        request.epoch,
        _seconds(request.deadline) if request.HasField("deadline") else None,
        request.max_rows if request.HasField("max_rows") else None,
    )


@encoder
def encode_chunk(chunk: Chunk) -> Message:
    return pb.GenerateChunk(
        pieces=chunk.pieces,
        tokens=chunk.tokens,
        drafters=chunk.drafters,
        finish_reason=FINISH_REASONS[chunk.finish_reason],
        stats=None
        if chunk.stats is None
        else pb.Stats(**{name: getattr(chunk.stats, name) for name in STATS_FIELDS}),
        error=chunk.error,
        logprobs=_logprobs_to_pb(chunk.logprobs) if chunk.logprobs else None,
        prompt_logprobs=_logprobs_to_pb(chunk.prompt_logprobs) if chunk.prompt_logprobs else None,
    )


def decode_chunk(data: bytes) -> Chunk:
    chunk = parse(pb.GenerateChunk.FromString, data)
    pieces = len(chunk.tokens) or min(1, len(chunk.pieces))  # text held back comes without a token
    if len(chunk.drafters) != len(chunk.tokens) or len(chunk.pieces) != pieces:
        sizes = (
            f"{len(chunk.tokens)} tokens, {len(chunk.drafters)} drafters"
            f" and {len(chunk.pieces)} pieces"
        )
        raise InvalidRequest(f"a chunk has {sizes}: send as many of each", "tokens")
    if chunk.finish_reason not in FINISH_REASON_OF:
        raise InvalidRequest(
            f"unknown finish_reason {chunk.finish_reason}: install the same version",
            "finish_reason",
        )
    return Chunk(
        tuple(chunk.pieces),
        token_ids(chunk.tokens, "tokens"),
        tuple(chunk.drafters),
        FINISH_REASON_OF[chunk.finish_reason],
        _stats_from_pb(chunk.stats) if chunk.HasField("stats") else None,
        chunk.error,
        _logprobs_from_pb(chunk.logprobs, len(chunk.tokens)) if chunk.HasField("logprobs") else (),
        _logprobs_from_pb(chunk.prompt_logprobs, len(chunk.prompt_logprobs.chosen)),
    )


@encoder
def encode_standby(texts: Sequence[StandbyText]) -> Message:
    return pb.StandbyUpdate(
        texts=[
            pb.StandbyText(
                session=text.session, start=text.start, tokens=text.tokens, over=text.over
            )
            for text in texts
        ]
    )


def decode_standby(data: bytes) -> tuple[StandbyText, ...]:
    return tuple(
        StandbyText(session_name(text), text.start, token_ids(text.tokens, "tokens"), text.over)
        for text in parse(pb.StandbyUpdate.FromString, data).texts
    )


def _logprobs_to_pb(logprobs: tuple[Logprob, ...]) -> pb.Logprobs:
    top = [entry for logprob in logprobs for entry in logprob.top]
    return pb.Logprobs(
        chosen=[logprob.chosen for logprob in logprobs],
        counts=[len(logprob.top) for logprob in logprobs],
        top_tokens=[token for token, _ in top],
        top_values=[value for _, value in top],
    )


def _logprobs_from_pb(logprobs: pb.Logprobs, tokens: int) -> tuple[Logprob, ...]:
    chosen, counts, values = logprobs.chosen, logprobs.counts, logprobs.top_values
    if not len(chosen) == len(counts) == tokens or not sum(counts) == len(
        logprobs.top_tokens
    ) == len(values):
        raise InvalidRequest(
            f"logprobs of {len(chosen)} tokens and {len(values)} others:"
            f" send those of all {tokens} tokens",
            "logprobs",
        )
    if not all(value <= 0 for value in (*chosen, *values)):  # a comparison with NaN is false
        raise InvalidRequest(
            "logprobs above 0 are not allowed: give logarithms of probabilities", "logprobs"
        )
    top = iter(zip(token_ids(logprobs.top_tokens, "logprobs"), values, strict=True))
    return tuple(
        Logprob(value, tuple(islice(top, count)))
        for value, count in zip(chosen, counts, strict=True)
    )


def _seconds(deadline: float) -> float:
    if math.isnan(deadline):
        raise InvalidRequest("deadline nan is not allowed: give a number of seconds", "deadline")
    return deadline


def _stats_from_pb(stats: pb.Stats) -> Stats:
    plain: dict[str, Any] = {name: getattr(stats, name) for name in STATS_FIELDS}
    plain["histogram"] = tuple(stats.histogram)
    plain["by_drafter"], plain["ignored"] = dict(stats.by_drafter), dict(stats.ignored)
    return Stats(**plain)
