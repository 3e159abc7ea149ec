"""Attack W3, an older version is brought back past its floor: on SQLite and on a real PostgreSQL.

By racing replicas, by a store restored from a backup or made anew, by a store or a log that is down, by naming another
store on the command line.
"""

import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.auth.key_admin import KeyAdmin, KeySpec
from server.auth.pepper import load_pepper
from server.bootstrap import ADMIN_GROUPS, ADMIN_SCOPES, prepare_folders, prepare_secrets
from server.cli import main
from server.commands import floor as floor_command
from server.commands import unseal as unseal_command
from server.engine.vllm.weights import KeyChannel
from server.errors import AuditUnavailableError, ConfigError, ConflictError, SealError, StartError, UnavailableError
from server.host import Host
from server.sealed.agent import MODEL_LOADED, KeyAgent
from server.settings import RUN_SETTINGS_NAME, Settings, load_settings
from server.store.database import Store
from server.store.floors import MEMORY_NAME, Floors
from tests.unit.sealed.workshop import open_workshop

ROOT = Path(__file__).parents[2]
MODEL = "tiny"


@pytest.fixture
def store(url):
    opened = Store.open(url, clock=lambda: 1000.0)  # a clock that stands still must not make a lowering look old
    yield opened
    opened.close()


@pytest.fixture
def make_host(store, tmp_path):
    """Hosts with a memory each, on one store."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        return Floors(store, folder)

    return make


def no_record(event, **fields):
    """Nobody asks what is on it."""
    del event, fields


def refuse_record(_event, **_fields):
    raise AuditUnavailableError("the log can't be written")


def raise_to(floors, version, record=no_record):
    floors.raise_to(MODEL, version, by="supervisor", record=record)


def lower_to(floors, version, record=no_record):
    floors.lower_to(MODEL, version, seen=floors.get(MODEL), by="ana", record=record)


def restore(store, version):
    """Put the store back to where the floor was `version`; 0 for before any."""
    with store.write() as connection:
        connection.execute(sa.text("DELETE FROM model_floors"))
        if version:
            connection.execute(
                sa.text("INSERT INTO model_floors (model, version, set_at_s, set_by) VALUES (:m, :v, 1, 'backup')"),
                {"m": MODEL, "v": version},
            )


def test_a_floor_rises_by_loading_and_falls_by_an_act_both_on_record(make_host):
    floors, events = make_host("a"), []

    def record(event, **fields):
        events.append((event, fields["floor_before"], fields["floor"]))

    assert floors.get(MODEL) == 0
    raise_to(floors, 3, record)
    raise_to(floors, 3, record)
    lower_to(floors, 2, record)
    assert floors.get(MODEL) == 2
    raise_to(floors, 4, record)
    assert events == [
        ("weights:floor:raised", 0, 3),
        ("weights:floor:lowered", 3, 2),
        ("weights:floor:raised", 2, 4),
    ]
    assert floors.get("other") == 0


def test_only_a_lower_version_lowers(make_host):
    floors = make_host("a")
    with pytest.raises(ConfigError, match="no floor"):
        lower_to(floors, 1, refuse_record)
    raise_to(floors, 4)
    for version in (-1, 0, 4, 5):
        with pytest.raises(ConfigError, match="from 1 to 3"):
            lower_to(floors, version, refuse_record)
    assert floors.get(MODEL) == 4


def test_who_lowers_has_seen_the_floor_that_is(make_host):
    """Between looking and acting another replica loaded a later version."""
    floors = make_host("a")
    raise_to(floors, 3)
    raise_to(make_host("b"), 7)
    with pytest.raises(ConflictError, match="is 7 by now"):
        floors.lower_to(MODEL, 2, seen=3, by="ana", record=refuse_record)
    assert floors.get(MODEL) == 7


def test_racing_replicas_never_lower_a_floor(make_host, url):
    """Each event begins where the one before ended, so no change was made on a floor that had changed already."""
    versions = list(range(1, 33))
    random.Random(9).shuffle(versions)  # noqa: S311 - every thread's share falls somewhere, so some are refused
    events, refused, start = [], [], threading.Barrier(4)

    def replica(number):
        store = Store.open(url)
        try:
            floors = Floors(store, make_host(f"r{number}")._memory.parent)
            start.wait(60)
            for version in versions[number::4]:
                try:
                    raise_to(floors, version, lambda _e, **f: events.append((f["floor_before"], f["floor"])))
                except SealError as err:
                    refused.append(err.kind)
        finally:
            store.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(replica, range(4)))
    assert [before for before, _ in events] == [0] + [after for _, after in events[:-1]]
    assert all(before < after for before, after in events)
    assert events[-1][1] == max(versions)
    assert set(refused) == {"version"}


@pytest.mark.parametrize("restored", [0, 1, 3])
def test_a_store_restored_from_a_backup_brings_no_older_version_back(make_host, store, restored):
    floors, events = make_host("a"), []
    raise_to(floors, 4)
    restore(store, restored)
    assert floors.get(MODEL) == 4
    with pytest.raises(SealError):
        raise_to(floors, 3)
    raise_to(floors, 4, lambda event, **fields: events.append((event, fields["floor_before"], fields["floor"])))
    assert events == [("weights:floor:raised", restored, 4)]  # the store is mended, and that it was is on record
    assert make_host("new").get(MODEL) == 4


def test_an_older_version_after_a_restore_takes_an_explicit_act(make_host, store):
    floors = make_host("a")
    raise_to(floors, 4)
    restore(store, 2)
    lower_to(floors, 2)
    assert floors.get(MODEL) == 2
    raise_to(floors, 2)


def test_a_lowering_counts_on_every_host_and_a_backup_from_before_it_does_not(make_host, store):
    one, other = make_host("a"), make_host("b")
    raise_to(one, 4)
    raise_to(other, 4)
    lower_to(other, 2)
    assert one.get(MODEL) == 2
    raise_to(one, 3)
    restore(store, 1)
    assert one.get(MODEL) == 3
    restore(store, 4)  # fails towards the higher floor
    assert one.get(MODEL) == 4


def test_a_missing_memory_leaves_what_the_store_says(make_host):
    floors = make_host("a")
    raise_to(floors, 4)
    floors._memory.unlink()
    assert floors.get(MODEL) == 4
    with pytest.raises(SealError):
        raise_to(floors, 3)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"tiny": 3}', b'{"tiny": {"version": 3}}', b'{"tiny": {"version": null}}', b"\xff"]
)
def test_a_damaged_memory_is_refused(make_host, content):
    floors = make_host("a")
    floors._memory.write_bytes(content)
    with pytest.raises(ConfigError, match=MEMORY_NAME):
        floors.get(MODEL)
    with pytest.raises(ConfigError, match=MEMORY_NAME):
        raise_to(floors, 9)


def test_without_a_log_nothing_changes(make_host):
    floors = make_host("a")
    with pytest.raises(AuditUnavailableError):
        raise_to(floors, 3, refuse_record)
    assert floors.get(MODEL) == 0
    raise_to(floors, 3)
    with pytest.raises(AuditUnavailableError):
        lower_to(floors, 2, refuse_record)
    assert floors.get(MODEL) == 3


def test_without_a_writable_memory_nothing_is_loaded(make_host):
    floors = make_host("a")
    floors._memory.with_suffix(".tmp").mkdir()
    with pytest.raises(ConfigError, match="remembered"):
        raise_to(floors, 3)
    assert floors.get(MODEL) == 0


# The whole way ------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path, url):
    settings = load_settings(ROOT / "configs" / "strongroom.yaml", {"state": str(tmp_path / "state"), "store.url": url})
    prepare_folders(settings.state)
    prepare_secrets(settings)
    (settings.state / RUN_SETTINGS_NAME).write_text(settings.model_dump_json())  # as the server does at its start
    return settings


def new_admin_key(settings):
    store = Store.open(settings.store_url)
    try:
        admin = KeyAdmin(store, load_pepper(settings.keys_dir / "pepper"), record=no_record, by="test")
        return admin.create(KeySpec("ana", "local", ADMIN_GROUPS, ADMIN_SCOPES))[1].reveal()
    finally:
        store.close()


def test_commands_use_the_store_of_the_server(settings, store, url, monkeypatch, tmp_path, capsys):
    """Not an empty one of their own beside it, which knows no floor: `unseal` would open any version."""
    events = []
    workshop = open_workshop(tmp_path)
    old = workshop.seal("old", version=2)
    (tmp_path / "sign.pub").write_text(
        workshop.signer.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    )
    for command in (floor_command, unseal_command):
        monkeypatch.setattr(command, "open_recorder", lambda _state: lambda event, **_fields: events.append(event))
    monkeypatch.setenv("ADMIN_API_KEY", new_admin_key(settings))
    raise_to(Floors(store, settings.state), 3)
    common = ["--state", str(settings.state), "--policy", str(ROOT / "configs" / "policy")]
    unseal = [
        "unseal", str(old), str(tmp_path / "plain"), "--kms", f"file:{tmp_path / 'kms.key'}",
        "--signer", str(tmp_path / "sign.pub"), "--force", *common,
    ]  # fmt: skip
    assert main(unseal) == 1
    assert not (tmp_path / "plain").exists()
    assert events[-1] == "weights:model:refused"
    assert main(["floor", MODEL, *common]) == 0
    assert "version 3 or later" in capsys.readouterr().out
    assert main(["floor", MODEL, "--lower-to", "2", *common]) == 0
    assert main(unseal) == 0
    assert main(["floor", MODEL, *common, "--store", f"sqlite:///{tmp_path / 'empty.db'}"]) == 0
    if url.startswith("postgresql"):
        assert not (settings.state / "store.db").exists()
    (settings.state / RUN_SETTINGS_NAME).write_text("{")
    assert main(["floor", MODEL, *common]) == 1


def loading(settings, workshop, path, version_floor):
    """Load as a worker does, with the host's own record of it; return what the worker is told."""
    host = Host(settings, lambda _line: None)

    def record(event, **fields):
        if event == MODEL_LOADED:
            host._raise_floor(MODEL, int(fields["version"]))

    agent = KeyAgent(services=[workshop.kms], trusted_signers=workshop.trusted, record=record)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = agent.serve(ours, agent.release(path, floor=version_floor, model_id=MODEL))
    channel = KeyChannel(theirs)
    try:
        channel.fetch_key().close()
        channel.confirm_load()
    finally:
        channel.close()
        thread.join(30)
        assert not thread.is_alive()


