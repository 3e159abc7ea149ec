"""Texts that policy asks for: encrypted, redacted, erased with their key, while the log stays as it was."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any

import pytest

from server.audit.entry import encode_entry
from server.audit.log import AuditLog
from server.audit.record import Audit
from server.audit.texts import TenantKeys, TextStore
from server.audit.tiles import pack_entries
from server.audit.verify import Verifier
from server.cli import main
from server.errors import AuditLogError, AuditUnavailableError
from server.types import Delta, Obligations, Outcome, RequestId, WireFormat
from tests.unit.audit.audit_kit import CLEAN, CLIENT, DECISION, EFFECTIVE, PRINCIPAL, PROMPT, REQUEST, new_signer

if TYPE_CHECKING:
    from pathlib import Path

SECRET = bytes(range(32))
CANARY = "canary-prompt-7f3a"


def redact(text: str) -> str:
    return text.replace("AKIAEXAMPLE", "[redacted]")


@pytest.fixture
def keys(tmp_path: Path) -> TenantKeys:
    return TenantKeys(tmp_path / "texts/keys", SECRET)


@pytest.fixture
def store(tmp_path: Path, keys: TenantKeys) -> TextStore:
    return TextStore(tmp_path / "texts", keys, redact=redact)


def test_texts_come_back_and_are_in_no_file_in_clear(tmp_path: Path, store: TextStore) -> None:
    store.put("blue", "r1", "prompt", f"{CANARY} with AKIAEXAMPLE")
    store.put("blue", "r1", "answer", "an answer")
    store.put("red", "r1", "prompt", "of another tenant")
    assert [(text.kind, text.text) for text in store.read("blue", "r1")] == [
        ("prompt", f"{CANARY} with [redacted]"),
        ("answer", "an answer"),
    ]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes()
            assert b"blue" not in path.read_bytes()
            assert path.stat().st_mode & 0o077 == 0


def test_a_destroyed_key_erases_the_texts_for_good(tmp_path: Path, keys: TenantKeys, store: TextStore) -> None:
    store.put("blue", "r1", "prompt", CANARY)
    old = keys.get("blue")
    assert keys.destroy("blue")
    with pytest.raises(AuditLogError, match="destroyed"):
        list(store.read("blue"))
    store.put("blue", "r2", "prompt", "later")  # the tenant goes on under a new key
    assert keys.get("blue") != old
    assert [text.text for text in store.read("blue")] == ["later"]
    with pytest.raises(AuditLogError, match="destroyed"):
        list(store.read("blue", "r1"))
    assert not keys.destroy("green")


def test_a_text_moved_to_another_request_or_tenant_is_refused(tmp_path: Path, store: TextStore) -> None:
    store.put("blue", "r1", "prompt", "text")
    (path,) = (tmp_path / "texts").glob("*/*.texts")
    path.write_bytes(path.read_bytes().replace(b"r1", b"r2", 1))
    with pytest.raises(AuditLogError, match="changed"):
        list(store.read("blue", "r2"))


def test_other_processes_share_keys_and_notice_destruction(tmp_path: Path, keys: TenantKeys) -> None:
    other = TenantKeys(tmp_path / "texts/keys", SECRET)
    assert other.get("blue") == keys.get("blue")
    with pytest.raises(AuditUnavailableError):
        TenantKeys(tmp_path / "texts/keys", b"x" * 32).get("blue")
    other.destroy("blue")
    keys._cache = {tenant: (0.0, stamp, key) for tenant, (_, stamp, key) in keys._cache.items()}  # two seconds later
    assert keys.get("blue") == other.get("blue")


def test_a_torn_text_ends_the_file(tmp_path: Path, store: TextStore) -> None:
    store.put("blue", "r1", "prompt", "first")
    store.put("blue", "r2", "prompt", "second")
    (path,) = (tmp_path / "texts").glob("*/*.texts")
    path.write_bytes(path.read_bytes()[:-3])
    assert [text.text for text in store.read("blue")] == ["first"]


def test_old_days_are_deleted(tmp_path: Path, store: TextStore) -> None:
    store.put("blue", "r1", "prompt", "text")
    (path,) = (tmp_path / "texts").glob("*/*.texts")
    path.rename(path.with_name("2026-01-01.texts"))
    store.put("blue", "r2", "prompt", "new")
    assert store.prune(30, date(2026, 3, 1)) == 1
    assert [text.text for text in store.read("blue")] == ["new"]


async def test_policy_decides_what_is_kept_and_the_log_verifies_after_erasure(
    tmp_path: Path, keys: TenantKeys, store: TextStore
) -> None:
    log = AuditLog(tmp_path / "audit", new_signer())

    class Appender:
        def submit(self, entry: dict[str, Any]) -> asyncio.Future[int]:
            data = encode_entry(entry)
            return asyncio.ensure_future(asyncio.sleep(0, log.commit(pack_entries([data]), [data])))

    audit = Audit(Appender(), text_key=SECRET, tenant_keys=keys, texts=store)

    async def serve(request_id: str, *, keep: bool) -> None:
        decision = replace(DECISION, obligations=Obligations(audit_text=keep))
        async with audit.open(RequestId(request_id), WireFormat.CHAT, "/v1/chat/completions", CLIENT) as record:
            record.identify(PRINCIPAL)
            record.decide(decision, REQUEST)
            await record.accept(PROMPT, CLEAN, EFFECTIVE)
            await record.durable()
            record.count([Delta(text="an "), Delta(text="answer")])
            record.count([Delta(text=".")])
            await record.finish(Outcome(status="completed"))

    await serve("kept", keep=True)
    await serve("not-kept", keep=False)
    assert [(text.request_id, text.text) for text in store.read("blue")] == [
        ("kept", PROMPT.text),
        ("kept", "an answer."),
    ]
    keys.destroy("blue")
    await serve("after", keep=False)
    log.close()
    report = Verifier(tmp_path / "audit", key=new_signer().key).verify()
    assert report.num_accepted == 3
    bundle = next((tmp_path / "audit/tile/entries").rglob("[0-9]*.p/*")).read_text("utf-8", "replace")
    assert bundle.count('"audit_text":true') == 1
    hashes = {piece.split('"')[0] for piece in bundle.split('"prompt":{"hmac":"')[1:]}
    assert len(hashes) == 2  # the same prompt under the destroyed key and under the new one


async def test_texts_asked_for_without_a_store_are_refused() -> None:
    class Appender:
        def submit(self, entry: dict[str, Any]) -> asyncio.Future[int]:
            raise AssertionError(entry["event"])

    decision = replace(DECISION, obligations=Obligations(audit_text=True))
    record = Audit(Appender(), text_key=SECRET).open(RequestId("r"), WireFormat.CHAT, "/v1", CLIENT)
    record.identify(PRINCIPAL)
    record.decide(decision, REQUEST)
    with pytest.raises(AuditUnavailableError, match="no text store"):
        await record.accept(PROMPT, CLEAN, EFFECTIVE)


def test_the_command_shows_texts(tmp_path: Path, store: TextStore, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/audit-text").write_text(SECRET.hex())
    (tmp_path / "keys/audit-text").chmod(0o600)
    store.put("blue", "r1", "prompt", "text")
    assert main(["audit", "text", str(tmp_path / "audit"), "--tenant", "blue"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "text"
    assert main(["audit", "text", str(tmp_path / "audit"), "--tenant", "green"]) == 1
