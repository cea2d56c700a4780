"""Who may talk to whom: certificates of the deployment's own authority, a role in each, and the command that makes them."""

import asyncio
import datetime
import logging
import re
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from actors import cli
from actors.rpc.certificate_authority import Authority, Signed
from actors.rpc.client import GrpcLink, GrpcTarget
from actors.rpc.common import closing
from actors.rpc.server import DraftingService, TargetService, serve
from actors.rpc.tls import ROLES, Role, channel, host_name, read, roles_in, uri, warn_if_open
from protos import codec
from runtime.config import Deployment, TlsConfig
from runtime.core.errors import InvalidRequest, LinkLost, Unavailable
from runtime.core.messages import Chunk, Request
from runtime.core.sampling_params import Sampling
from tests.contracts.link_contract import PATIENCE_S, draft_for
from tests.support.fakes import HELLO, HOST, Feed, ScriptedDrafter, ScriptedTarget, opening
from tests.support.paths import ROOT

NOW = datetime.datetime.now(datetime.UTC)
REQUEST = Request("s", (1, 2, 3), Sampling())
CHUNK = Chunk(("a",), (7,), ("",), "length")
METHODS = {"target": f"/{codec.TARGET}/Generate", "drafter": f"/{codec.DRAFTING}/Speculate"}


def lay(folder: Path, authority: Authority) -> TlsConfig:
    """The authority's certificates in files, as `outrider certs` names them."""
    folder.mkdir(exist_ok=True)
    (folder / "ca.pem").write_bytes(authority.certificate)
    signed: dict[str, Signed] = {**authority.roles(), "https": authority.website([HOST])}
    for name, pair in signed.items():
        (folder / f"{name}.pem").write_bytes(pair.certificate)
        (folder / f"{name}-key.pem").write_bytes(pair.key)
    return TlsConfig(
        ca=folder / "ca.pem", cert=folder / "{role}.pem", key=folder / "{role}-key.pem"
    )


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    return lay(tmp_path_factory.mktemp("certs"), Authority("ours", NOW, 30))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    """Of another authority, of the same name."""
    return lay(tmp_path_factory.mktemp("strangers"), Authority("ours", NOW, 30))


def shown(tls: TlsConfig, name: str) -> TlsConfig:
    """Whatever role is asked for, this certificate is shown."""
    return tls.model_copy(
        update={"cert": tls.ca.parent / f"{name}.pem", "key": tls.ca.parent / f"{name}-key.pem"}
    )


@asynccontextmanager
async def served(
    service: DraftingService | TargetService, tls: TlsConfig | None
) -> AsyncIterator[str]:
    server, port = await serve([service], HOST, tls=tls)
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(None)


async def answered(address: str, tls: TlsConfig | None) -> list[Chunk]:
    target = GrpcTarget(address, tls)
    try:
        return [chunk async for chunk in target.generate(REQUEST)]
    finally:
        await target.close()


async def drafted(address: str, tls: TlsConfig | None) -> int:
    """Nodes of the first growth."""
    async with closing(GrpcLink(address, HELLO, tls=tls).speculate(Feed(opening()))) as replies:
        return len((await draft_for(replies, "s")).tokens)


async def status(
    address: str,
    service: Role,
    open_channel: Callable[[str, list[tuple[str, int]]], grpc.aio.Channel],
) -> grpc.StatusCode:
    """What the method of this service answers over this channel."""
    async with open_channel(address, []) as connection, asyncio.timeout(PATIENCE_S):
        make = connection.unary_stream if service == "target" else connection.stream_stream
        call = make(METHODS[service])(
            *([codec.encode_request(REQUEST)] if service == "target" else [])
        )
        code: grpc.StatusCode = await call.code()
        return code


# Who gets in


def test_tokens_go_over_mutual_tls(tls: TlsConfig) -> None:
    async def main() -> None:
        async with served(TargetService(ScriptedTarget(CHUNK)), tls) as address:
            assert await answered(address, tls) == [CHUNK]
        async with served(DraftingService(ScriptedDrafter(), HELLO), tls) as address:
            assert await drafted(address, tls) == 4

    asyncio.run(main())