def test_a_load_is_confirmed_once_its_version_is_the_floor(settings, store, tmp_path, monkeypatch):
    monkeypatch.setattr(Host, "_record", lambda _self, _event, **_fields: None)
    workshop = open_workshop(tmp_path)
    loading(settings, workshop, workshop.seal(version=3), 0)
    assert Floors(store, settings.state).get(MODEL) == 3


def test_a_replica_that_was_overtaken_does_not_serve(settings, store, tmp_path, monkeypatch):
    """Its version was above the floor when it got the key, and is below by the time it has loaded."""
    monkeypatch.setattr(Host, "_record", lambda _self, _event, **_fields: None)
    workshop = open_workshop(tmp_path)
    path = workshop.seal(version=3)
    (tmp_path / "other").mkdir()
    raise_to(Floors(store, tmp_path / "other"), 4)
    with pytest.raises(StartError, match="did not accept the load"):
        loading(settings, workshop, path, 3)
    assert Floors(store, settings.state).get(MODEL) == 4


def test_a_store_that_is_down_refuses_the_start_and_the_load(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Host, "_record", lambda _self, _event, **_fields: None)
    (tmp_path / "nobody").mkdir()
    down = Settings.model_validate(
        settings.model_dump() | {"store": {"url": f"postgresql+psycopg://tester@/x?host={tmp_path / 'nobody'}"}}
    )
    with pytest.raises(UnavailableError):
        Host(down, lambda _line: None)._open_models()
    workshop = open_workshop(tmp_path)
    with pytest.raises(StartError, match="did not accept the load"):
        loading(down, workshop, workshop.seal(), 0)


def test_another_model_under_the_name_is_refused_before_its_key_is_asked_for(tmp_path):
    """Its own floor may be lower: the floor that is looked up must be that of the model that is opened."""
    workshop, events = open_workshop(tmp_path), []
    agent = KeyAgent(
        services=[workshop.kms], trusted_signers=workshop.trusted, record=lambda event, **fields: events.append(event)
    )
    path = workshop.seal(model_id="other", version=9)
    for open_it in (agent.release, agent.open_files):
        with pytest.raises(SealError) as refused:
            open_it(path, floor=3, model_id=MODEL)
        assert refused.value.kind == "version"
    assert events == ["weights:model:refused"] * 2


def test_the_memory_is_private_and_readable_by_another_implementation(make_host):
    floors = make_host("a")
    raise_to(floors, 3)
    assert json.loads(floors._memory.read_text()) == {MODEL: {"version": 3, "lowered_at_s": 0.0}}
    assert floors._memory.stat().st_mode & 0o777 == 0o600
