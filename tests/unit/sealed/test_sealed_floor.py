"""Attack W3, an older version is brought back: a loaded version is the floor until somebody lowers it on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.auth.key_admin import KeyAdmin, KeySpec
from server.auth.pepper import load_pepper
from server.bootstrap import ADMIN_GROUPS, ADMIN_SCOPES, CLIENT_GROUPS, CLIENT_SCOPES, prepare_folders, prepare_secrets
from server.cli import main
from server.commands import floor as command
from server.errors import SealError
from server.host import Host
from server.registry.source import open_model
from server.settings import ModelSettings, SealSettings, Settings, load_settings
from server.store.database import Store
from server.store.floors import Floors
from tests.unit.sealed.workshop import open_workshop

ROOT = Path(__file__).parents[3]
MODEL = "coder"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = load_settings(ROOT / "configs" / "strongroom.yaml", {"state": str(tmp_path / "state")})
    prepare_folders(settings.state)
    prepare_secrets(settings)
    return settings


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(Host, "_record", lambda _self, event, **fields: found.append((event, fields)))
    monkeypatch.setattr(command, "open_recorder", lambda _state: lambda event, **fields: found.append((event, fields)))
    return found


def floor_of(settings: Settings) -> int:
    store = Store.open(settings.store_url)
    try:
        return Floors(store, settings.state).get(MODEL)
    finally:
        store.close()


def key(settings: Settings, groups: frozenset[str], scopes: frozenset[str]) -> str:
    store = Store.open(settings.store_url)
    try:
        admin = KeyAdmin(store, load_pepper(settings.keys_dir / "pepper"), record=lambda *_a, **_k: None, by="test")
        return admin.create(KeySpec("somebody", "local", groups, scopes))[1].reveal()
    finally:
        store.close()


def test_a_loaded_version_is_the_floor(settings: Settings, events: list[tuple[str, dict[str, Any]]]) -> None:
    host = Host(settings, lambda _line: None)
    for version in (3, 3, 4):
        host._raise_floor(MODEL, version)
    with pytest.raises(SealError):
        host._raise_floor(MODEL, 2)
    assert floor_of(settings) == 4
    assert [(name, fields["floor_before"], fields["floor"]) for name, fields in events] == [
        ("weights:floor:raised", 0, 3),
        ("weights:floor:raised", 3, 4),
    ]


def test_it_is_lowered_by_permission_and_on_record(
    settings: Settings,
    events: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["floor", MODEL, "--state", str(settings.state), "--policy", str(ROOT / "configs" / "policy")]
    assert main(arguments) == 0
    assert "never loaded" in capsys.readouterr().out
    Host(settings, lambda _line: None)._raise_floor(MODEL, 4)
    events.clear()
    lower = [*arguments, "--lower-to", "2"]
    for secret in ("", "sr_unknown", key(settings, CLIENT_GROUPS, CLIENT_SCOPES)):
        monkeypatch.setenv("ADMIN_API_KEY", secret)
        assert main(lower) == 1
    assert floor_of(settings) == 4
    monkeypatch.setenv("ADMIN_API_KEY", key(settings, ADMIN_GROUPS, ADMIN_SCOPES))
    for wrong in ("0", "4", "5"):
        assert main([*arguments, "--lower-to", wrong]) == 1
    assert not events
    assert main(lower) == 0
    assert floor_of(settings) == 2
    ((name, fields),) = events
    assert (name, fields["by"], fields["floor_before"], fields["floor"]) == ("weights:floor:lowered", "somebody", 4, 2)
    assert main(arguments) == 0
    assert "version 2 or later" in capsys.readouterr().out


def test_the_record_comes_before_the_act(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a log nothing is lowered, and nothing is raised that the log does not hold."""

    def unavailable(*_args: Any, **_fields: Any) -> None:
        raise SealError("no log", kind="header")

    monkeypatch.setattr(Host, "_record", unavailable)
    with pytest.raises(SealError):
        Host(settings, lambda _line: None)._raise_floor(MODEL, 3)
    assert floor_of(settings) == 0


def test_an_older_version_is_refused(tmp_path: Path) -> None:
    workshop = open_workshop(tmp_path)
    path = workshop.seal(version=2)
    with pytest.raises(SealError) as refused:
        open_model(ModelSettings(id="tiny", path=path), SealSettings(allow_unsigned=True), floor=3)
    assert refused.value.kind == "version"
