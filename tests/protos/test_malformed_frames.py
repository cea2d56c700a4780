"""A malformed frame is refused, and the error names what is wrong."""

import math
from typing import Any

import numpy as np
import pytest

from protos import drafting_codec, target_codec
from protos import speculation_pb2 as pb
from protos.handshake import Hello
from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.messages import (
    Draft,
    Features,
)


def growth(
    parents: bytes = bytes(8),
    tokens: bytes = bytes(4),
    scores: bytes = bytes(4),
    *,
    session: str = "s",
) -> bytes:
    frame: bytes = pb.FromDrafter(
        draft=pb.Draft(session=session, parents=parents, tokens=tokens, scores=scores)
    ).SerializeToString()
    return frame


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def nodes(count: int) -> tuple[bytes, bytes, bytes]:
    return bytes(8 * count), bytes(4 * count), bytes(4 * count)


def test_growth_at_the_limits_is_taken() -> None:
    assert isinstance(drafting_codec.decode_reply(growth(*nodes(limits.DRAFT_NODES))), Draft)
    assert isinstance(drafting_codec.decode_reply(growth(scores=floats(-3e38))), Draft)


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (growth(parents=bytes(16)), "2 parents, 1 tokens"),
        (growth(tokens=bytes(8)), "2 tokens"),
        (growth(scores=b""), "0 scores"),
        (growth(parents=bytes(9)), "9 bytes of parents"),
        (growth(*nodes(limits.DRAFT_NODES + 1)), "257 nodes"),
        (growth(scores=floats(math.nan)), "nan"),
        (growth(scores=floats(0.5)), "0.5"),
        (growth(scores=floats(-math.inf)), "-inf"),
        (growth(tokens=np.array([-1], "<i4").tobytes()), "token id -1"),
        (growth(session=""), "session of 0 characters"),
        (growth(session="s" * 257), "session of 257 characters"),
        (drafting_codec.encode_hello_from_drafter(Hello("v", "m", "d")), "hello is not a"),
        (b"\xff\xff\xff", "3 bytes are not a valid frame"),
    ],
)
def test_malformed_replies_are_refused(frame: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        drafting_codec.decode_reply(frame)


def test_one_bad_score_among_good_ones_is_found() -> None:
    with pytest.raises(InvalidRequest, match="scores"):
        drafting_codec.decode_reply(growth(bytes(24), bytes(12), floats(-1, math.nan, -2)))


def features(rows: bytes, width: int = 2, session: str = "s") -> pb.ToDrafter:
    return pb.ToDrafter(features=pb.Features(session=session, width=width, rows=rows))


def test_features_at_the_limit_are_taken() -> None:
    frame = features(bytes(limits.FEATURE_BYTES), 16).SerializeToString()
    found = drafting_codec.decode_event(frame)
    assert isinstance(found, Features)
    assert found.rows.rows.shape == (limits.FEATURE_BYTES // 32, 16)


@pytest.mark.parametrize("layers", [[], [2, 1], [1, 1], list(range(limits.FEATURE_LAYERS + 1))])
def test_malformed_requests_for_features_are_refused(layers: list[int]) -> None:
    frame = pb.FromDrafter(feature_request=pb.FeatureRequest(layers=layers)).SerializeToString()
    with pytest.raises(InvalidRequest, match="layers"):
        drafting_codec.decode_reply(frame)


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (features(bytes(6)), "6 bytes of features are no whole number of rows of width 2"),
        (features(bytes(5)), "5 bytes of features"),
        (features(b""), "0 bytes of features"),
        (features(bytes(8), 0), "width 0"),
        (features(bytes(8), 2**32 - 1), "width 4294967295"),
        (features(bytes(limits.FEATURE_BYTES + 4)), f"at most {limits.FEATURE_BYTES}"),
        (features(b"\x00\x00\x80\x7f"), "not finite"),
        (features(b"\xc0\xff\x00\x00"), "not finite"),
        (features(bytes(4), session=""), "session of 0"),
        (pb.ToDrafter(open=pb.Open(session="s", prompt=1, share_of=1)), "prompt 1 of 0 tokens"),
        (
            pb.ToDrafter(open=pb.Open(session="s", tokens=[1], prompt=0, share_of=1)),
            "prompt 0 of 1",
        ),
        (
            pb.ToDrafter(open=pb.Open(session="s", tokens=[1], prompt=2, share_of=1)),
            "prompt 2 of 1",
        ),
        (
            pb.ToDrafter(open=pb.Open(session="s", tokens=[1], prompt=1, share_index=1)),
            "share 1 of 0",
        ),
        (
            pb.ToDrafter(
                open=pb.Open(session="s", tokens=[1], prompt=1, style=pb.Style(width=2**20))
            ),
            "width 1048576, branches 0",
        ),
        (
            pb.ToDrafter(
                open=pb.Open(session="s", tokens=[1], prompt=1, style=pb.Style(branches=2**32 - 1))
            ),
            "branches 4294967295",
        ),
        (pb.ToDrafter(open=pb.Open(session="s", tokens=[-7], prompt=1, share_of=1)), "token id -7"),
        (
            pb.ToDrafter(
                open=pb.Open(
                    session="s",
                    tokens=[1],
                    prompt=1,
                    share_of=1,
                    sampling=pb.Sampling(temperature=math.nan),
                )
            ),
            "temperature",
        ),
        (pb.ToDrafter(commit=pb.Commit(session="s", tokens=[-1])), "token id -1"),
        (pb.ToDrafter(share=pb.Share(session="s", index=2, of=2)), "share 2 of 2"),
        (pb.ToDrafter(close=pb.Close()), "session of 0"),
        (pb.ToDrafter(hello=pb.Hello()), "hello is not a"),
    ],
)
def test_malformed_events_are_refused(frame: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        drafting_codec.decode_event(frame.SerializeToString())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sampling": pb.Sampling(top_p=-0.5)}, "top_p"),
        ({"sampling": pb.Sampling(bias_tokens=[1])}, "logit_bias"),
        ({"sampling": pb.Sampling(stop=[""])}, "stop"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"committed": [-1]}, "committed"),
        ({"session": ""}, "session"),
        ({"deadline": math.nan}, "deadline"),
        ({"sampling": pb.Sampling(logprobs=21)}, "logprobs"),
        ({"sampling": pb.Sampling(constraint=pb.Constraint(text="a"))}, "response_format"),
        (
            {"sampling": pb.Sampling(constraint=pb.Constraint(kind=pb.CONSTRAINT_KIND_REGEX))},
            "response_format",
        ),
        (
            {
                "sampling": pb.Sampling(
                    constraint=pb.Constraint(kind=pb.CONSTRAINT_KIND_REGEX, text="a" * 16385)
                )
            },
            "response_format",
        ),
    ],
)
def test_malformed_requests_name_the_parameter(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        target_codec.decode_request(
            pb.GenerateRequest(**{"session": "s", **fields}).SerializeToString()
        )
    assert caught.value.param == param


def logged(**fields: Any) -> pb.GenerateChunk:
    """A chunk of one token."""
    return pb.GenerateChunk(pieces=["a"], tokens=[1], drafters=[""], logprobs=pb.Logprobs(**fields))


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        (
            pb.GenerateChunk(pieces=["a"], tokens=[1, 2], drafters=["", ""]),
            "2 tokens, 2 drafters and 1 pieces",
        ),
        (pb.GenerateChunk(pieces=["a", "b"], tokens=[1, 2], drafters=[""]), "1 drafters"),
        (pb.GenerateChunk(pieces=["a", "b"]), "0 tokens, 0 drafters and 2 pieces"),
        (pb.GenerateChunk(drafters=[""]), "1 drafters"),
        (pb.GenerateChunk(pieces=["a"], tokens=[-1], drafters=[""]), "token id -1"),
        (pb.GenerateChunk(finish_reason=99), "finish_reason 99"),  # type: ignore[arg-type]
        (logged(chosen=[-1.0]), "logprobs of 1 tokens and 0 others"),
        (logged(chosen=[-1.0], counts=[1]), "logprobs of 1 tokens and 0 others"),
        (logged(chosen=[-1.0] * 2, counts=[0] * 2), "logprobs of 2 tokens"),
        (
            logged(chosen=[-1.0], counts=[1], top_tokens=[3, 4], top_values=[-1.0] * 2),
            "logprobs of 1 tokens and 2 others",
        ),
        (logged(chosen=[math.nan], counts=[0]), "logprobs above 0"),
        (logged(chosen=[-1.0], counts=[1], top_tokens=[3], top_values=[0.5]), "logprobs above 0"),
        (logged(chosen=[-1.0], counts=[1], top_tokens=[-3], top_values=[-0.5]), "token id -3"),
    ],
)
def test_malformed_chunks_are_refused(chunk: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        target_codec.decode_chunk(chunk.SerializeToString())
