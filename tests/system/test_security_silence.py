"""Logs and traces contain no prompt, answer, key or address, whatever fails."""

import asyncio
import datetime
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import grpc
import pytest

from actors.drafter import DraftActor
from actors.rpc.certificate_authority import CertificateAuthority
from actors.rpc.client import GrpcTarget
from actors.rpc.endpoints import Endpoint
from actors.rpc.tls import channel
from actors.target import TargetActor
from protos import drafting_codec
from protos import speculation_pb2 as pb
from protos.handshake import PROTOCOL
from runtime.config import DrafterConfig, Placement, ScheduleConfig, TargetConfig, TlsConfig
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.messages import Request
from runtime.core.sampling_params import SamplingParams
from runtime.models.loader import load_tokenizer
from tests.contracts.link_contract import soon
from tests.support.certificates import write_certificates
from tests.support.fakes import HOST
from tests.support.pair import save_model
from tests.support.paths import ROOT

MARK = "zanzibar quixotic passphrase"
HERE = Placement(listen=HOST)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny", context=256))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    return write_certificates(
        tmp_path_factory.mktemp("certs"),
        CertificateAuthority("ours", datetime.datetime.now(datetime.UTC), 30),
    )


@contextmanager
def deployed(model: str, tls: TlsConfig) -> Iterator[tuple[TargetActor, DraftActor]]:
    """The actors as they are, without Ray: their servers, links and threads."""
    drafter = DraftActor(
        DrafterConfig(name="lookup", method="ngram", placement=HERE), model, record=True, tls=tls
    )
    # A schedule that never lets its drafters rest, whatever they cost.
    config = TargetConfig(
        model=model, device="cpu", placement=HERE, schedule=ScheduleConfig(policy="amusd")
    )
    target = TargetActor(config, record=True, tls=tls)
    try:
        place = drafter.start()
        target.start()
        target.drafters([Endpoint("lookup", place.address, 0)])
        yield target, drafter
    finally:
        # Before its target: a lost link is worth a log line, and the test reads that line.
        drafter.stop()
        target.stop()


def test_actors_speak_by_certificate_and_keep_silent(
    model: str, tls: TlsConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tuple(load_tokenizer(model).encode(f"{MARK} {MARK} {MARK}"))
    request = Request(
        "s",
        prompt,
        SamplingParams(max_tokens=40, temperature=0.5, seed=3, stop=(MARK,), ignore_eos=True),
    )
    told: list[str] = []

    def broken(_: object) -> object:
        raise ValueError(f"cannot continue {MARK!r}, tokens {prompt}")

    async def main(target: TargetActor, drafter: DraftActor) -> tuple[int, ...]:
        client = GrpcTarget(target.address, tls)
        chunks = [chunk async for chunk in client.generate(request)]
        text = "".join(piece for chunk in chunks for piece in chunk.pieces)
        told.extend(text[start : start + 12] for start in range(0, len(text) - 11, 4))
        with pytest.raises(InvalidRequest, match="over the context"):
            await anext(
                client.generate(
                    replace(request, sampling=SamplingParams(max_tokens=10_000, stop=(MARK,)))
                )
            )
        with pytest.raises(InvalidRequest, match="is not in the vocabulary"):
            await anext(client.generate(replace(request, prompt=(*prompt, 10**6))))
        stranger = GrpcTarget(target.address)
        with pytest.raises(Unavailable):
            await anext(stranger.generate(request))
        await stranger.close()
        await malformed(drafter.address)
        monkeypatch.setattr(drafter.host.draft_engine.drafter, "expand", broken)
        again = [chunk async for chunk in client.generate(replace(request, session="t"))]
        await soon(lambda: drafter.host.draft_engine.counters["failed"] > 0)
        await client.close()
        tokens, same = (
            tuple(token for chunk in found for token in chunk.tokens) for found in (chunks, again)
        )
        assert tokens == same
        return tokens

    async def malformed(address: str) -> None:
        """From a target that does not keep to the protocol."""
        async with channel(address, [], tls, "target", "drafter") as connection:
            call = connection.stream_stream(f"/{drafting_codec.DRAFTING_SERVICE}/Speculate")()
            hello = pb.Hello(protocol=PROTOCOL, vocabulary="other", model="other", drafter="lookup")
            await call.write(pb.ToDrafter(hello=hello).SerializeToString())
            assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
            call = connection.stream_stream(f"/{drafting_codec.DRAFTING_SERVICE}/Speculate")()
            await call.write(
                pb.ToDrafter(
                    open=pb.Open(session=MARK, tokens=prompt, prompt=1)
                ).SerializeToString()
            )
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

    with caplog.at_level(logging.INFO), deployed(model, tls) as (target, drafter):
        tokens = asyncio.run(main(target, drafter))
        traces = [repr(actor.trace().events) for actor in (target, drafter)]
        addresses = [target.address, drafter.address]
    assert len(tokens) == 40
    assert len(told) > 10
    assert "a target: refused" in caplog.text
    assert "drafter lookup gives a session up: ValueError" in caplog.text
    assert "drafter lookup lost" in caplog.text
    secrets = [
        MARK,
        *MARK.split(),
        *told,
        *addresses,
        "BEGIN",
        str(list(prompt))[1:-1],
        str(list(tokens[:4]))[1:-1],
    ]
    for said in (caplog.text, *traces):
        assert [secret for secret in secrets if secret in said] == []


def test_the_debug_level_says_where_a_drafter_is(
    caplog: pytest.LogCaptureFixture, model: str, tls: TlsConfig
) -> None:
    """So that silence is a choice and not a lack of words."""
    with (
        caplog.at_level(logging.DEBUG, "actors.rpc.client"),
        deployed(model, tls) as (target, drafter),
    ):
        asyncio.run(soon(lambda: f"drafter lookup is at {drafter.address}" in caplog.text))
        assert target.attached() == ["lookup"]


def test_nothing_private_lies_beside_the_checkout() -> None:
    """Keys are made where they are used; none is part of the project."""
    folders = ("actors", "runtime", "protos", "models", "deploy", "bench", "tests")
    endings = ("*.pem", "*.key", "*.crt", "*.p12")
    assert [
        file for folder in folders for ending in endings for file in (ROOT / folder).rglob(ending)
    ] == []
