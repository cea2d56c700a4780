"""Between the values of runtime/core/messages.py and bytes: the only file that knows both shapes.

Every `encode` gives bytes that decode to an equal value, or raises InvalidRequest for what the wire cannot carry: more than
limits.MESSAGE_BYTES, a number beyond its field, text that is not Unicode. Every `decode` raises InvalidRequest, and nothing
else, for bytes that are no valid message; token ids are checked to be non-negative, but not against a vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from protos import speculation_pb2 as pb
from protos.handshake import Hello
from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.messages import (
    Chunk,
    Close,
    Commit,
    Draft,
    Event,
    FinishReason,
    Logprob,
    Open,
    Reply,
    Request,
    Resync,
    Share,
    Stats,
    Style,
    Tokens,
)
from runtime.core.sampling_params import Constraint, Kind, Sampling

DRAFTING: str = pb.DESCRIPTOR.services_by_name["Drafting"].full_name
TARGET: str = pb.DESCRIPTOR.services_by_name["Target"].full_name

KEYS, IDS, SCORES = np.dtype("<u8"), np.dtype("<i4"), np.dtype("<f4")
COMPOUND = ("stop", "logit_bias", "constraint")
SCALARS = tuple(field.name for field in fields(Sampling) if field.name not in COMPOUND)
STATS = tuple(field.name for field in fields(Stats))
REASONS: dict[FinishReason | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "cancelled": pb.FINISH_REASON_CANCELLED,
    "error": pb.FINISH_REASON_ERROR,
    "deadline": pb.FINISH_REASON_DEADLINE,
}
REASON_OF = {number: reason for reason, number in REASONS.items()}
KINDS: dict[Kind, pb.ConstraintKind] = {
    "json_object": pb.CONSTRAINT_KIND_JSON_OBJECT,
    "json_schema": pb.CONSTRAINT_KIND_JSON_SCHEMA,
    "regex": pb.CONSTRAINT_KIND_REGEX,
}
KIND_OF = {number: kind for kind, number in KINDS.items()}

Value = TypeVar("Value")
Frame = TypeVar("Frame")


@dataclass(frozen=True, slots=True)
class Bye:
    """The drafter ends its stream on purpose."""


def _carried(build: Callable[[Value], Message]) -> Callable[[Value], bytes]:
    """Makes an encoder of a function that builds the protobuf message."""

    @wraps(build)
    def encode(value: Value) -> bytes:
        try:
            data: bytes = build(value).SerializeToString()
        except ValueError as error:
            raise InvalidRequest(f"{type(value).__name__} cannot be sent: {error}") from error
        if len(data) > limits.MESSAGE_BYTES:
            raise InvalidRequest(
                f"{type(value).__name__} of {len(data)} bytes: at most {limits.MESSAGE_BYTES} are allowed, send fewer tokens"
            )
        return data

    return encode


@_carried
def encode_hello_to_drafter(hello: Hello) -> Message:
    return pb.ToDrafter(hello=_pb_hello(hello))


@_carried
def encode_hello_from_drafter(hello: Hello) -> Message:
    return pb.FromDrafter(hello=_pb_hello(hello))


def decode_hello_to_drafter(data: bytes) -> Hello:
    return _hello(_parse(pb.ToDrafter.FromString, data))


def decode_hello_from_drafter(data: bytes) -> Hello:
    return _hello(_parse(pb.FromDrafter.FromString, data))


@_carried
def encode_event(event: Event) -> Message:
    match event:
        case Open(session, epoch, tokens, prompt, sampling, share, style):
            opened = pb.Open(
                session=session,
                epoch=epoch,
                tokens=tokens,
                prompt=prompt,
                sampling=_pb_sampling(sampling),
            )
            opened.share_index, opened.share_of = share.index, share.of
            opened.style.CopyFrom(
                pb.Style(width=style.width, branches=style.branches, passes=style.passes)
            )
            return pb.ToDrafter(open=opened)
        case Commit(session, epoch, base, tokens, key):
            return pb.ToDrafter(
                commit=pb.Commit(session=session, epoch=epoch, base=base, tokens=tokens, key=key)
            )
        case Share(session, index, of):
            return pb.ToDrafter(share=pb.Share(session=session, index=index, of=of))
        case Close(session):
            return pb.ToDrafter(close=pb.Close(session=session))


def decode_event(data: bytes) -> Event | None:
    """None for a kind of frame that this version does not know."""
    frame = _parse(pb.ToDrafter.FromString, data)
    match frame.WhichOneof("kind"):
        case "open":
            return _open(frame.open)
        case "commit":
            commit = frame.commit
            return Commit(
                _session(commit),
                commit.epoch,
                commit.base,
                _tokens(commit.tokens, "tokens"),
                commit.key,
            )
        case "share":
            return _share(frame.share.index, frame.share.of, _session(frame.share))
        case "close":
            return Close(_session(frame.close))
        case None:
            return None
        case other:
            raise InvalidRequest(f"{other} has no place among the events: send it first, once")


@_carried
def encode_reply(reply: Reply | Bye) -> Message:
    """Without the drafter's name, which the stream implies."""
    match reply:
        case Draft(session, epoch, _, parents, tokens, scores):
            draft = pb.Draft(session=session, epoch=epoch)
            draft.parents = np.asarray(parents, KEYS).tobytes()
            draft.tokens = np.asarray(tokens, IDS).tobytes()
            draft.scores = np.asarray(scores, SCORES).tobytes()
            return pb.FromDrafter(draft=draft)
        case Resync(session):
            return pb.FromDrafter(resync=pb.Resync(session=session))
        case Bye():
            return pb.FromDrafter(bye=pb.Bye())