@pytest.mark.parametrize(
    ("service", "role"),
    [("target", "target"), ("target", "drafter"), ("drafter", "drafter"), ("drafter", "gateway")],
)
def test_a_certificate_of_another_role_is_denied(service: Role, role: Role, tls: TlsConfig) -> None:
    async def main() -> None:
        target, drafter = ScriptedTarget(CHUNK), ScriptedDrafter()
        async with served(
            TargetService(target) if service == "target" else DraftingService(drafter, HELLO), tls
        ) as address:
            code = await status(
                address,
                service,
                lambda address, options: channel(address, options, tls, role, service),
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
            address, credentials, [*options, ("grpc.ssl_target_name_override", host_name(service))]
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
        own = lay(tmp_path, Authority("old", NOW, 30))
        async with served(TargetService(ScriptedTarget(CHUNK)), own) as address:
            assert await answered(address, own) == [CHUNK]
            old = shown(lay(tmp_path / "kept", Authority("unused", NOW, 30)), "gateway")
            for name in ("ca.pem", "gateway.pem", "gateway-key.pem"):
                (old.ca.parent / name).write_bytes((tmp_path / name).read_bytes())
            for file in strangers.ca.parent.iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())
            assert await answered(address, strangers) == [CHUNK]
            with pytest.raises(Unavailable):
                await answered(address, old)
            (tmp_path / "target.pem").write_text("half of a certific")
            assert await answered(address, strangers) == [CHUNK]
        assert "the certificates of before stay in use" in caplog.text

    asyncio.run(main())


# Files


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"cert": "nowhere.pem"},
            r"nowhere\.pem cannot be read \(No such file or directory\): give",
        ),
        ({"ca": "noise.pem"}, "noise.pem, .* is not what it should be"),
        ({"cert": "noise.pem"}, "is not what it should be"),
        ({"key": "noise.pem"}, "is not what it should be"),
        ({"key": "{role}.pem"}, "is not what it should be"),
        ({"key": "drafter-key.pem"}, r"drafter-key\.pem is not the key of .*target\.pem: give"),
        (
            {"cert": "gateway.pem", "key": "gateway-key.pem"},
            "is for role gateway, not target: write {role} into the path",
        ),
        ({"cert": "https.pem", "key": "https-key.pem"}, "is for role none, not target"),
        ({"cert": "ca.pem"}, "is not what it should be"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    files: dict[str, str], message: str, tls: TlsConfig
) -> None:
    folder = tls.ca.parent
    (folder / "noise.pem").write_text("noise")
    with pytest.raises(InvalidRequest, match=message) as caught:
        read(tls.model_copy(update={name: folder / file for name, file in files.items()}), "target")
    assert "\n" not in str(caught.value)


def test_a_certificate_that_has_run_out_is_refused(tmp_path: Path) -> None:
    past = lay(tmp_path, Authority("past", NOW - datetime.timedelta(days=40), 30))
    with pytest.raises(InvalidRequest, match=r"ran out on \d{4}-\d\d-\d\d: make new ones"):
        read(past, "drafter")


