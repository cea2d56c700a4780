"""Encodes, decodes and checks the fields that messages of both services share.

Together with drafting_codec.py and target_codec.py, this is the only code that knows both the
values of runtime/core/messages.py and their bytes. Every `encode_*` returns bytes that decode to an
equal value, or raises InvalidRequest for what the wire cannot carry: more than
limits.MESSAGE_BYTES, a number beyond its field, text that is not Unicode. Every `decode_*` raises
InvalidRequest, and nothing else, for invalid bytes. Token ids are checked to be non-negative, but
not against a vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import wraps
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from protos import speculation_pb2 as pb
from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.messages import (
    Tokens,
)
from runtime.core.sampling_params import Constraint, ConstraintKind, SamplingParams

SAMPLING_COMPOUND = ("stop", "logit_bias", "constraint")
SAMPLING_SCALARS = tuple(
    field.name for field in fields(SamplingParams) if field.name not in SAMPLING_COMPOUND
)
CONSTRAINT_KINDS: dict[ConstraintKind, pb.ConstraintKind] = {
    "json_object": pb.CONSTRAINT_KIND_JSON_OBJECT,
    "json_schema": pb.CONSTRAINT_KIND_JSON_SCHEMA,
    "regex": pb.CONSTRAINT_KIND_REGEX,
}
CONSTRAINT_OF = {number: kind for kind, number in CONSTRAINT_KINDS.items()}
Value = TypeVar("Value")
Frame = TypeVar("Frame")


def encoder(build: Callable[[Value], Message]) -> Callable[[Value], bytes]:
    """Turns a function that builds a protobuf message into one that returns its bytes."""

    @wraps(build)
    def encode(value: Value) -> bytes:
        try:
            data: bytes = build(value).SerializeToString()
        except ValueError as error:
            raise InvalidRequest(f"{type(value).__name__} cannot be sent: {error}") from error
        if len(data) > limits.MESSAGE_BYTES:
            raise InvalidRequest(
                f"{type(value).__name__} of {len(data)} bytes:"
                f" at most {limits.MESSAGE_BYTES} are allowed, send fewer tokens"
            )
        return data

    return encode


def parse(parser: Callable[[bytes], Frame], data: bytes) -> Frame:
    try:
        return parser(data)
    except DecodeError as error:
        raise InvalidRequest(
            f"{len(data)} bytes are not a valid frame: send messages of speculation.proto"
        ) from error


def sampling_to_pb(sampling: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        **{name: getattr(sampling, name) for name in SAMPLING_SCALARS},
        stop=sampling.stop,
        bias_tokens=[token for token, _ in sampling.logit_bias],
        bias_values=[value for _, value in sampling.logit_bias],
        constraint=None if sampling.constraint is None else constraint_to_pb(sampling.constraint),
    )


def sampling_from_pb(sampling: pb.Sampling) -> SamplingParams:
    if len(sampling.bias_tokens) != len(sampling.bias_values):
        counts = f"{len(sampling.bias_tokens)} tokens and {len(sampling.bias_values)} values"
        raise InvalidRequest(f"logit_bias has {counts}: send as many of each", "logit_bias")
    given = {name: getattr(sampling, name) for name in SAMPLING_SCALARS if sampling.HasField(name)}
    bias = tuple(zip(sampling.bias_tokens, sampling.bias_values, strict=True))
    constraint = (
        constraint_from_pb(sampling.constraint) if sampling.HasField("constraint") else None
    )
    return SamplingParams(
        **given, stop=tuple(sampling.stop), logit_bias=bias, constraint=constraint
    )


def constraint_to_pb(constraint: Constraint) -> pb.Constraint:
    return pb.Constraint(kind=CONSTRAINT_KINDS[constraint.kind], text=constraint.text)


def constraint_from_pb(constraint: pb.Constraint) -> Constraint:
    if constraint.kind not in CONSTRAINT_OF:
        raise InvalidRequest(
            f"unknown constraint {constraint.kind}: install the same version",
            "response_format",
        )
    return Constraint(CONSTRAINT_OF[constraint.kind], constraint.text)


def token_ids(ids: Iterable[int], name: str) -> Tokens:
    tokens = tuple(ids)
    if tokens and min(tokens) < 0:
        raise InvalidRequest(f"token id {min(tokens)} is not allowed: give numbers from 0", name)
    return tokens


def session_name(
    message: pb.Open
    | pb.Commit
    | pb.Features
    | pb.Share
    | pb.Close
    | pb.Draft
    | pb.Resync
    | pb.GenerateRequest
    | pb.StandbyText,
) -> str:
    return checked_name(message.session, "session")


def checked_name(text: str, name: str) -> str:
    if not 0 < len(text) <= limits.NAME_LENGTH:
        raise InvalidRequest(
            f"{name} of {len(text)} characters: allowed are 1 to {limits.NAME_LENGTH}", name
        )
    return text
