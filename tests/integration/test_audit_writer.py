"""A real writer process: clients, order, orphans, signals, disks that fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from server.audit.client import AuditClient, SyncAuditClient
from server.audit.entry import new_entry
from server.audit.journal import list_segments
from server.audit.tags import Event
from server.audit.tail import entries_from
from server.audit.verify import Verifier
from server.audit.writer_protocol import ACK, DURABLE, LENGTH
from server.errors import AuditUnavailableError
from tests.unit.audit.audit_kit import read_vkey, start_writer, wait_until, writer_process

if TYPE_CHECKING:
    from pathlib import Path


def act(number: int) -> dict[str, object]:
    return new_entry(Event.ACT_PERFORMED, number=number)


def accepted(request_id: str) -> dict[str, object]:
    return new_entry(Event.REQUEST_ACCEPTED, request_id=request_id)


def finished(request_id: str) -> dict[str, object]:
    return new_entry(Event.REQUEST_FINISHED, request_id=request_id, outcome="completed")


def read_log(state: Path) -> list[dict[str, object]]:
    return [json.loads(entry) for _, entry in entries_from(state / "audit", 0)]


async def test_many_appends_are_durable_in_order(tmp_path: Path) -> None:
    with writer_process(tmp_path):
        client = AuditClient(tmp_path / "audit.sock")
        indexes = await asyncio.gather(*(client.append(act(number)) for number in range(3_000)))
        assert indexes == list(range(1, 3_001))  # 0 is the writer's own start
        await client.aclose()
    report = Verifier(tmp_path / "audit", key=read_vkey(tmp_path)).verify()
    assert report.size == 3_002
    assert report.events == {"audit:log:started": 1, "admin:act:performed": 3_000, "audit:log:stopped": 1}
    numbers = [entry["number"] for entry in read_log(tmp_path) if "number" in entry]
    assert numbers == list(range(3_000))


def test_private_files_and_socket(tmp_path: Path) -> None:
    with writer_process(tmp_path):
        assert stat.S_IMODE((tmp_path / "audit.sock").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o700
    assert not (tmp_path / "audit.sock").exists()


async def test_clients_of_both_kinds_share_one_log(tmp_path: Path) -> None:
    with writer_process(tmp_path):
        sync, client = SyncAuditClient(tmp_path / "audit.sock"), AuditClient(tmp_path / "audit.sock")
        assert [sync.append(act(0)), await client.append(act(1)), sync.append(act(2))] == [1, 2, 3]
        sync.close()
        await client.aclose()


async def test_a_request_is_closed_once_and_only_if_it_is_open(tmp_path: Path) -> None:
    with writer_process(tmp_path):
        client = AuditClient(tmp_path / "audit.sock")
        await client.append(accepted("r1"))
        with pytest.raises(AuditUnavailableError, match="refused"):
            await client.append(accepted("r1"))
        await client.append(finished("r1"))
        for request_id in ("r1", "never"):
            with pytest.raises(AuditUnavailableError, match="not open"):
                await client.append(finished(request_id))
        mixed = await asyncio.gather(
            client.append(accepted("r2")),
            client.append(finished("r3")),
            client.append(finished("r2")),
            return_exceptions=True,
        )
        assert [type(result) for result in mixed] == [int, AuditUnavailableError, int]
        await client.aclose()
    report = Verifier(tmp_path / "audit").verify()
    assert (report.num_accepted, report.num_finished, report.num_unknown) == (2, 2, 0)


async def test_requests_of_a_client_that_dies_are_closed_as_unknown(tmp_path: Path) -> None:
    with writer_process(tmp_path):
        client, other = AuditClient(tmp_path / "audit.sock"), AuditClient(tmp_path / "audit.sock")
        await client.append(accepted("mine"))
        await other.append(accepted("other"))
        await client.aclose()
        wait = asyncio.to_thread(wait_until, lambda: len(read_log(tmp_path)) == 4)
        await wait
        assert {"request_id": "mine", "outcome": "unknown"}.items() <= read_log(tmp_path)[-1].items()
        await other.append(finished("other"))
        await other.aclose()


async def test_a_killed_writer_closes_orphans_when_it_comes_back(tmp_path: Path) -> None:
    with writer_process(tmp_path, "--segment-bytes", "4000") as process:
        client = AuditClient(tmp_path / "audit.sock")
        await client.append(accepted("lost"))
        number = 0  # several segments later, whatever a busy disk makes of that, it is still known to be open
        while len(list_segments(tmp_path / "audit")) < 4:
            await client.append(act(number := number + 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(AuditUnavailableError):
            await client.append(act(99))
    second = start_writer(tmp_path, tmp_path / "audit.key")
    with pytest.raises(AuditUnavailableError, match="not open"):  # too late: the log has said that it is unknown
        await client.append(finished("lost"))
    await client.append(act(100))
    second.terminate()
    assert second.wait(20) == 0
    entries = read_log(tmp_path)
    closing = [entry for entry in entries if entry.get("request_id") == "lost"][-1]
    assert closing["outcome"] == "unknown"
    report = Verifier(tmp_path / "audit", key=read_vkey(tmp_path)).verify()
    assert (report.num_open, report.num_unknown) == (0, 1)
    assert report.events["audit:segment:opened"] > 2


def test_a_second_writer_leaves_the_first_alone(tmp_path: Path) -> None:
    with writer_process(tmp_path):
        second = start_writer(tmp_path, tmp_path / "audit.key", wait=False)
        assert second.wait(20) == 1
        assert "Another writer" in (tmp_path / "writer.log").read_text()
        client = SyncAuditClient(tmp_path / "audit.sock")
        assert client.append(act(1)) == 1
        client.close()


def test_hostile_frames_cost_only_their_sender(tmp_path: Path) -> None:
    frames = [
        struct.pack(">I", 1 << 30),
        struct.pack(">I", 5) + b"\x00\x09{}x",
        struct.pack(">I", 3) + b"\x00\x00\x00",
    ]
    with writer_process(tmp_path):
        good = SyncAuditClient(tmp_path / "audit.sock")
        for frame in frames:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(tmp_path / "audit.sock"))
                sock.settimeout(10)
                sock.sendall(frame)
                assert sock.recv(100) == b""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "audit.sock"))
            entries = [b'{"a":1}', b"not an object", b'{"a":\n1}', b'{"b":2}']
            packed = b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)
            sock.sendall(struct.pack(">I", len(packed)) + packed)
            answers = b""
            while len(answers) < 4 * 13:
                answers += sock.recv(100)
        assert [struct.unpack(">BQI", answers[at : at + 13])[0] for at in range(0, 52, 13)] == [0, 2, 2, 0]
        assert good.append(act(1)) == 3
        good.close()


def test_heartbeats_when_nothing_happens(tmp_path: Path) -> None:
    with writer_process(tmp_path, "--heartbeat-s", "0.1"):
        wait_until(lambda: sum(entry["event"] == "audit:log:heartbeat" for entry in read_log(tmp_path)) >= 3)


def test_tail_is_published_soon_without_further_appends(tmp_path: Path) -> None:
    with writer_process(tmp_path, "--publish-interval-s", "0.05"):
        client = SyncAuditClient(tmp_path / "audit.sock")
        index = client.append(act(1))
        wait_until(lambda: Verifier(tmp_path / "audit").verify().published == index + 1, deadline_s=5)
        client.close()


async def test_nothing_is_answered_while_there_is_no_writer(tmp_path: Path) -> None:
    client = AuditClient(tmp_path / "audit.sock")
    started = asyncio.get_running_loop().time()
    with pytest.raises(AuditUnavailableError):
        await client.append(act(1))
    assert not await client.is_available()
    assert asyncio.get_running_loop().time() - started < 2.0


async def test_a_writer_that_hangs_is_unavailable_in_bounded_time(tmp_path: Path) -> None:
    with writer_process(tmp_path) as process:
        client = AuditClient(tmp_path / "audit.sock", answer_s=1.0)
        await client.append(act(1))
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(AuditUnavailableError, match="in time"):
            await client.append(act(2))
        started = asyncio.get_running_loop().time()
        with pytest.raises(AuditUnavailableError, match="no answer"):
            await client.append(act(3))
        assert asyncio.get_running_loop().time() - started < 0.9  # the next ones hear it at once
        os.kill(process.pid, signal.SIGCONT)
        index = None
        while index is None:
            with suppress(AuditUnavailableError):
                index = await client.append(act(4))
            await asyncio.sleep(0.02)
        assert index == 3  # the entry nobody waited for is in the log, and answers still match
        await client.aclose()


async def test_a_slow_disk_is_waited_for_asleep(tmp_path: Path) -> None:
    """The client keeps its loop awake for an answer that comes at once, never for one that takes milliseconds."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            for index in range(600):
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                await reader.readexactly(length)
                if index < 3:  # slow: many times what the client looks for
                    await asyncio.sleep(0.2)
                writer.write(ACK.pack(DURABLE, index, 1))
        writer.close()

    server = await asyncio.start_unix_server(answer, tmp_path / "audit.sock")
    client = AuditClient(tmp_path / "audit.sock")
    await client.append(act(0))
    loop, original = asyncio.get_running_loop(), asyncio.get_running_loop().call_soon
    num_polls = 0

    def counting(callback: Any, *arguments: Any, **named: Any) -> asyncio.Handle:
        nonlocal num_polls
        num_polls += getattr(callback, "__name__", "") == "_poll"
        return original(callback, *arguments, **named)

    loop.call_soon = counting  # type: ignore[method-assign, assignment]
    try:
        assert [await client.append(act(1)), await client.append(act(2))] == [1, 2]
        assert num_polls == 0  # the first answer was slow, so nobody looks for the next ones
        for index in range(3, 600):
            assert await client.append(act(index)) == index
        assert num_polls > 0  # after a while it is tried again
    finally:
        loop.call_soon = original  # type: ignore[method-assign]
    await client.aclose()
    server.close()
    await server.wait_closed()


async def test_a_live_log_verifies_while_it_is_written(tmp_path: Path) -> None:
    with writer_process(tmp_path, "--segment-bytes", "150000", "--publish-interval-s", "0.01"):
        client = AuditClient(tmp_path / "audit.sock")
        is_done = asyncio.Event()

        async def load(name: str) -> None:
            number = 0
            while not is_done.is_set():
                number += 1
                await client.append(accepted(f"{name}-{number}"))
                await client.append(finished(f"{name}-{number}"))

        tasks = [asyncio.create_task(load(f"r{at}")) for at in range(4)]
        sizes = []
        for _ in range(12):
            report = await asyncio.to_thread(Verifier(tmp_path / "audit", key=read_vkey(tmp_path)).verify)
            sizes.append(report.size)
        is_done.set()
        await asyncio.gather(*tasks)
        await client.aclose()
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]


def test_a_writer_stopped_as_soon_as_it_listens_stops_cleanly(tmp_path: Path) -> None:
    with writer_process(tmp_path):
        pass
    for _ in range(5):
        process = start_writer(tmp_path, tmp_path / "audit.key")
        process.terminate()
        assert process.wait(20) == 0
    assert Verifier(tmp_path / "audit").verify().events["audit:log:stopped"] == 6
