"""Every message survives encoding, and invalid bytes raise InvalidRequest."""

from collections.abc import Callable

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
from runtime.core.features import EXPONENT_BITS, FeatureRows, FeatureSpec
from runtime.core.messages import (
    Chunk,
    Close,
    Commit,
    Draft,
    Event,
    FeatureRequest,
    Features,
    Logprob,
    Open,
    Request,
    Resync,
    Share,
    StandbyText,
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
    prompt_logprobs=st.none() | st.integers(0, limits.LOGPROBS),
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
    most = max(1, len(ids_))  # without tokens, text that was held back
    pieces = draw(st.lists(st.text(max_size=8), min_size=len(ids_), max_size=most).map(tuple))
    logged = draw(
        st.just(()) | st.lists(logprobs, min_size=len(ids_), max_size=len(ids_)).map(tuple)
    )
    of_prompt = draw(st.lists(logprobs, max_size=3).map(tuple))
    last, error = draw(st.none() | stats), draw(st.text())
    return Chunk(pieces, ids_, by, reason, last, error, logged, of_prompt)


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
@given(st.lists(st.builds(StandbyText, names, st.integers(0, 2**32 - 1), tokens, st.booleans())))
def test_standby_round_trip(texts: list[StandbyText]) -> None:
    assert target_codec.decode_standby(target_codec.encode_standby(texts)) == tuple(texts)


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


@st.composite
def features(draw: st.DrawFn) -> Features:
    random, shape = np.random.default_rng(draw(ids)), (draw(st.integers(1, 20)), draw(widths) + 1)
    rows = random.integers(0, EXPONENT_BITS, shape, dtype=np.uint16)
    return Features(draw(names), draw(epochs), FeatureRows(draw(counts), rows))


@quick
@given(features())
def test_features_round_trip(event: Features) -> None:
    found = drafting_codec.decode_event(drafting_codec.encode_event(event))
    assert isinstance(found, Features)
    assert (found.session, found.epoch, found.rows.start) == (
        event.session,
        event.epoch,
        event.rows.start,
    )
    assert found.rows.rows.dtype == np.uint16
    np.testing.assert_array_equal(found.rows.rows, event.rows.rows)
    assert not found.rows.rows.flags.writeable


@quick
@given(st.sets(counts, min_size=1, max_size=limits.FEATURE_LAYERS))
def test_a_request_for_features_round_trips(layers: set[int]) -> None:
    spec = FeatureSpec(tuple(sorted(layers)))
    assert drafting_codec.decode_reply(
        drafting_codec.encode_reply(FeatureRequest(spec, DRAFTER))
    ) == FeatureRequest(spec, "")


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
        target_codec.decode_standby,
        drafting_codec.decode_hello_to_drafter,
        drafting_codec.decode_hello_from_drafter,
        drafting_codec.decode_reply,
    ]
    for decode in decoders:
        try:
            decode(data)
        except InvalidRequest as error:
            assert len(str(error)) < 300  # noqa: PT017 - any outcome but another exception is right


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
        (Request("s\udcff", (1,), SamplingParams()), "surrogates"),
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


def hash_below(size: int) -> str:
    return {4: "four", 6: "six"}[size]


@pytest.mark.parametrize(
    ("drafter", "fits"),
    [
        (Hello("four", "small", "d0", tokens=4), True),  # it lacks the target's last two tokens
        (Hello("other", "small", "d0", tokens=4), False),
        (Hello("six", "small", "d0", tokens=6), True),
        (Hello("other", "small", "d0", tokens=6), False),
        (Hello("eight", "small", "d0", tokens=8), False),  # it knows tokens that the target lacks
        (Hello("six", "small", "d0"), True),  # an older drafter, which states no size
        (Hello("four", "small", "d0"), False),
    ],
)
def test_a_drafter_may_lack_the_last_tokens(drafter: Hello, fits: bool) -> None:
    target = Hello("six", "big", "d0", tokens=6)
    assert (mismatch(target, drafter, hash_below) is None) is fits
    left_to_the_target = drafter.tokens == 4
    assert (mismatch(target, drafter) is None) is (fits or left_to_the_target)


def test_a_hello_keeps_its_size() -> None:
    hello = Hello("six", "big", "d0", 2, tokens=6)
    data = drafting_codec.encode_hello_to_drafter(hello)
    assert drafting_codec.decode_hello_to_drafter(data) == hello


def test_generated_code_is_fresh() -> None:
    assert generate.stale_files() == []