def decode_reply(data: bytes) -> Reply | Bye | None:
    """None for a kind of frame that this version does not know. The arrays of a Draft are read-only views.

    The reply names no drafter (""): who speaks is known from the link, and the target writes it down.
    """
    frame = _parse(pb.FromDrafter.FromString, data)
    match frame.WhichOneof("kind"):
        case "draft":
            return _draft(frame.draft)
        case "resync":
            return Resync(_session(frame.resync), "")
        case "bye":
            return Bye()
        case None:
            return None
        case other:
            raise InvalidRequest(f"{other} has no place among the replies: send it first, once")


@_carried
def encode_request(request: Request) -> Message:
    return pb.GenerateRequest(
        session=request.session,
        prompt=request.prompt,
        sampling=_pb_sampling(request.sampling),
        speculation=request.speculation,
        committed=request.committed,
        epoch=request.epoch,
        deadline=request.deadline,
        max_rows=request.max_rows,
    )


def decode_request(data: bytes) -> Request:
    request = _parse(pb.GenerateRequest.FromString, data)
    return Request(
        _session(request),
        _tokens(request.prompt, "prompt"),
        _sampling(request.sampling),
        request.speculation if request.HasField("speculation") else True,
        _tokens(request.committed, "committed"),
        request.epoch,
        _seconds(request.deadline) if request.HasField("deadline") else None,
        request.max_rows if request.HasField("max_rows") else None,
    )


@_carried
def encode_chunk(chunk: Chunk) -> Message:
    return pb.GenerateChunk(
        pieces=chunk.pieces,
        tokens=chunk.tokens,
        drafters=chunk.drafters,
        finish_reason=REASONS[chunk.finish_reason],
        stats=None
        if chunk.stats is None
        else pb.Stats(**{name: getattr(chunk.stats, name) for name in STATS}),
        error=chunk.error,
        logprobs=_pb_logprobs(chunk.logprobs) if chunk.logprobs else None,
    )


