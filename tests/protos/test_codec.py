"""The wire: what is encoded comes back equal, and what is not valid is refused by one kind of error."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from protos import drafting_codec, fields, generate, target_codec
from protos import speculation_pb2 as pb
from protos.handshake import PROTOCOL, Hello, mismatch
from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.messages import (
    Chunk,
    Close,
    Commit,
    Draft,
    Event,
    Logprob,
    Open,
    Request,
    Resync,
    Share,
    Stats,
    Style,
)
from runtime.core.sampling_params import Constraint, SamplingParams

DRAFTER = "d0"
quick = settings(max_examples=50, deadline=None)  # a busy machine is no failure

names = st.text(min_size=1, max_size=limits.NAME_LENGTH)
counts = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 2**64 - 1)
ids = st.integers(0, 2**31 - 1)
tokens = st.lists(ids, max_size=20).map(tuple)
seconds = st.floats(0, 1e9)
constraints = st.builds(
    Constraint, st.sampled_from(list(fields.CONSTRAINT_KINDS)), st.text(min_size=1, max_size=30)
)
samplings = st.builds(
    SamplingParams,
    temperature=st.just(0.0) | st.floats(0.01, 100),
    top_k=ids,
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.001, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.lists(st.tuples(ids, st.floats(-100, 100)), max_size=5).map(tuple),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(
        st.text(min_size=1, max_size=limits.STOP_LENGTH), max_size=limits.STOP_STRINGS
    ).map(tuple),
    max_tokens=st.integers(10, 2**31 - 1),
    min_tokens=st.integers(0, 10),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, limits.LOGPROBS),
    constraint=st.none() | constraints,
)
widths = st.integers(0, limits.TREE_NODES)
styles = st.builds(Style, widths, widths, counts)


@st.composite
def opens(draw: st.DrawFn) -> Open:
    session, text, of = draw(names), draw(st.lists(ids, min_size=1, max_size=20)), draw(counts)
    share = Share(session, draw(st.integers(0, max(0, of - 1))), of)
    return Open(
        session,
        draw(epochs),
        tuple(text),
        draw(st.integers(1, len(text))),
        draw(samplings),
        share,
        draw(styles),
    )


events: SearchStrategy[Event] = st.one_of(
    opens(),
    st.builds(Commit, names, epochs, counts, tokens, st.integers(0, 2**64 - 1)),
    opens().map(lambda opened: opened.share),
    st.builds(Close, names),
)
deadlines = st.none() | st.floats(allow_nan=False)
requests = st.builds(
    Request, names, tokens, samplings, st.booleans(), tokens, epochs, deadlines, st.none() | counts
)
stats = st.builds(
    Stats,
    *[epochs] * 7,
    st.lists(epochs, max_size=8).map(tuple),
    st.dictionaries(st.text(), epochs, max_size=4),
    st.dictionaries(st.text(), epochs, max_size=4),
    *[seconds] * 2,
    epochs,
    *[seconds] * 3,
)


logs = st.floats(max_value=0, allow_nan=False)
logprobs = st.builds(Logprob, logs, st.lists(st.tuples(ids, logs), max_size=3).map(tuple))


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    ids_ = draw(tokens)
    by = draw(st.lists(st.text(max_size=8), min_size=len(ids_), max_size=len(ids_)).map(tuple))
    reason = draw(st.sampled_from(list(target_codec.FINISH_REASONS)))
    pieces = draw(st.lists(st.text(max_size=8), min_size=len(ids_), max_size=len(ids_)).map(tuple))
    logged = draw(
        st.just(()) | st.lists(logprobs, min_size=len(ids_), max_size=len(ids_)).map(tuple)
    )
    return Chunk(pieces, ids_, by, reason, draw(st.none() | stats), draw(st.text()), logged)


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    nodes = draw(st.integers(0, limits.DRAFT_NODES))
    random = np.random.default_rng(draw(ids))
    scores = -random.exponential(size=nodes).astype(np.float32)
    parents = random.integers(0, 2**64, nodes, dtype=np.uint64)
    return Draft(
        draw(names),
        draw(epochs),
        DRAFTER,
        parents,
        random.integers(0, 2**31, nodes, dtype=np.int32),
        scores,
    )


@quick
@given(events)
def test_event_round_trip(event: Event) -> None:
    assert drafting_codec.decode_event(drafting_codec.encode_event(event)) == event


@quick
@given(requests)
def test_request_round_trip(request: Request) -> None:
    assert target_codec.decode_request(target_codec.encode_request(request)) == request


@quick
@given(chunks())
def test_chunk_round_trip(chunk: Chunk) -> None:
    assert target_codec.decode_chunk(target_codec.encode_chunk(chunk)) == chunk


@quick
@given(drafts())
def test_draft_round_trip(draft: Draft) -> None:
    found = drafting_codec.decode_reply(drafting_codec.encode_reply(draft))
    assert isinstance(found, Draft)
    assert (found.session, found.epoch, found.drafter) == (draft.session, draft.epoch, "")
    for name in ("parents", "tokens", "scores"):
        there, here = getattr(draft, name), getattr(found, name)
        assert here.dtype == there.dtype
        np.testing.assert_array_equal(here, there)
        assert not here.flags.writeable


@quick
@given(names)
def test_short_replies_round_trip(session: str) -> None:
    assert drafting_codec.decode_reply(
        drafting_codec.encode_reply(Resync(session, DRAFTER))
    ) == Resync(session, "")
    assert (
        drafting_codec.decode_reply(drafting_codec.encode_reply(drafting_codec.Bye()))
        == drafting_codec.Bye()
    )


@quick
@given(st.builds(Hello, names, names, names, epochs, counts))
def test_hello_round_trip(hello: Hello) -> None:
    assert (
        drafting_codec.decode_hello_to_drafter(drafting_codec.encode_hello_to_drafter(hello))
        == hello
    )
    assert (
        drafting_codec.decode_hello_from_drafter(drafting_codec.encode_hello_from_drafter(hello))
        == hello
    )


@quick
@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_an_invalid_request(data: bytes) -> None:
    decoders: list[Callable[[bytes], object]] = [
        drafting_codec.decode_event,
        target_codec.decode_request,
        target_codec.decode_chunk,
        drafting_codec.decode_hello_to_drafter,
        drafting_codec.decode_hello_from_drafter,
        drafting_codec.decode_reply,
    ]
    for decode in decoders:
        try:
            decode(data)
        except InvalidRequest as error:
            assert len(str(error)) < 300  # noqa: PT017 - any outcome but another exception is right


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


@pytest.mark.parametrize(
    ("frame", "says"),
    [
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
        ({"sampling": pb.Sampling(top_p=0.0)}, "top_p"),
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


def test_absent_fields_have_the_defaults() -> None:
    assert target_codec.decode_request(
        pb.GenerateRequest(session="s").SerializeToString()
    ) == Request("s", (), SamplingParams())
    opened = pb.ToDrafter(open=pb.Open(session="s", tokens=[7], prompt=1))
    assert drafting_codec.decode_event(opened.SerializeToString()) == Open(
        "s", 0, (7,), 1, SamplingParams(), Share("s", 0, 0), Style(0, 0, 0)
    )


def test_a_frame_of_a_later_protocol_is_neither_a_value_nor_an_error() -> None:
    later = b"\xfa\x01\x03abc"  # field 31, length-delimited
    assert drafting_codec.decode_event(later) is None
    assert drafting_codec.decode_reply(later) is None


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request("s", (2**31,), SamplingParams()), "2147483648"),
        (Request("s", (1,), SamplingParams(stop=("\udcff",))), "surrogates"),
        (Request("s", (1000,) * limits.MESSAGE_BYTES, SamplingParams()), "at most 1048576"),
    ],
)
def test_what_the_wire_cannot_carry_is_an_invalid_request(request_: Request, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        target_codec.encode_request(request_)


HELLO = Hello("abc", "big", "d0", 3)


@pytest.mark.parametrize(
    ("other", "values"),
    [
        (Hello("xyz", "small", "d0", 3), ("abc", "xyz")),
        (Hello("abc", "small", "d1", 3), ("d0", "d1")),
        (Hello("abc", "small", "d0", 4), ("life 3", "life 4")),
        (
            Hello("abc", "small", "d0", 3, PROTOCOL + 1),
            (f"protocol {PROTOCOL}", f"protocol {PROTOCOL + 1}"),
        ),
    ],
)
def test_a_mismatch_names_both_values(other: Hello, values: tuple[str, str]) -> None:
    why = mismatch(HELLO, other)
    assert why is not None
    assert all(value in why for value in values)


def test_models_of_one_vocabulary_match() -> None:
    assert mismatch(HELLO, Hello("abc", "small", "d0", 3)) is None


def test_generated_code_is_fresh() -> None:
    assert generate.stale_files() == []
