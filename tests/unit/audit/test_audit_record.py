"""One request's record: what it says, and that it is closed once whatever happens."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from server.audit.entry import encode_entry, parse_entry
from server.audit.record import Audit
from server.errors import (
    AuditUnavailableError,
    AuthenticationError,
    ContentBlockedError,
    EngineError,
    PermissionDeniedError,
    RateLimitedError,
    ThrottledError,
)
from server.types import (
    Client,
    Decision,
    Delta,
    Finding,
    Outcome,
    RequestId,
    ScanReport,
    ScanState,
    Usage,
    WireFormat,
)
from tests.unit.audit.audit_kit import CLEAN, CLIENT, DECISION, EFFECTIVE, PRINCIPAL, PROMPT, REQUEST

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from server.audit.record import Record

KEY = b"k" * 32


class Appender:
    """Keeps entries as the writer would, byte for byte."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.entries: list[dict[str, Any]] = []
        self.is_down = False
        self.delay_s = delay_s

    def submit(self, entry: dict[str, Any]) -> asyncio.Future[int]:
        data = encode_entry(entry)
        if self.is_down:
            raise AuditUnavailableError("down")
        self.entries.append(parse_entry(data))
        return asyncio.ensure_future(asyncio.sleep(self.delay_s, len(self.entries) - 1))


@pytest.fixture
def appender() -> Appender:
    return Appender()


def open_record(appender: Appender) -> Record:
    audit = Audit(appender, text_key=KEY)
    return audit.open(RequestId("r1"), WireFormat.CHAT, "/v1/chat/completions", CLIENT)


async def accept(record: Record) -> None:
    record.identify(PRINCIPAL)
    record.decide(DECISION, REQUEST)
    await record.accept(PROMPT, CLEAN, EFFECTIVE)
    await record.durable()


async def test_a_completed_request_is_two_entries_without_texts(appender: Appender) -> None:
    async with open_record(appender) as record:
        await accept(record)
        record.count([Delta(text="an answer "), Delta(text="nobody may keep")])
        outcome = Outcome(status="completed", finish_reasons={0: "stop"}, usage=Usage(3, 4, 1), scan=CLEAN)
        await record.finish(outcome)
        assert await record.durable() == 1
    accepted, finished = appender.entries
    assert accepted["event"] == "gateway:request:accepted"
    assert accepted["principal"] == {
        "subject": "alice",
        "tenant": "blue",
        "groups": ["dev"],
        "method": "api_key",
        "credential": "k1",
    }
    assert accepted["client"] == {"address": "192.0.2.7", "agent": "probe/1"}
    assert (accepted["model"], accepted["model_digest"]) == ("smol", "ef" * 32)
    assert accepted["params"] == {"temperature": "0.7"}
    assert accepted["template"] == {"id": "secure-coding", "version": "1.0.0", "digest": "cd" * 32}
    assert accepted["policy"]["digest"] == "ab" * 32
    assert accepted["scan_input"] == {"state": "clean"}
    assert finished["outcome"] == "completed"
    assert finished["usage"] == {"prompt": 3, "completion": 4, "cached": 1}
    assert finished["finish"] == ["stop"]
    assert finished["accepted"] == 0
    assert finished["answer"]["chars"] == len("an answer nobody may keep")
    assert "nobody may keep" not in str(appender.entries)


async def test_hashes_of_texts_are_keyed_by_tenant(appender: Appender) -> None:
    def digest(audit: Audit, tenant: str) -> str:
        keyed = audit.new_text_hmac(tenant)
        keyed.update(b"text")
        return keyed.hexdigest()

    audit, other = Audit(appender, text_key=KEY), Audit(appender, text_key=b"o" * 32)
    assert digest(audit, "a") == digest(audit, "a")
    assert len({digest(audit, "a"), digest(audit, "b"), digest(other, "a")}) == 3


async def test_the_answers_hash_does_not_depend_on_the_cuts(appender: Appender) -> None:
    for cuts in ((["ab", "c"],), (["a"], ["bc"])):
        async with open_record(appender) as record:
            await accept(record)
            for cut in cuts:
                record.count([Delta(text=text) for text in cut])
            await record.finish(Outcome(status="completed"))
    assert appender.entries[1]["answer"]["hmac"] == appender.entries[3]["answer"]["hmac"]


@pytest.mark.parametrize(
    ("error", "event", "code", "outcome"),
    [
        (AuthenticationError("expired", key_id="k9"), "gateway:credential:refused", "invalid_api_key", "denied"),
        (PermissionDeniedError("no permit"), "gateway:request:refused", "permission_denied", "denied"),
        (RateLimitedError("spent", retry_after_s=1), "gateway:request:refused", "rate_limit_exceeded", "denied"),
        (ContentBlockedError("secret", findings=({"rule": "aws", "line": 3, "text": "AKIA"},)),
         "gateway:request:refused", "content_blocked", "denied"),
        (KeyError("a text nobody may keep"), "gateway:request:refused", "internal_error", "failed"),
    ],
)  # fmt: skip
async def test_a_refusal_is_one_entry(
    appender: Appender, error: Exception, event: str, code: str, outcome: str
) -> None:
    async def serve() -> None:
        async with open_record(appender) as record:
            record.identify(PRINCIPAL)
            raise error

    with pytest.raises(type(error)):
        await serve()
    (entry,) = appender.entries
    assert (entry["event"], entry["code"], entry["outcome"]) == (event, code, outcome)
    assert "nobody may keep" not in str(entry)
    assert "AKIA" not in str(entry)


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (EngineError("gone"), "failed", "engine_error"),
        (ContentBlockedError("insecure"), "denied", "content_blocked"),
        (AuthenticationError("revoked"), "denied", "invalid_api_key"),
        (ValueError("bug"), "failed", "internal_error"),
    ],
)
async def test_a_failure_after_acceptance_closes_the_record(
    appender: Appender, error: Exception, outcome: str, code: str
) -> None:
    async def serve() -> None:
        async with open_record(appender) as record:
            await accept(record)
            record.count([Delta(text="ab", usage=Usage(3, 2, 0))])
            raise error

    with pytest.raises(type(error)):
        await serve()
    finished = appender.entries[-1]
    assert (finished["outcome"], finished["code"]) == (outcome, code)
    assert finished["usage"]["completion"] == 2


