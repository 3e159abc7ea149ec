"""The store: opening, migrations, change numbers, floors."""

import stat
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from server.errors import ConfigError, ConflictError, NotFoundError
from server.store.database import Store, read_seq
from server.store.incidents import Quarantine, Quarantined, lift_incident, list_incidents, open_incident
from server.store.keys import KeyRow, expire_key, get_key, insert_keys, list_keys, revoke_key, touch_keys
from server.store.tables import metadata
from server.store.usage import Spent, UsageKey, add_usage, list_usage


@pytest.fixture
def store(tmp_path):
    opened = Store.open(f"sqlite:///{tmp_path / 'store.db'}", clock=lambda: 1000.0)
    yield opened
    opened.close()


def new_row(number=1, **changes):
    values: dict[str, Any] = {
        "id": f"key{number}", "digest": f"{number:064x}", "pepper": 1, "subject": "ana", "tenant": "acme",
        "groups": frozenset({"developers"}), "scopes": frozenset({"model:*"}), "note": "", "created_at_s": 1.0,
        "created_by": "test",
    }  # fmt: skip
    return KeyRow(**(values | changes))


def test_migrations_lead_to_the_tables(store):
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_file_is_private(store, tmp_path):
    assert stat.S_IMODE((tmp_path / "store.db").stat().st_mode) == 0o600


def test_a_newer_store_is_refused(store, tmp_path):
    with store.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="newer version"):
        Store.open(f"sqlite:///{tmp_path / 'store.db'}")


@pytest.mark.parametrize("url", ["nonsense", "mysql://h/d", "sqlite://", "sqlite:////no/such/folder/x.db"])
def test_a_wrong_address_is_refused(url):
    with pytest.raises(ConfigError):
        Store.open(url)


def test_floors_go_up_and_down(store):
    assert store.get_floor("m") == 0
    assert store.set_floor("m", 3, by="ana") == 0
    assert store.set_floor("m", 2, by="ana") == 3
    assert store.get_floor("m") == 2


def test_changes_are_numbered_and_found(store):
    with store.write() as connection:
        insert_keys(connection, [new_row(1), new_row(2)])
    with store.read() as connection:
        seq = read_seq(connection)
    with store.write() as connection:
        revoke_key(connection, "key2", reason="left", at_s=5.0)
    with store.read() as connection:
        changed = list_keys(connection, since_seq=seq)
        assert read_seq(connection) == seq + 1
    assert [(row.id, row.revoked_at_s, row.revoked_reason) for row in changed] == [("key2", 5.0, "left")]


def test_a_write_that_fails_leaves_nothing(store):
    def fail():
        with store.write() as connection:
            insert_keys(connection, [new_row(1)])
            raise RuntimeError("the log can't be written")

    with pytest.raises(RuntimeError):
        fail()
    with store.read() as connection:
        assert list_keys(connection) == []


def test_the_same_key_twice_is_a_conflict(store):
    with store.write() as connection:
        insert_keys(connection, [new_row(1)])
    for again in (new_row(1), new_row(2, digest=f"{1:064x}")):
        with pytest.raises(ConflictError), store.write() as connection:
            insert_keys(connection, [again])
    with pytest.raises(ConflictError), store.write() as connection:
        insert_keys(connection, [new_row(3), new_row(3)])


def test_revocation_stays_and_expiry_is_only_brought_forward(store):
    with store.write() as connection:
        insert_keys(connection, [new_row(1, expires_at_s=100.0)])
        revoke_key(connection, "key1", reason="first", at_s=5.0)
        assert revoke_key(connection, "key1", reason="second", at_s=6.0).revoked_reason == "first"
        expire_key(connection, "key1", at_s=200.0)
        assert get_key(connection, "key1").expires_at_s == 100.0
        expire_key(connection, "key1", at_s=50.0)
        assert get_key(connection, "key1").expires_at_s == 50.0


def test_last_use_only_moves_on(store):
    with store.write() as connection:
        insert_keys(connection, [new_row(1)])
        touch_keys(connection, {"key1": 9.0})
        touch_keys(connection, {"key1": 7.0})
        assert get_key(connection, "key1").last_used_at_s == 9.0
        with pytest.raises(NotFoundError):
            get_key(connection, "none")


def test_incidents_open_once_and_lift_once(store):
    with store.write() as connection:
        opened = open_incident(connection, Quarantined.MODEL, "m", reason="leak", by="sam", at_s=1.0)
        with pytest.raises(ConflictError):
            open_incident(connection, Quarantined.MODEL, "m", reason="again", by="sam", at_s=2.0)
        quarantine = Quarantine()
        quarantine.load(list_incidents(connection))
        assert quarantine.has(Quarantined.MODEL, "m")
        assert not quarantine.has(Quarantined.TENANT, "m")
        lift_incident(connection, opened.id, by="sam", at_s=3.0)
        with pytest.raises(ConflictError):
            lift_incident(connection, opened.id, by="sam", at_s=4.0)
        with pytest.raises(NotFoundError):
            lift_incident(connection, 99, by="sam", at_s=4.0)
        assert list_incidents(connection) == []
        assert [one.lifted_by for one in list_incidents(connection, with_lifted=True)] == ["sam"]


def test_usage_adds_up_and_tenants_are_apart(store):
    key = UsageKey(5, "acme", "ana", "k", "[]", "m")
    other = UsageKey(5, "zeta", "bob", "k2", "[]", "m")
    for _ in range(2):
        with store.write() as connection:
            add_usage(connection, {key: Spent(1, 10, 20, 30), other: Spent(1, 1, 1, 1)})
    with store.read() as connection:
        assert list_usage(connection, from_hour=5, to_hour=6, tenant="acme") == [(key, Spent(2, 20, 40, 60))]
        assert len(list_usage(connection, from_hour=0, to_hour=9)) == 2
        assert list_usage(connection, from_hour=6, to_hour=9) == []
