"""Tricks on the wire, against a whole gateway."""

import json
import socket

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
