"""Tricks on the wire, against a whole gateway."""

import json
import re
import socket
import time

import pytest

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


def exchange(gateway, *pieces: bytes) -> bytes:
    """Send pieces one after the other, the last of which asks to close; return all that comes back."""
    host, _, port = gateway.base.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.1)  # most come in a read of their own; the outcome is the same for any
        answer = b""
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