def test_a_server_does_not_start_with_files_that_cannot_be_used(tls: TlsConfig) -> None:
    with pytest.raises(InvalidRequest, match="for role gateway, not drafter"):
        asyncio.run(
            serve([DraftingService(ScriptedDrafter(), HELLO)], HOST, tls=shown(tls, "gateway"))
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


# Names


def test_roles_are_read_from_uris_alone() -> None:
    names = [
        uri("target", "a"),
        "outrider://gateway/b",
        "drafter.outrider.internal",
        "https://x/outrider://drafter/c",
        "outrider://root/d",
    ]
    assert roles_in(names) == {"target", "gateway"}
    assert (
        roles_in(["outrider://Target/a", "outrider:/target", "", "outrider://targets/a"]) == set()
    )


def extension(
    certificate: x509.Certificate, kind: type[x509.ExtensionType]
) -> x509.Extension[x509.ExtensionType]:
    return certificate.extensions.get_extension_for_class(kind)


def test_certificates_say_what_they_are_for(tls: TlsConfig) -> None:
    signed = {
        name: x509.load_pem_x509_certificate(tls.ca.with_name(f"{name}.pem").read_bytes())
        for name in (*ROLES, "https", "ca")
    }
    assert len({certificate.serial_number for certificate in signed.values()}) == 5
    for name, certificate in signed.items():
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp256r1"
        basic, usage = (
            extension(certificate, x509.BasicConstraints),
            extension(certificate, x509.KeyUsage),
        )
        assert basic.critical
        assert usage.critical
        assert basic.value == x509.BasicConstraints(
            ca=name == "ca", path_length=0 if name == "ca" else None
        )
        assert isinstance(usage.value, x509.KeyUsage)
        assert (usage.value.key_cert_sign, usage.value.digital_signature) == (
            name == "ca",
            name != "ca",
        )
        assert NOW - datetime.timedelta(hours=2) < certificate.not_valid_before_utc < NOW
        assert certificate.not_valid_after_utc == NOW.replace(microsecond=0) + datetime.timedelta(
            days=30
        )


def test_a_browser_believes_the_gateway(tls: TlsConfig) -> None:
    async def main() -> None:
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(tls.ca.with_name("https.pem"), tls.ca.with_name("https-key.pem"))
        theirs = ssl.create_default_context(cafile=tls.ca)
        theirs.verify_flags |= ssl.VERIFY_X509_STRICT
        server = await asyncio.start_server(lambda _, writer: writer.close(), HOST, 0, ssl=own)
        port = server.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection(HOST, port, ssl=theirs)
        writer.close()
        with pytest.raises(ssl.SSLCertVerificationError, match="match"):
            await asyncio.open_connection(
                HOST, port, ssl=theirs, server_hostname="elsewhere.example"
            )
        server.close()

    asyncio.run(main())


# The command


def outrider(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["outrider", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_makes_what_a_deployment_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deep" / "certs"
    assert (
        outrider(
            monkeypatch,
            "certs",
            folder,
            "--days",
            3,
            "--name",
            "lab-1",
            "--host",
            "llm.example",
            "--host",
            "10.0.0.7",
        )
        == 0
    )
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    said = capsys.readouterr().out
    block = said[said.index("security:") : said.index("\n\nCopy")]
    plan = Deployment.model_validate({"target": {"model": "m"}, **yaml.safe_load(block)})
    assert plan.security.tls is not None
    assert plan.gateway.tls is not None
    for role in ROLES:
        certificate = x509.load_pem_x509_certificate(read(plan.security.tls, role)[1])
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
            f"outrider://{role}/lab-1"
        ]
    website = x509.load_pem_x509_certificate(plan.gateway.tls.cert.read_bytes())
    names = website.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["llm.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert not any("PRIVATE KEY" in file.read_text() for file in folder.glob("ca*"))


def test_the_command_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "certs", tmp_path / "certs") == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "certs").iterdir()}
    capsys.readouterr()
    assert outrider(monkeypatch, "certs", tmp_path / "certs") == 2
    assert re.fullmatch(
        r"outrider: \S+ is not empty: give a new folder, .*\n", capsys.readouterr().err
    )
    assert {file.name: file.read_bytes() for file in (tmp_path / "certs").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--days", "0"], "days 0"),
        (["--days", "9999"], "days 9999"),
        (["--name", "../x"], "name '../x'"),
        (["--host", "a b"], "host 'a b'"),
        (["--host", "https://x"], "host 'https://x'"),
        (["--host", "ümlaut"], "host 'ümlaut'"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outrider(monkeypatch, "certs", tmp_path / "certs", *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert named in said.err
    assert not (tmp_path / "certs").exists()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert outrider(monkeypatch, "certs", tmp_path / "file" / "certs") == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "lines"), [(["a", "b", "a"], 1), (["a", "a"], 0), (["", "b"], 0), ([], 0)]
)
def test_several_nodes_in_the_clear_are_worth_a_warning(
    nodes: list[str], lines: int, tls: TlsConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_open(nodes, tls)
        assert caplog.records == []
        warn_if_open(nodes, None)
    assert len(caplog.records) == lines
