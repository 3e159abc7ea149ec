"""Acts on keys change the store and the log together; the command line and the watch of the store."""

import json
import time

import pytest

import server.commands.keys as command
from server.auth.api_key import KeyRing
from server.auth.key_admin import KeyAdmin, KeySpec, describe_key
from server.auth.pepper import Pepper, load_pepper
from server.cli import main
from server.errors import AuditUnavailableError, AuthenticationError, ConflictError, NotFoundError, RequestError
from server.store.database import Store
from server.store.incidents import Quarantine, Quarantined, open_incident
from server.store.watch import StoreWatch

PEPPER = Pepper({1: bytes(range(32))})
SPEC = KeySpec("ana", "acme", frozenset({"developers"}), frozenset({"model:*"}))


class World:
    """A store, its keys and a log that can be made to fail."""

    def __init__(self, tmp_path):
        self.now_s = 1000.0
        self.log = []
        self.is_log_down = False
        self.store = Store.open(f"sqlite:///{tmp_path / 's.db'}", clock=lambda: self.now_s)
        self.admin = KeyAdmin(self.store, PEPPER, record=self.record, by="sam")
        self.ring = KeyRing(PEPPER, clock=lambda: self.now_s)
        self.quarantine = Quarantine()
        self.watch = StoreWatch(
            self.store, quarantine=self.quarantine, on_keys=self.ring.load, used=self.ring.take_used
        )

    def record(self, event, **fields):
        if self.is_log_down:
            raise AuditUnavailableError("down")
        self.log.append((event, fields))


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.store.close()


def test_a_key_is_made_logged_and_works_after_a_poll(world):
    row, text = world.admin.create(SPEC)
    assert world.watch.poll()
    assert not world.watch.poll()
    assert world.ring.authenticate(text.reveal()).subject == "ana"
    ((event, fields),) = world.log
    assert (event, fields["key_id"], fields["by"]) == ("admin:api-key:created", row.id, "sam")
    assert text.reveal() not in str(world.log)


def test_nothing_happens_when_the_log_is_down(world):
    row, _text = world.admin.create(SPEC)
    world.is_log_down = True
    for act in (
        lambda: world.admin.create(SPEC),
        lambda: world.admin.revoke(row.id, reason="x"),
        lambda: world.admin.rotate(row.id, overlap_s=1),
        lambda: world.admin.import_keys([("legacy-0123456789abcdefghijklmnop", SPEC)]),
    ):
        with pytest.raises(AuditUnavailableError):
            act()
    assert [(one.id, one.revoked_at_s, one.expires_at_s) for one in world.admin.list()] == [(row.id, None, None)]


def test_rotation_overlaps_and_keeps_the_rights(world):
    old, old_text = world.admin.create(SPEC)
    new, new_text = world.admin.rotate(old.id, overlap_s=60)
    world.watch.poll()
    assert world.ring.authenticate(old_text.reveal()).credential_id == old.id
    principal = world.ring.authenticate(new_text.reveal())
    assert (principal.groups, principal.scopes, new.replaces) == (SPEC.groups, SPEC.scopes, old.id)
    world.now_s += 60
    with pytest.raises(AuthenticationError):
        world.ring.authenticate(old_text.reveal())
    assert world.ring.authenticate(new_text.reveal()).credential_id == new.id
    with pytest.raises(ConflictError):
        world.admin.rotate(old.id, overlap_s=60)
    with pytest.raises(RequestError):
        world.admin.rotate(new.id, overlap_s=-1)


@pytest.mark.parametrize("way", ["id", "digest", "leaked"])
def test_revocation_by_id_digest_and_leaked_text(world, way):
    row, text = world.admin.create(SPEC)
    if way == "id":
        world.admin.revoke(row.id, reason="left")
    elif way == "digest":
        world.admin.revoke_digest(row.digest, reason="left")
    else:
        world.admin.revoke_leaked(text.reveal(), reason="left")
    world.watch.poll()
    assert world.ring.is_revoked(row.id)
    assert world.log[-1][0] == "admin:api-key:revoked"


def test_what_is_not_there_is_not_found(world):
    for act in (
        lambda: world.admin.revoke("none", reason="x"),
        lambda: world.admin.revoke_digest("00" * 32, reason="x"),
        lambda: world.admin.revoke_leaked("sr_none", reason="x"),
        lambda: world.admin.get("none"),
    ):
        with pytest.raises(NotFoundError):
            act()


def test_import_takes_all_or_none(world):
    good = ("legacy-0123456789abcdefghijklmnop", SPEC)
    with pytest.raises(RequestError, match="Key 2"):
        world.admin.import_keys([good, ("short", SPEC)])
    assert world.admin.list() == []
    world.admin.import_keys([good])
    world.watch.poll()
    assert world.ring.authenticate(good[0]).tenant == "acme"
    with pytest.raises(ConflictError):
        world.admin.import_keys([good])


@pytest.mark.parametrize(
    "spec",
    [
        KeySpec("", "acme", frozenset(), frozenset({"*"})),
        KeySpec("a/b", "acme", frozenset(), frozenset({"*"})),
        KeySpec("ana", "ac me", frozenset(), frozenset({"*"})),
        KeySpec("ana", "acme", frozenset({""}), frozenset({"*"})),
        KeySpec("ana", "acme", frozenset(), frozenset()),
        KeySpec("ana", "acme", frozenset(), frozenset({"*"}), expires_at_s=1000.0),
        KeySpec("ana", "acme", frozenset(), frozenset({"*"}), expires_at_s=1e12),
    ],
)
def test_a_bad_spec_is_refused(world, spec):
    with pytest.raises(RequestError):
        world.admin.create(spec)


