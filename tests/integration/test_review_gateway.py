"""Tricks on the wire, against a whole gateway."""

import json
import re
import socket
import time
from contextlib import suppress

import pytest

from benchmarks.gateway.kit import make_kit

BODY = json.dumps({"model": "tiny-coder", "messages": [{"role": "user", "content": "hi"}]}).encode()


def ask_raw(gateway, head: bytes, trailers: bytes) -> bytes:
    """Send a chunked request whose trailers come with it in one piece; return the answer's first line."""
    host, _, port = gateway.base.removeprefix("http://").rpartition(":")
    chunked = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(BODY), BODY, trailers)
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            b"content-type: application/json\r\ntransfer-encoding: chunked\r\n" + head + b"\r\n" + chunked
        )
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    return answer.split(b"\r\n")[0]


def test_a_trailer_is_no_header(gateway, key):
    bearer = b"authorization: Bearer " + key.encode() + b"\r\n"
    assert ask_raw(gateway, bearer, b"") == b"HTTP/1.1 200 OK"
    # A proxy that checks or strips headers sees no trailer: neither a credential nor a data class may come in one.
    assert ask_raw(gateway, b"", bearer).startswith(b"HTTP/1.1 401")
    assert ask_raw(gateway, bearer, b"x-data-classification: nonsense\r\n") == b"HTTP/1.1 200 OK"


def exchange(gateway, *pieces: bytes, base: str = "") -> bytes:
    """Send pieces one after the other, the last of which asks to close; return all that comes back."""
    host, _, port = (base or gateway.base).removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.1)  # most come in a read of their own; the outcome is the same for any
        answer = b""
        with suppress(ConnectionResetError):  # it closed before it had read all
            while data := sock.recv(65536):
                answer += data
    return answer


LAST = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "TLS/1.0"])
def test_a_body_behind_an_upgrade_is_no_request(gateway, protocol):
    """Behind a proxy that shares connections, the answer to it would go to somebody else (K3, T3)."""
    hidden = b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n"
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: {protocol}\r\n"
        f"content-length: {len(hidden)}\r\n\r\n"
    ).encode()
    for pieces in ((head, hidden, LAST), (head + hidden, LAST), (head + hidden + LAST,)):
        answer = exchange(gateway, *pieces)
        assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"401", b"200"], answer


def test_a_client_that_offers_an_upgrade_is_served_without_it(gateway, key):
    """Java's own client always does, with a body as well."""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        f"http2-settings: AAEAAEAAAAIAAAAB\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    ).encode()
    sized, chunked = (
        head + b"content-length: %d\r\n\r\n" % len(BODY),
        head + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(BODY),
    )
    whole = [sized + BODY, chunked + BODY + b"\r\n0\r\n\r\n"]
    answer = exchange(gateway, *whole, *whole, b"".join(whole) + LAST)
    assert answer.count(b"HTTP/1.1 200 OK") == 7
    assert answer.count(b"HTTP/1.1 ") == 7
    many = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: a\r\n\r\n" * 1500
    assert exchange(gateway, many + LAST).count(b"HTTP/1.1 200 OK") == 1501
    closing = exchange(gateway, sized.replace(b"Upgrade,", b"close, Upgrade,") + BODY + LAST)
    assert closing.count(b"HTTP/1.1 200 OK") == 1
    assert exchange(gateway, b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("listener", ["public", "admin"])
@pytest.mark.parametrize(
    ("version", "hosts", "accepted"),
    [
        ("1.1", [], False),
        ("1.1", ["a", "a"], False),
        ("1.1", ["a", "b"], False),
        ("1.0", ["a", "b"], False),
        ("1.1", ["a b"], False),
        ("1.1", ["a/b"], False),
        ("1.1", ["a@b"], False),
        ("1.1", ["a:b"], False),
        ("1.1", ["[::1"], False),
        ("1.1", ["a, b:80"], False),
        ("1.0", [], True),
        ("1.1", [""], True),  # what RFC 9112 wants where the target has no authority
        ("1.1", ["example.com:8443"], True),
        ("1.1", ["[::1]:80"], True),
        ("1.1", ["münchen.example".encode("idna").decode()], True),
    ],
)
def test_a_request_has_one_host(gateway, listener, version, hosts, accepted):
    """RFC 9112, section 3.2: two proxies could read anything else in two ways."""
    path = "/livez" if listener == "public" else "/admin/status"
    head = f"GET {path} HTTP/{version}\r\n" + "".join(f"Host: {host}\r\n" for host in hosts)
    answer = exchange(
        gateway,
        (head + "connection: close\r\n\r\n").encode(),
        base=getattr(gateway, {"public": "base"}.get(listener, listener)),
    )
    served = b"HTTP/1.1 200" if listener == "public" else b"HTTP/1.1 401"
    assert answer.startswith(served if accepted else b"HTTP/1.1 400"), answer
    if not accepted:
        assert b'"invalid_http"' in answer
        assert b"connection: close" in answer


def test_a_refused_request_leaves_the_answer_before_it_alone(make_gateway):
    """What stands in the middle of an answer is read as a part of it."""
    with make_gateway() as kit:
        key = kit.working_key(groups={"developers"})
        kit.control(text="word " * 40, num_tokens=40, delay_ms=20, separate=True)
        body = json.dumps({**json.loads(BODY), "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        ask = head.encode() + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        for bad in (b"GET /livez HTTP/1.1\r\n\r\n", b"\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\na: %b" % (b"b" * 70_000)):
            host, _, port = kit.base.removeprefix("http://").rpartition(":")
            with socket.create_connection((host, int(port)), timeout=30) as sock:
                sock.sendall(ask)
                answer = sock.recv(65536)  # it has begun
                sock.sendall(bad)
                with suppress(ConnectionResetError):
                    while data := sock.recv(65536):
                        answer += data
            assert answer.count(b"HTTP/1.1 ") == 1, answer
            assert answer.startswith(b"HTTP/1.1 200")
        answer = exchange(kit, head.encode() + b"transfer-encoding: chunked\r\n\r\n", b"no length\r\n")
        assert answer.startswith(b"HTTP/1.1 400")  # in the body of a request that nobody has answered


@pytest.mark.parametrize(
    "start",
    [
        b"GET /livez HTTP/1.1\r\nhost: x\r\na: ",
        b"GET /livez HTTP/1.1\r\nhost: x\r\n",  # and then a name
        b"GET /",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\na: ",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1;a=",
    ],
    ids=["value", "name", "target", "trailer", "chunk extension"],
)
def test_what_never_ends_is_refused_by_its_size(patient, start):
    """K3: the parser keeps what is unfinished, and copies it with each piece that comes."""
    host, _, port = patient.base.removeprefix("http://").rpartition(":")
    endless = b"b" * (32 * 1024 * 1024)  # far more than what stands in the buffers of both sides
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(start)
        with pytest.raises(ConnectionError):
            sock.sendall(endless)


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A gateway that waits long for heads and bodies, so that no time limit cuts anything off."""
    public = {"header_timeout_s": 120, "body_timeout_s": 120}
    with make_kit(tmp_path_factory.mktemp("patient"), public=public) as kit:
        yield kit
