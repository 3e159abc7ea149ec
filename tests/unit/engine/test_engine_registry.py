"""Model names to engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.client import EngineClient, unix_address, url_address
from server.engine.registry import EngineRegistry
from server.errors import ConfigError, ModelNotFoundError


@pytest.fixture
async def chat() -> EngineClient:
    return EngineClient("chat", 10, unix_address(Path("/c")))


async def test_ids_and_aliases(chat: EngineClient) -> None:
    registry = EngineRegistry((chat,), {"default": "chat"})
    assert registry.engine("chat") is registry.engine("default") is chat
    assert registry.resolve("default") == "chat"
    assert list(registry) == [chat]
    assert registry.aliases == {"default": "chat"}


@pytest.mark.parametrize("name", ["", "Chat", "chat ", "../chat", "http://x"])
async def test_other_names_are_unknown(chat: EngineClient, name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        EngineRegistry((chat,)).engine(name)


async def test_clashes_are_refused(chat: EngineClient) -> None:
    with pytest.raises(ConfigError):
        EngineRegistry((chat, EngineClient("chat", 10, unix_address(Path("/d")))))
    with pytest.raises(ConfigError):
        EngineRegistry((chat,), {"chat": "chat"})
    with pytest.raises(ConfigError):
        EngineRegistry((chat,), {"other": "absent"})


@pytest.mark.parametrize(
    "url",
    [
        "http://engine:8000",
        "https://engine",
        "ftp://engine",
        "https://u:p@engine",
        "https://engine/v1",
        "engine",
        "https://e:x",
    ],
)
def test_urls_without_tls_or_ca_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        url_address(url)


def test_plaintext_must_be_asked_for() -> None:
    address = url_address("http://[::1]:8000", allow_plaintext=True)
    assert (address.host, address.port, address.tls, address.authority) == ("::1", 8000, None, "[::1]:8000")
    with pytest.raises(ConfigError, match="PEM"):
        url_address("https://engine", ca_file=Path("/dev/null"))
