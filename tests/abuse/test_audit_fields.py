"""What a client controls stays one well-formed entry; no text it sent is anywhere in clear (LG-03, LG-04, LG-11)."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from server.audit.client import AuditClient
from server.audit.export.files import FileSink
from server.audit.export.ship import Shipper
from server.audit.record import Audit
from server.audit.search import SearchIndex
from server.audit.tail import entries_from
from server.audit.verify import Verifier
from server.errors import AuthenticationError, ContentBlockedError, EngineError, PermissionDeniedError, RateLimitedError
from server.types import (
    Client,
    Completion,
    Decision,
    Delta,
    Finding,
    ModelRequest,
    Outcome,
    Principal,
    RequestId,
    ScanReport,
    ScanState,
    SubjectId,
    TenantId,
    Usage,
    WireFormat,
)
from tests.unit.audit.audit_kit import (
    CLEAN,
    CLIENT,
    DECISION,
    EFFECTIVE,
    ORIGIN,
    PRINCIPAL,
    PROMPT,
    REQUEST,
    read_vkey,
    writer_process,
)

if TYPE_CHECKING:
    from pathlib import Path

KEY = bytes(range(32))
CANARIES = ("canary-secret-AKIA5PQ3", "canary-prompt-9b1d", "canary-answer-77aa", "canary-tool-0c0c")
HOSTILE = {
    "line breaks": 'a\r\nb\n{"v":1,"event":"gateway:request:finished"}',
    "ansi": "\x1b[2J\x1b[31mred\x1b]0;title\x07",
    "json breakers": '"}],"event":"audit:log:pruned","x":[{"',
    "a finished event": '"event":"gateway:request:finished","request_id":"r0"',
    "backslashes": '\\\\\\" \\u0000 \\n',
    "bidi": "\u202egnp.exe \u2066",
    "lone surrogate": "\ud800\udfff\ud800",
    "null": "\x00" * 50,
    "separators": "\u2028\u2029\u0085",
    "a megabyte": "x" * 1_000_000,
    "a megabyte of emoji": "\U0001f512" * 250_000,
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_every_field_of_a_client_gives_one_well_formed_entry(tmp_path: Path, name: str) -> None:
    text = HOSTILE[name]
    client = Client(address=text, user_agent=text)
    principal = Principal(
        SubjectId(text), TenantId(text), frozenset({text, "g"}), frozenset({text}), "oidc", text, None
    )
    request = ModelRequest(WireFormat.CHAT, text, Completion(text), {"stop": [text]}, classification=text)
    finding = Finding(text, text, text, text, 0, 1, cwe=text, language=text)
    decision = Decision(True, text, (text, text), "ab" * 32)
    effective = {**EFFECTIVE, "params": {"seed": 10**30, "user": text, "stop": [text], "temperature": float("nan")}}
    scan = ScanReport(ScanState.FINDINGS, (finding,) * 99, text)
    outcome = Outcome("completed", finish_reasons={0: text}, usage=Usage(1, 2, 3), scan=scan, error_code=text)
    with writer_process(tmp_path):
        appender = AuditClient(tmp_path / "audit.sock")
        audit = Audit(appender, text_key=KEY)
        async with audit.open(RequestId("r1"), WireFormat.CHAT, text, client) as record:
            record.identify(principal)
            record.decide(decision, request)
            await record.accept(replace(PROMPT, text=text), ScanReport(ScanState.FINDINGS, (finding,), text), effective)
            record.count(
                [Delta(text=text, reasoning=text, tool_calls=[{"function": {"name": text, "arguments": text}}])]
            )
            await record.finish(outcome)
        with pytest.raises(AuthenticationError):
            await _refuse(audit, client, AuthenticationError(text, key_id=text))
        blocked = ContentBlockedError(text, findings=({"rule": text, "line": text},))
        with pytest.raises(ContentBlockedError):
            await _refuse(audit, client, blocked)
        await appender.aclose()
    report = Verifier(tmp_path / "audit", key=read_vkey(tmp_path)).verify()  # canonical, one line, bounded
    assert report.events == {
        "audit:log:started": 1,
        "gateway:request:accepted": 1,
        "gateway:request:finished": 1,
        "gateway:credential:refused": 1,
        "gateway:request:refused": 1,
        "audit:log:stopped": 1,
    }
    for _, data in entries_from(tmp_path / "audit", 0):
        assert data.decode().isprintable()
        assert len(data) <= 24_576


async def _refuse(audit: Audit, client: Client, error: Exception) -> None:
    async with audit.open(RequestId("r2"), WireFormat.CHAT, "/v1", client):
        raise error


async def test_no_text_is_anywhere_in_clear(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    secret, prompt_text, answer, tool = CANARIES
    request = replace(REQUEST, payload=Completion(prompt_text), sampling={"stop": [secret], "user": secret})
    finding = Finding("secret", "secret", "high", f"found {secret}", 0, 9)
    with writer_process(tmp_path):
        appender = AuditClient(tmp_path / "audit.sock")
        audit = Audit(appender, text_key=KEY)
        for number, error in enumerate((None, EngineError("down"), ContentBlockedError("blocked"), ValueError(secret))):

            async def serve(number: int = number, error: Exception | None = error) -> None:
                async with audit.open(RequestId(f"r{number}"), WireFormat.CHAT, "/v1", CLIENT) as record:
                    record.identify(PRINCIPAL)
                    record.decide(DECISION, request)
                    prompt = replace(PROMPT, text=f"{prompt_text} {secret}")
                    effective = {**EFFECTIVE, "params": {"stop": [secret], "logit_bias": {secret: 1}}}
                    await record.accept(prompt, ScanReport(ScanState.FINDINGS, (finding,)), effective)
                    record.count([Delta(text=answer, tool_calls=[{"function": {"name": "f", "arguments": tool}}])])
                    if error is not None:
                        raise error
                    await record.finish(Outcome("completed", scan=ScanReport(ScanState.FINDINGS, (finding,))))

            if error is None:
                await serve()
            else:
                with pytest.raises(type(error)):
                    await serve()
        await appender.aclose()
    index = SearchIndex(tmp_path / "audit")
    index.update()
    index.close()
    await asyncio.to_thread(
        Shipper(tmp_path / "audit", FileSink(tmp_path / "worm", origin=ORIGIN), tmp_path / "cursor").run, once=True
    )
    files = await asyncio.to_thread(lambda: [path for path in tmp_path.rglob("*") if path.is_file()])
    assert len(files) > 8
    captured = capfd.readouterr()
    for canary in CANARIES:
        assert canary not in captured.out + captured.err
        for path in files:
            assert canary.encode() not in path.read_bytes(), f"{canary} is in {path.name}"


async def test_requests_entries_and_usage_reconcile_after_a_mixed_hour(tmp_path: Path) -> None:
    """An hour at half a request a second, compressed: 2,000 requests, every kind of end, 24 at a time."""
    rng = random.Random(11)  # noqa: S311 - a seeded campaign
    expected: Counter[str] = Counter()
    usage: Counter[str] = Counter()
    errors = {
        "denied": PermissionDeniedError("no"),
        "limited": RateLimitedError("spent", retry_after_s=1),
        "anonymous": AuthenticationError("unknown"),
        "failed": EngineError("gone"),
    }
    with writer_process(tmp_path, "--segment-bytes", "500000"):
        appender = AuditClient(tmp_path / "audit.sock")
        audit = Audit(appender, text_key=KEY)
        gate = asyncio.Semaphore(24)

        async def one(number: int, end: str) -> None:
            async with gate, audit.open(RequestId(f"r{number}"), WireFormat.CHAT, "/v1", CLIENT) as record:
                if end in ("denied", "limited", "anonymous"):
                    raise errors[end]
                record.identify(PRINCIPAL)
                record.decide(DECISION, REQUEST)
                await record.accept(PROMPT, CLEAN, EFFECTIVE)
                tokens = Usage(rng.randrange(100), rng.randrange(100), 0)
                record.count([Delta(text="x", usage=tokens)])
                usage.update(prompt=tokens.prompt_tokens, completion=tokens.completion_tokens)
                if end == "aborted":
                    raise asyncio.CancelledError
                if end == "failed":
                    raise errors[end]
                await record.finish(Outcome("completed", usage=tokens))

        ends = [
            rng.choice(["completed"] * 4 + ["denied", "limited", "anonymous", "failed", "aborted"])
            for _ in range(2_000)
        ]
        expected.update(ends)
        await asyncio.gather(*(one(number, end) for number, end in enumerate(ends)), return_exceptions=True)
        await asyncio.sleep(0.2)  # the records of cancelled requests are written after them
        await appender.aclose()
    report = Verifier(tmp_path / "audit", key=read_vkey(tmp_path)).verify()
    assert report.num_accepted == expected["completed"] + expected["failed"] + expected["aborted"]
    assert (report.num_finished, report.num_open, report.num_unknown) == (report.num_accepted, 0, 0)
    assert report.num_refused == expected["denied"] + expected["limited"] + expected["anonymous"]
    found: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for _, data in entries_from(tmp_path / "audit", 0):
        entry = json.loads(data)
        if entry["event"] == "gateway:request:finished":
            found[entry["outcome"]] += 1
            counted.update(prompt=entry["usage"]["prompt"], completion=entry["usage"]["completion"])
    assert found == {end: expected[end] for end in ("completed", "failed", "aborted")}
    assert counted == usage
