"""Several frames in one message: as many as fit, in order, and each by itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import bundle, drafting_codec
from protos import speculation_pb2 as pb
from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Draft, Event, Resync
from tests.protos.test_codec import DRAFTER, events, quick


@quick
@given(st.lists(events, max_size=5))
def test_bundled_events_round_trip(several: list[Event]) -> None:
    messages = bundle.bundle_events([drafting_codec.encode_event(event) for event in several])
    assert len(messages) == (1 if several else 0)
    assert [
        drafting_codec.decode_event(frame)
        for message in messages
        for frame in bundle.unbundle_events(message)
    ] == several


def test_bundles_stay_within_a_message() -> None:
    frame = drafting_codec.encode_reply(Draft("s", 0, DRAFTER, *wide(limits.DRAFT_NODES)))
    frames = [frame] * (3 * limits.MESSAGE_BYTES // len(frame))
    messages = bundle.bundle_replies(frames)
    assert len(messages) == 4
    assert max(map(len, messages)) <= limits.MESSAGE_BYTES
    assert [one for message in messages for one in bundle.unbundle_replies(message)] == frames


def test_a_frame_as_large_as_a_message_goes_alone() -> None:
    frame = bytes(limits.MESSAGE_BYTES)
    assert bundle.bundle_events([b"x", frame, b"y"]) == [b"x", frame, b"y"]


def test_a_message_holds_so_many_frames_and_no_more() -> None:
    """A frame may be empty: a message of them would be a million lines of work."""
    frames = [drafting_codec.encode_reply(Resync("s", DRAFTER))] * (
        2 * limits.FRAMES_PER_MESSAGE + 1
    )
    messages = bundle.bundle_replies(frames)
    assert [len(bundle.unbundle_replies(message)) for message in messages] == [
        limits.FRAMES_PER_MESSAGE,
        limits.FRAMES_PER_MESSAGE,
        1,
    ]
    with pytest.raises(InvalidRequest, match="257 frames"):
        bundle.unbundle_replies(
            pb.FromDrafter(
                bundle=pb.Bundle(frames=[b""] * (limits.FRAMES_PER_MESSAGE + 1))
            ).SerializeToString()
        )


def test_a_bundle_in_a_bundle_is_of_no_kind() -> None:
    inner = pb.FromDrafter(
        bundle=pb.Bundle(frames=[drafting_codec.encode_reply(Resync("s", DRAFTER))])
    ).SerializeToString()
    (frame,) = bundle.unbundle_replies(
        pb.FromDrafter(bundle=pb.Bundle(frames=[inner])).SerializeToString()
    )
    with pytest.raises(InvalidRequest, match="bundle is not a"):
        drafting_codec.decode_reply(frame)


def wide(nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros(nodes, np.uint64), np.zeros(nodes, np.int32), np.zeros(nodes, np.float32)
