"""A disk that is full, broken, read-only or slow, a signer that is down: nothing is answered, nothing lost (LG-07)."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from server.audit.client import AuditClient, SyncAuditClient
from server.audit.entry import new_entry
from server.audit.log import AuditLog
from server.audit.record import Audit
from server.audit.tags import Event
from server.audit.tail import entries_from
from server.audit.verify import Verifier
from server.audit.writer import Writer, bind
from server.errors import AuditLogError, AuditUnavailableError
from server.types import Outcome, RequestId
from tests.unit.audit.audit_kit import (
    CLEAN,
    CLIENT,
    DECISION,
    EFFECTIVE,
    PRINCIPAL,
    PROMPT,
    REQUEST,
    new_signer,
    read_vkey,
    start_writer,
    writer_process,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def act(number: int) -> dict[str, object]:
    return new_entry(Event.ACT_PERFORMED, number=number)


def acts(state: Path) -> list[int]:
    entries = [json.loads(entry) for _, entry in entries_from(state / "audit", 0)]
    return [entry["number"] for entry in entries if "number" in entry]


async def append_until_it_works(client: AuditClient, number: int) -> int:
    for _ in range(400):
        try:
            return await client.append(act(number))
        except AuditUnavailableError:
            await asyncio.sleep(0.02)
    raise AssertionError("the writer did not come back")


async def test_a_full_disk_stops_answers_and_the_writer_recovers_by_itself(tmp_path: Path) -> None:
    """The kernel refuses every byte past a size: the journal can't grow, and later it can again."""
    with writer_process(tmp_path, "--segment-bytes", "8000000") as process:
        client = AuditClient(tmp_path / "audit.sock")
        await client.append(act(0))
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4_300_000, hard))
        done, refused = [0], 0
        filler = "x" * 900
        number = 1
        while not refused:  # until what was reserved is used up
            results = await asyncio.gather(
                *(client.append({**act(at), "filler": filler}) for at in range(number, number + 500)),
                return_exceptions=True,
            )
            done += [
                at for at, result in zip(range(number, number + 500), results, strict=True) if isinstance(result, int)
            ]
            refused = sum(isinstance(result, AuditUnavailableError) for result in results)
            number += 500
        with pytest.raises(AuditUnavailableError):
            await client.append(act(-1))
        assert process.poll() is None
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        await append_until_it_works(client, number)
        await client.aclose()
    assert acts(tmp_path) == [*done, number]
    report = Verifier(tmp_path / "audit", key=read_vkey(tmp_path)).verify()
    assert report.events["audit:log:interrupted"] == 1
    assert "can't be written" in (tmp_path / "writer.log").read_text()


@contextmanager
def writer_thread(state: Path, log: AuditLog) -> Iterator[Writer]:
    sock = bind(state / "audit.sock")
    writer = Writer(log, sock)
    writer.start()
    thread = threading.Thread(target=writer.run)
    thread.start()
    try:
        yield writer
    finally:
        writer.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", ["fdatasync", "pwrite"])
async def test_a_call_that_fails_is_never_taken_for_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    log = AuditLog(tmp_path / "audit", new_signer())
    with writer_thread(tmp_path, log):
        client = AuditClient(tmp_path / "audit.sock")
        await client.append(act(0))
        real = getattr(os, call)

        def failing(*_args: object) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, call, failing)
        for _ in range(5):
            with pytest.raises(AuditUnavailableError):
                await client.append(act(-1))
        monkeypatch.setattr(os, call, real)
        await append_until_it_works(client, 1)
        await client.aclose()
    assert acts(tmp_path) == [0, 1]
    assert Verifier(tmp_path / "audit").verify().events["audit:log:interrupted"] == 1


