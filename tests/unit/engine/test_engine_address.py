"""Where a remote engine may be: at an https URL whose CA is pinned, unless the operator says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.client import url_address
from server.errors import ConfigError


@pytest.mark.parametrize(
    "url",
    [
        "http://engine:8000",
        "https://engine",
        "ftp://engine",
        "https://u:p@engine",
        "https://engine/v1",
        "https://engine?x=1",
        "engine",
        "https://e:x",
        "",
    ],
)
def test_urls_without_tls_or_ca_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        url_address(url)


def test_plaintext_must_be_asked_for() -> None:
    address = url_address("http://[::1]:8000", allow_plaintext=True)
    assert (address.host, address.port, address.tls, address.authority) == ("::1", 8000, None, "[::1]:8000")


def test_a_ca_must_be_readable() -> None:
    with pytest.raises(ConfigError, match="PEM"):
        url_address("https://engine", ca_file=Path("/dev/null"))
