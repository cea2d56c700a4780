"""A target served over gRPC: errors, cancellation, health and reflection."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from actors.rpc.client import GrpcTarget
from actors.rpc.common import REQUEST_TAKEN, closing
from actors.rpc.server import DraftingService, TargetService, serve
from protos import speculation_pb2 as pb
from protos import target_codec
from protos.handshake import PROTOCOL
from protos.speculation_pb2_grpc import DraftingStub, TargetStub
from runtime.core import limits
from runtime.core.errors import (
    InvalidRequest,
    OutriderError,
    Overloaded,
    PairMismatch,
    TargetDied,
    Unavailable,
)
from runtime.core.messages import Chunk, Logprob, Request, StandbyText
from runtime.core.sampling_params import SamplingParams
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.target.chunked_prefill import CHUNK_TOKENS
from tests.contracts.link_contract import PATIENCE_S, soon
from tests.support.fakes import DRAFTER, HELLO, HOST, ScriptedDrafter, ScriptedTarget
from tests.support.harness import running

GARBAGE = b"\xff" * 20


REQUEST = Request(
    "s", (1, 2, 3), SamplingParams(temperature=0.5, seed=-7, stop=("x",)), False, (4,)
)
CHUNKS = (Chunk(("a",), (7,), ("",)), Chunk(("b", "c"), (8, 9), ("d0", ""), "stop"))


@asynccontextmanager
async def target_over_grpc(body: ScriptedTarget) -> AsyncIterator[GrpcTarget]:
    server, port = await serve([TargetService(body)], HOST)
    target = GrpcTarget(f"{HOST}:{port}")
    try:
        yield target
    finally:
        await target.close()
        await server.stop(None)


def test_a_request_arrives_whole_and_its_output_comes_back() -> None:
    async def main() -> None:
        body = ScriptedTarget(*CHUNKS)
        async with target_over_grpc(body) as target:
            assert tuple([chunk async for chunk in target.generate(REQUEST)]) == CHUNKS
        assert body.asked == [REQUEST]

    asyncio.run(main())


def test_the_logprobs_of_a_whole_chunk_of_a_prompt_fit_in_a_message() -> None:
    most = Logprob(-0.1, tuple((2**31 - 1 - rank, -0.1 * rank) for rank in range(limits.LOGPROBS)))
    chunk = Chunk((), (), (), prompt_logprobs=(most,) * CHUNK_TOKENS)

    async def main() -> None:
        async with target_over_grpc(ScriptedTarget(chunk, *CHUNKS)) as target:
            assert tuple([found async for found in target.generate(REQUEST)]) == (chunk, *CHUNKS)

    asyncio.run(main())


def test_closing_the_output_ends_the_work() -> None:
    async def main() -> None:
        body = ScriptedTarget(*CHUNKS, hangs=True)
        async with target_over_grpc(body) as target:
            async with closing(target.generate(REQUEST)) as chunks:
                assert await anext(chunks) == CHUNKS[0]
                assert body.running == 1
            await soon(lambda: body.running == 0)

    asyncio.run(main())


def test_cancelling_the_reader_ends_the_work() -> None:
    async def main() -> None:
        body = ScriptedTarget(hangs=True)
        async with target_over_grpc(body) as target:
            reading = asyncio.ensure_future(anext(target.generate(REQUEST)))
            await soon(lambda: body.running == 1)
            reading.cancel()
            await soon(lambda: body.running == 0)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("raised", "kind", "says"),
    [
        (InvalidRequest("top_k is wrong", "top_k"), InvalidRequest, "top_k is wrong"),
        (Overloaded("256 sessions"), Overloaded, "256 sessions"),
        (PairMismatch("other words"), PairMismatch, "other words"),
        (Unavailable("no model"), Unavailable, "UNAVAILABLE: no model"),
        (OutriderError("odd"), Unavailable, "INTERNAL: odd"),
        (ZeroDivisionError(), Unavailable, "UNKNOWN"),
    ],
)
def test_errors_cross_as_what_they_are(raised: Exception, kind: type[Exception], says: str) -> None:
    async def main() -> None:
        async with target_over_grpc(ScriptedTarget(CHUNKS[0], fails=raised)) as target:
            chunks = target.generate(REQUEST)
            assert await anext(chunks) == CHUNKS[0]
            with pytest.raises(kind, match=says) as caught:
                await anext(chunks)
            assert type(caught.value) is kind
            assert getattr(caught.value, "param", None) == getattr(raised, "param", None)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("code", "taken", "kind"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, False, Overloaded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, True, Unavailable),
        (grpc.StatusCode.UNAVAILABLE, False, Unavailable),
        (grpc.StatusCode.UNAVAILABLE, True, TargetDied),
        (grpc.StatusCode.INVALID_ARGUMENT, True, Unavailable),
        (grpc.StatusCode.FAILED_PRECONDITION, True, Unavailable),
        (grpc.StatusCode.INTERNAL, True, Unavailable),
    ],
)
def test_an_error_of_grpc_itself_is_not_taken_for_the_targets(
    code: grpc.StatusCode, taken: bool, kind: type[Exception]
) -> None:
    """A call that breaks in mid-stream is no refusal of the target, whatever its status is."""

    async def generate(_: bytes, context: Any) -> None:
        if taken:
            await context.send_initial_metadata((REQUEST_TAKEN,))
        await context.abort(code, "of gRPC")

    async def main() -> None:
        server = grpc.aio.server()
        handler = grpc.unary_stream_rpc_method_handler(generate)
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    target_codec.TARGET_SERVICE, {"Generate": handler}
                )
            ]
        )
        target = GrpcTarget(f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}")
        await server.start()
        with pytest.raises(kind, match="of gRPC") as caught:
            await anext(target.generate(REQUEST))
        assert type(caught.value) is kind
        await target.close()
        await server.stop(None)

    asyncio.run(main())


def test_all_that_a_target_lets_wait_reach_it() -> None:
    async def main() -> None:
        body = ScriptedTarget(hangs=True)
        count = limits.SESSIONS + limits.QUEUED_REQUESTS + 1  # the last is the target's to refuse
        async with target_over_grpc(body) as target:
            reading = [asyncio.ensure_future(anext(target.generate(REQUEST))) for _ in range(count)]
            await soon(lambda: body.running == count)
            for one in reading:
                one.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    asyncio.run(main())


def test_texts_that_others_write_arrive_whole() -> None:
    told = [
        (StandbyText("1", 0, (1, 2, 3)), StandbyText("2", 0, (4,))),
        (StandbyText("1", 3, (5,)), StandbyText("2", over=True)),
    ]

    async def updates() -> AsyncGenerator[Sequence[StandbyText], None]:
        for texts in told:
            yield texts

    async def main() -> None:
        body = ScriptedTarget()
        async with target_over_grpc(body) as target:
            await target.standby(updates())
        assert body.told == told

    asyncio.run(main())


def test_a_target_that_refuses_texts_of_others_or_is_gone_says_so() -> None:
    async def updates(token: int) -> AsyncGenerator[Sequence[StandbyText], None]:
        while True:
            yield (StandbyText("1", 0, (token,)),)
            await asyncio.sleep(0.01)

    async def main() -> None:
        async with running(ToyModel(vocabulary=24), Fixed(4)) as body:
            server, port = await serve([TargetService(body)], HOST)
            target = GrpcTarget(f"{HOST}:{port}")
            with pytest.raises(InvalidRequest, match="token id 24 is not in the vocabulary"):
                await target.standby(updates(24))
            telling = asyncio.ensure_future(target.standby(updates(3)))
            await asyncio.sleep(0.1)
            assert not telling.done()
            await server.stop(None)
            with pytest.raises(Unavailable):
                await telling
            await target.close()
            await soon(lambda: not body.engine.requests.standby.texts)

    asyncio.run(main())


def test_heartbeats_come_until_the_server_stops() -> None:
    async def main() -> None:
        server, port = await serve([TargetService(ScriptedTarget(hangs=True))], HOST)
        target = GrpcTarget(f"{HOST}:{port}")
        heartbeats = target.heartbeats()
        for _ in range(3):
            await anext(heartbeats)
        await server.stop(None)
        with pytest.raises(Unavailable):
            async for _ in heartbeats:
                pass
        await target.close()

    asyncio.run(main())


def test_a_target_of_an_older_version_has_no_heartbeats() -> None:
    async def main() -> None:
        server = grpc.aio.server()
        target = GrpcTarget(f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}")
        await server.start()
        with pytest.raises(Unavailable, match="UNIMPLEMENTED"):
            await anext(target.heartbeats())
        await target.close()
        await server.stop(None)

    asyncio.run(main())


def test_a_malformed_request_is_refused_by_the_server() -> None:
    async def main() -> None:
        body = ScriptedTarget(*CHUNKS)
        server, port = await serve([TargetService(body)], HOST)
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            call = TargetStub(channel).Generate(
                pb.GenerateRequest(session="s", prompt=[1], sampling=pb.Sampling(top_p=2.0))
            )
            assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "top_p 2.0" in await call.details()
        await server.stop(None)
        assert body.asked == []

    asyncio.run(main())


def test_a_request_over_the_limit_is_refused_before_it_is_sent() -> None:
    async def main() -> None:
        body = ScriptedTarget(*CHUNKS)
        async with target_over_grpc(body) as target:
            with pytest.raises(InvalidRequest, match="at most 1048576"):
                await anext(
                    target.generate(replace(REQUEST, prompt=(10**6,) * limits.MESSAGE_BYTES))
                )
        assert body.asked == []

    asyncio.run(main())


def test_a_target_that_is_mute_or_gone_is_unavailable() -> None:
    async def main() -> None:
        with socket.create_server((HOST, 0)) as mute:
            address = "{}:{}".format(*mute.getsockname())
            target = GrpcTarget(address)
            with pytest.raises(Unavailable, match="the target cannot be reached"):
                async with asyncio.timeout(2 * PATIENCE_S):
                    await anext(target.generate(REQUEST))
        await target.close()

    asyncio.run(main())


def test_a_target_that_speaks_nonsense_is_unavailable() -> None:
    async def generate(_: bytes, context: Any) -> None:
        await context.write(GARBAGE)

    async def main() -> None:
        server = grpc.aio.server()
        handler = grpc.unary_stream_rpc_method_handler(generate)
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    target_codec.TARGET_SERVICE, {"Generate": handler}
                )
            ]
        )
        target = GrpcTarget(f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}")
        await server.start()
        with pytest.raises(Unavailable, match="invalid reply"):
            await anext(target.generate(REQUEST))
        await target.close()
        await server.stop(None)

    asyncio.run(main())


# The server itself


def test_health_and_reflection() -> None:
    async def main() -> None:
        server, port = await serve(
            [DraftingService(ScriptedDrafter(), HELLO), TargetService(ScriptedTarget())], HOST
        )
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", "outrider.v1.Drafting", "outrider.v1.Target"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = {service.name for service in (await call.read()).list_services_response.service}
            call.cancel()
        await server.stop(None)
        assert {"outrider.v1.Drafting", "outrider.v1.Target", "grpc.health.v1.Health"} <= names

    asyncio.run(main())


def test_a_port_in_use_is_refused_in_one_line() -> None:
    async def main() -> None:
        with socket.create_server((HOST, 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(
                Unavailable, match=f"no server at {HOST}:{port} .*: choose another port"
            ) as caught:
                await serve([], HOST, port)
        assert "\n" not in str(caught.value)

    asyncio.run(main())


def test_the_generated_client_speaks_to_the_server() -> None:
    async def main() -> None:
        server, port = await serve([DraftingService(ScriptedDrafter(), HELLO)], HOST)
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            call = DraftingStub(channel).Speculate()
            await call.write(
                pb.ToDrafter(
                    hello=pb.Hello(
                        protocol=PROTOCOL,
                        vocabulary=HELLO.vocabulary,
                        model="other",
                        drafter=DRAFTER,
                    )
                )
            )
            assert (await call.read()).hello.drafter == DRAFTER
            call.cancel()
        await server.stop(None)

    asyncio.run(main())