async def test_a_request_that_was_open_when_the_disk_failed_can_still_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writer_thread(tmp_path, AuditLog(tmp_path / "audit", new_signer())):
        client = AuditClient(tmp_path / "audit.sock")
        finished = {**new_entry(Event.REQUEST_FINISHED, request_id="r"), "outcome": "failed"}
        await client.append(new_entry(Event.REQUEST_ACCEPTED, request_id="r"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", _raise_eio)
            with pytest.raises(AuditUnavailableError):
                await client.append(finished)
        await append_until_it_works(client, 1)
        await client.append(finished)
        await client.aclose()
    report = Verifier(tmp_path / "audit").verify()
    assert (report.num_accepted, report.num_finished, report.num_unknown) == (1, 1, 0)


async def test_a_request_that_ended_while_the_disk_failed_is_closed_once_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would stand open for as long as the gateway runs, and its outcome nowhere."""
    with writer_thread(tmp_path, AuditLog(tmp_path / "audit", new_signer())):
        client = AuditClient(tmp_path / "audit.sock")
        audit = Audit(client, text_key=b"k" * 32)

        async def request(name: str, *, is_left: bool = False) -> None:
            async with audit.open(RequestId(name), "openai.chat", "/v1/chat/completions", CLIENT) as record:
                record.identify(PRINCIPAL)
                record.decide(DECISION, REQUEST)
                await record.accept(PROMPT, CLEAN, EFFECTIVE)
                await record.durable()
                accepted[name].set()
                await may_end[name].wait()
                await record.finish(Outcome(status="completed"))
                if is_left:
                    raise asyncio.CancelledError
                await record.durable()

        accepted, may_end = ({name: asyncio.Event() for name in ("told", "left", "later")} for _ in range(2))
        await append_until_it_works(client, 0)
        told, left = asyncio.create_task(request("told")), asyncio.create_task(request("left", is_left=True))
        await accepted["told"].wait()
        await accepted["left"].wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", _raise_eio)
            may_end["told"].set()
            may_end["left"].set()
            with pytest.raises(AuditUnavailableError):
                await told
            with pytest.raises(asyncio.CancelledError):
                await left
        await append_until_it_works(client, 1)
        may_end["later"].set()
        await request("later")  # the first that the log takes again brings the others' ends
        await append_until_it_works(client, 2)
        await client.aclose()
    report = Verifier(tmp_path / "audit").verify()
    assert (report.num_accepted, report.num_finished, report.num_unknown) == (3, 3, 0)
    ends = [json.loads(entry) for _, entry in entries_from(tmp_path / "audit", 0)]
    assert {end["request_id"] for end in ends if end.get("outcome") == "completed"} == {"told", "left", "later"}


def _raise_eio(_descriptor: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


async def test_a_signer_that_is_down_stops_answers(tmp_path: Path) -> None:
    class Token:
        """A key in a token that can be pulled out."""

        key = new_signer().key
        is_out = False

        def sign(self, message: bytes) -> bytes:
            if self.is_out:
                raise OSError(errno.ENODEV, "token removed")
            return new_signer().sign(message)

    token = Token()
    with writer_thread(tmp_path, AuditLog(tmp_path / "audit", token)):
        client = AuditClient(tmp_path / "audit.sock")
        await client.append(act(0))
        token.is_out = True
        with pytest.raises(AuditUnavailableError):
            await client.append(act(-1))
        token.is_out = False
        await append_until_it_works(client, 1)
        await client.aclose()
    assert acts(tmp_path) == [0, 1]
    assert Verifier(tmp_path / "audit", key=token.key).verify().num_commits > 2


async def test_tiles_that_cannot_be_written_do_not_stop_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path / "audit", new_signer())
    with writer_thread(tmp_path, log):
        client = AuditClient(tmp_path / "audit.sock")
        with monkeypatch.context() as patch:
            patch.setattr(AuditLog, "_replace", lambda *_args, **_options: _raise_eio(0))
            for number in range(600):
                await client.append(act(number))
        await client.aclose()
    assert acts(tmp_path) == list(range(600))
    assert Verifier(tmp_path / "audit").verify().published == 602


def test_a_folder_that_cannot_be_written_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("a file where the folder should be")
    with pytest.raises(AuditLogError, match="can't be written"):
        AuditLog(tmp_path / "audit", new_signer())


def test_a_key_that_is_missing_stops_the_writer_with_one_line(tmp_path: Path) -> None:
    process = start_writer(tmp_path, tmp_path / "audit.key", wait=False)
    assert process.wait(20) == 1
    lines = (tmp_path / "writer.log").read_text().splitlines()
    assert len(lines) == 1
    assert "audit.key" in json.loads(lines[0])["message"]


def test_a_sync_client_says_that_the_log_is_unavailable(tmp_path: Path) -> None:
    client = SyncAuditClient(tmp_path / "audit.sock")
    with pytest.raises(AuditUnavailableError):
        client.append(act(0))