def test_a_description_has_no_secret(world):
    row, text = world.admin.create(SPEC)
    told = json.dumps(describe_key(row, 1000.0))
    assert text.reveal().rsplit("_", 1)[1] not in told
    assert describe_key(row, 1000.0)["state"] == "active"


def test_the_watch_brings_revocations_and_incidents_within_five_seconds(world):
    row, _text = world.admin.create(SPEC)
    world.watch.start()
    try:
        world.admin.revoke(row.id, reason="left")
        with world.store.write() as connection:
            open_incident(connection, Quarantined.TENANT, "acme", reason="leak", by="sam", at_s=1.0)
        started_s = time.monotonic()
        while not (world.ring.is_revoked(row.id) and world.quarantine.has(Quarantined.TENANT, "acme")):
            assert time.monotonic() - started_s < 30  # five are promised, to a machine that does nothing else
            time.sleep(0.02)
        assert world.watch.age_s() < 5
    finally:
        world.watch.stop()


def test_last_uses_are_written_down_at_the_end(world):
    row, text = world.admin.create(SPEC)
    world.watch.start()
    world.ring.authenticate(text.reveal())
    world.watch.stop()
    assert world.admin.get(row.id).last_used_at_s == 1000.0


@pytest.fixture
def state(tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr(command, "open_recorder", lambda _state: lambda event, **fields: log.append((event, fields)))
    folder = tmp_path / "state"
    assert main(["keys", "init", "--state", str(folder)]) == 0
    return folder


def run_json(capsys, *arguments):
    capsys.readouterr()
    assert main(["keys", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_makes_lists_rotates_and_revokes(state, capsys):
    at = ["--state", str(state)]
    made = run_json(capsys, "create", *at, "--subject", "ana", "--group", "developers", "--expires", "90d")
    assert made["key"].startswith("sr_" + made["id"])
    assert made["expires_at_s"] > time.time() + 89 * 86400
    listed = run_json(capsys, "list", *at)
    assert [one["id"] for one in listed] == [made["id"]]
    assert made["key"] not in json.dumps(listed)
    new = run_json(capsys, "rotate", made["id"], *at, "--overlap", "1h")
    assert new["replaces"] == made["id"]
    assert run_json(capsys, "revoke", new["id"], *at)[0]["state"] == "revoked"
    assert main(["keys", "list", *at]) == 0
    assert "revoked" in capsys.readouterr().out


def test_the_command_prints_a_key_once_and_alone(state, capsys):
    capsys.readouterr()
    assert main(["keys", "create", "--state", str(state), "--subject", "ana"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("sr_")
    assert shown.out.count("\n") == 1
    assert "only time" in shown.err


def test_the_command_imports_a_file_and_revokes_a_leaked_key(state, capsys, tmp_path):
    file = tmp_path / "keys.csv"
    file.write_text(
        "key,subject,tenant,groups,scopes\nlegacy-0123456789abcdefghijklmnop,bob,acme,ci;developers,model:*\n"
    )
    (row,) = run_json(capsys, "import", str(file), "--state", str(state))
    assert (row["subject"], row["groups"]) == ("bob", ["ci", "developers"])
    leaked = tmp_path / "leaked.txt"
    leaked.write_text("legacy-0123456789abcdefghijklmnop\n")
    (gone,) = run_json(capsys, "revoke", "--leaked", str(leaked), "--state", str(state))
    assert (gone["id"], gone["state"]) == (row["id"], "revoked")


def test_the_command_ends_every_key_that_stands_in_a_file(state, capsys, tmp_path):
    texts, ids = [], []
    for subject in ("ana", "bob"):
        assert main(["keys", "create", "--state", str(state), "--subject", subject, "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        texts.append(made["key"])
        ids.append(made["id"])
    others = "sr_" + "z" * 12 + "_" + "Z" * 43
    found = tmp_path / "dotenv"
    found.write_text(f"# of a laptop\nexport A_KEY={texts[0]}\n{others}\ncurl -H 'x-api-key:{texts[1]}' {texts[0]}\n")
    gone = run_json(capsys, "revoke", "--leaked", str(found), "--state", str(state))
    assert [(row["id"], row["state"]) for row in gone] == [(key_id, "revoked") for key_id in ids]
    found.write_text(f"export A_KEY={others}\n")
    assert main(["keys", "revoke", "--leaked", str(found), "--state", str(state)]) != 0
    assert "none of our keys" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "--subject", "ana", "--expires", "soon"],
        ["create", "--subject", "ana", "--expires", "2020-01-01"],
        ["create", "--subject", "ana", "--scope", "everything"],
        ["create", "--subject", "a b"],
        ["revoke"],
        ["revoke", "x", "--digest", "y"],
        ["show", "none"],
        ["rotate", "none", "--overlap", "5"],
    ],
)
def test_wrong_use_of_the_command_is_one_clear_line(state, capsys, arguments):
    capsys.readouterr()
    assert main(["keys", *arguments, "--state", str(state)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_without_the_logs_writer_no_key_is_made(tmp_path, capsys):
    assert main(["keys", "init", "--state", str(tmp_path)]) == 0
    assert main(["keys", "create", "--state", str(tmp_path), "--subject", "ana"]) == 1
    assert main(["keys", "list", "--state", str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.strip().endswith("[]")
    assert "sr_" not in out


def test_a_pepper_is_added(state, capsys):
    assert main(["keys", "rotate-pepper", "--state", str(state)]) == 0
    assert load_pepper(state / "keys" / "pepper").numbers == [2, 1]
