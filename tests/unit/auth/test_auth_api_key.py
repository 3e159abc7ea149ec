"""API keys: form, look-up, peppers, secrets on disk."""

import pytest

from server.auth.api_key import KeyRing, import_id, new_key, parse_key_id
from server.auth.pepper import (
    CacheSalt,
    Pepper,
    check_secret,
    load_pepper,
    load_secret,
    new_pepper,
    new_secret,
    rotate_pepper,
)
from server.errors import AuthenticationError, ConfigError
from server.store.keys import KeyRow
from server.types import TenantId

SECRET = bytes(range(32))
OTHER = bytes(range(100, 132))


def row_of(key, **changes):
    values = {
        "id": key.id, "digest": key.digest, "pepper": key.pepper, "subject": "ana", "tenant": "acme",
        "groups": frozenset({"developers"}), "scopes": frozenset({"model:*"}), "note": "", "created_at_s": 1.0,
        "created_by": "test",
    }  # fmt: skip
    return KeyRow(**(values | changes))


@pytest.fixture
def pepper():
    return Pepper({1: SECRET})


def test_a_key_is_its_owners(pepper):
    key = new_key(pepper)
    ring = KeyRing(pepper, clock=lambda: 50.0)
    ring.load([row_of(key, expires_at_s=100.0)])
    principal = ring.authenticate(key.text.reveal())
    assert (principal.subject, principal.tenant, principal.method, principal.credential_id, principal.expires_at_s) == (
        "ana", "acme", "api_key", key.id, 100.0,
    )  # fmt: skip
    assert ring.take_used() == {key.id: 50.0}
    assert ring.take_used() == {}


def test_keys_have_one_form_and_differ(pepper):
    keys = [new_key(pepper) for _ in range(100)]
    assert {parse_key_id(key.text.reveal()) for key in keys} == {key.id for key in keys}
    assert len({key.id for key in keys}) == 100
    assert SECRET.hex() not in repr(keys[0])
    assert "redacted" in repr(keys[0])


def test_refusals_say_why_to_the_log_and_nothing_to_the_caller(pepper):
    good, revoked, expired = (new_key(pepper) for _ in range(3))
    ring = KeyRing(pepper, clock=lambda: 50.0)
    ring.load([row_of(good), row_of(revoked, revoked_at_s=1.0), row_of(expired, expires_at_s=50.0)])
    wrong = good.text.reveal()[:-1] + ("a" if good.text.reveal()[-1] != "a" else "b")
    told = {
        "wrong secret": wrong,
        "revoked key": revoked.text.reveal(),
        "expired key": expired.text.reveal(),
        "unknown key": new_key(pepper).text.reveal(),
    }
    messages = set()
    for reason, text in told.items():
        with pytest.raises(AuthenticationError) as caught:
            ring.authenticate(text)
        assert caught.value.reason == reason
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert ring.take_used() == {}


def test_revocation_is_seen_at_the_next_load(pepper):
    key = new_key(pepper)
    ring = KeyRing(pepper, clock=lambda: 50.0)
    ring.load([row_of(key)])
    assert not ring.is_revoked(key.id)
    ring.load([row_of(key, revoked_at_s=49.0)])
    assert ring.is_revoked(key.id)
    assert ring.is_revoked("never-seen")


def test_a_key_made_elsewhere_is_found_by_its_digest(pepper):
    text = "legacy-0123456789abcdefghijklmnop"
    digest = pepper.digest(text, 1).hex()
    ring = KeyRing(pepper)
    ring.load([row_of(new_key(pepper), id=import_id(digest), digest=digest)])
    assert ring.authenticate(text).subject == "ana"
    with pytest.raises(AuthenticationError):
        ring.authenticate(text + "x")


def test_old_keys_work_under_a_new_pepper():
    old = new_key(Pepper({1: SECRET}))
    both = Pepper({1: SECRET, 2: OTHER})
    new = new_key(both)
    ring = KeyRing(both)
    ring.load([row_of(old), row_of(new)])
    assert ring.authenticate(old.text.reveal()).credential_id == old.id
    assert ring.authenticate(new.text.reveal()).credential_id == new.id
    without = KeyRing(Pepper({2: OTHER}))
    without.load([row_of(old)])
    with pytest.raises(AuthenticationError):
        without.authenticate(old.text.reveal())


@pytest.mark.parametrize("weak", [b"", b"changeme", b"sk-test" * 8, b"\0" * 64, b"0123456789" * 4])
def test_weak_secrets_are_refused(weak):
    with pytest.raises(ConfigError):
        check_secret(weak, "pepper")
    with pytest.raises(ConfigError):
        Pepper({1: weak})
    with pytest.raises(ConfigError):
        CacheSalt(weak)


def test_no_pepper_is_refused():
    with pytest.raises(ConfigError):
        Pepper({})


def test_pepper_file_is_made_once_read_and_rotated(tmp_path):
    path = tmp_path / "pepper"
    new_pepper(path)
    first = path.read_text()
    new_pepper(path)
    assert path.read_text() == first
    assert load_pepper(path).numbers == [1]
    assert rotate_pepper(path) == 2
    assert load_pepper(path).numbers == [2, 1]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content", ["", "1 zz", "x " + "ab" * 32, f"1 {SECRET.hex()}\n1 {OTHER.hex()}", "1 6368616e67656d65"]
)
def test_a_damaged_pepper_file_is_refused(tmp_path, content):
    path = tmp_path / "pepper"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError):
        load_pepper(path)


def test_a_secret_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "salt"
    new_secret(path)
    assert len(load_secret(path, "salt")) == 32
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_secret(path, "salt")
    with pytest.raises(ConfigError, match="can't be read"):
        load_secret(tmp_path / "none", "salt")


def test_salts_differ_by_tenant_and_secret_and_tell_nothing():
    salt = CacheSalt(SECRET)
    acme = salt.cache_salt(TenantId("acme"))
    assert acme == salt.cache_salt(TenantId("acme"))
    assert len({acme, salt.cache_salt(TenantId("zeta")), CacheSalt(OTHER).cache_salt(TenantId("acme"))}) == 3
    assert "acme" not in acme
