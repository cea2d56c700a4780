"""Clients of both services: a target's link to a drafter, and a caller's connection to a target."""

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import grpc

from actors.rpc.common import (
    DRAFTER_SILENCE_MS,
    HANDSHAKE_TIMEOUT_S,
    REQUEST_TAKEN,
    TARGET_SILENCE_MS,
    client_options,
    closing,
    describe_status,
    is_from_peer,
    to_outrider_error,
)
from actors.rpc.frames import coalesce, count_discarded, decode_frames, encode_frames
from actors.rpc.reply_budget import ReplyBudget
from actors.rpc.tls import channel
from protos import bundle, drafting_codec, target_codec
from protos.handshake import Hello, mismatch
from runtime.config import TlsConfig
from runtime.core.errors import (
    InvalidRequest,
    LinkLost,
    OutriderError,
    Overloaded,
    TargetDied,
    Unavailable,
)
from runtime.core.messages import Chunk, Draft, Event, Reply, Request, StandbyText

logger = logging.getLogger(__name__)

MAX_STRIKES, STRIKE_WINDOW_S = 3, 60.0  # so many strikes in so many seconds end the link
STRIKE_KINDS = ("malformed", "surplus")


class GrpcLink:
    """A runtime.core.links.DraftLink to a drafter in another process.

    Each call of `speculate` opens a connection.

    counters  discarded items by reason: `malformed` and `unknown` replies; `surplus` messages,
              which exceed the budget of actors.rpc.reply_budget and are not decoded; `unsent`
              events, which cannot be encoded
    peer      the drafter's Hello, after the handshake

    If the drafter stops or is cut off, LinkLost is raised within two seconds; at once if it is
    killed; and after `handshake_s` seconds without a handshake. A malformed reply or a surplus
    message is a strike. Three strikes within a minute, also over several connections, raise
    LinkLost and put the link into quarantine.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        handshake_s: float = HANDSHAKE_TIMEOUT_S,
        now: Callable[[], float] = time.monotonic,
        tls: TlsConfig | None = None,
        tokens: int | None = None,
        hash_below: Callable[[int], str] | None = None,
    ) -> None:
        """Creates the link.

        `tokens` is the number of columns of the target's logits: guesses beyond it are malformed.
        None disables the check. `hash_below` checks a drafter that lacks the target's last tokens,
        see protos.handshake.mismatch; None leaves that unchecked.
        """
        self.address = address
        self.hello = hello
        self.peer: Hello | None = None
        self.counters: Counter[str] = Counter()
        self._tls, self._tokens, self._hash_below = tls, tokens, hash_below
        self._handshake_s = handshake_s
        self._now = now
        self._strikes: deque[float] = deque(maxlen=MAX_STRIKES)

    @property
    def quarantined(self) -> bool:
        """Tells whether the drafter is in quarantine: nobody should call `speculate`.

        Quarantine lasts for a minute after the last of three strikes.
        """
        return self._struck_out() and self._now() - self._strikes[-1] < STRIKE_WINDOW_S

    async def speculate(self, events: AsyncIterator[Event]) -> AsyncGenerator[Reply, None]:
        """Implements DraftLink. An error raised by `events` is raised here unchanged."""
        logger.debug(
            "drafter %s is at %s", self.hello.drafter, self.address
        )  # log lines above the debug level contain no addresses
        options = client_options(DRAFTER_SILENCE_MS)
        try:
            connection = channel(self.address, options, self._tls, own="target", peer="drafter")
        except InvalidRequest as error:  # an expired certificate, or one that is being replaced
            raise self._lost(str(error)) from error
        async with connection:
            call = connection.stream_stream(f"/{drafting_codec.DRAFTING_SERVICE}/Speculate")()
            ended = asyncio.Event()
            forwarding: asyncio.Task[None] | None = None
            budget = ReplyBudget()
            try:
                await self._handshake(call)
                forwarding = asyncio.create_task(self._forward(call, events, ended, budget))
                while (data := await call.read()) is not grpc.aio.EOF:
                    replies = self._replies(data, budget)
                    for reply in replies:
                        if not isinstance(reply, drafting_codec.Bye):
                            yield reply
                    if any(isinstance(reply, drafting_codec.Bye) for reply in replies):
                        break
                if not ended.is_set():
                    raise self._lost(
                        "the stream ended without a goodbye"
                        if data is grpc.aio.EOF
                        else "it said goodbye"
                    )
            except grpc.aio.AioRpcError as error:
                raise self._lost(describe_status(error)) from error
            except asyncio.CancelledError:
                if forwarding is not None and forwarding.done():
                    forwarding.result()
                raise
            finally:
                if forwarding is not None:
                    forwarding.cancel()
                    await asyncio.gather(forwarding, return_exceptions=True)
                call.cancel()

    async def _handshake(self, call: Any) -> None:
        """Exchanges Hellos. Raises LinkLost; AioRpcError if the drafter refuses."""
        try:
            async with asyncio.timeout(self._handshake_s):
                await call.write(drafting_codec.encode_hello_to_drafter(self.hello))
                data = await call.read()
        except TimeoutError as error:
            raise self._lost(f"no hello within {self._handshake_s:g} s") from error
        if data is grpc.aio.EOF:
            raise self._lost("the stream ended before its hello")
        try:
            self.peer = drafting_codec.decode_hello_from_drafter(data)
        except InvalidRequest as error:
            raise self._lost(str(error)) from error
        if (why := mismatch(self.hello, self.peer, self._hash_below)) is not None:
            raise self._lost(f"FAILED_PRECONDITION: {why}")

    async def _forward(
        self, call: Any, events: AsyncIterator[Event], ended: asyncio.Event, budget: ReplyBudget
    ) -> None:
        try:
            async with closing(coalesce(events)) as waiting:
                async for some in waiting:
                    for data in bundle.bundle_events(
                        encode_frames(some, partial(encode_granted, budget), self._discard)
                    ):
                        await call.write(data)
            ended.set()
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream has ended, and its reader raises the reason
        except BaseException:
            call.cancel()  # wakes the reader
            raise

    def _replies(self, data: bytes, budget: ReplyBudget) -> list[Reply | drafting_codec.Bye]:
        """Decodes a message, without what is discarded. Raises LinkLost at the last strike."""
        return decode_frames(data, partial(self._within, budget), self._decode_reply, self._discard)

    def _within(self, budget: ReplyBudget, data: bytes) -> Sequence[bytes]:
        """Returns the frames of a message, or none if it exceeds the budget.

        Raises InvalidRequest if it is not a valid message.
        """
        if len(data) > budget.size:
            self._discard(
                "surplus", f"{len(data)} bytes where {budget.size} are left until the next event"
            )
            return ()
        frames = bundle.unbundle_replies(data)
        if not budget.spend(max(1, len(frames)), len(data)):
            self._discard(
                "surplus",
                f"{len(frames)} frames where {budget.frames} are left until the next event",
            )
            return ()
        return frames

    def _decode_reply(self, frame: bytes) -> Reply | drafting_codec.Bye | None:
        """Decodes a reply. Raises InvalidRequest, also for a token outside the vocabulary."""
        reply = drafting_codec.decode_reply(frame)
        if self._tokens is not None and isinstance(reply, Draft):
            strange = reply.tokens[(reply.tokens < 0) | (reply.tokens >= self._tokens)]
            if len(strange):
                raise InvalidRequest(f"token {strange[0]} of a vocabulary of {self._tokens}")
        return reply

    def _discard(self, what: str, why: str) -> None:
        """Counts a discarded item. Raises LinkLost if it is the last strike."""
        if what not in STRIKE_KINDS:
            count_discarded(logger, self.counters, f"drafter {self.hello.drafter}", what, why)
        elif self.strike(why, what):
            raise self._lost(f"quarantined after {MAX_STRIKES} strikes, the last: {what}: {why}")

    def strike(self, why: str, what: str = "malformed") -> bool:
        """Counts a reply that no correct drafter sends.

        Returns True from the last strike on: the caller must then end the link.
        """
        count_discarded(logger, self.counters, f"drafter {self.hello.drafter}", what, why)
        self._strikes.append(self._now())
        return self._struck_out()

    def _struck_out(self) -> bool:
        return (
            len(self._strikes) == MAX_STRIKES
            and self._strikes[-1] - self._strikes[0] <= STRIKE_WINDOW_S
        )

    def _lost(self, why: str) -> LinkLost:
        return LinkLost(f"drafter {self.hello.drafter} is lost ({why})")


def encode_granted(budget: ReplyBudget, event: Event) -> bytes:
    """Encodes the event, and adds what the drafter may answer to the budget."""
    frame = drafting_codec.encode_event(event)
    budget.grant(event)
    return frame


class GrpcTarget:
    """A target in another process. Create, use and close it on one running event loop.

    With `tls` it connects with the role of a gateway. If the target stops or is cut off, that is
    noticed within `silence_ms` and half a second; at once if it is killed. Raises InvalidRequest if
    the files of `tls` cannot be used.
    """

    def __init__(
        self, address: str, tls: TlsConfig | None = None, silence_ms: int = TARGET_SILENCE_MS
    ) -> None:
        self.address = address
        self._channel = channel(
            address, client_options(silence_ms), tls, own="gateway", peer="target"
        )
        self._generate = self._channel.unary_stream(f"/{target_codec.TARGET_SERVICE}/Generate")
        self._standby = self._channel.stream_stream(f"/{target_codec.TARGET_SERVICE}/Standby")
        self._heartbeats = self._channel.unary_stream(f"/{target_codec.TARGET_SERVICE}/Heartbeats")

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Yields the output in chunks.

        Closing the iterator, or cancelling its reader, cancels the work at the target. Raises
        InvalidRequest, Overloaded and PairMismatch as the target does; TargetDied if the target is
        lost while it holds the request; Unavailable if it cannot be reached, or refuses.
        """
        call = self._generate(target_codec.encode_request(request))
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                yield self._chunk(data)
        except grpc.aio.AioRpcError as error:
            found = to_outrider_error(error, "the target")
            if not is_from_peer(error):
                found = grpc_error(
                    error, found, REQUEST_TAKEN in tuple(await call.initial_metadata())
                )
            raise found from error
        finally:
            call.cancel()

    async def standby(self, updates: AsyncGenerator[Sequence[StandbyText], None]) -> None:
        """Tells the target texts that others write, until `updates` ends.

        Raises Unavailable if the target is lost or does not listen, InvalidRequest for an update
        that it refuses.
        """
        call = None
        try:
            with contextlib.suppress(asyncio.InvalidStateError):  # ended: the call knows why
                async for texts in updates:
                    call = call or self._standby()
                    await call.write(target_codec.encode_standby(texts))
                if call is not None:
                    await call.done_writing()
            while call is not None and await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            raise to_outrider_error(error, "the target") from error
        finally:
            if call is not None:
                call.cancel()

    async def heartbeats(self) -> AsyncGenerator[None, None]:
        """Yields at each heartbeat. Raises Unavailable if the target is lost, or sends none."""
        call = self._heartbeats(target_codec.HEARTBEATS_REQUEST)
        try:
            while await call.read() is not grpc.aio.EOF:
                yield
        except grpc.aio.AioRpcError as error:
            raise Unavailable(describe_status(error)) from error
        finally:
            call.cancel()

    def _chunk(self, data: bytes) -> Chunk:
        try:
            return target_codec.decode_chunk(data)
        except InvalidRequest as error:
            raise Unavailable(
                f"the target sent an invalid reply ({error}): install the same version"
            ) from error

    async def close(self) -> None:
        """Closes the connection and ends every call on it."""
        await self._channel.close()


def grpc_error(error: grpc.aio.AioRpcError, found: OutriderError, has_taken: bool) -> OutriderError:
    """Returns `found`, or what gRPC's own error of a call says more exactly.

    A target that had taken the request and is gone has died with it. A server that refuses a call
    before the target sees it has too many.
    """
    match error.code(), has_taken:
        case grpc.StatusCode.UNAVAILABLE, True:
            return TargetDied(str(found))
        case grpc.StatusCode.RESOURCE_EXHAUSTED, False:
            return Overloaded(describe_status(error))
    return found
