"""The supervisor's look at the gateway, when the gateway speaks TLS."""

from __future__ import annotations

import contextlib
import datetime
import ssl
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typing_extensions import override

from server.host import answers
from server.settings import parse_settings


class Live(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/livez" else 503)
        self.send_header("content-length", "0")
        self.end_headers()

    @override
    def log_message(self, *_):
        """Say nothing."""


class QuietServer(HTTPServer):
    @override
    def handle_error(self, *_):
        """A refused handshake is what a test wants here."""


@contextlib.contextmanager
def tls_server(folder: Path, *, wants_certificate: bool):
    """Serve under a certificate of a company's own CA, for the name that callers use and not for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "models.example.org")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    if wants_certificate:
        context.load_verify_locations(pem)
        context.verify_mode = ssl.CERT_REQUIRED
    server = QuietServer(("127.0.0.1", 0), Live)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    tls = {
        "certificate": str(pem),
        "key": str(pem),
        "client_ca": str(pem),
        "require_client_certificate": wants_certificate,
    }
    try:
        yield parse_settings({"public": {"port": server.server_address[1], "tls": tls}}, base=folder)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("wants_certificate", [False, True])
def test_a_gateway_with_tls_is_seen_to_live(tmp_path, monkeypatch, wants_certificate):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a proxy of the machine's is none of its business
    with tls_server(tmp_path, wants_certificate=wants_certificate) as settings:
        assert answers(settings, "/livez")
        assert not answers(settings, "/readyz")
    assert not answers(settings, "/livez")