def decode_chunk(data: bytes) -> Chunk:
    chunk = _parse(pb.GenerateChunk.FromString, data)
    if not len(chunk.tokens) == len(chunk.drafters) == len(chunk.pieces):
        sizes = f"{len(chunk.tokens)} tokens, {len(chunk.drafters)} drafters and {len(chunk.pieces)} pieces"
        raise InvalidRequest(f"a chunk has {sizes}: send as many of each", "tokens")
    if chunk.finish_reason not in REASON_OF:
        raise InvalidRequest(
            f"finish_reason {chunk.finish_reason} is not known: install the same version",
            "finish_reason",
        )
    return Chunk(
        tuple(chunk.pieces),
        _tokens(chunk.tokens, "tokens"),
        tuple(chunk.drafters),
        REASON_OF[chunk.finish_reason],
        _stats(chunk.stats) if chunk.HasField("stats") else None,
        chunk.error,
        _logprobs(chunk.logprobs, len(chunk.tokens)) if chunk.HasField("logprobs") else (),
    )


def _parse(parser: Callable[[bytes], Frame], data: bytes) -> Frame:
    try:
        return parser(data)
    except DecodeError as error:
        raise InvalidRequest(
            f"{len(data)} bytes are no frame of this protocol: send messages of speculation.proto"
        ) from error


def _pb_hello(hello: Hello) -> pb.Hello:
    return pb.Hello(
        protocol=hello.protocol,
        vocabulary=hello.vocabulary,
        model=hello.model,
        incarnation=hello.incarnation,
        drafter=hello.drafter,
    )


def _hello(frame: pb.ToDrafter | pb.FromDrafter) -> Hello:
    if not frame.HasField("hello"):
        raise InvalidRequest(
            "the first frame of a stream is not hello: send it before anything else"
        )
    hello = frame.hello
    names = (
        _name(hello.vocabulary, "vocabulary"),
        _name(hello.model, "model"),
        _name(hello.drafter, "drafter"),
    )
    return Hello(*names, hello.incarnation, hello.protocol)


def _open(open_: pb.Open) -> Open:
    session, tokens = _session(open_), _tokens(open_.tokens, "tokens")
    if not 1 <= open_.prompt <= len(tokens):
        raise InvalidRequest(
            f"prompt {open_.prompt} of {len(tokens)} tokens is not allowed: give 1 to their number",
            "prompt",
        )
    share = _share(open_.share_index, open_.share_of, session)
    return Open(
        session,
        open_.epoch,
        tokens,
        open_.prompt,
        _sampling(open_.sampling),
        share,
        _style(open_.style),
    )


def _style(style: pb.Style) -> Style:
    most = max(style.width, style.branches)
    if most > limits.TREE_NODES:
        raise InvalidRequest(
            f"a style of width {style.width}, branches {style.branches}: at most {limits.TREE_NODES} are allowed",
            "style",
        )
    return Style(style.width, style.branches, style.passes)


def _share(index: int, of: int, session: str) -> Share:
    if index >= max(of, 1):
        raise InvalidRequest(f"share {index} of {of} is not allowed: count from 0", "share")
    return Share(session, index, of)


def _draft(draft: pb.Draft) -> Draft:
    session = _session(draft)
    parents, tokens, scores = (
        _array(draft.parents, KEYS, "parents"),
        _array(draft.tokens, IDS, "tokens"),
        _array(draft.scores, SCORES, "scores"),
    )
    nodes = len(tokens)
    if len(parents) != nodes or len(scores) != nodes:
        raise InvalidRequest(
            f"growth of {len(parents)} parents, {nodes} tokens and {len(scores)} scores: send as many of each"
        )
    if nodes > limits.DRAFT_NODES:
        raise InvalidRequest(f"growth of {nodes} nodes: at most {limits.DRAFT_NODES} are allowed")
    if nodes and tokens.min() < 0:
        raise InvalidRequest(
            f"token id {tokens.min()} is not allowed: give numbers from 0", "tokens"
        )
    # A comparison with NaN is false.
    if nodes and not (scores.min() > -np.inf and scores.max() <= 0):
        raise InvalidRequest(
            f"scores from {scores.min()} to {scores.max()} are not allowed: give finite numbers up to 0",
            "scores",
        )
    return Draft(session, draft.epoch, "", parents, tokens, scores)


