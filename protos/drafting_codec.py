"""Encodes and decodes the messages between a target and a drafter. Contract: see fields.py."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from protos import speculation_pb2 as pb
from protos.fields import (
    checked_name,
    encoder,
    parse,
    sampling_from_pb,
    sampling_to_pb,
    session_name,
    token_ids,
)
from protos.handshake import Hello
from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.features import FeatureRows, FeatureSpec, all_finite
from runtime.core.messages import (
    Close,
    Commit,
    Draft,
    Event,
    FeatureRequest,
    Features,
    Open,
    Reply,
    Resync,
    Share,
    Style,
)

DRAFTING_SERVICE: str = pb.DESCRIPTOR.services_by_name["Drafting"].full_name
KEY_DTYPE, TOKEN_DTYPE, SCORE_DTYPE = np.dtype("<u8"), np.dtype("<i4"), np.dtype("<f4")
FEATURE_DTYPE = np.dtype("<u2")  # the bits of a bfloat16


@dataclass(frozen=True, slots=True)
class Bye:
    """The drafter ends its stream on purpose."""


@encoder
def encode_hello_to_drafter(hello: Hello) -> Message:
    return pb.ToDrafter(hello=_hello_to_pb(hello))


@encoder
def encode_hello_from_drafter(hello: Hello) -> Message:
    return pb.FromDrafter(hello=_hello_to_pb(hello))


def decode_hello_to_drafter(data: bytes) -> Hello:
    return _hello_from_pb(parse(pb.ToDrafter.FromString, data))


def decode_hello_from_drafter(data: bytes) -> Hello:
    return _hello_from_pb(parse(pb.FromDrafter.FromString, data))


@encoder
def encode_event(event: Event) -> Message:
    match event:
        case Open(session, epoch, tokens, prompt, sampling, share, style):
            opened = pb.Open(
                session=session,
                epoch=epoch,
                tokens=tokens,
                prompt=prompt,
                sampling=sampling_to_pb(sampling),
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
        case Features(session, epoch, FeatureRows(start, rows)):
            features = pb.Features(session=session, epoch=epoch, start=start, width=rows.shape[1])
            features.rows = np.asarray(rows, FEATURE_DTYPE).tobytes()
            return pb.ToDrafter(features=features)
        case Close(session):
            return pb.ToDrafter(close=pb.Close(session=session))


def decode_event(data: bytes) -> Event | None:
    """Returns the event; None for a kind of frame that this version does not know."""
    frame = parse(pb.ToDrafter.FromString, data)
    match frame.WhichOneof("kind"):
        case "open":
            return _open_from_pb(frame.open)
        case "commit":
            commit = frame.commit
            return Commit(
                session_name(commit),
                commit.epoch,
                commit.base,
                token_ids(commit.tokens, "tokens"),
                commit.key,
            )
        case "share":
            return _share_from_pb(frame.share.index, frame.share.of, session_name(frame.share))
        case "features":
            return _features_from_pb(frame.features)
        case "close":
            return Close(session_name(frame.close))
        case None:
            return None
        case other:
            raise InvalidRequest(f"{other} is not an event: send it once, as the first frame")


@encoder
def encode_reply(reply: Reply | Bye) -> Message:
    """Encodes a reply without the drafter's name, which the stream implies."""
    match reply:
        case Draft(session, epoch, _, parents, tokens, scores):
            draft = pb.Draft(session=session, epoch=epoch)
            draft.parents = np.asarray(parents, KEY_DTYPE).tobytes()
            draft.tokens = np.asarray(tokens, TOKEN_DTYPE).tobytes()
            draft.scores = np.asarray(scores, SCORE_DTYPE).tobytes()
            return pb.FromDrafter(draft=draft)
        case Resync(session):
            return pb.FromDrafter(resync=pb.Resync(session=session))
        case FeatureRequest(spec):
            return pb.FromDrafter(feature_request=pb.FeatureRequest(layers=spec.layers))
        case Bye():
            return pb.FromDrafter(bye=pb.Bye())


