"""Strict JSON: what a body may be, and the 400 of everything else."""

import pytest

from server.api.body import MAX_DEPTH, parse_json_object
from server.errors import RequestError


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"a":1}x',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e400}',
        b'{"a":1,"a":2}',
        b'{"b":{"a":1,"a":2}}',
        b'\xef\xbb\xbf{"a":1}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b'{"\\uDFFF":1}',
        b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}",
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}",
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_refuses_what_is_not_a_plain_json_object(body):
    with pytest.raises(RequestError) as caught:
        parse_json_object(body)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a":1}', {"a": 1}),
        (b' {"a":"\\ud83d\\ude00"} ', {"a": "😀"}),
        (b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}", None),
        (b'{"a":[' + b"[]," * 500 + b"[]]}", None),
    ],
)
def test_parses_what_is(body, value):
    parsed = parse_json_object(body)
    assert value is None or parsed == value
