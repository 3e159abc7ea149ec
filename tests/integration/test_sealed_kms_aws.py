"""AWS KMS against moto's server: the wire calls and the context.

What moto does not prove: it decrypts with a disabled key and with one pending deletion, checks no IAM policy and no
grant, and never throttles. Those refusals come from a server of this file, in the service's wire form, and a real
botocore client parses them.
"""

from __future__ import annotations

import http.server
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from typing_extensions import override

from server.errors import ConfigError, KMSDeniedError, KMSDisabledError, KMSUnreachableError
from server.sealed.kms.aws import AWSKMS, new_client
from server.sealed.kms.uri import open_kms
from tests.integration.kms_contract import Starts, check_round_trip, no_sleep

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REGION = "eu-central-1"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def new_key(endpoint: str) -> str:
    arn: str = new_client(REGION, endpoint=endpoint).create_key()["KeyMetadata"]["Arn"]
    return arn


def kms(arn: str, endpoint: str) -> AWSKMS:
    return AWSKMS(arn, new_client(REGION, endpoint=endpoint), sleep=no_sleep()[1])


def test_round_trip(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arn = new_key(endpoint)
    monkeypatch.setenv("STRONGROOM_AWS_KMS_ENDPOINT", endpoint)
    check_round_trip(open_kms(f"aws:{arn}"))
    starts = Starts(tmp_path, kms(arn, endpoint))
    starts.released()
    starts.rewrapped_from_file_and_back()


def test_another_key_does_not_open(endpoint: str, tmp_path: Path) -> None:
    starts = Starts(tmp_path, kms(new_key(endpoint), endpoint))
    other = kms(new_key(endpoint), endpoint)
    other.key_id, real = starts.kms.key_id, other.key_id
    client = other._client
    other._client = Redirected(client, real)
    starts.refused(KMSDeniedError, kms=other)


class Redirected:
    """Asks for another key than the one named, as an attacker in front of the service would."""

    def __init__(self, client: Any, arn: str) -> None:
        self._client, self._arn = client, arn

    def decrypt(self, **request: Any) -> Any:
        return self._client.decrypt(**(request | {"KeyId": self._arn}))


@pytest.mark.parametrize(
    ("status", "code", "error", "num_requests"),
    [
        (400, "DisabledException", KMSDisabledError, 1),
        (400, "KMSInvalidStateException", KMSDisabledError, 1),
        (400, "NotFoundException", KMSDisabledError, 1),
        (400, "AccessDeniedException", KMSDeniedError, 1),
        (400, "ExpiredTokenException", KMSDeniedError, 1),
        (400, "IncorrectKeyException", KMSDeniedError, 1),
        (400, "ThrottlingException", KMSUnreachableError, 4),
        (500, "KMSInternalException", KMSUnreachableError, 4),
        (503, "ServiceUnavailable", KMSUnreachableError, 4),
    ],
)
def test_refusals_are_told_apart(
    endpoint: str, tmp_path: Path, status: int, code: str, error, num_requests: int
) -> None:
    arn = new_key(endpoint)
    starts = Starts(tmp_path, kms(arn, endpoint))
    with Answering(status, code) as answering:
        starts.refused(error, kms=kms(arn, answering.endpoint))
        assert answering.num_requests == num_requests


def test_cut_off_and_no_credentials(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arn = new_key(endpoint)
    starts = Starts(tmp_path, kms(arn, endpoint))
    starts.refused(KMSUnreachableError, kms=kms(arn, "http://127.0.0.1:9"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    starts.refused(KMSDeniedError, kms=kms(arn, endpoint))


@pytest.mark.parametrize("uri", ["aws:alias/coder", "aws:arn:aws:kms:eu-central-1:1:alias/coder", "aws:x"])
def test_only_the_arn_of_a_key_will_do(uri: str) -> None:
    with pytest.raises(ConfigError, match="ARN of a key"):
        open_kms(uri)


class Answering:
    """A server on the loopback that gives one KMS error, in the service's wire form."""

    def __init__(self, status: int, code: str) -> None:
        outer = self
        self.num_requests = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.num_requests += 1
                self.rfile.read(int(self.headers["Content-Length"]))
                body = json.dumps({"__type": code, "message": "no"}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/x-amz-json-1.1")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            @override
            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Answering:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