async def test_what_is_throttled_is_left_to_the_sums(appender: Appender) -> None:
    async def serve() -> None:
        async with open_record(appender):
            raise ThrottledError("too many", retry_after_s=1)

    with pytest.raises(ThrottledError):
        await serve()
    assert appender.entries == []


async def test_leaving_without_an_outcome_is_a_failure(appender: Appender) -> None:
    async with open_record(appender) as record:
        await accept(record)
    assert appender.entries[-1]["outcome"] == "failed"
    assert appender.entries[-1]["code"] == "not_finished"


async def test_a_client_that_leaves_is_recorded_though_cancelled_twice() -> None:
    appender = Appender(delay_s=0.05)

    async def serve() -> None:
        async with open_record(appender) as record:
            await accept(record)
            await asyncio.sleep(60)

    task = asyncio.create_task(serve())
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()  # a cancel scope cancels at every await
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.1)
    assert appender.entries[-1]["outcome"] == "aborted"


async def test_a_generator_that_is_closed_is_aborted(appender: Appender) -> None:
    async def stream() -> AsyncGenerator[int, None]:
        async with open_record(appender) as record:
            await accept(record)
            yield 1
            yield 2

    async with aclosing(stream()) as chunks:
        async for _ in chunks:
            break
    assert [entry.get("outcome") for entry in appender.entries] == [None, "aborted"]


async def test_cancelled_while_the_acceptance_is_written_still_closes() -> None:
    appender = Appender(delay_s=0.05)
    task = asyncio.create_task(_accept_only(appender))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.15)
    assert [entry["event"] for entry in appender.entries] == ["gateway:request:accepted", "gateway:request:finished"]


async def _accept_only(appender: Appender) -> None:
    async with open_record(appender) as record:
        await accept(record)


async def test_a_log_that_is_down_refuses_everything(appender: Appender) -> None:
    appender.is_down = True

    async def refuse() -> None:
        async with open_record(appender):
            raise PermissionDeniedError("no")

    with pytest.raises(AuditUnavailableError):
        await _accept_only(appender)
    with pytest.raises(AuditUnavailableError):  # a refusal off the record is none
        await refuse()


async def test_a_log_that_goes_down_ends_the_answer_with_an_error(appender: Appender) -> None:
    async def serve() -> None:
        async with open_record(appender) as record:
            await accept(record)
            appender.is_down = True
            await record.finish(Outcome(status="completed"))

    with pytest.raises(AuditUnavailableError):
        await serve()
    assert len(appender.entries) == 1


async def test_a_record_is_closed_once(appender: Appender) -> None:
    async with open_record(appender) as record:
        with pytest.raises(RuntimeError):
            await record.finish(Outcome())
        await accept(record)
        await record.finish(Outcome(status="completed"))
        with pytest.raises(RuntimeError):
            await record.finish(Outcome(status="completed"))
    assert len(appender.entries) == 2


async def test_findings_are_bounded_and_hold_no_text(appender: Appender) -> None:
    finding = Finding(rule="r", category="c", severity="high", message="the secret itself", start=1, end=2, cwe="CWE-1")
    async with open_record(appender) as record:
        record.identify(PRINCIPAL)
        record.decide(Decision(True, "permit", (), "00"), REQUEST)
        await record.accept(PROMPT, ScanReport(ScanState.FINDINGS, (finding,) * 500), EFFECTIVE)
        await record.finish(Outcome(status="completed"))
    scan = appender.entries[0]["scan_input"]
    assert scan["num_findings"] == 500
    assert len(scan["findings"]) == 32
    assert "secret itself" not in str(appender.entries)


@pytest.mark.parametrize(
    "text", ["a\r\nb", "\x1b[31mred", '"}{"event":"gateway:request:finished"', "‮evil", "\ud800", "x" * 1_000_000]
)
async def test_client_fields_are_cleaned(appender: Appender, text: str) -> None:
    audit = Audit(appender, text_key=KEY)
    client = Client(address=text, user_agent=text)

    async def serve() -> None:
        async with audit.open(RequestId("r"), WireFormat.CHAT, text, client):
            raise PermissionDeniedError(text)

    with pytest.raises(PermissionDeniedError):
        await serve()
    data = encode_entry(appender.entries[0])
    assert len(data) < 8192
    assert data.decode().isprintable()