def _array(data: bytes, dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise InvalidRequest(
            f"{len(data)} bytes of {name} are no whole number of {dtype.name} values: send all of them",
            name,
        )
    return np.frombuffer(data, dtype)


def _pb_sampling(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(
        **{name: getattr(sampling, name) for name in SCALARS},
        stop=sampling.stop,
        bias_tokens=[token for token, _ in sampling.logit_bias],
        bias_values=[value for _, value in sampling.logit_bias],
        constraint=None if sampling.constraint is None else _pb_constraint(sampling.constraint),
    )


def _sampling(sampling: pb.Sampling) -> Sampling:
    if len(sampling.bias_tokens) != len(sampling.bias_values):
        counts = f"{len(sampling.bias_tokens)} tokens and {len(sampling.bias_values)} values"
        raise InvalidRequest(f"logit_bias has {counts}: send as many of each", "logit_bias")
    given = {name: getattr(sampling, name) for name in SCALARS if sampling.HasField(name)}
    bias = tuple(zip(sampling.bias_tokens, sampling.bias_values, strict=True))
    constraint = _constraint(sampling.constraint) if sampling.HasField("constraint") else None
    return Sampling(**given, stop=tuple(sampling.stop), logit_bias=bias, constraint=constraint)


def _pb_constraint(constraint: Constraint) -> pb.Constraint:
    return pb.Constraint(kind=KINDS[constraint.kind], text=constraint.text)


def _constraint(constraint: pb.Constraint) -> Constraint:
    if constraint.kind not in KIND_OF:
        raise InvalidRequest(
            f"constraint {constraint.kind} is not known: install the same version",
            "response_format",
        )
    return Constraint(KIND_OF[constraint.kind], constraint.text)


def _pb_logprobs(logprobs: tuple[Logprob, ...]) -> pb.Logprobs:
    top = [entry for logprob in logprobs for entry in logprob.top]
    return pb.Logprobs(
        chosen=[logprob.chosen for logprob in logprobs],
        counts=[len(logprob.top) for logprob in logprobs],
        top_tokens=[token for token, _ in top],
        top_values=[value for _, value in top],
    )


def _logprobs(logprobs: pb.Logprobs, tokens: int) -> tuple[Logprob, ...]:
    chosen, counts, values = logprobs.chosen, logprobs.counts, logprobs.top_values
    if not len(chosen) == len(counts) == tokens or not sum(counts) == len(
        logprobs.top_tokens
    ) == len(values):
        raise InvalidRequest(
            f"logprobs of {len(chosen)} tokens and {len(values)} others: send those of all {tokens} tokens",
            "logprobs",
        )
    if not all(value <= 0 for value in (*chosen, *values)):  # a comparison with NaN is false
        raise InvalidRequest(
            "logprobs above 0 are not allowed: give logarithms of probabilities", "logprobs"
        )
    top = iter(zip(_tokens(logprobs.top_tokens, "logprobs"), values, strict=True))
    return tuple(
        Logprob(value, tuple(islice(top, count)))
        for value, count in zip(chosen, counts, strict=True)
    )


def _seconds(deadline: float) -> float:
    if math.isnan(deadline):
        raise InvalidRequest("deadline nan is not allowed: give a number of seconds", "deadline")
    return deadline


def _stats(stats: pb.Stats) -> Stats:
    plain: dict[str, Any] = {name: getattr(stats, name) for name in STATS}
    plain["histogram"] = tuple(stats.histogram)
    plain["by_drafter"], plain["ignored"] = dict(stats.by_drafter), dict(stats.ignored)
    return Stats(**plain)


def _tokens(ids: Iterable[int], name: str) -> Tokens:
    tokens = tuple(ids)
    if tokens and min(tokens) < 0:
        raise InvalidRequest(f"token id {min(tokens)} is not allowed: give numbers from 0", name)
    return tokens


def _session(
    message: pb.Open | pb.Commit | pb.Share | pb.Close | pb.Draft | pb.Resync | pb.GenerateRequest,
) -> str:
    return _name(message.session, "session")


def _name(text: str, name: str) -> str:
    if not 0 < len(text) <= limits.NAME_LENGTH:
        raise InvalidRequest(
            f"{name} of {len(text)} characters: allowed are 1 to {limits.NAME_LENGTH}", name
        )
    return text
