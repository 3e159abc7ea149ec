"""A remote engine behind TLS: only the pinned CA counts."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from benchmarks.instant_engine import Connection, Engine, Script
from server.engine.client import EngineClient, url_address
from server.errors import EngineUnavailableError

if TYPE_CHECKING:
    from pathlib import Path


def new_ca(folder: Path, name: str) -> tuple[Path, Path]:
    """A CA's certificate, and key plus certificate of a server at 127.0.0.1 that it signed."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def certificate(subject: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> x509.Certificate:
        builder = x509.CertificateBuilder(ca_name, subject, public, x509.random_serial_number())
        builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(hours=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        builder = builder.add_extension(authority, critical=False)
        usage = x509.KeyUsage(True, False, False, False, False, ca, ca, False, False)
        builder = builder.add_extension(usage, critical=True)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return builder.sign(ca_key, hashes.SHA256())

    pem = serialization.Encoding.PEM
    ca_file, server_file = folder / f"{name}.pem", folder / f"{name}-server.pem"
    ca_file.write_bytes(certificate(ca_name, ca_key.public_key(), ca=True).public_bytes(pem))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "engine")])
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    server_file.write_bytes(private + certificate(subject, key.public_key(), ca=False).public_bytes(pem))
    return ca_file, server_file


async def test_only_the_pinned_ca_counts(tmp_path: Path) -> None:
    ca_file, server_file = new_ca(tmp_path, "ours")
    other_ca_file, _ = new_ca(tmp_path, "others")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_file)
    engine = Engine("m", 4096, Script("abc", 1))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    try:
        client = EngineClient("m", 4096, url_address(f"https://127.0.0.1:{port}", ca_file=ca_file))
        await client.wait_ready(5)
        client.close()
        for url, ca in ((f"https://127.0.0.1:{port}", other_ca_file), (f"https://localhost:{port}", ca_file)):
            stranger = EngineClient("m", 4096, url_address(url, ca_file=ca))
            with pytest.raises(EngineUnavailableError):
                await stranger.self_test()
    finally:
        server.close()
