"""Mutual TLS lets in only certificates of the deployment's own authority with the right role."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from actors.rpc.certificate_authority import CertificateAuthority
from actors.rpc.server import DraftingService, TargetService, serve
from actors.rpc.tls import ROLES, Role, channel, role_host_name
from protos import drafting_codec, target_codec
from runtime.config import TlsConfig
from runtime.core.errors import InvalidRequest, LinkLost, Unavailable
from tests.contracts.link_contract import PATIENCE_S
from tests.support.certificates import (
    CHUNK,
    NOW,
    REQUEST,
    answered,
    drafted,
    presenting,
    served,
    write_certificates,
)
from tests.support.fakes import HELLO, HOST, ScriptedDrafter, ScriptedTarget
from tests.support.paths import ROOT

GENERATE = f"/{target_codec.TARGET_SERVICE}/Generate"
HEARTBEATS = f"/{target_codec.TARGET_SERVICE}/Heartbeats"
STANDBY = f"/{target_codec.TARGET_SERVICE}/Standby"
METHODS = {"target": GENERATE, "drafter": f"/{drafting_codec.DRAFTING_SERVICE}/Speculate"}


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    """Writes certificates of another authority with the same name."""
    return write_certificates(
        tmp_path_factory.mktemp("strangers"), CertificateAuthority("ours", NOW, 30)
    )


async def status(
    address: str,
    service: Role,
    open_channel: Callable[[str, list[tuple[str, int]]], grpc.aio.Channel],
    method: str = "",
) -> grpc.StatusCode:
    """Calls a method of this service over the channel and returns the status code."""
    async with open_channel(address, []) as connection, asyncio.timeout(PATIENCE_S):
        make = connection.unary_stream if service == "target" else connection.stream_stream
        call = make(method or METHODS[service])(
            *([target_codec.encode_request(REQUEST)] if service == "target" else [])
        )
        code: grpc.StatusCode = await call.code()
        return code


def test_tokens_go_over_mutual_tls(tls: TlsConfig) -> None:
    async def main() -> None:
        async with served(TargetService(ScriptedTarget(CHUNK)), tls) as address:
            assert await answered(address, tls) == [CHUNK]
        async with served(DraftingService(ScriptedDrafter(), HELLO), tls) as address:
            assert await drafted(address, tls) == 4

    asyncio.run(main())


@pytest.mark.parametrize(
    ("service", "role", "method"),
    [
        ("target", "target", GENERATE),
        ("target", "drafter", GENERATE),
        ("target", "target", HEARTBEATS),
        ("target", "target", STANDBY),
        ("drafter", "drafter", ""),
        ("drafter", "gateway", ""),
    ],
)
def test_a_certificate_of_another_role_is_denied(
    service: Role, role: Role, method: str, tls: TlsConfig
) -> None:
    async def main() -> None:
        target, drafter = ScriptedTarget(CHUNK), ScriptedDrafter()
        async with served(
            TargetService(target) if service == "target" else DraftingService(drafter, HELLO), tls
        ) as address:
            code = await status(
                address,
                service,
                lambda address, options: channel(address, options, tls, role, service),
                method,
            )
            assert code is grpc.StatusCode.PERMISSION_DENIED
        assert (target.asked, drafter.seen) == ([], [])

    asyncio.run(main())


def dialling(
    certificate: Path | None, tls: TlsConfig, service: Role
) -> Callable[[str, list[tuple[str, int]]], grpc.aio.Channel]:
    """A client that trusts the server, and shows this certificate or none."""

    def open_channel(address: str, options: list[tuple[str, int]]) -> grpc.aio.Channel:
        pair: tuple[bytes | None, bytes | None] = (None, None)
        if certificate is not None:
            pair = (
                certificate.with_name(f"{certificate.stem}-key.pem").read_bytes(),
                certificate.read_bytes(),
            )
        credentials = grpc.ssl_channel_credentials(tls.ca.read_bytes(), *pair)
        return grpc.aio.secure_channel(
            address,
            credentials,
            [*options, ("grpc.ssl_target_name_override", role_host_name(service))],
        )

    return open_channel


@pytest.mark.parametrize("service", ["target", "drafter"])
@pytest.mark.parametrize(
    "caller", ["in the clear", "no certificate", "another authority's", "the website's"]
)
def test_without_a_certificate_of_the_deployment_there_is_no_connection(
    service: Role, caller: str, tls: TlsConfig, strangers: TlsConfig
) -> None:
    role: Role = "gateway" if service == "target" else "target"
    callers = {
        "in the clear": grpc.aio.insecure_channel,
        "no certificate": dialling(None, tls, service),
        "another authority's": dialling(strangers.ca.with_name(f"{role}.pem"), tls, service),
        "the website's": dialling(tls.ca.with_name("https.pem"), tls, service),
    }

    async def main() -> None:
        target, drafter = ScriptedTarget(CHUNK), ScriptedDrafter()
        async with served(
            TargetService(target) if service == "target" else DraftingService(drafter, HELLO), tls
        ) as address:
            assert await status(address, service, callers[caller]) is grpc.StatusCode.UNAVAILABLE
        assert (target.asked, drafter.seen) == ([], [])

    asyncio.run(main())


@pytest.mark.parametrize("pose", ["target", "gateway", "https"])
def test_a_target_takes_nobody_but_a_drafter_for_a_drafter(pose: str, tls: TlsConfig) -> None:
    async def main() -> None:
        posing = grpc.aio.server()
        pair = (
            tls.ca.with_name(f"{pose}-key.pem").read_bytes(),
            tls.ca.with_name(f"{pose}.pem").read_bytes(),
        )
        posing.add_generic_rpc_handlers([DraftingService(ScriptedDrafter(), HELLO).handler()])
        port = posing.add_secure_port(f"{HOST}:0", grpc.ssl_server_credentials([pair]))
        await posing.start()
        with pytest.raises(LinkLost, match="UNAVAILABLE"):
            await drafted(f"{HOST}:{port}", tls)
        await posing.stop(None)

    asyncio.run(main())


def test_a_server_of_another_authority_is_not_believed(
    tls: TlsConfig, strangers: TlsConfig
) -> None:
    async def main() -> None:
        body = ScriptedTarget(CHUNK)
        async with served(TargetService(body), strangers) as address:
            with pytest.raises(Unavailable, match="UNAVAILABLE"):
                await answered(address, tls)
        assert body.asked == []

    asyncio.run(main())


@pytest.mark.parametrize("role", ROLES)
def test_health_is_for_every_role(role: Role, tls: TlsConfig) -> None:
    async def main() -> None:
        async with (
            served(TargetService(ScriptedTarget()), tls) as address,
            channel(address, [], tls, role, "target") as connection,
        ):
            answer = await health_pb2_grpc.HealthStub(connection).Check(
                health_pb2.HealthCheckRequest()
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(main())


def test_new_files_are_used_from_the_next_connection_on(
    tmp_path: Path, strangers: TlsConfig, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        own = write_certificates(tmp_path, CertificateAuthority("old", NOW, 30))
        async with served(TargetService(ScriptedTarget(CHUNK)), own) as address:
            assert await answered(address, own) == [CHUNK]
            old = presenting(
                write_certificates(tmp_path / "kept", CertificateAuthority("unused", NOW, 30)),
                "gateway",
            )
            for name in ("ca.pem", "gateway.pem", "gateway-key.pem"):
                (old.ca.parent / name).write_bytes((tmp_path / name).read_bytes())
            for file in strangers.ca.parent.iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())
            assert await answered(address, strangers) == [CHUNK]
            with pytest.raises(Unavailable):
                await answered(address, old)
            (tmp_path / "target.pem").write_text("half of a certific")
            assert await answered(address, strangers) == [CHUNK]
        assert "new certificates cannot be used, the old ones stay in use: " in caplog.text
        assert (
            f"{tmp_path / 'target.pem'} or {tmp_path / 'target-key.pem'} is invalid" in caplog.text
        )

    asyncio.run(main())


def test_a_server_does_not_start_with_files_that_cannot_be_used(tls: TlsConfig) -> None:
    with pytest.raises(InvalidRequest, match="for role gateway, not drafter"):
        asyncio.run(
            serve([DraftingService(ScriptedDrafter(), HELLO)], HOST, tls=presenting(tls, "gateway"))
        )


def test_callers_that_shake_hands_at_the_same_time_end_nothing(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "tests.support.handshakes", str(tmp_path)]
    done = subprocess.run(
        call, cwd=ROOT, capture_output=True, text=True, timeout=4 * PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (0, "3 were answered\n"), done.stderr[-2000:]


def test_a_link_without_usable_files_is_lost_and_may_come_back(
    tmp_path: Path, tls: TlsConfig
) -> None:
    async def main() -> None:
        broken = tls.model_copy(update={"key": tmp_path / "{role}-key.pem"})
        async with served(DraftingService(ScriptedDrafter(), HELLO), tls) as address:
            with pytest.raises(LinkLost, match="cannot be read"):
                await drafted(address, broken)
            (tmp_path / "target-key.pem").write_bytes(
                tls.ca.with_name("target-key.pem").read_bytes()
            )
            assert await drafted(address, broken) == 4

    asyncio.run(main())
