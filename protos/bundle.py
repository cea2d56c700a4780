"""Bundles several encoded frames into one message, since most of a message's cost is its
overhead.
"""

from collections.abc import Sequence

from google.protobuf.message import DecodeError

from protos import speculation_pb2 as pb
from runtime.core import limits
from runtime.core.errors import InvalidRequest

FRAME_OVERHEAD_BYTES = 16  # at most, for each frame of a bundle and for the bundle itself


def bundle_events(frames: Sequence[bytes]) -> list[bytes]:
    """Bundles encoded events into the fewest messages that the wire carries."""
    return [
        few[0] if len(few) == 1 else pb.ToDrafter(bundle=pb.Bundle(frames=few)).SerializeToString()
        for few in group_frames(frames)
    ]


def bundle_replies(frames: Sequence[bytes]) -> list[bytes]:
    """Bundles encoded replies into the fewest messages that the wire carries."""
    return [
        few[0]
        if len(few) == 1
        else pb.FromDrafter(bundle=pb.Bundle(frames=few)).SerializeToString()
        for few in group_frames(frames)
    ]


def unbundle_events(data: bytes) -> Sequence[bytes]:
    """Returns the frames of a message, for drafting_codec.decode_event. Raises InvalidRequest."""
    return unbundle_frames(pb.ToDrafter, data)


def unbundle_replies(data: bytes) -> Sequence[bytes]:
    """Returns the frames of a message, for drafting_codec.decode_reply. Raises InvalidRequest."""
    return unbundle_frames(pb.FromDrafter, data)


def unbundle_frames(
    kind: type[pb.ToDrafter] | type[pb.FromDrafter], data: bytes
) -> Sequence[bytes]:
    try:
        frame = kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(
            f"{len(data)} bytes are not a valid frame: send messages of speculation.proto"
        ) from error
    if len(frame.bundle.frames) > limits.FRAMES_PER_MESSAGE:
        raise InvalidRequest(
            f"a message of {len(frame.bundle.frames)} frames:"
            f" at most {limits.FRAMES_PER_MESSAGE} are allowed,"
            " send several messages"
        )
    return frame.bundle.frames if frame.HasField("bundle") else (data,)


def group_frames(frames: Sequence[bytes]) -> list[list[bytes]]:
    """Splits the frames, in order, into groups that each fit into a message."""
    groups: list[list[bytes]] = []
    room = 0
    for frame in frames:
        needed = len(frame) + FRAME_OVERHEAD_BYTES
        if needed > room or len(groups[-1]) == limits.FRAMES_PER_MESSAGE:
            groups.append([])
            room = limits.MESSAGE_BYTES - FRAME_OVERHEAD_BYTES
        groups[-1].append(frame)
        room -= needed
    return groups
