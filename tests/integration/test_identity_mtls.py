"""TLS and client certificates over real sockets: versions, mapping, revocation, reload."""

import asyncio
import contextlib
import datetime
import hashlib
import os
import ssl
from pathlib import Path

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server.api.protocol import protocol_for
from server.auth.api_key import KeyRing, new_key
from server.auth.authenticator import Authenticator
from server.auth.mtls import CertificateMap, CertificateRules
from server.auth.pepper import Pepper
from server.auth.throttle import FailureThrottle
from server.auth.tls import TLSListener
from server.errors import AuthenticationError, ConfigError
from server.settings import ListenerSettings, parse_settings
from server.store.incidents import Quarantine
from server.store.keys import KeyRow
from server.types import Client, Credentials, Secret

NOW = datetime.datetime.now(tz=datetime.UTC)
HERE = Client("127.0.0.1", "test")


class Authority:
    """A certificate authority for one test run."""

    def __init__(self, name="test-ca"):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (
            self.builder(self.name, self.key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def builder(self, subject, public_key, days=1):
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - datetime.timedelta(days=2))
            .not_valid_after(NOW + datetime.timedelta(days=days))
        )

    def issue(self, folder, file, names, usage=ExtendedKeyUsageOID.CLIENT_AUTH, days=1):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in names])
        builder = self.builder(subject, key.public_key(), days).add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        made = builder.sign(self.key, hashes.SHA256())
        (folder / f"{file}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        (folder / f"{file}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return made.public_bytes(serialization.Encoding.DER)


ANA = [
    (NameOID.COMMON_NAME, "ana"),
    (NameOID.ORGANIZATION_NAME, "acme"),
    (NameOID.ORGANIZATIONAL_UNIT_NAME, "developers"),
    (NameOID.ORGANIZATIONAL_UNIT_NAME, "leads"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority()
    (folder / "ca.pem").write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))
    authority.issue(folder, "server", [(NameOID.COMMON_NAME, "localhost")], ExtendedKeyUsageOID.SERVER_AUTH)
    authority.issue(folder, "server2", [(NameOID.COMMON_NAME, "localhost")], ExtendedKeyUsageOID.SERVER_AUTH)
    authority.issue(folder, "ana", ANA)
    Authority("evil-ca").issue(folder, "evil", ANA)
    return folder, authority


def der_of(path):
    return ssl.PEM_cert_to_DER_cert(path.read_text())


async def show_certificate(scope, _receive, send):
    """Answer with the fingerprint of the certificate that the scope carries."""
    found = scope.get("extensions", {}).get("tls", {}).get("client_cert_der")
    body = hashlib.sha256(found).hexdigest().encode() if found else b"none"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def serving(tls):
    config = uvicorn.Config(
        show_certificate, port=0, http=protocol_for(ListenerSettings()), lifespan="off", log_config=None, ws="none"
    )
    config.load()
    config.ssl = tls.context
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        await server.shutdown()


async def ask(port, context):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    try:
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        if not answer:
            raise ConnectionError("closed without an answer")
        return answer.rpartition(b"\r\n")[2], writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()


def client(folder, certificate=None, **changes):
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    if certificate is not None:
        context.load_cert_chain(folder / f"{certificate}.pem", folder / f"{certificate}.key")
    for name, value in changes.items():
        setattr(context, name, value)
    return context


def listener(folder, **changes):
    return TLSListener(folder / "server.pem", folder / "server.key", client_ca=folder / "ca.pem", **changes)


async def test_the_certificate_reaches_the_application(files):
    folder, _authority = files
    async with serving(listener(folder)) as port:
        body, _server = await ask(port, client(folder, "ana"))
        assert body.decode().endswith(hashlib.sha256(der_of(folder / "ana.pem")).hexdigest())
        body, _server = await ask(port, client(folder))
        assert body.endswith(b"none")


async def test_a_required_certificate_is_required_and_a_strangers_is_refused(files):
    folder, _authority = files
    async with serving(listener(folder, require_client=True)) as port:
        for certificate in (None, "evil"):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await ask(port, client(folder, certificate))
        body, _server = await ask(port, client(folder, "ana"))
        assert len(body) == 64


async def test_old_versions_weak_ciphers_and_plain_http_are_refused(files):
    folder, _authority = files
    async with serving(listener(folder)) as port:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            await ask(port, client(folder, minimum_version=version, maximum_version=version))
        old = client(folder)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="deprecated"):
            old.minimum_version = ssl.TLSVersion.TLSv1_1
        with pytest.warns(DeprecationWarning, match="deprecated"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await ask(port, old)
        weak = client(folder, maximum_version=ssl.TLSVersion.TLSv1_2)
        weak.set_ciphers("AES128-SHA:ECDHE-ECDSA-AES128-SHA")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await ask(port, weak)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" not in await reader.read()
        writer.close()


async def test_new_files_are_used_without_a_restart_and_bad_ones_are_not(files, tmp_path):
    folder, _authority = files
    for name in ("server.pem", "server.key", "ca.pem"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tls = listener(tmp_path)
    async with serving(tls) as port:
        _body, first = await ask(port, client(folder))
        assert not tls.poll()
        (tmp_path / "server.pem").write_bytes((folder / "server2.pem").read_bytes())
        os.utime(tmp_path / "server.pem", ns=(1, 1))
        with pytest.raises(ConfigError):
            tls.poll()
        _body, still = await ask(port, client(folder))
        assert still == first
        (tmp_path / "server.key").write_bytes((folder / "server2.key").read_bytes())
        tls.start()
        try:
            now = first
            for _ in range(250):
                _body, now = await ask(port, client(folder))
                if now != first:
                    break
                await asyncio.sleep(0.02)
            assert now == der_of(folder / "server2.pem")
        finally:
            tls.stop()


def test_unusable_files_are_refused(files, tmp_path):
    folder, _authority = files
    with pytest.raises(ConfigError):
        TLSListener(tmp_path / "none.pem", folder / "server.key")
    with pytest.raises(ConfigError):
        TLSListener(folder / "server.pem", folder / "ana.key")
    with pytest.raises(ConfigError, match="no CA"):
        TLSListener(folder / "server.pem", folder / "server.key", require_client=True)
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(ConfigError):
        TLSListener(folder / "server.pem", folder / "server.key", client_ca=tmp_path / "ca.pem")


def test_a_certificate_is_its_subject(files):
    folder, _authority = files
    principal = CertificateMap(CertificateRules()).authenticate(der_of(folder / "ana.pem"))
    assert principal.subject == "ana"
    assert principal.tenant == "acme"
    assert principal.groups == frozenset({"developers", "leads"})
    assert principal.method == "mtls"
    assert principal.scopes == frozenset({"model:*"})
    assert principal.expires_at_s is not None


@pytest.mark.parametrize(
    ("names", "usage", "days"),
    [
        ([(NameOID.COMMON_NAME, "ana")], ExtendedKeyUsageOID.CLIENT_AUTH, 1),
        ([(NameOID.ORGANIZATION_NAME, "acme")], ExtendedKeyUsageOID.CLIENT_AUTH, 1),
        ([*ANA, (NameOID.COMMON_NAME, "root")], ExtendedKeyUsageOID.CLIENT_AUTH, 1),
        ([(NameOID.COMMON_NAME, "a/b"), (NameOID.ORGANIZATION_NAME, "acme")], ExtendedKeyUsageOID.CLIENT_AUTH, 1),
        (ANA, ExtendedKeyUsageOID.SERVER_AUTH, 1),
        (ANA, ExtendedKeyUsageOID.CLIENT_AUTH, -1),
    ],
)
def test_certificates_that_name_nobody_are_refused(files, tmp_path, names, usage, days):
    _folder, authority = files
    made = authority.issue(tmp_path, "x", names, usage, days)
    with pytest.raises(AuthenticationError):
        CertificateMap(CertificateRules()).authenticate(made)


def test_a_default_tenant_serves_where_there_is_no_organisation(files, tmp_path):
    _folder, authority = files
    made = authority.issue(tmp_path, "x", [(NameOID.COMMON_NAME, "bob")], None)
    assert CertificateMap(CertificateRules(default_tenant="house")).authenticate(made).tenant == "house"
    with pytest.raises(AuthenticationError):
        CertificateMap(CertificateRules()).authenticate(b"\x30\x03nonsense")


async def test_revocation_by_file_ends_requests_and_streams(files, tmp_path, caplog):
    folder, _authority = files
    path = tmp_path / "revoked.txt"
    path.write_text("# none yet\n")
    now = [1000.0 + NOW.timestamp()]
    certificates = CertificateMap(CertificateRules(), revoked=path, clock=lambda: now[0])
    ring = KeyRing(Pepper({1: bytes(range(32))}), clock=lambda: now[0])
    auth = Authenticator(
        ring, throttle=FailureThrottle(), keyless=FailureThrottle(), quarantine=Quarantine(), certificates=certificates
    )
    credentials = Credentials(certificate=der_of(folder / "ana.pem"))
    principal = await auth.authenticate(credentials, HERE)
    assert not auth.is_revoked(principal)
    path.write_text(hashlib.sha256(der_of(folder / "ana.pem")).hexdigest().upper() + "  # stolen laptop\n")
    now[0] += 1.1
    assert auth.is_revoked(principal)
    with pytest.raises(AuthenticationError):
        await auth.authenticate(credentials, HERE)
    for broken in (lambda: path.write_text("half a li"), path.unlink):
        broken()
        now[0] += 1.1
        assert auth.is_revoked(principal)
        assert "what was revoked" in caplog.text
        caplog.clear()
        now[0] += 1.1
        assert auth.is_revoked(principal)
        assert not caplog.text  # once is enough
    path.write_text("")
    now[0] += 1.1
    assert not auth.is_revoked(principal)
    now[0] += 2 * 86400  # it is good for a day
    assert auth.is_revoked(principal)


def test_a_broken_line_of_the_revocation_file_keeps_nobody_in(files, tmp_path):
    folder, authority = files
    path = tmp_path / "revoked.txt"
    path.write_text("")
    now = [NOW.timestamp()]
    certificates = CertificateMap(CertificateRules(), revoked=path, clock=lambda: now[0])
    ana = der_of(folder / "ana.pem")
    bob = authority.issue(tmp_path, "bob", [(NameOID.COMMON_NAME, "bob"), (NameOID.ORGANIZATION_NAME, "acme")])
    names = [f"mtls:{hashlib.sha256(one).hexdigest()}" for one in (ana, bob)]
    # Written by an editor that begins files with a mark, with a line that lost its comment sign.
    path.write_text(f"{names[0][5:]}\nstolen laptop\n", encoding="utf-8-sig")
    now[0] += 1.1
    assert [certificates.is_revoked(name) for name in names] == [True, False]
    path.write_text(f"stolen laptop\n{names[1][5:]}\n")
    now[0] += 1.1
    assert [certificates.is_revoked(name) for name in names] == [True, True]
    path.write_text(f"{names[1][5:]}\n")
    now[0] += 1.1
    assert [certificates.is_revoked(name) for name in names] == [False, True]


def test_a_missing_or_damaged_revocation_file_stops_the_start(tmp_path):
    with pytest.raises(ConfigError):
        CertificateMap(CertificateRules(), revoked=tmp_path / "none")
    (tmp_path / "bad").write_text("abc")
    with pytest.raises(ConfigError):
        CertificateMap(CertificateRules(), revoked=tmp_path / "bad")


def test_a_revocation_file_that_nobody_would_read_stops_the_start():
    """A listener whose certificates stand for nobody can't tell which are revoked; a setting must not promise it."""
    tls = {"certificate": "c.pem", "key": "k.pem", "client_ca": "ca.pem", "revoked": "revoked.txt"}
    assert parse_settings({"public": {"tls": tls}}, base=Path("/")).public.tls is not None
    with pytest.raises(ConfigError, match=r"admin\.tls\.revoked"):
        parse_settings({"admin": {"tls": tls}}, base=Path("/"))


@pytest.mark.parametrize(("tenant", "is_in"), [("acme", True), ("zeta", False)])
async def test_a_key_beside_a_certificate_must_be_of_the_same_tenant(files, tenant, is_in):
    folder, _authority = files
    pepper = Pepper({1: bytes(range(32))})
    key = new_key(pepper)
    ring = KeyRing(pepper)
    ring.load([
        KeyRow(key.id, key.digest, 1, "bob", tenant, frozenset(), frozenset({"model:*"}), "", 1.0, "test")
    ])  # fmt: skip
    auth = Authenticator(
        ring,
        throttle=FailureThrottle(),
        keyless=FailureThrottle(),
        quarantine=Quarantine(),
        certificates=CertificateMap(CertificateRules()),
    )
    credentials = Credentials((Secret(key.text.reveal()),), certificate=der_of(folder / "ana.pem"))
    if is_in:
        assert (await auth.authenticate(credentials, HERE)).subject == "bob"
    else:
        with pytest.raises(AuthenticationError) as caught:
            await auth.authenticate(credentials, HERE)
        assert caught.value.reason == "certificate of another tenant"
