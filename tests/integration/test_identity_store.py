"""The store, the same suite on SQLite and on a real PostgreSQL: migrations, change numbers, replicas, backup."""

import gc
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from server.errors import ConfigError, ConflictError, NotFoundError, UnavailableError
from server.store.database import Store, next_seq, read_seq
from server.store.incidents import Quarantine, Quarantined, lift_incident, list_incidents, open_incident
from server.store.keys import KeyRow, expire_key, get_key, insert_keys, list_keys, revoke_key, touch_keys
from server.store.responses import ResponseStore
from server.store.tables import metadata
from server.store.usage import Spent, UsageKey, add_usage, list_usage
from server.store.watch import StoreWatch


@pytest.fixture
def store(url):
    opened = Store.open(url, clock=lambda: 1000.0)
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


def test_file_is_private(tmp_path):
    Store.open(f"sqlite:///{tmp_path / 'store.db'}").close()
    assert stat.S_IMODE((tmp_path / "store.db").stat().st_mode) == 0o600


def test_a_newer_store_is_refused(store, url):
    with store.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="newer version"):
        Store.open(url)


@pytest.mark.parametrize("url", ["nonsense", "mysql://h/d", "sqlite://", "sqlite:////no/such/folder/x.db"])
def test_a_wrong_address_is_refused(url):
    with pytest.raises(ConfigError):
        Store.open(url)


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


def test_one_across_tenants_stands_beside_a_tenants_own(store):
    def new(by, *, across_tenants):
        return open_incident(
            connection, Quarantined.KEY, "k", reason="x", by=by, at_s=1.0, across_tenants=across_tenants
        )

    with store.write() as connection:
        own = new("theirs", across_tenants=False)
        with pytest.raises(ConflictError):
            new("theirs", across_tenants=False)
        new("ours", across_tenants=True)
        for across_tenants in (False, True):
            with pytest.raises(ConflictError):
                new("anybody", across_tenants=across_tenants)
        lift_incident(connection, own.id, by="theirs", at_s=2.0)
        quarantine = Quarantine()
        quarantine.load(list_incidents(connection))
        assert quarantine.has(Quarantined.KEY, "k")


def test_incidents_of_an_older_version_are_lifted_by_who_manages_all_tenants_alone(store):
    with store.write() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO incidents (kind, target, reason, opened_at_s, opened_by, seq) "
                "VALUES ('key', 'k', 'x', 1, 'sam', 1)"
            )
        )
        (found,) = list_incidents(connection)
    assert found.across_tenants is True


def test_what_is_written_and_polled_all_day_leaves_no_cycles(store):
    watch = StoreWatch(store, quarantine=Quarantine(), on_keys=lambda _rows: None, used=dict)

    def pass_a_moment(hour):
        with store.write() as connection:
            add_usage(connection, {UsageKey(hour, "acme", "ana", key, "[]", "m"): Spent(1, 2, 3, 4) for key in "ab"})
            next_seq(connection)
        watch.poll()
        watch.poll()

    pass_a_moment(0)
    gc.collect()
    gc.disable()
    try:
        for hour in range(20):
            pass_a_moment(hour)
        assert gc.collect() < 20
    finally:
        gc.enable()


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


def test_replicas_that_start_at_once_migrate_once(url):
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _number: Store.open(url), range(4)))
    for one in opened:
        with one.read() as connection:
            assert list_keys(connection) == []
        one.close()


def test_no_change_is_missed_by_a_replica_that_polls_while_many_write(store, url):
    """Change numbers become visible in order: a poll that saw number N has seen every row up to N."""
    other = Store.open(url)
    seen: set[str] = set()
    watch = StoreWatch(
        other, quarantine=Quarantine(), on_keys=lambda rows: seen.update(row.id for row in rows), used=dict
    )
    stop = threading.Event()

    def poll():
        while not stop.is_set():
            watch.poll()

    poller = threading.Thread(target=poll)
    poller.start()

    def write(number):
        with store.write() as connection:
            insert_keys(connection, [new_row(number)])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(1, 121)))
    stop.set()
    poller.join()
    watch.poll()
    assert len(seen) == 120
    other.close()