def decode_reply(data: bytes) -> Reply | Bye | None:
    """Returns the reply; None for a kind of frame that this version does not know.

    The arrays of a Draft are read-only views. The reply's drafter is "": the target knows the
    sender from the link and fills it in.
    """
    frame = parse(pb.FromDrafter.FromString, data)
    match frame.WhichOneof("kind"):
        case "draft":
            return _draft_from_pb(frame.draft)
        case "resync":
            return Resync(session_name(frame.resync), "")
        case "feature_request":
            return FeatureRequest(FeatureSpec(tuple(frame.feature_request.layers)), "")
        case "bye":
            return Bye()
        case None:
            return None
        case other:
            raise InvalidRequest(f"{other} is not a reply: send it once, as the first frame")


def _hello_to_pb(hello: Hello) -> pb.Hello:
    return pb.Hello(
        protocol=hello.protocol,
        vocabulary=hello.vocabulary,
        model=hello.model,
        incarnation=hello.incarnation,
        drafter=hello.drafter,
        tokens=hello.tokens,
    )


def _hello_from_pb(frame: pb.ToDrafter | pb.FromDrafter) -> Hello:
    if not frame.HasField("hello"):
        raise InvalidRequest(
            "the first frame of a stream is not hello: send it before anything else"
        )
    hello = frame.hello
    names = (
        checked_name(hello.vocabulary, "vocabulary"),
        checked_name(hello.model, "model"),
        checked_name(hello.drafter, "drafter"),
    )
    return Hello(*names, hello.incarnation, hello.protocol, hello.tokens)


def _open_from_pb(open_: pb.Open) -> Open:
    session, tokens = session_name(open_), token_ids(open_.tokens, "tokens")
    if not 1 <= open_.prompt <= len(tokens):
        raise InvalidRequest(
            f"prompt {open_.prompt} of {len(tokens)} tokens is not allowed: give 1 to their number",
            "prompt",
        )
    share = _share_from_pb(open_.share_index, open_.share_of, session)
    return Open(
        session,
        open_.epoch,
        tokens,
        open_.prompt,
        sampling_from_pb(open_.sampling),
        share,
        _style_from_pb(open_.style),
    )


def _style_from_pb(style: pb.Style) -> Style:
    most = max(style.width, style.branches)
    if most > limits.TREE_NODES:
        raise InvalidRequest(
            f"a style of width {style.width}, branches {style.branches}:"
            f" at most {limits.TREE_NODES} are allowed",
            "style",
        )
    return Style(style.width, style.branches, style.passes)


def _share_from_pb(index: int, of: int, session: str) -> Share:
    if index >= max(of, 1):
        raise InvalidRequest(f"share {index} of {of} is not allowed: count from 0", "share")
    return Share(session, index, of)


def _features_from_pb(features: pb.Features) -> Features:
    session, width = session_name(features), features.width
    row, size = width * FEATURE_DTYPE.itemsize, len(features.rows)
    if not row or not size or size % row:
        raise InvalidRequest(
            f"{size} bytes of features are no whole number of rows of width {width}:"
            " send all of them",
            "features",
        )
    if size > limits.FEATURE_BYTES:
        raise InvalidRequest(
            f"{size} bytes of features: at most {limits.FEATURE_BYTES} are allowed", "features"
        )
    rows = _array(features.rows, FEATURE_DTYPE, "features").reshape(-1, width)
    if not all_finite(rows):
        raise InvalidRequest("features that are not finite: send numbers", "features")
    return Features(session, features.epoch, FeatureRows(features.start, rows))


def _draft_from_pb(draft: pb.Draft) -> Draft:
    session = session_name(draft)
    parents, tokens, scores = (
        _array(draft.parents, KEY_DTYPE, "parents"),
        _array(draft.tokens, TOKEN_DTYPE, "tokens"),
        _array(draft.scores, SCORE_DTYPE, "scores"),
    )
    nodes = len(tokens)
    if len(parents) != nodes or len(scores) != nodes:
        raise InvalidRequest(
            f"growth of {len(parents)} parents, {nodes} tokens and {len(scores)} scores:"
            " send as many of each"
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
            f"scores from {scores.min()} to {scores.max()} are not allowed:"
            " give finite numbers up to 0",
            "scores",
        )
    return Draft(session, draft.epoch, "", parents, tokens, scores)


def _array(data: bytes, dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise InvalidRequest(
            f"{len(data)} bytes of {name} are no whole number of {dtype.name} values:"
            " send all of them",
            name,
        )
    return np.frombuffer(data, dtype)