def test_a_revocation_reaches_another_replica_within_five_seconds(store, url):
    other = Store.open(url)
    revoked = threading.Event()

    def on_keys(rows):
        if any(row.revoked_at_s is not None for row in rows):
            revoked.set()

    quarantine = Quarantine()
    watch = StoreWatch(other, quarantine=quarantine, on_keys=on_keys, used=dict)
    with store.write() as connection:
        insert_keys(connection, [new_row(1)])
    watch.start()
    try:
        with store.write() as connection:
            revoke_key(connection, "key1", reason="leak", at_s=5.0)
            open_incident(connection, Quarantined.MODEL, "m", reason="leak", by="sam", at_s=1.0)
        assert revoked.wait(5)
        assert quarantine.has(Quarantined.MODEL, "m")
    finally:
        watch.stop()
        other.close()


def test_usage_of_two_replicas_adds_up(store, url):
    other = Store.open(url)
    keys = [UsageKey(5, "acme", f"s{number}", "k", "[]", "m") for number in range(5)]

    def add(which):
        for _ in range(10):
            with which.write() as connection:
                add_usage(connection, {key: Spent(1, 1, 1, 1) for key in keys})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, [store, other, store, other]))
    with store.read() as connection:
        rows = list_usage(connection, from_hour=0, to_hour=9)
    assert [spent.requests for _key, spent in rows] == [40] * 5
    other.close()


def test_a_backup_taken_while_it_is_written_can_be_restored(store, url, tmp_path, request):
    """As docs/identity.md says: the online backup of SQLite, pg_dump of PostgreSQL."""
    with store.write() as connection:
        insert_keys(connection, [new_row(1)])
        connection.execute(sa.text("SELECT 1"))
    if url.startswith("sqlite"):
        with sqlite3.connect(tmp_path / "store.db") as live, sqlite3.connect(tmp_path / "copy.db") as copy:
            live.backup(copy)
        live.close()
        copy.close()
        restored_url = f"sqlite:///{tmp_path / 'copy.db'}"
    else:
        server = request.getfixturevalue("postgres")
        at = ["-h", str(server.folder), "-U", "tester"]
        dump = server.run("pg_dump", *at, "-Fc", url.rpartition("/")[2] and sa.make_url(url).database)
        name = server.new_database()
        server.run("pg_restore", *at, "-d", name, input=dump)
        restored_url = server.url(name)
    with store.write() as connection:
        insert_keys(connection, [new_row(2)])
    restored = Store.open(restored_url)
    with restored.read() as connection:
        assert [row.id for row in list_keys(connection)] == ["key1"]
    with restored.write() as connection:
        insert_keys(connection, [new_row(3)])
    restored.close()


def test_a_database_that_is_down_is_503_and_its_password_is_not_told(tmp_path):
    with pytest.raises(UnavailableError) as caught:
        Store.open(f"postgresql+psycopg://tester:hunter2@/none?host={tmp_path}")
    assert "hunter2" not in str(caught.value)


def test_a_store_that_fails_while_it_serves_is_503_and_ages(tmp_path):
    store = Store.open(f"sqlite:///{tmp_path / 's.db'}")
    now = [0.0]
    watch = StoreWatch(store, quarantine=Quarantine(), on_keys=lambda _rows: None, used=dict, clock=lambda: now[0])
    watch.poll()
    with store.write() as connection:
        connection.execute(sa.text("DROP TABLE counters"))
    now[0] = 7.0
    with pytest.raises(UnavailableError):
        watch.poll()
    assert watch.age_s() == 7.0
    store.close()


def test_responses_are_kept_for_their_owner_and_for_a_time(url):
    now = [1000.0]
    opened = Store.open(url, clock=lambda: now[0])
    kept = ResponseStore(opened, lambda tenant: tenant.encode().ljust(32, b"k"), keep_s=100)
    try:
        kept.put("acme", "ana", "resp_1", {"text": "x"})
        assert kept.get("acme", "ana", "resp_1") == {"text": "x"}
        for tenant, subject in (("acme", "ben"), ("other", "ana")):
            with pytest.raises(NotFoundError):
                kept.get(tenant, subject, "resp_1")
            with pytest.raises(NotFoundError):
                kept.delete(tenant, subject, "resp_1")
        now[0] += 100
        with pytest.raises(NotFoundError):
            kept.get("acme", "ana", "resp_1")
        kept.put("acme", "ana", "resp_2", {})  # what has expired goes on this occasion
        with opened.read() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM responses")) == 1
        kept.delete("acme", "ana", "resp_2")
        with pytest.raises(NotFoundError):
            kept.get("acme", "ana", "resp_2")
    finally:
        opened.close()
